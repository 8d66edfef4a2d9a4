"""Adapters: through PEFT, and bottlenecks, which it has not."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spaces.config import IA3_RESULTS, LAST_PRODUCTS, Recipe
from trainables.bottleneck import Bottleneck
from trainables.low_rank import adapted_product
from trainables.prefix import add_prefix
from trainables.quantize import is_head
from trainables.report import TrialError
from trainables.rotation import rotate

# isort: split
# After `trainables.quantize`, which tells the logger of bitsandbytes: PEFT imports that.
from peft import IA3Config, LoraConfig, OFTConfig, TaskType, VeraConfig, get_peft_model
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.layer import LoraVariant, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.oft import OFTLayer
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight

# PEFT asks for it by the name that it had before transformers 5.24.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

TASK_TYPES = {"sequence-classification": TaskType.SEQ_CLS, "causal-lm": TaskType.CAUSAL_LM}


@contextmanager
def _drawn_in_fp32() -> Iterator[None]:
    """Have PEFT leave what it draws in fp32: it rounds that to the base's number format first, DoRA's norms of the base too."""
    with ExitStack() as stack:
        for kind in (BaseTunerLayer, ParamWrapper):
            stack.enter_context(patch.object(kind, "_move_adapter_to_device_of_base_layer", lambda *_, **__: None))
        yield


@_drawn_in_fp32()
def add_adapter(module: nn.Module, recipe: Recipe, task: str, new_parameters: tuple[str, ...]) -> nn.Module:
    """Freeze the model and add a trainable adapter, which is on the CPU.

    What the pretrained weights lack is trained whole: a small update of random weights would leave them random.

    Args:
        module: the model; changed in place.
        recipe: adapter, rank, alpha and target modules.
        task: the model's task.
        new_parameters: names of the parameters that were drawn anew.

    Raises:
        TrialError: a target module does not exist in the model.
    """
    new = {name.rpartition(".")[0] for name in new_parameters}
    routers = {name for name, part in module.named_modules() if isinstance(part, nn.Linear) and "Router" in type(part).__name__}
    heads = {name for name, _ in module.named_modules() if is_head(name)}
    if recipe.adapter == "bottleneck":
        return _add_bottlenecks(module, recipe.adapter_rank or 0, heads | new)
    if recipe.adapter == "prefix":
        if task != "causal-lm" or new:
            raise TrialError("space.adapter: prefix trains keys and values alone: of language models, and with all weights there")
        return add_prefix(module, recipe.adapter_rank or 0)
    saved: Any = {"task_type": TASK_TYPES[task], "modules_to_save": sorted(new - heads) or None}
    if recipe.adapter == "ia3":
        return _add_ia3(module, saved)
    targets = recipe.adapter_target_modules or ()
    _check_targets(module, targets)
    if recipe.adapter == "vera":
        names = _linear_names(module, targets, new | heads | routers)
        config = VeraConfig(r=recipe.adapter_rank or 0, target_modules=names, projection_prng_key=recipe.seed, **saved)
        return get_peft_model(module, config)
    if recipe.adapter == "oft":
        return _add_rotations(module, recipe.adapter_rank or 0, _linear_names(module, targets, new | heads | routers), saved)
    return _add_lora(module, recipe, new | heads | routers, saved)


def _add_ia3(module: Any, saved: dict[str, Any]) -> nn.Module:
    inputs, results = (_one_of(names) for names in (LAST_PRODUCTS, IA3_RESULTS))
    config = IA3Config(target_modules=f"{inputs}|{results}", feedforward_modules=inputs, **saved)
    try:
        return get_peft_model(module, config)
    except ValueError as error:
        known = ", ".join((*IA3_RESULTS, *LAST_PRODUCTS))
        raise TrialError(f"space.adapter: ia3 scales layers of these names, of which this model has none: {known}") from error


def _add_rotations(module: Any, size: int, names: list[str], saved: dict[str, Any]) -> nn.Module:
    part: Any
    rotated = get_peft_model(module, OFTConfig(oft_block_size=size, target_modules=names, **saved))
    for part in rotated.modules():
        if isinstance(part, OFTLayer):
            part.oft_R["default"].__class__ = _Rotation
            part.cast_input_dtype_enabled = False
    return rotated


def _add_lora(module: Any, recipe: Recipe, excluded: set[str], saved: dict[str, Any]) -> nn.Module:
    part: Any
    targets = recipe.adapter_target_modules or ()
    # Dropout would make the loss curve depend on the layout.
    config = LoraConfig(
        r=recipe.adapter_rank or 0,
        lora_alpha=recipe.adapter_alpha or 0.0,  # type: ignore[arg-type]  # PEFT takes a float too
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        exclude_modules=sorted(excluded) or None,
        lora_dropout=0.0,
        use_rslora=recipe.adapter == "rslora",
        use_dora=recipe.adapter == "dora",
        **saved,
    )
    try:
        adapted = get_peft_model(module, config)
    except ValueError as error:
        raise TrialError(f"space.adapter: {recipe.adapter}: {str(error).splitlines()[0]}") from error
    for part in adapted.modules():
        if _is_around_a_linear_layer(part):
            part.lora_variant["default"] = _LeanDora() if recipe.adapter == "dora" else _Lean()
            part.cast_input_dtype_enabled = False
            if recipe.adapter != "dora" and type(part) is Linear and type(part.get_base_layer()) is nn.Linear:
                part.__class__ = LeanLinear
    return adapted


def _add_bottlenecks(module: Any, size: int, whole: set[str]) -> nn.Module:
    """Freeze the model, put a bottleneck behind the last product of each block, and train it and copies of what trains whole."""
    module.requires_grad_(False)
    last = re.compile(_one_of(LAST_PRODUCTS))
    layers = {name: part for name, part in module.named_modules() if last.fullmatch(name) and isinstance(part, nn.Linear | Conv1D)}
    # A mixture of experts may have some such layers beside the stacked ones.
    if not layers or any("expert" in name for name in layers):
        known = ", ".join(LAST_PRODUCTS)
        raise TrialError(f"space.adapter: bottlenecks are behind one layer a block of these names, which this model has not: {known}")
    for name, layer in layers.items():
        width = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        module.set_submodule(name, Bottleneck(layer, width, size))
    # What is in another one that trains whole is copied with it.
    for name in (name for name in whole if not any(name.startswith(f"{other}.") for other in whole)):
        part = copy.deepcopy(module.get_submodule(name))
        module.set_submodule(name, part.requires_grad_(True))
    return module


def _is_around_a_linear_layer(part: Any) -> bool:
    """Return whether a module is LoRA's around one; around stacked experts PEFT computes otherwise."""
    return isinstance(part, LoraLayer) and isinstance(part.get_base_layer(), nn.Linear | Conv1D)


class LeanLinear(Linear):
    """PEFT's LoRA around an `nn.Linear`, computed as one operation; compiled, the compiler sees to it."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's result with what its adapter adds: (..., outputs)."""
        base: Any = self.get_base_layer()
        name = self.active_adapters[0]
        first: Any = self.lora_A[name]
        second: Any = self.lora_B[name]
        is_plain = not (self.disable_adapters or self.merged or torch.compiler.is_compiling() or base.weight.requires_grad)
        # A base may have a forward pass of its own, as tensor parallelism gives it.
        is_plain = is_plain and "forward" not in vars(base)
        if not is_plain or (base.weight.dtype != first.weight.dtype and not torch.is_autocast_enabled(x.device.type)):
            result: torch.Tensor = super().forward(x, *args, **kwargs)
            return result
        return adapted_product(x, base.weight, base.bias, first.weight, second.weight, self.scaling[name])


class _Lean(LoraVariant):
    """LoRA with less beside its two products, around all other layers: quantised ones, GPT-2's, and compiled ones.

    It is scaled between its factors, where a token is as wide as the rank: PEFT scales the result, forward and backward. Under
    autocast it takes its input as it is, which other layers then share: PEFT casts a copy to fp32, which autocast casts back.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        first, second = module.lora_A[active_adapter], module.lora_B[active_adapter]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(first.weight.dtype)
        return result + second(first(x) * module.scaling[active_adapter])

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class _LeanDora(DoraLinearVariant):
    """DoRA that scales its sum once: PEFT scales both results, adds them up, and sends the identity through the factors."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        dora, base = module.lora_magnitude_vector[active_adapter], module.get_base_layer()
        first, second = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        with torch.no_grad():  # the norms are constants of the gradient: section 4.3 of the paper
            weight = dequantize_module_weight(base).to(first.dtype)
            norms = dora.get_weight_norm(weight, (second @ first).to(first.dtype), module.scaling[active_adapter])
        scale = dora.weight / norms
        scaled = _Lean.forward(module, active_adapter, x, result) * scale
        summed = scaled if base.bias is None else scaled + base.bias * (1 - scale)
        # Over a quantised base PEFT leaves what it gets as it is under CUDA's autocast, and the next block would go on in fp32.
        return summed.to(result.dtype)


class _Rotation(OFTRotationModule):
    """PEFT's rotation, with its matrices computed in fp32 and its input taken as it is: PEFT casts that to fp32 first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rotated input (..., features)."""
        with torch.autocast(x.device.type, enabled=False):
            skew = self.weight.float()
            rotations = self._cayley_batch(skew, self.block_size, self.use_cayley_neumann, self.num_cayley_neumann_terms)
        return rotate(x, rotations.to(x.dtype))


def _linear_names(module: Any, targets: tuple[str, ...], excluded: set[str]) -> list[str]:
    """Return the full names of the linear layers that are meant; of `all-linear` the output embedding is none."""
    is_all = targets == ("all-linear",)
    kept = module.get_output_embeddings() if is_all else None
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D) and part is not kept]
    return [name for name in names if name not in excluded and (is_all or any(_is_meant(name, t) for t in targets))]


def _is_meant(name: str, target: str) -> bool:
    """Return whether a target is a module's full name or ends it after a dot: PEFT's rule."""
    return name == target or name.endswith(f".{target}")


def _one_of(names: Sequence[str]) -> str:
    """Return a regular expression of the full names that end in one of these, with any number where a name has `*`."""
    return rf"(?:.*\.(?:{'|'.join(re.escape(name).replace(chr(92) + '*', '[0-9]+') for name in names)}))"


def _check_targets(module: nn.Module, targets: tuple[str, ...]) -> None:
    if targets == ("all-linear",):
        return
    known = sorted({name.rsplit(".", 1)[-1] for name, part in module.named_modules() if isinstance(part, nn.Linear)})
    for target in targets:
        if not any(_is_meant(name, target) for name, _ in module.named_modules()):
            close = difflib.get_close_matches(target, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise TrialError(f"space.lora_target_modules: no module '{target}'; there are: {', '.join(known)}{hint}")
