"""Bytes that one rank holds while it trains, by term, from a blueprint and a trial config.

What a layer keeps for its backward pass is read off transformers' modelling files, torch's own backward formulas (what
`torch.autograd` saves) and what autocast casts; what FSDP2 gathers and reduces, off `torch.distributed.fsdp`. Tests compare the sum
with the tensors that really live. The peak is the largest of the moments below.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from spaces.blueprint import Blueprint, Matrix
from spaces.config import Recipe, TrialConfig

FP32_BYTES, BF16_BYTES = 4, 2
# Scores of the cross entropy, the gradient of the picked one, and that of all; in fp32 whatever the model computes in.
LOGITS_COPIES = 3
ADAMW_STATES = 2
# While FSDP2 gathers a block, it holds the flat buffer of it and that of the one before beside the weights themselves.
GATHERED_BLOCKS = 3
# While it reduces gradients: its flat buffer, the copy that gloo makes of it, the result of half the size over two ranks, and
# what of the gathered weights is not freed yet. NCCL makes no copy.
REDUCED_COPIES, GATHERED_LEFT = 2.5, 0.5


class NoFormula(ValueError):
    """There is no formula for this model or layout yet; the message says for what."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Bytes on one rank; the sum of the terms is the largest that is held at once."""

    weights_bytes: int
    optimizer_bytes: int
    gradients_bytes: int = 0
    """Zero where the peak comes before they are all there."""
    activations_bytes: int = 0
    logits_bytes: int = 0
    communication_bytes: int = 0
    """DDP's buckets; what FSDP2 gathers, and its buffers."""

    @property
    def peak_bytes(self) -> int:
        return sum(int(getattr(self, f.name)) for f in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """Bytes per number."""

    frozen: int
    """Weights that do not train, as they are held."""
    stream: int
    """What the blocks hand on to each other."""
    products: int
    """What goes into the matrix products and comes out of them."""
    is_autocast: bool
    """Whether every product casts its own copy of its input, and trained weights are cast once a step."""


def widths(config: TrialConfig) -> Widths:
    """Return the number formats of a trial, as `trainables.model.build` and `trainables.parallelize` make them."""
    if config.recipe.precision == "fp32":
        return Widths(frozen=FP32_BYTES, stream=FP32_BYTES, products=FP32_BYTES, is_autocast=False)
    is_autocast = not _is_sharded(config)
    # The embedding's number format goes through the residual stream: fp32 where it trains under autocast.
    stream = FP32_BYTES if is_autocast and config.recipe.adapter == "none" else BF16_BYTES
    return Widths(frozen=BF16_BYTES, stream=stream, products=BF16_BYTES, is_autocast=is_autocast)


def num_trained(plan: Blueprint, recipe: Recipe) -> int:
    """Return the parameters that train."""
    if recipe.adapter == "none":
        return plan.num_params
    heads = sum(m.num_params for m in plan.head if m.trains_with_adapter)
    return heads + num_adapter_params(plan, recipe)


def num_adapter_params(plan: Blueprint, recipe: Recipe) -> int:
    """Return the parameters that LoRA adds."""
    return plan.shape.num_layers * _adapter_params(plan.block, recipe) + _adapter_params(plan.head, recipe)


def rank_memory(plan: Blueprint, config: TrialConfig, length: int, num_targets: int | None = None) -> RankMemory:
    """Return what a rank holds at its peak.

    Args:
        plan: the model.
        config: recipe and layout; the layout's micro batch counts.
        length: padded tokens per row.
        num_targets: positions of a micro batch that the loss counts; by default those of plain text or of a class.

    Raises:
        NoFormula: for routed experts, attention that is written out, and bf16 with another normalisation than RMSNorm.
    """
    _check_known(plan, config)
    recipe, rows = config.recipe, config.layout.micro_batch_size
    tokens, num_layers = rows * length, plan.shape.num_layers
    targets = int(rows * plan.targets_per_row(length)) if num_targets is None else num_targets
    width = widths(config)
    trained, frozen = num_trained(plan, recipe), _num_frozen(plan, recipe)
    shards = config.layout.world_size if _is_sharded(config) else 1
    state = RankMemory(
        weights_bytes=(FP32_BYTES * trained + width.frozen * frozen) // shards,
        optimizer_bytes=FP32_BYTES * ADAMW_STATES * trained // shards,
        # DDP's buckets are a second copy of all gradients, made before the first step.
        communication_bytes=FP32_BYTES * trained if shards == 1 and config.layout.world_size > 1 else 0,
    )
    # With recomputation a block keeps its input, and all of it lives again while its own backward pass runs.
    recomputes = config.layout.recomputation == "full"
    block = _kept_by_block(plan, recipe, width)
    kept = _kept_outside(plan, recipe, width, tokens, targets) + _cast_weights(plan, recipe, width)
    if recomputes:
        kept += num_layers * tokens * width.stream * plan.shape.hidden_size
    else:
        kept += tokens * ((num_layers - 1) * block + _kept_by_block(plan, recipe, width, is_first=True))
    again = tokens * block if recomputes else 0
    head = plan.head[-1]
    logits = LOGITS_COPIES * FP32_BYTES * head.num_outputs * (targets if head.per == "target" else tokens)
    inside = tokens * _inside_block(plan, recipe, width)
    at_loss = replace(state, activations_bytes=kept, logits_bytes=logits)
    in_last_block = replace(state, activations_bytes=kept + again + inside)
    at_update = replace(state, gradients_bytes=FP32_BYTES * trained // shards)
    if shards == 1:
        return max(at_loss, in_last_block, at_update, key=_peak)
    return max(_while_sharded(plan, recipe, width, shards, at_loss, in_last_block, at_update), key=_peak)


def _while_sharded(
    plan: Blueprint, recipe: Recipe, width: Widths, shards: int, at_loss: RankMemory, in_last_block: RankMemory, at_update: RankMemory
) -> list[RankMemory]:
    """Return the moments of a sharded model: what is gathered and reduced beside the shards, block by block.

    What no block holds (embedding, last normalisation, head) is gathered from the forward pass to the end of the backward pass.
    """
    num_layers = plan.shape.num_layers
    trained_block = plan.num_block_params if recipe.adapter == "none" else _adapter_params(plan.block, recipe)
    held_block = plan.num_block_params + _adapter_params(plan.block, recipe)
    trained_root = num_trained(plan, recipe) - num_layers * trained_block
    held_root = num_trained(plan, recipe) + _num_frozen(plan, recipe) - num_layers * held_block
    gathered = width.products
    root, root_gradients = gathered * held_root, gathered * trained_root
    block = gathered * held_block
    reducing_block = int(REDUCED_COPIES * FP32_BYTES * trained_block + GATHERED_LEFT * block)
    reducing_root = int(REDUCED_COPIES * FP32_BYTES * trained_root + GATHERED_LEFT * root)
    block_shards = FP32_BYTES * num_layers * trained_block // shards
    but_one = at_loss.activations_bytes * (num_layers - 1) // num_layers
    plain = replace(at_loss, activations_bytes=0, logits_bytes=0)
    return [
        replace(plain, communication_bytes=2 * root + 2 * block),
        replace(plain, activations_bytes=but_one, communication_bytes=root + GATHERED_BLOCKS * block),
        replace(at_loss, communication_bytes=root + block),
        replace(in_last_block, communication_bytes=root + root_gradients + 2 * block),
        replace(plain, activations_bytes=but_one, communication_bytes=root + root_gradients + block + reducing_block),
        replace(plain, gradients_bytes=block_shards, communication_bytes=root + root_gradients + reducing_block),
        replace(plain, gradients_bytes=block_shards, communication_bytes=reducing_root),
        at_update,
    ]


def _peak(memory: RankMemory) -> int:
    return memory.peak_bytes


def _is_sharded(config: TrialConfig) -> bool:
    return config.layout.strategy == "fsdp" and config.layout.world_size > 1


def _check_known(plan: Blueprint, config: TrialConfig) -> None:
    unknown = {
        "bf16 with this normalisation": config.recipe.precision == "bf16" and plan.norm != "rms",
        "routed experts": any(m.num_experts > 1 for m in plan.block),
        "attention that is written out": not plan.is_attention_fused,
    }
    for what, is_so in unknown.items():
        if is_so:
            raise NoFormula(f"no formula for {what}")


def _num_frozen(plan: Blueprint, recipe: Recipe) -> int:
    """Return the parameters that are held and do not train; PEFT keeps the head that it trains beside the one that was there."""
    return 0 if recipe.adapter == "none" else plan.num_params


def _adapter_params(matrices: tuple[Matrix, ...], recipe: Recipe) -> int:
    rank = recipe.adapter_rank or 0
    return sum(rank * (m.num_inputs + m.num_outputs) for m in matrices if _is_wrapped(m, recipe))


def _cast_weights(plan: Blueprint, recipe: Recipe, width: Widths) -> int:
    """Return the bytes of the trained matrices as autocast has cast them."""
    if not width.is_autocast:
        return 0
    if recipe.adapter != "none":
        return BF16_BYTES * num_trained(plan, recipe)
    matrices = (*plan.block * plan.shape.num_layers, *plan.head)
    return BF16_BYTES * sum(m.num_params for m in matrices)


def _kept_outside(plan: Blueprint, recipe: Recipe, width: Widths, tokens: int, targets: int) -> int:
    """Return the bytes that the embedding, the last normalisation and the input of the head's layers keep."""
    full = recipe.adapter == "none"
    hidden = plan.shape.hidden_size
    # What a head of target positions multiplies is a copy of them.
    picked = width.products * hidden * targets if full and plan.head[-1].is_output else 0
    if plan.norm == "rms":
        # The last normalisation: its input in fp32 with the statistic, before its weight, and after it what a `score` reads.
        kept = FP32_BYTES * (hidden + 1) if full or width.products == BF16_BYTES else 0
        kept += (width.stream + (0 if picked else width.products)) * hidden if full else 0
    elif plan.is_post_norm:
        # The embedding's normalisation: its input, output and two statistics; frozen, its output alone, which adapters read.
        kept = FP32_BYTES * (2 * hidden + 2 if full else hidden)
    else:
        kept = FP32_BYTES * ((1 if picked else 2) * hidden + 2 if full else 0)
    pooled = sum(m.num_outputs for m in plan.head[:-1]) * targets
    return kept * tokens + picked + FP32_BYTES * pooled


def _kept_by_block(plan: Blueprint, recipe: Recipe, width: Widths, *, is_first: bool = False) -> int:
    """Return the bytes that one block keeps per token."""
    needs_grad = recipe.adapter == "none" or not is_first or any(_is_wrapped(m, recipe) for m in plan.attention_in)
    kept = _kept_by_attention(plan, recipe, width) if needs_grad else 0
    if not needs_grad and not width.is_autocast and any(_is_wrapped(m, recipe) for m in plan.attention_out):
        kept += width.products * plan.attention_out[0].num_inputs
    kept += _kept_by_feed_forward(plan, recipe, width)
    wrapped = [m for m in plan.block if _is_wrapped(m, recipe)]
    kept += width.products * (recipe.adapter_rank or 0) * len(wrapped)
    if width.is_autocast:
        kept += width.products * sum(m.num_inputs for m in wrapped)
    return kept


def _kept_by_attention(plan: Blueprint, recipe: Recipe, width: Widths) -> int:
    shape, full = plan.shape, recipe.adapter == "none"
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    kept = _kept_before(plan.attention_in, plan, recipe, width)
    # Queries, keys, values, the output and the logarithm of the sums.
    if len(plan.attention_in) > 1 or plan.norm == "layer":
        kept += width.products * (2 * queries + 2 * keys)
    else:
        # One matrix for all three: rotated queries and keys are copies, and so is the transposed output.
        kept += width.products * (4 * queries + 3 * keys)
    kept += FP32_BYTES * shape.num_heads
    if plan.has_head_norms:
        kept += (FP32_BYTES + (width.products if full else 0)) * (queries + keys)
        kept += FP32_BYTES * (shape.num_heads + shape.num_kv_heads)
    return kept


def _kept_by_feed_forward(plan: Blueprint, recipe: Recipe, width: Widths) -> int:
    last = plan.feed_forward_out[0]
    num_inner = plan.num_kept_by_activation
    if recipe.adapter != "none" and (width.is_autocast or not _is_wrapped(last, recipe)):
        num_inner -= 1
    return _kept_before(plan.feed_forward_in, plan, recipe, width) + width.products * num_inner * last.num_inputs


def _kept_before(stage: tuple[Matrix, ...], plan: Blueprint, recipe: Recipe, width: Widths) -> int:
    """Return the bytes per token from the residual stream to the inputs of one half's first matrices."""
    full, hidden = recipe.adapter == "none", plan.shape.hidden_size
    # A normalisation keeps its input, in fp32, and its statistics; around some halves there is a second one.
    norms = plan.num_norms_per_block // 2
    kept = FP32_BYTES * norms * (hidden + (1 if plan.norm == "rms" else 2))
    if full and plan.norm == "rms":
        kept += width.stream * norms * hidden
    if width.is_autocast:
        # Every product has a copy of its own; those of adapters are counted with them.
        kept += width.products * hidden * len(stage) if full else 0
    elif full or any(_is_wrapped(m, recipe) for m in stage):
        kept += width.products * hidden
    return kept


def _inside_block(plan: Blueprint, recipe: Recipe, width: Widths) -> int:
    """Return the bytes per token that the backward pass of the last block's feed-forward holds beside the activations.

    Gradients of the inner width: of the activation's output and input. Where a product follows the activation (gated, or GELU
    by its formula) and its result was not kept, of that too; where all trains, a plain GELU has freed the first by then.
    """
    full = recipe.adapter == "none"
    is_plain = plan.num_kept_by_activation == 2
    copies = 1 if full and is_plain else 2
    if not (full or is_plain or _is_wrapped(plan.feed_forward_out[0], recipe)):
        copies += 1
    inside = width.products * copies
    if width.is_autocast and _is_wrapped(plan.feed_forward_out[0], recipe):
        # PEFT hands the adapter its input in fp32, and gets the gradient so.
        inside += FP32_BYTES
    return inside * plan.feed_forward_out[0].num_inputs


def _is_wrapped(matrix: Matrix, recipe: Recipe) -> bool:
    return recipe.adapter == "lora" and not matrix.trains_with_adapter and matrix.is_wrapped_by(recipe.adapter_target_modules or ())
