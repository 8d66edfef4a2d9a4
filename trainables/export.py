"""A trial's trained weights as what transformers and PEFT load: a whole model, or an adapter beside its base.

A bottleneck is neither: it goes with the file that loads it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, GenerationConfig

from spaces.config import Adapter, Layout, Precision, TrialConfig
from trainables import bottleneck
from trainables.checkpoint import read_checkpoint
from trainables.data import TaskData
from trainables.evaluation import evaluate, score_completions
from trainables.loop import memory_errors
from trainables.mesh import World
from trainables.model import BaseModel, build, quietly, trainable
from trainables.quantize import is_head, pack_linears, spread_out
from trainables.report import OutOfMemory
from trainables.settings import restore
from trainables.text_part import put_back
from trainables.tokenization import load_tokenizer
from trainables.whole import load_weights

# isort: split
# After `trainables.quantize`, which tells the logger of bitsandbytes: PEFT imports that.
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Settings of generation that name tokens.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What no change of weights is, and why not.
UNMERGED: dict[Adapter, str] = {
    "bottleneck": "no weights stand for a bottleneck, which is not linear: leave --merge out",
    "prefix": "no weights stand for a prefix, which is keys and values of its own: leave --merge out",
}
# Nothing is split or sharded in a file.
ONE_RANK = {"world_size": 1, "strategy": "ddp", "shard_size": None, "tp_size": None, "offload": "none", "recomputation": "none"}


def trained_module(config: TrialConfig, base: BaseModel, weights: Path) -> Any:
    """Return a trial's model on the CPU, in fp32: transformers' own, with PEFT's around it where the trial had an adapter.

    An adapter stands on the base as it is, even where the trial had that quantised.

    Raises:
        ValueError: the weights are damaged.
    """
    module = build(_plain(config), base, World.alone())
    load_weights(trainable(module), read_checkpoint(weights).weights)
    return module


def merged_module(config: TrialConfig, base: BaseModel, weights: Path) -> Any:
    """Return a trial's model with its adapter in the weights, on the CPU, in fp32.

    Where the trial had the base quantised, the adapter learned beside weights that are a little off: it is added to those.

    Raises:
        ValueError: the weights are damaged, or the adapter cannot be merged.
    """
    if config.recipe.adapter in UNMERGED:
        raise ValueError(UNMERGED[config.recipe.adapter])
    adapted = trained_module(config, _spread_base(config, base), weights)
    head = adapted.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) and head.get_base_layer().weight is adapted.get_input_embeddings().weight:
        raise ValueError("its adapter is on the output embedding, whose weights are the input embedding's too: leave --merge out")
    for name, part in list(adapted.named_modules()):
        if isinstance(part, ModulesToSaveWrapper):  # PEFT 0.21 takes each for a layer with a weight, which some heads are not
            adapted.set_submodule(name, part.modules_to_save["default"])
    return adapted.merge_and_unload()


def whole_module(config: TrialConfig, base: BaseModel, weights: Path) -> Any:
    """Return a trial's model as it computes, on the CPU in the trial's number format: an adapter merged, where it can be.

    Raises:
        ValueError: as `merged_module`.
    """
    if config.recipe.adapter == "none":
        module = trained_module(config, base, weights)
    elif config.recipe.adapter in UNMERGED:
        module = trained_module(config, _spread_base(config, base), weights)
    else:
        module = merged_module(config, base, weights)
    return in_format(module, config.recipe.precision)


def in_format(module: Any, precision: Precision) -> Any:
    """Return a model on the CPU with its weights, and no tables of positions, in the number format that a trial computes in."""
    for parameter in module.to("cpu").parameters():
        parameter.data = parameter.data.to(DTYPES[precision])
    return module


def _spread_base(config: TrialConfig, base: BaseModel) -> BaseModel:
    """Return a base of its own, as merging changes weights that all trials share, with what quantised weights stand for."""
    own = replace(base, module=base.copy(), _held={}, _packed={})
    recipe = config.recipe
    packed = pack_linears(base.module, recipe.quantization, DTYPES[recipe.precision], torch.device("cpu"), base.new_parameters)
    spread_out(own.module, packed)
    return own


def as_saved(module: Any, config: TrialConfig) -> Any:
    """Return a whole model in the number format that the trial computed in; an adapter as it is."""
    is_adapter = isinstance(module, PeftModel) or config.recipe.adapter == "bottleneck"
    return module if is_adapter else in_format(module, config.recipe.precision)


def unquantized(module: Any) -> list[str]:
    """Return the names of the modules that stay as they are beside an adapter on a quantised base."""
    heads = {name.removeprefix("base_model.model.") for name, _ in module.named_modules() if is_head(name)}
    kept = {name.partition(".modules_to_save")[0].removesuffix(".original_module") for name in heads}
    if isinstance(module, PeftModel):
        settings: Any = module.peft_config["default"]
        saved = set(settings.modules_to_save or ())
    else:
        saved = {name.rpartition(".")[0] for name in trainable(module)} - set(bottleneck.parts(module))
    return sorted({name for name in kept if "." not in name} | saved)


def scores(module: nn.Module, config: TrialConfig, data: TaskData, base: BaseModel, exact_match_rows: int) -> dict[str, float]:
    """Return a model's metrics on the evaluation rows, on a GPU where there is one that has the memory."""

    def on(device: str) -> dict[str, float]:
        world = replace(World.alone(), device=torch.device(device))
        module.to(world.device)
        completed = score_completions(module, config, data, data.evaluation, world, base, exact_match_rows)
        return evaluate(module, config, data, data.evaluation, world, is_final=False) | completed

    config = replace(config, layout=_one_rank(config))
    if torch.cuda.is_available():
        with suppress(OutOfMemory), memory_errors():
            return on("cuda")
    return on("cpu")


def save(
    module: Any,
    base: BaseModel,
    config: TrialConfig,
    directory: Path,
    *,
    end_token_ids: Sequence[int] = (),
    chat_template: str | None = None,
    origin: str | None = None,
) -> None:
    """Write safetensors, configuration and tokenizer: an adapter in fp32, a whole model in what the trial computed in.

    Args:
        module: as `trained_module` or `merged_module` gives it.
        base: what it was trained from.
        config: of the trial.
        directory: is made if there is none.
        end_token_ids: behind which an answer is over, beside those that the base's own generation ends with.
        chat_template: that chats were rendered in; by default the tokenizer's own.
        origin: the base's name on the hub, which an adapter's files give; by default where it was loaded from.
    """
    is_adapter = isinstance(module, PeftModel)
    module = for_use(as_saved(module.to("cpu"), config), base)
    if is_adapter:
        settings = module.peft_config["default"]
        settings.base_model_name_or_path, settings.revision = origin or base.name, base.revision
    if base.task == "causal-lm":
        whole = module.get_base_model() if is_adapter else module
        whole.generation_config = _ending(whole.generation_config, end_token_ids)
    module.config.dtype = DTYPES[config.recipe.precision]  # by which the base is loaded beside an adapter
    if config.recipe.adapter == "bottleneck":
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in trainable(module).items()}, directory / bottleneck.WEIGHTS)
        shutil.copy(bottleneck.__file__, directory)
    else:
        # PEFT would ask the hub whether embeddings were trained too.
        options = {"save_embedding_layers": False} if is_adapter else {}
        with quietly():
            module.save_pretrained(directory, **options)
    # Beside an adapter; a whole model has written the same.
    module.config.save_pretrained(directory)
    if base.task == "causal-lm":
        module.generation_config.save_pretrained(directory)
    tokenizer = load_tokenizer(base.name, base.revision)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(directory)


def _ending(settings: GenerationConfig, end_token_ids: Sequence[int]) -> GenerationConfig:
    """Return settings of generation that end with these tokens too."""
    known = settings.eos_token_id
    own = [] if known is None else [known] if isinstance(known, int) else known
    missing = [token for token in end_token_ids if token not in own]
    if not missing:
        return settings
    settings.eos_token_id = [*own, *missing] if own or len(missing) > 1 else missing[0]
    try:
        settings.validate(strict=True)
    except ValueError:
        # Some published settings have what does nothing without sampling, and do not sample: that is read, and not written.
        return GenerationConfig(**{name: getattr(settings, name) for name in TOKENS})
    return settings


def for_use(module: Any, base: BaseModel) -> Any:
    """Give a model back what it was trained without, settings and parts that no text goes through, and return it."""
    restore(module.config, AutoConfig.from_pretrained(base.name, revision=base.revision))
    put_back(module, base.unread)
    return module


def _plain(config: TrialConfig) -> TrialConfig:
    return replace(config, recipe=replace(config.recipe, quantization="none", precision="fp32"), layout=_one_rank(config))


def _one_rank(config: TrialConfig) -> Layout:
    return replace(config.layout, **ONE_RANK)  # type: ignore[arg-type]
