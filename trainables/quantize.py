"""Quantised linear layers of a frozen base.

Through bitsandbytes (nf4, int8): layers, weights and results are those of transformers' loading. In float8 a weight is what
torchao's `Float8WeightOnlyConfig` makes of it; its own product keeps the weight that it spread out for the backward pass, and so all
of the memory that it should save (torchao 0.18). So does that of its `Int8WeightOnlyConfig` (4 MiB in int8 kept 16 MiB in fp32), so
that 8-bit integers are bitsandbytes' alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from spaces.config import Quantization
from spaces.quantization import NF4_BLOCK

FLOAT8 = torch.float8_e4m3fn

# On some CPUs it says at its import, in every worker, that a kernel is not installed which we do not use, and in every evaluation
# that int8 goes through fp16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# At its import it offers functions to torch's compiler, which takes a second to be there; nobody here has them compiled.
_is_compiler_off = "TORCHDYNAMO_DISABLE" in os.environ
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from bitsandbytes.functional import (  # noqa: E402  # after its logger was told
    dequantize_4bit,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    quantize_4bit,
)
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit  # noqa: E402

if not _is_compiler_off:
    del os.environ["TORCHDYNAMO_DISABLE"]

# Inputs beyond it int8 leaves to fp16: what transformers' configuration has.
OUTLIER_THRESHOLD = 6.0
# What PEFT trains whole beside an adapter on a classifier, by the end of the module's name.
HEADS = ("classifier", "score")


def is_head(name: str) -> bool:
    """Return whether a module is the head of a classifier, or in it."""
    return any(part.endswith(HEADS) for part in name.split("."))


@dataclass(frozen=True, kw_only=True, slots=True)
class Packed:
    """A quantised weight of a linear layer."""

    weight: torch.Tensor
    """Two values of four bits in a uint8, flat; or (outputs, inputs) in int8, or in float8, whose bytes are in uint8: nothing then
    casts them as it does floating-point weights."""
    scales: torch.Tensor
    """fp32, one for each block of values (nf4) or each row (int8, float8)."""
    state: Any = None
    """What bitsandbytes knows of an nf4 weight: its scales, shape and number format."""


def pack_linears(
    module: nn.Module, method: Quantization, dtype: torch.dtype, device: torch.device, new_parameters: tuple[str, ...]
) -> dict[str, Packed]:
    """Quantise every linear layer that transformers quantises, by the module's name; heads and what is new train whole, and stay."""
    if method == "none":
        return {}
    new = {name.rpartition(".")[0] for name in new_parameters}
    linears = {name: linear for name, linear in _linears(module) if name not in new and not is_head(name)}
    return {name: _pack(_weight(linear).to(device, dtype).contiguous(), method) for name, linear in linears.items()}


def spread_out(module: nn.Module, packed: Mapping[str, Packed]) -> None:
    """Give a model's own layers the weights that quantised ones stand for.

    Args:
        module: a transformers model without an adapter; changed in place.
        packed: what `pack_linears` made of the same model.
    """
    for name, weight in packed.items():
        linear: Any = module.get_submodule(name)
        if weight.state is not None:
            values = dequantize_4bit(weight.weight, weight.state)
        elif weight.weight.dtype == torch.uint8:
            values = _of_float8(weight.weight, weight.scales, torch.float32)
        else:
            values = int8_vectorwise_dequant(weight.weight, weight.scales)
        linear.weight.data = (values.T if isinstance(linear, Conv1D) else values).to(linear.weight.dtype).contiguous()


def quantize(module: nn.Module, packed: Mapping[str, Packed], dtype: torch.dtype) -> None:
    """Put quantised layers in the place of a model's own, with the weights that other trials have too.

    Args:
        module: a transformers model; changed in place.
        packed: what `pack_linears` made of the same model.
        dtype: what nf4 computes in.
    """
    for name, weight in packed.items():
        linear: Any = module.get_submodule(name)
        num_outputs, num_inputs = _weight(linear).shape
        # On `meta`: the weights that a layer makes for itself are thrown away.
        with torch.device("meta"):
            layer: QuantizedLinear
            sizes = (num_inputs, num_outputs, linear.bias is not None)
            if weight.state is not None:
                layer = Nf4Linear(*sizes, compute_dtype=dtype, compress_statistics=False, quant_type="nf4")
            elif weight.weight.dtype == torch.uint8:
                layer = Float8Linear(*sizes)
            else:
                layer = Int8Linear(*sizes, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD)
        layer.hold(weight)
        layer.bias = linear.bias
        module.set_submodule(name, layer)
    # PEFT asks for it before it looks at the layers of bitsandbytes.
    kinds = {type(part) for part in module.modules()}
    for kind, flag in ((Nf4Linear, "is_loaded_in_4bit"), (Int8Linear, "is_loaded_in_8bit")):
        if kind in kinds:
            setattr(module, flag, True)


class Nf4Linear(Linear4bit):
    """A frozen linear layer in nf4."""

    def hold(self, packed: Packed) -> None:
        """Take a weight."""
        self.weight = Params4bit(
            packed.weight,
            requires_grad=False,
            quant_state=packed.state,
            blocksize=NF4_BLOCK,
            compress_statistics=False,
            quant_type="nf4",
            bnb_quantized=True,
            module=self,
        )
        self.quant_state = packed.state
        # A buffer: so it is seen where memory is weighed.
        self.register_buffer("scales", packed.scales, persistent=False)
        # Evaluation would reorder the weight that all trials share for a kernel that has no backward pass.
        self.support_avx512bf16_for_cpu = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W' + b."""
        return quantized_product(x, self)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Let bitsandbytes multiply."""
        return super().forward(x)


class Int8Linear(Linear8bitLt):
    """A frozen linear layer in int8."""

    def hold(self, packed: Packed) -> None:
        """Take a weight."""
        self.weight = Int8Params(packed.weight, requires_grad=False, has_fp16_weights=False, CB=packed.weight, SCB=packed.scales)
        self.register_buffer("scales", packed.scales, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W' + b."""
        return quantized_product(x, self)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Let bitsandbytes multiply, and keep nothing for the backward pass."""
        result = super().forward(x)
        if not torch.compiler.is_compiling() and result.grad_fn is not None:
            # bitsandbytes keeps the input for the gradient of a weight that has none, and past all hooks: recomputation would save
            # nothing. What torch compiles keeps what it needs.
            node: Any = result.grad_fn
            node.A, node.tensors = None, (None, None, None)
        return result


class Float8Linear(nn.Linear):
    """A frozen linear layer in float8 (e4m3) with a scale for each row."""

    def hold(self, packed: Packed) -> None:
        """Take a weight."""
        self.weight = nn.Parameter(packed.weight, requires_grad=False)
        self.register_buffer("scales", packed.scales, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W' + b."""
        return quantized_product(x, self)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply with the weight spread out, and keep nothing but the weight as it is held."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        result: torch.Tensor = _Float8Product.apply(x.to(dtype), self.weight, self.scales, bias)
        return result


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        context.save_for_backward(weight, scales)
        return functional.linear(x, _of_float8(weight, scales, x.dtype), bias)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = gradients
        weight, scales = context.saved_tensors
        return gradient @ _of_float8(weight, scales, gradient.dtype), None, None, None


QuantizedLinear = Nf4Linear | Int8Linear | Float8Linear


def quantized_product(x: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
    """Return the layer's result: a function of its own, because that is what `trainables.meter` sees."""
    if has_torch_function_unary(x):
        return handle_torch_function(quantized_product, (x,), x, layer)
    return layer.multiply(x)


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what transformers' loading replaces: not the output embedding, what is tied to it, or the last layer of all."""
    kept = get_keys_to_not_convert(module)
    for name, part in module.named_modules():
        if (type(part) is nn.Linear or isinstance(part, Conv1D)) and should_convert_module(name, kept):
            yield name, part


def _weight(linear: Any) -> torch.Tensor:
    """Return the weight as (outputs, inputs); GPT-2 holds it the other way."""
    weight: torch.Tensor = linear.weight.detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def _pack(weight: torch.Tensor, method: Quantization) -> Packed:
    if method == "nf4":
        data, state = quantize_4bit(weight, blocksize=NF4_BLOCK, compress_statistics=False, quant_type="nf4")
        return Packed(weight=data, scales=state.absmax, state=state)
    if method == "float8":
        largest = torch.finfo(FLOAT8).max
        # A row of zeros has any scale.
        scales = (weight.abs().amax(dim=1) / largest).float().clamp(min=torch.finfo(torch.float32).tiny)
        return Packed(weight=(weight.float() / scales[:, None]).clamp(-largest, largest).to(FLOAT8).view(torch.uint8), scales=scales)
    data, scales, _ = int8_vectorwise_quant(weight.to(torch.float16))
    return Packed(weight=data, scales=scales)


def _of_float8(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what a weight in float8 stands for: (outputs, inputs)."""
    return weight.view(FLOAT8).to(dtype).mul_(scales.to(dtype)[:, None])
