"""Which models can be split over ranks matrix by matrix, and what one rank has of them, from a blueprint alone.

The first matrices of a half of a block (queries, keys, values; gate, up) are cut by their outputs, the last one (attention's output,
down) by its inputs (https://arxiv.org/abs/1909.08053, section 3): a rank then has some of the heads and some of the inner width, and
the results of the halves are sums over the ranks. Embeddings, normalisation, the residual stream and the head are on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from spaces.adapters import is_wrapped
from spaces.blueprint import Blueprint, Matrix
from spaces.config import Recipe

_DENSE = {
    "self_attn.q_proj": "colwise",
    "self_attn.k_proj": "colwise",
    "self_attn.v_proj": "colwise",
    "self_attn.o_proj": "rowwise",
    "mlp.gate_proj": "colwise",
    "mlp.up_proj": "colwise",
    "mlp.down_proj": "rowwise",
}
# Normalised head by head with weights that all heads share: a rank's gradient is that of its own heads.
_WITH_HEAD_NORMS = {
    **_DENSE,
    "self_attn.q_norm": "replicated_with_grad_allreduce",
    "self_attn.k_norm": "replicated_with_grad_allreduce",
}
# By `model_type`, of every layer: `base_model_tp_plan` of the families' configuration files in
# https://github.com/huggingface/transformers/tree/main/src/transformers/models, where nothing else is in it. A test compares them.
PLANS: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "gemma", "gemma2"), _DENSE),
    **dict.fromkeys(("qwen3", "gemma3_text"), _WITH_HEAD_NORMS),
    **dict.fromkeys(("smollm3", "ministral3"), _DENSE),
}


def local_blueprint(plan: Blueprint, num_ranks: int) -> Blueprint:
    """Return what one of the ranks has of a model, rounded up where they do not divide it; all of it where there is no plan."""
    if num_ranks == 1 or plan.family not in PLANS:
        return plan

    def part(size: int) -> int:
        return -(-size // num_ranks)

    def by_outputs(matrices: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
        return tuple(replace(m, num_outputs=part(m.num_outputs)) for m in matrices)

    def by_inputs(matrices: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
        return tuple(replace(m, num_inputs=part(m.num_inputs)) for m in matrices)

    shape = plan.shape
    return replace(
        plan,
        shape=replace(
            shape,
            num_heads=part(shape.num_heads),
            num_kv_heads=part(shape.num_kv_heads),
            intermediate_size=part(shape.intermediate_size),
        ),
        attention_in=by_outputs(plan.attention_in),
        attention_out=by_inputs(plan.attention_out),
        feed_forward_in=by_outputs(plan.feed_forward_in),
        feed_forward_out=by_inputs(plan.feed_forward_out),
    )


def left_over(plan: Blueprint, num_ranks: int) -> dict[str, int]:
    """Return what does not divide by the ranks, by its name with its size in front, and what is left over of it."""
    shape = plan.shape
    sizes = {"heads": shape.num_heads, "key-value heads": shape.num_kv_heads, "inner features": shape.intermediate_size}
    return {f"{size} {name}": size % num_ranks for name, size in sizes.items() if size % num_ranks}


def num_partial_params(plan: Blueprint, recipe: Recipe) -> int:
    """Return the parameters of which every rank has all, and of their gradients its own summand.

    Of an adapter the factor that is not cut; of full fine-tuning the weights of normalised heads, and the biases of what is cut by
    its inputs, which one rank adds.
    """
    layers, rank = plan.shape.num_layers, recipe.adapter_rank or 0
    last = (*plan.attention_out, *plan.feed_forward_out)
    if recipe.adapter == "none":
        head_norms = 2 * plan.shape.head_dim if plan.has_head_norms else 0
        return layers * (head_norms + sum(m.num_outputs for m in last if m.has_bias))
    first = (*plan.attention_in, *plan.feed_forward_in)
    factors = sum(m.num_inputs for m in first if is_wrapped(m, recipe)) + sum(m.num_outputs for m in last if is_wrapped(m, recipe))
    return layers * rank * factors
