"""Bytes of a quantised base: which weights are quantised, what they take packed, and what one takes while it is multiplied.

As `bitsandbytes` does it (https://github.com/bitsandbytes-foundation/bitsandbytes, `autograd/_functions.py`): a product keeps
neither its input nor its weight for the backward pass, but spreads the weight out, forward and again backward, in the format that it
computes in. On a GPU, int8 multiplies int8 forward, and spreads out backward alone. Of float8 `trainables.quantize` does as much.
"""

from __future__ import annotations

from spaces.blueprint import Blueprint, Matrix
from spaces.config import Recipe

# Of nf4: values that share one fp32 scale; transformers does not quantise the scales again unless it is told to.
NF4_BLOCK = 64
SCALE_BYTES = 4


def is_quantized(matrix: Matrix, recipe: Recipe) -> bool:
    """Return whether a matrix is held quantised: every linear layer but the head; experts of one stacked weight are none."""
    return recipe.quantization != "none" and matrix.is_module and not (matrix.is_output or matrix.trains_with_adapter)


def packed_bytes(matrix: Matrix, recipe: Recipe) -> int:
    """Return the bytes of a quantised matrix with its scales; its bias stays as it is."""
    num_weights = matrix.num_inputs * matrix.num_outputs
    if recipe.quantization == "nf4":
        return -(-num_weights // 2) + SCALE_BYTES * -(-num_weights // NF4_BLOCK)
    return num_weights + SCALE_BYTES * matrix.num_outputs


def frozen_bytes(plan: Blueprint, recipe: Recipe, width: int) -> int:
    """Return the bytes of a frozen base.

    Args:
        width: bytes of a weight that is not quantised.
    """
    num_weights, packed = _quantized(plan, recipe)
    return width * (plan.num_params - num_weights) + packed


def spread_bytes(plan: Blueprint, recipe: Recipe, width: int) -> int:
    """Return what is read and written to spread all quantised weights out once.

    Args:
        width: bytes of a weight that is spread out.
    """
    num_weights, packed = _quantized(plan, recipe)
    return width * num_weights + packed


def _quantized(plan: Blueprint, recipe: Recipe) -> tuple[int, int]:
    """Return how many weights are quantised, and their bytes."""
    quantized = [m for m in (*plan.block * plan.shape.num_layers, *plan.head) if is_quantized(m, recipe)]
    return sum(m.num_inputs * m.num_outputs for m in quantized), sum(packed_bytes(m, recipe) for m in quantized)
