"""Bytes that one rank holds while it trains, by term, from a blueprint and a trial config.

What FSDP2 gathers and reduces is read off `torch.distributed.fsdp`; what a step keeps is in `spaces.activations`. Tests compare the
sum with the tensors that really live. The peak is the largest of the moments below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from spaces.activations import Activations
from spaces.adapters import adapter_params, is_wrapped, prefix_params, shared_params
from spaces.blueprint import Blueprint, Matrix
from spaces.config import Layout, Recipe, TrialConfig
from spaces.quantization import frozen_bytes
from spaces.tensor_parallel import local_blueprint, num_partial_params
from spaces.widths import FP32_BYTES, widths

# Scores of the cross entropy, the gradient of the picked one, and that of all; in fp32 whatever the model computes in.
LOGITS_COPIES = 3
# Where head and loss are one operation, what its logits may take with what is made of them: enough targets at a time that to add the
# gradient of the head for each such part takes little of a step (a GPU's 16,384 targets of 128,256 tokens: eight parts).
LOGITS_BYTES, BYTES_PER_LOGIT = 2 * 1024**3, 8
ADAMW_STATES = 2
# While FSDP2 gathers a block, it holds the flat buffer of it and that of the one before beside the weights themselves.
GATHERED_BLOCKS = 3
# While it reduces gradients over gloo: its flat buffer, the copy that gloo makes of it, the result of half the size over two ranks,
# and what of the gathered weights is not freed yet; measured on two ranks, and an upper bound on more.
REDUCED_COPIES, GATHERED_LEFT = 2.5, 0.5


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
    """DDP's buckets; what FSDP2 gathers, and its buffers; gradients that tensor-parallel ranks sum together."""

    @property
    def peak_bytes(self) -> int:
        return sum(int(getattr(self, f.name)) for f in fields(self))


def host_bytes(plan: Blueprint, config: TrialConfig) -> int:
    """Return what a rank leaves to its host with `offload: cpu`: its shards, their gradients and the optimizer's state."""
    if config.layout.offload == "none":
        return 0
    held = FP32_BYTES * (2 + ADAMW_STATES) * _num_updated(plan, config) + _frozen_bytes(plan, config)
    return held // config.layout.num_shards


def num_trained(plan: Blueprint, recipe: Recipe) -> int:
    """Return the parameters that train."""
    if recipe.adapter == "none":
        return plan.num_params
    heads = sum(m.num_params for m in plan.head if m.trains_with_adapter)
    return heads + num_adapter_params(plan, recipe)


def num_trained_of_block(plan: Blueprint, recipe: Recipe) -> int:
    """Return the parameters of one block that train."""
    return plan.num_block_params if recipe.adapter == "none" else adapter_params(plan.block, recipe)


def num_adapter_params(plan: Blueprint, recipe: Recipe) -> int:
    """Return the parameters that an adapter adds and trains."""
    of_blocks = plan.shape.num_layers * adapter_params(plan.block, recipe)
    return of_blocks + adapter_params(plan.head, recipe) + prefix_params(plan, recipe)


def leaves_rows_alone(config: TrialConfig) -> bool:
    """Return whether rows of the embedding that no token has are left alone: all weights train, and a rank holds the whole table."""
    layout = config.layout
    return config.recipe.adapter == "none" and not layout.is_sharded and layout.tensor_parallel_size == 1


def num_updated(plan: Blueprint, config: TrialConfig) -> int:
    """Return the parameters that a step updates on a rank that holds them all: of an embedding, rows that the data read."""
    return num_trained(plan, config.recipe) - (plan.num_idle_params if leaves_rows_alone(config) else 0)


def rank_memory(
    plan: Blueprint,
    config: TrialConfig,
    length: int,
    num_targets: int | None = None,
    *,
    num_tokens: int | None = None,
    num_micro_batches: int | None = None,
    is_on_gpu: bool = False,
) -> RankMemory:
    """Return what a rank holds at its peak.

    Args:
        plan: the model.
        config: recipe and layout; the layout's micro batch counts.
        length: padded tokens per row, at most.
        num_targets: positions of a micro batch that the loss counts; by default those of plain text or of a class.
        num_tokens: padded tokens of a micro batch; by default the most that it may have.
        num_micro_batches: of a rank and step; by default those of rows of that length.
        is_on_gpu: whether ranks exchange by NCCL, which makes no copy, or on CPUs by gloo.
    """
    recipe = config.recipe
    tokens = config.most_tokens(length) if num_tokens is None else num_tokens
    accumulates = (config.num_grad_accum_steps(length) if num_micro_batches is None else num_micro_batches) > 1
    # Whose ranks split matrices hold what one rank would of a model with fewer heads and a narrower inner width.
    num_partial = num_partial_params(plan, recipe) if config.layout.tensor_parallel_size > 1 else 0
    plan = local_blueprint(plan, config.layout.tensor_parallel_size)
    targets = int(tokens * plan.targets_per_row(length) / length) if num_targets is None else num_targets
    step = Activations(
        plan=plan,
        recipe=recipe,
        width=widths(config),
        num_tokens=tokens,
        length=length,
        num_targets=targets,
        recomputes=config.layout.recomputes(0),
        is_on_gpu=is_on_gpu,
    )
    trained, shards, state = _num_updated(plan, config), config.layout.num_shards, _between_steps(plan, config)
    computed = _while_computing(step, config.layout, state)
    at_update = replace(state, gradients_bytes=_held_here(FP32_BYTES * trained, config.layout))
    if num_partial:
        at_update = replace(at_update, communication_bytes=FP32_BYTES * num_partial // shards)
    if _has_buckets(config.layout):
        return max(_while_replicated(plan, recipe, computed, at_update), key=_peak)
    at_embedding = at_update
    if plan.is_head_tied and recipe.adapter == "none":
        # The gradients that the shared matrix gets as head and as embedding are there beside their sum, and beside that of the micro
        # batches before.
        shared = (3 if accumulates else 2) * FP32_BYTES * plan.head[-1].num_weights
        at_embedding = replace(at_update, gradients_bytes=at_update.gradients_bytes + shared)
    moments = [*computed, at_embedding, at_update]
    if config.layout.is_sharded:
        moments = _while_sharded(step, config.layout, is_on_gpu, computed, at_update)
    if accumulates:
        # Those of the micro batches before are all there, beside that of the product whose backward pass runs.
        summed = at_update.gradients_bytes + FP32_BYTES * _num_trained_of(plan.feed_forward_out, recipe)
        moments = [replace(m, gradients_bytes=max(m.gradients_bytes, summed)) if m is not at_update else m for m in moments]
    return max(moments, key=_peak)


def _between_steps(plan: Blueprint, config: TrialConfig) -> RankMemory:
    """Return what a rank holds all the time."""
    recipe, trained = config.recipe, _num_updated(plan, config)
    return RankMemory(
        weights_bytes=_held_here(FP32_BYTES * trained + _frozen_bytes(plan, config), config.layout)
        + FP32_BYTES * shared_params(plan, recipe),
        optimizer_bytes=_held_here(FP32_BYTES * ADAMW_STATES * trained, config.layout),
        # DDP's buckets, which are there before the first step, hold all gradients.
        communication_bytes=FP32_BYTES * trained if _has_buckets(config.layout) else 0,
    )


def _has_buckets(layout: Layout) -> bool:
    """Return whether gradients are exchanged by DDP."""
    return not layout.is_sharded and layout.data_parallel_size > 1


def _while_replicated(plan: Blueprint, recipe: Recipe, moments: Sequence[RankMemory], at_update: RankMemory) -> list[RankMemory]:
    """Return the moments of a rank whose gradients are in DDP's buckets, but for that which is computed."""
    of_product = FP32_BYTES * _num_trained_of(plan.feed_forward_out, recipe)
    computed = [replace(m, gradients_bytes=min(m.gradients_bytes, of_product)) for m in moments]
    if recipe.adapter != "none":
        return [*computed, replace(at_update, gradients_bytes=0)]
    # The gradients that a shared matrix gets as head and as embedding are there beside their sum.
    table = 3 * plan.head[-1].num_weights if plan.is_head_tied else plan.num_embedding_params - plan.num_idle_params
    return [*computed, replace(at_update, gradients_bytes=FP32_BYTES * table)]


def _frozen_bytes(plan: Blueprint, config: TrialConfig) -> int:
    """Return what is held of weights that no step updates."""
    if config.recipe.adapter == "none":
        return FP32_BYTES * (num_trained(plan, config.recipe) - num_updated(plan, config))
    filling = plan.shape.num_layers * _num_filled(plan, config.layout)
    return frozen_bytes(plan, config.recipe, widths(config).frozen) + widths(config).frozen * filling


def _num_filled(plan: Blueprint, layout: Layout) -> int:
    """Return the numbers by which FSDP2 fills up one block's stacked experts, which it deals to the shards one by one.

    Other weights are dealt by rows: what those are filled up by is next to nothing.
    """
    stacked = [m for m in plan.block if m.num_experts > 1]
    return sum(-m.num_experts % layout.num_shards * m.num_params // m.num_experts for m in stacked)


def _num_updated(plan: Blueprint, config: TrialConfig) -> int:
    """Return `num_updated`, and what it is filled up by where it is sharded."""
    filling = plan.shape.num_layers * _num_filled(plan, config.layout) if config.recipe.adapter == "none" else 0
    return num_updated(plan, config) + filling


def _held_here(num_bytes: int, layout: Layout) -> int:
    """Return what of all shards a rank's device holds between steps."""
    return num_bytes // layout.num_shards if layout.offload == "none" else 0


def targets_at_once(vocab_size: int) -> int:
    """Return for how many targets a head and its loss compute logits together."""
    return max(1, LOGITS_BYTES // (BYTES_PER_LOGIT * vocab_size))


def _logits_bytes(step: Activations) -> int:
    """Return what is held beside the activations while the loss is computed.

    Head and loss as one (`trainables.head_loss`): of as many targets as are computed together, the logits and their softmax, which is
    in fp32, or its gradient and the head's; of all of them what goes into the head, where the backward pass does not need it anyway,
    and the gradient of that; and what that was picked from.
    """
    plan, width, head, targets = step.plan, step.width, step.plan.head[-1], step.num_targets
    if not head.is_output or plan.are_logits_capped or is_wrapped(head, step.recipe):
        per_logit = LOGITS_COPIES * FP32_BYTES + (width.products if plan.are_logits_capped else 0)  # a cap keeps its tanh
        return per_logit * head.num_outputs * (targets if head.per == "target" else step.num_tokens)
    trains, products = step.recipe.adapter == "none", width.products
    at_once = min(targets, targets_at_once(head.num_outputs))
    logits, given = at_once * head.num_outputs, targets * head.num_inputs
    softmax = (FP32_BYTES + (products if products != FP32_BYTES else 0)) * logits
    # Fed with fp32 under autocast, as layer normalisation always does there, the head casts what it computes together.
    stream = FP32_BYTES if width.is_autocast and plan.norm == "layer" else width.stream
    cast = products * at_once * head.num_inputs if stream != products else 0
    inputs = stream * given * 2 - (products * given if trains else 0) + cast  # what trains is counted among the activations
    # The last normalisation's result, of which the targets are picked; and what it is computed from, where that is counted nowhere.
    is_input_counted = trains or (plan.norm == "rms" and products != FP32_BYTES)
    inputs += stream * head.num_inputs * step.num_tokens * (1 if is_input_counted else 2)
    if not trains:
        return inputs + softmax
    held = FP32_BYTES if width.is_autocast else products
    if at_once < targets:
        total = FP32_BYTES * head.num_weights
        return inputs + total + max(softmax, products * (logits + (head.num_weights if products != FP32_BYTES else 0)))
    return inputs + max(softmax, products * logits + (products + (held if held != products else 0)) * head.num_weights)


def _while_computing(step: Activations, layout: Layout, state: RankMemory) -> tuple[RankMemory, ...]:
    """Return five moments: the loss, and the backward pass of the last normalisation, of the last block, the next and the first.

    In between, activations go and gradients come at an even pace, so one of the ends is the largest. A block that is computed again
    keeps its input, and all of it lives again while its own backward pass runs.
    """
    plan, recipe, num_layers = step.plan, step.recipe, step.plan.shape.num_layers
    before, casts = step.before_blocks(), step.cast_block_weights()
    kept_by = _kept_by_blocks(step, layout)

    def inside(index: int) -> int:
        """Return what is kept up to a block in whose backward pass that is, and what lives there beside."""
        is_last, recomputes = index == num_layers - 1, layout.recomputes(index)
        again = step.again(is_last=is_last) if recomputes else 0
        # Autocast keeps what it casts to the end of the forward pass; a block that is computed again casts its own again.
        num_cast = sum(not layout.recomputes(i) for i in range(index + 1)) + recomputes
        is_short = is_last and plan.ends_at_first_tokens
        beside = step.inside_attention() if is_short else replace(step, recomputes=recomputes).inside_block()
        return before + sum(kept_by[: index + 1]) + again + num_cast * casts + beside

    kept = before + sum(kept_by) + step.after_blocks() + num_layers * casts + step.cast_head_weights()
    of_head = _num_trained_of(plan.head, recipe)
    of_last_block = of_head + _num_trained_of(_first_done(plan), recipe)
    in_last_block = replace(state, activations_bytes=inside(num_layers - 1), gradients_bytes=FP32_BYTES * of_last_block)
    # The gradient of a block's last product comes first.
    of_last = _num_trained_of(plan.feed_forward_out, recipe)
    of_next = of_head + num_trained_of_block(plan, recipe) + of_last
    tables = plan.num_embedding_params if recipe.adapter == "none" and not plan.is_head_tied else 0
    of_first = num_trained(plan, recipe) - num_trained_of_block(plan, recipe) - tables + of_last
    is_alone = num_layers == 1
    return (
        replace(state, activations_bytes=kept, logits_bytes=_logits_bytes(step)),
        replace(state, activations_bytes=kept + step.inside_last_norm(), gradients_bytes=FP32_BYTES * of_head),
        in_last_block,
        in_last_block if is_alone else replace(state, activations_bytes=inside(num_layers - 2), gradients_bytes=FP32_BYTES * of_next),
        replace(state, activations_bytes=inside(0), gradients_bytes=FP32_BYTES * of_first),
    )


def _kept_by_blocks(step: Activations, layout: Layout) -> list[int]:
    """Return what each block keeps for the backward pass."""
    last, inputs, between = step.plan.shape.num_layers - 1, step.block_inputs(), step.block()
    ends = {index: step.block(is_first=index == 0, is_last=index == last) for index in (0, last)}
    return [inputs if layout.recomputes(index) else ends.get(index, between) for index in range(last + 1)]


def _first_done(plan: Blueprint) -> tuple[Matrix, ...]:
    """Return the matrices that have their gradients at the peak of the last block's backward pass.

    Where next to nothing follows its attention, that is in there.
    """
    if not plan.ends_at_first_tokens:
        return plan.feed_forward_out
    return (*plan.attention_out, *plan.feed_forward_in, *plan.feed_forward_out)


def _while_sharded(
    step: Activations, layout: Layout, is_on_gpu: bool, computed: tuple[RankMemory, ...], at_update: RankMemory
) -> list[RankMemory]:
    """Return the moments of a sharded model: what is gathered and reduced beside the shards, block by block.

    What no block holds (embedding, last normalisation, head) is gathered from the forward pass to the end of the backward pass.
    """
    plan, recipe, shards = step.plan, step.recipe, layout.num_shards
    at_loss, _, in_last_block, in_next_block, in_first_block = computed
    num_layers = plan.shape.num_layers
    trained_block = num_trained_of_block(plan, recipe)
    held_block = plan.num_block_params + adapter_params(plan.block, recipe)
    trained_root = num_trained(plan, recipe) - num_layers * trained_block
    held_root = num_trained(plan, recipe) + _num_frozen(plan, recipe) - num_layers * held_block
    held_block += _num_filled(plan, layout)
    trained_block += _num_filled(plan, layout) if recipe.adapter == "none" else 0
    gathered = step.width.products
    root, block = gathered * held_root, gathered * held_block
    largest_block, largest_of_head = (max(m.num_params for m in matrices) for matrices in (plan.block, plan.head))
    arriving_block = _arriving(step, layout, trained_block, held_block, largest_block)
    arriving_root = _arriving(step, layout, trained_root, held_root, max(plan.num_embedding_params, largest_of_head))
    # A single rank gathers nothing, and nothing ahead: no flat buffers, and one block at a time.
    copies = (2, 2, GATHERED_BLOCKS, 2) if shards > 1 else (1, 0, 1, 1)
    # The embedding's gradient comes last, unless the head is tied to it.
    head_gradients = gathered * _num_trained_of(plan.head, recipe)
    last_gradients = gathered * _num_trained_of(plan.feed_forward_out, recipe)
    # What stays to the end of the root's reduction over ranks is its last gradient, that of a head of its own.
    last_of_root = 0 if plan.is_head_tied or shards == 1 else head_gradients
    reducing_block = _reducing(gathered, trained_block, held_block, 0, shards, is_on_gpu)
    reducing_root = _reducing(gathered, trained_root, held_root, last_of_root, shards, is_on_gpu)
    # The flat buffer and the result, unless it went to the host, stay until the next block is reduced.
    reduced_block = FP32_BYTES * trained_block + _held_here(FP32_BYTES * trained_block, layout)
    block_shards = _held_here(FP32_BYTES * num_layers * trained_block, layout)
    but_one = at_loss.activations_bytes - _kept_by_blocks(step, layout)[-1]
    plain = replace(at_loss, activations_bytes=0, logits_bytes=0)
    of_root, ahead, in_forward, in_backward = copies
    computing = root + head_gradients + in_backward * block + arriving_block
    moments = [
        replace(plain, communication_bytes=of_root * root + ahead * block + max(arriving_root, arriving_block)),
        replace(plain, activations_bytes=but_one, communication_bytes=root + in_forward * block + arriving_block),
        replace(at_loss, communication_bytes=root),
        replace(in_last_block, gradients_bytes=gathered * _num_trained_of(_first_done(plan), recipe), communication_bytes=computing),
        replace(plain, activations_bytes=but_one, communication_bytes=root + head_gradients + block + reducing_block),
        replace(plain, gradients_bytes=block_shards, communication_bytes=root + gathered * trained_root + reducing_block),
        replace(plain, gradients_bytes=block_shards, communication_bytes=reducing_root),
        at_update,
    ]
    if plan.is_head_tied:
        # The gradients that the shared matrix gets as head and as embedding are there beside their sum.
        all_gradients = gathered * trained_root + 2 * head_gradients
        moments.append(replace(plain, gradients_bytes=block_shards, communication_bytes=root + all_gradients + reduced_block))
    if num_layers > 1:
        later_shards = block_shards * (num_layers - 2) // num_layers
        moments += [
            replace(in_next_block, gradients_bytes=last_gradients, communication_bytes=computing + reduced_block),
            replace(in_first_block, gradients_bytes=last_gradients + later_shards, communication_bytes=computing + reduced_block),
        ]
    return moments


def _arriving(step: Activations, layout: Layout, num_trained: int, num_held: int, largest: int) -> int:
    """Return the bytes, at most, of what comes from the host and is not gathered yet: as wide as it is held there.

    Of several shards all of a block's; one rank alone copies and casts one weight after the other.
    """
    if layout.offload == "none":
        return 0
    frozen, products = step.width.frozen, step.width.products
    if layout.num_shards > 1:
        return (FP32_BYTES * num_trained + frozen * (num_held - num_trained)) // layout.num_shards
    held = FP32_BYTES if step.recipe.adapter == "none" else frozen
    return largest * (held + (products if held != products else 0))


def _reducing(gathered: int, num_trained: int, num_held: int, last: int, shards: int, is_on_gpu: bool) -> int:
    """Return the bytes that FSDP2 holds while it reduces gradients, of which the last stays until there is a result."""
    flat = FP32_BYTES * num_trained
    if is_on_gpu:
        return max(gathered * num_trained + flat, flat + flat // shards + last)
    return int(REDUCED_COPIES * flat + GATHERED_LEFT * gathered * num_held)


def _peak(memory: RankMemory) -> int:
    return memory.peak_bytes


def _num_trained_of(matrices: tuple[Matrix, ...], recipe: Recipe) -> int:
    if recipe.adapter == "none":
        return sum(m.num_params for m in matrices)
    return adapter_params(matrices, recipe) + sum(m.num_params for m in matrices if m.trains_with_adapter)


def _num_frozen(plan: Blueprint, recipe: Recipe) -> int:
    """Return the parameters that are held and do not train; PEFT keeps the head that it trains beside the one that was there."""
    return 0 if recipe.adapter == "none" else plan.num_params
