"""Bytes that one rank holds while it trains, by term, from a blueprint and a trial config; fp32.

What a layer keeps for its backward pass is read off transformers' modelling files and torch's own backward formulas (what
`torch.autograd` saves), and tests compare every term with the tensors that really live. The peak is the largest of three
moments: the start of the backward pass (all activations and three tensors of the size of the logits), the last block's
backward (all activations and the gradients inside that block), and the optimizer step (all gradients).
"""

from __future__ import annotations

from dataclasses import dataclass

from spaces.blueprint import Blueprint, Matrix
from spaces.config import Recipe, TrialConfig

FP32_BYTES = 4
# Scores of the cross entropy, the gradient of the picked one, and that of all.
LOGITS_COPIES = 3
ADAMW_STATES = 2


class NoFormula(ValueError):
    """There is no formula for this model or layout yet; the message says for what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes on one rank; the sum of the terms is the largest that is held at once."""

    weights_bytes: int
    gradients_bytes: int
    """Zero where the peak comes before they are all there."""
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    communication_bytes: int

    @property
    def peak_bytes(self) -> int:
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
            + self.communication_bytes
        )


def num_trained(plan: Blueprint, recipe: Recipe) -> int:
    """Return the parameters that train."""
    if recipe.adapter == "none":
        return plan.num_params
    heads = sum(m.num_params for m in plan.head if m.trains_with_adapter)
    return heads + num_adapter_params(plan, recipe)


def num_adapter_params(plan: Blueprint, recipe: Recipe) -> int:
    """Return the parameters that LoRA adds."""
    if recipe.adapter == "none":
        return 0
    wrapped = [m for m in (*plan.block * plan.shape.num_layers, *plan.head) if _is_wrapped(m, recipe)]
    return sum((recipe.adapter_rank or 0) * (m.num_inputs + m.num_outputs) for m in wrapped)


def rank_memory(plan: Blueprint, config: TrialConfig, length: int) -> RankMemory:
    """Return what a rank of a replicated model holds at its peak.

    Args:
        plan: the model.
        config: recipe and layout; the layout's micro batch counts.
        length: padded tokens per row.

    Raises:
        NoFormula: for sharded layouts, bf16, routed experts, and attention that is written out.
    """
    _check_known(plan, config)
    recipe, rows = config.recipe, config.layout.micro_batch_size
    tokens = rows * length
    trained = num_trained(plan, recipe)
    # PEFT keeps the head that it trains beside the one that was there.
    copies = 0 if recipe.adapter == "none" else sum(m.num_params for m in plan.head if m.trains_with_adapter)
    weights = plan.num_params + num_adapter_params(plan, recipe) + copies
    # With recomputation a block keeps its input, and all of it lives again while its own backward pass runs.
    recomputes = config.layout.recomputation == "full"
    block = _kept_by_block(plan, recipe)
    activations = _activations(plan, recipe, tokens, rows, plan.shape.hidden_size if recomputes else block)
    in_backward = tokens * block if recomputes else 0
    head = plan.head[-1]
    # The last token of a row predicts nothing.
    logits = LOGITS_COPIES * head.num_outputs * (rows if head.per == "row" else rows * (length - 1))
    moments = {
        "loss": (0, activations, logits),
        "last block": (0, activations + in_backward + _inside_block(plan, recipe, tokens), 0),
        "optimizer": (trained, 0, 0),
    }
    gradients, activations, logits = max(moments.values(), key=sum)
    # DDP's buckets are a second copy of all gradients, made before the first step.
    buckets = trained if config.layout.world_size > 1 else 0
    return RankMemory(
        weights_bytes=FP32_BYTES * weights,
        gradients_bytes=FP32_BYTES * gradients,
        optimizer_bytes=FP32_BYTES * ADAMW_STATES * trained,
        activations_bytes=FP32_BYTES * activations,
        logits_bytes=FP32_BYTES * logits,
        communication_bytes=FP32_BYTES * buckets,
    )


def _check_known(plan: Blueprint, config: TrialConfig) -> None:
    unknown = {
        "fsdp": config.layout.strategy == "fsdp" and config.layout.world_size > 1,
        "bf16": config.recipe.precision == "bf16",
        "routed experts": any(m.num_experts > 1 for m in plan.block),
        "attention that is written out": not plan.is_attention_fused,
    }
    for what, is_so in unknown.items():
        if is_so:
            raise NoFormula(f"no formula for {what}")


def _activations(plan: Blueprint, recipe: Recipe, tokens: int, rows: int, kept_by_block: int) -> int:
    """Return the numbers that all blocks and the embedding keep for the backward pass."""
    full = recipe.adapter == "none"
    width = plan.shape.hidden_size
    kept = plan.shape.num_layers * kept_by_block
    if plan.norm == "rms":
        # The embedding, and the last normalisation before and after its weight.
        kept += 3 * width + 1 if full else 0
    elif plan.head[0].per == "row":
        # The embedding's normalisation: its input, output and two statistics; frozen, its output alone, which adapters read.
        kept += 2 * width + 2 if full else width
    else:
        kept += 2 * width + 2 if full else 0
    pooled = sum(m.num_outputs for m in plan.head[:-1]) * rows
    return kept * tokens + pooled


def _kept_by_block(plan: Blueprint, recipe: Recipe) -> int:
    """Return the numbers that one block keeps per token."""
    shape = plan.shape
    full = recipe.adapter == "none"
    width, queries, keys = shape.hidden_size, shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    kept = 2 * width  # the residual stream, before each half
    # A normalisation keeps its statistics, and what its weight's gradient and the next matrix need.
    statistics = 1 if plan.norm == "rms" else 2
    kept += statistics * plan.num_norms_per_block
    for stage in (plan.attention_in, plan.feed_forward_in):
        if full or any(_is_wrapped(m, recipe) for m in stage):
            kept += width
        if full and plan.norm == "rms":
            kept += width
    if plan.num_norms_per_block == 4:
        # Around each half a second normalisation, whose input is the half's output.
        kept += 4 * width if full else 2 * width
    # Attention keeps queries, keys, values, its output and the logarithm of its sums.
    if len(plan.attention_in) > 1 or plan.norm == "layer":
        kept += 2 * queries + 2 * keys + shape.num_heads
    else:
        # One matrix for all three: rotated queries and keys are copies, and so is the transposed output.
        kept += queries + 2 * keys + queries + keys + 2 * queries + shape.num_heads
    if plan.has_head_norms:
        kept += (2 if full else 1) * (queries + keys) + shape.num_heads + shape.num_kv_heads
    kept += plan.num_kept_by_activation * plan.feed_forward_out[0].num_inputs
    if not (full or _is_wrapped(plan.feed_forward_out[0], recipe)):
        kept -= plan.feed_forward_out[0].num_inputs
    if not full:
        kept += (recipe.adapter_rank or 0) * sum(_is_wrapped(m, recipe) for m in plan.block)
    return kept


def _inside_block(plan: Blueprint, recipe: Recipe, tokens: int) -> int:
    """Return what the backward pass of the last block's feed-forward holds beside the activations, none of which it has freed.

    Gradients of the inner width: of the activation's output and input. Where a product follows the activation (gated, or GELU
    by its formula) and its result was not kept, of that too; where all trains, a plain GELU has freed the first by then.
    """
    full = recipe.adapter == "none"
    is_plain = plan.num_kept_by_activation == 2
    copies = 1 if full and is_plain else 2
    if not (full or is_plain or _is_wrapped(plan.feed_forward_out[0], recipe)):
        copies += 1
    return tokens * copies * plan.feed_forward_out[0].num_inputs


def _is_wrapped(matrix: Matrix, recipe: Recipe) -> bool:
    return recipe.adapter == "lora" and not matrix.trains_with_adapter and matrix.is_wrapped_by(recipe.adapter_target_modules or ())
