"""The pretrained model: loaded once per process; a trial copies what it trains and shares what stays frozen."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import Mxfp4Config

from spaces.architecture import ModelShape
from spaces.config import Quantization, TrialConfig
from trainables.adapters import add_adapter
from trainables.compilation import Compilation
from trainables.first_tokens import end_at_first_tokens
from trainables.hub import ModelError, class_for, is_masked, is_mxfp4
from trainables.mesh import World
from trainables.meter import StepTimer
from trainables.packed import attend_by_rows, attend_in_one_kernel
from trainables.parallelize import own_in_fp32, parallelize
from trainables.quantize import Packed, is_head, pack_linears, quantize
from trainables.report import TrialError
from trainables.settings import switch_off
from trainables.text_part import take_out
from trainables.trained_rows import train_used_rows

# What safetensors calls the formats in which weights are kept as they are stored.
HALF_FORMATS = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseModel:
    """A pretrained model on the CPU, in the number format of its files.

    As they are stored, weights are pages of the file, which all workers of a machine share: an 8B model in bf16 takes 16 GB of a host
    with eight GPUs, where in fp32 it would take 256.
    """

    name: str
    revision: str | None
    task: str
    module: nn.Module
    """Without what no text goes through: see `unread`."""
    new_parameters: tuple[str, ...]
    """Names of the parameters that the pretrained weights lack, such as a classification head's."""
    shape: ModelShape
    unread: Mapping[str, nn.Module] = field(default_factory=dict)
    """What pictures and sound go through, by the names of the modules."""
    _held: dict[tuple[torch.dtype, torch.device], dict[int, torch.Tensor]] = field(default_factory=dict)
    """Weights that trials leave frozen, where and as they compute, by the address of the base's own."""
    _packed: dict[tuple[Quantization, torch.dtype, torch.device], dict[str, Packed]] = field(default_factory=dict)
    """Quantised weights, by the module's name."""

    @staticmethod
    @cache
    def load(name: str, revision: str | None, task: str, label_names: tuple[str, ...], pad_token_id: int | None = None) -> BaseModel:
        """Load from a local directory or the hub, once per process.

        Args:
            name: of the model.
            revision: on the hub.
            task: what it shall do.
            label_names: of the classes.
            pad_token_id: what rows are padded with, before which a decoder that classifies looks for the last token; None: its own.
        """
        config = AutoConfig.from_pretrained(name, revision=revision)
        architectures = config.architectures or []
        switch_off(config)
        given: list[str] = []
        if task == "sequence-classification":
            given = [str(config.id2label[i]) for i in sorted(config.id2label)]
            config.num_labels = len(label_names)
            config.id2label = dict(enumerate(label_names))
            config.label2id = {label: i for i, label in enumerate(label_names)}
            config.problem_type = "single_label_classification"
            if pad_token_id is not None and not is_masked(config.model_type):
                config.pad_token_id = pad_token_id
        stored, kind = _stored_format(name, revision), _class_for(config, task)
        with quietly():
            module, info = kind.from_pretrained(
                name,
                revision=revision,
                config=config,
                dtype=stored,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                # Of gpt-oss there are no other files; on GPUs it would train nothing that is packed.
                **({"quantization_config": Mxfp4Config(dequantize=True)} if is_mxfp4(config.to_dict()) else {}),
            )
        unread = take_out(module)
        new = {*info["missing_keys"], *(key[0] for key in info.get("mismatched_keys", ()))}
        if task == "sequence-classification":
            new |= _order_classes(module, given, label_names, new)
        if stored != torch.float32:
            _compute_in_fp32(module, kind, new)
        attend_by_rows(module)
        return BaseModel(
            name=name,
            revision=revision,
            task=task,
            module=module,
            unread=unread,
            new_parameters=tuple(sorted(new & dict(module.named_parameters()).keys())),
            shape=ModelShape.from_config({**config.to_dict(), "architectures": [*architectures, type(module).__name__]}),
        )

    def share(self, *, is_frozen: bool) -> nn.Module:
        """Return a model whose pretrained weights are the base's own and must not change: `parallelize` gives what trains others."""
        if not is_frozen:
            self._held.clear()  # memory that this trial may need
            self._packed.clear()
        # What deepcopy finds in its memo, it takes instead of a copy.
        memo = {}
        for name, weights in self.module.named_parameters():
            is_new = name in self.new_parameters
            shared = weights.detach().clone() if is_new else weights.detach()
            if not is_frozen and not weights.requires_grad:  # a table that no trial trains
                shared = shared.float()
            memo[id(weights)] = nn.Parameter(shared, requires_grad=weights.requires_grad and (is_new or not is_frozen))
        return copy.deepcopy(self.module, memo)

    def copy(self) -> nn.Module:
        """Return a model in fp32 that shares nothing."""
        module = self.share(is_frozen=False)
        own_in_fp32(module, torch.device("cpu"))
        return module

    def quantize(self, module: nn.Module, method: Quantization, dtype: torch.dtype, device: torch.device) -> None:
        """Quantise the linear layers of a frozen copy, once for all trials; one method on one device is kept at a time.

        Raises:
            TrialError: it has none.
        """
        if (method, dtype, device) not in self._packed:
            self._held.clear()
            self._packed.clear()
            self._packed[method, dtype, device] = pack_linears(self.module, method, dtype, device, self.new_parameters)
        if method != "none" and not self._packed[method, dtype, device]:
            raise TrialError(f"space.quantization: {method} packs linear layers of torch's own, of which this model has none")
        quantize(module, self._packed[method, dtype, device], dtype)

    def hold_frozen(self, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        """Put what does not train where it computes, once for all trials; one number format on one device is kept at a time."""
        if (dtype, device) not in self._held:
            self._held.clear()
            frozen = {p.data_ptr() for p in module.parameters() if not p.requires_grad}
            # Without what is quantised.
            own = {p.data_ptr(): p.detach() for p in self.module.parameters() if p.data_ptr() in frozen}
            self._held[dtype, device] = {pointer: weights.to(device, dtype) for pointer, weights in own.items()}
        held = self._held[dtype, device]
        for parameter in module.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = held[parameter.data_ptr()] if parameter.data_ptr() in held else parameter.data.to(device, dtype)


@contextmanager
def quietly() -> Iterator[None]:
    """Have transformers draw no progress, and not advise to train the head that is about to be trained."""
    verbosity, had_progress = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_progress:
            transformers_logging.enable_progress_bar()


def build(
    config: TrialConfig,
    base: BaseModel,
    world: World,
    timer: StepTimer | None = None,
    compilation: Compilation | None = None,
    used_tokens: np.ndarray | None = None,
) -> nn.Module:
    """Return the model that a trial trains: the base with the trial's adapter, parallelised over its ranks.

    Args:
        timer: see `parallelize`.
        compilation: see `parallelize`.
        used_tokens: see `train_used_rows`; None: the whole embedding trains.

    Raises:
        TrialError: the adapter does not fit the model.
    """
    recipe = config.recipe
    # What is sharded or split moves piece by piece: a whole model may not fit the device.
    is_whole = not config.layout.is_sharded and config.layout.tensor_parallel_size == 1
    device = world.device if is_whole else torch.device("cpu")
    # Products of a bf16 recipe are in bf16 anyway, and an fp32 copy beside would be most of the memory.
    frozen = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    module = base.share(is_frozen=recipe.adapter != "none")
    attend_in_one_kernel(module, recipe, world.device, base.shape.head_dim)
    if base.task == "sequence-classification":
        end_at_first_tokens(module)
    if recipe.adapter != "none":
        base.quantize(module, recipe.quantization, frozen, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        _initialise(module, base.new_parameters)
        if recipe.adapter != "none":
            module = add_adapter(module, recipe, base.task, base.new_parameters)
            base.hold_frozen(module, frozen, device)
    if used_tokens is not None:
        train_used_rows(module, config, used_tokens)
    return parallelize(module, config, world, timer, compilation)


def unwrapped(module: nn.Module) -> Any:
    """Return the model inside DDP; FSDP2 shards in place."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by their names without wrappers."""
    return {name: p for name, p in unwrapped(module).named_parameters() if p.requires_grad}


def _order_classes(module: nn.Module, given: Sequence[str], label_names: Sequence[str], new: Collection[str]) -> set[str]:
    """Put the classes of a head that is there in the data's order; return its parameters' names where its classes are others.

    Args:
        module: the model; changed in place.
        given: the classes that it was trained for; `LABEL_0` and so on say nothing.
        label_names: those of the data.
        new: parameters that the pretrained weights lack.
    """
    own, wanted = ([name.casefold() for name in names] for names in (given, label_names))
    is_unnamed = sorted(own) != sorted(wanted) and all(name.startswith("label_") for name in own)
    if own == wanted or is_unnamed:
        return set()
    # Of a head with several layers the last one's alone have a row for each class.
    last = {n: p for n, p in module.named_parameters() if n not in new and is_head(n.rpartition(".")[0]) and len(p) == len(wanted)}
    if sorted(own) != sorted(wanted):
        return set(last)
    order = torch.tensor([own.index(name) for name in wanted])
    for parameter in last.values():
        parameter.data = parameter.data[order]
    return set()


def _class_for(config: Any, task: str) -> Any:
    """Return the class by which transformers loads a model for a task.

    Raises:
        ModelError: it has none.
    """
    name = class_for(config.to_dict(), task)
    if name is None:
        raise ModelError(f"model.task: transformers has no {task} of {config.model_type}")
    return getattr(transformers, name)


def _stored_format(name: str, revision: str | None) -> torch.dtype:
    """Return the half format that all weights of a model are stored in; fp32 where they are not, or are in no safetensors."""
    formats = set()
    for path in _weight_files(name, revision):
        with safe_open(path, framework="pt") as file:
            formats |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118  # no mapping
    floats = {given for given in formats if "F" in given}
    return HALF_FORMATS.get(floats.pop(), torch.float32) if len(floats) == 1 else torch.float32


def _weight_files(name: str, revision: str | None) -> list[str]:
    def find(file: str) -> str | None:
        found: str | None = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        return found

    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    else:
        names = [SAFE_WEIGHTS_NAME]
    return [path for path in map(find, names) if path is not None]


def _compute_in_fp32(module: Any, kind: Any, new_parameters: set[str]) -> None:
    """Give a model in a half format what one that is loaded in fp32 has beside the weights: tables, new parameters, configuration."""
    module.config.dtype = torch.float32
    with init_empty_weights(include_buffers=False):
        tables = dict(kind.from_config(module.config, dtype=torch.float32).named_buffers())
    learned = module.state_dict().keys()
    for name, table in module.named_buffers():
        if table.is_floating_point():
            table.data = table.float() if name in learned else tables[name].to(torch.float32)
    for name, parameter in module.named_parameters():
        if name in new_parameters:
            parameter.data = parameter.data.float()


def _initialise(module: nn.Module, names: tuple[str, ...]) -> None:
    """Draw new parameters: from_pretrained drew them once per process, but they belong to the trial's seed."""
    std = getattr(module.config, "initializer_range", 0.02)
    parameters = dict(module.named_parameters())
    for name in names:
        if parameters[name].dim() > 1:
            nn.init.normal_(parameters[name], std=std)
        else:
            nn.init.constant_(parameters[name], 0.0 if name.endswith("bias") else 1.0)
