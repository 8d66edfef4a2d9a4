"""Bytes that attention keeps for its backward pass, between the projections before it and the one behind it."""

from __future__ import annotations

from spaces.adapters import num_prefix_tokens
from spaces.blueprint import Blueprint
from spaces.config import Recipe
from spaces.packing import can_pack
from spaces.widths import FP32_BYTES, Widths


def num_keys(recipe: Recipe, length: int) -> int:
    """Return the keys that a row of some tokens sees."""
    return num_prefix_tokens(recipe) + length


def num_kept_kv_heads(plan: Blueprint, width: Widths, *, is_on_gpu: bool) -> int:
    """Return the heads of keys that attention is given: in fp32 on a GPU one for each of queries (`trainables.packed`)."""
    is_repeated = is_on_gpu and width.products == FP32_BYTES and can_pack(plan.family)
    return plan.shape.num_heads if is_repeated else plan.shape.num_kv_heads


def attention_bytes(
    plan: Blueprint, recipe: Recipe, width: Widths, length: int, *, is_output_kept: bool, is_on_gpu: bool = False
) -> float:
    """Return what attention keeps for each token.

    Args:
        plan: the model.
        recipe: what it is trained with.
        width: bytes per number.
        length: padded tokens per row.
        is_output_kept: whether the product behind it needs its output where attention does not.
        is_on_gpu: whether the device is one.
    """
    shape, products = plan.shape, width.products
    queries, keys = shape.num_heads * shape.head_dim, num_kept_kv_heads(plan, width, is_on_gpu=is_on_gpu) * shape.head_dim
    of_sums, stretch = FP32_BYTES * shape.num_heads, num_keys(recipe, length) / length
    if not plan.is_attention_fused:
        return _written_out(plan, recipe, products, length) + (products * queries if is_output_kept else 0)
    if num_prefix_tokens(recipe) and can_pack(plan.family):
        # With the prefix before them all are copies, and queries are as many as keys.
        return (products * (2 * queries + 2 * keys) + of_sums) * stretch
    if num_prefix_tokens(recipe):
        # Beside a mask, of which every layer has a copy, keys and values are repeated for every head.
        return products * (2 * queries * (1 + stretch) + num_keys(recipe, length)) + of_sums
    if len(plan.attention_in) > 1 or plan.norm == "layer":
        # Queries, keys, values, the output and the logarithm of the sums.
        return products * (2 * queries + 2 * keys) + of_sums
    # One matrix for all three: rotated queries and keys are copies, and so is the transposed output.
    return products * (4 * queries + 3 * keys) + of_sums


def _written_out(plan: Blueprint, recipe: Recipe, products: int, length: int) -> float:
    """Return what attention keeps whose scores are tensors, one row of them per token and head.

    Queries, and keys and values repeated for every head, are copies for the batched products. The cap keeps the tanh of the scores,
    the softmax its result in fp32, and the product with the values that in its own format.
    """
    seen = num_keys(recipe, length)
    weights = FP32_BYTES + (products if products != FP32_BYTES else 0)
    queries = plan.shape.num_heads * plan.shape.head_dim
    return products * queries * (1 + 2 * seen / length) + (products + weights) * plan.shape.num_heads * seen
