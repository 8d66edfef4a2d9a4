"""Bytes that a step of training holds for its backward pass, block by block, from a blueprint and a recipe.

What a layer keeps is read off transformers' modelling files, torch's own backward formulas (what `torch.autograd` saves) and what
autocast casts on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from spaces.adapters import (
    adds_in_place,
    casts_input,
    factor_params,
    is_wrapped,
    keeps_input,
    num_between,
    num_prefix_tokens,
    rotation_numbers,
)
from spaces.attention import attention_bytes, num_kept_kv_heads, num_keys
from spaces.blueprint import Blueprint, Matrix
from spaces.config import Recipe
from spaces.quantization import is_quantized
from spaces.widths import BF16_BYTES, FP32_BYTES, INT64_BYTES, Widths

# Of RMSNorm's backward pass, written out: five tensors in fp32, per number that it normalises.
RMS_BACKWARD_BYTES = 5 * FP32_BYTES
# Of the series that makes OFT's rotations, per number of these: a skew matrix, its square and its cube.
SERIES_BYTES = 3 * FP32_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """What one step keeps. `..._per_token` are bytes per padded token."""

    plan: Blueprint
    recipe: Recipe
    width: Widths
    num_tokens: int
    """Padded tokens of a micro batch."""
    length: int
    """Padded tokens per row."""
    num_targets: int
    """Positions of a micro batch that the loss counts."""
    recomputes: bool
    """Whether a block keeps its input alone, and lives again while its own backward pass runs."""
    is_on_gpu: bool = False
    """Where autocast has layer normalisation return fp32; on a CPU it returns what it is given."""

    @property
    def _is_full(self) -> bool:
        return self.recipe.adapter == "none"

    def before_blocks(self) -> int:
        """Return what the embedding keeps: of an encoder, its normalisation's input, output and two statistics.

        Frozen, its output alone, which adapters read; with recomputation that is the input which the first block keeps.
        """
        plan, hidden, kept = self.plan, self.plan.shape.hidden_size, 0
        if plan.is_post_norm and self._is_full:
            kept = 2 * hidden + 2
        elif plan.is_post_norm and not self.recomputes:
            kept = hidden
        # Attention that is written out adds a mask to its scores: one for all tokens before, one for those in the window.
        kept += 0 if plan.is_attention_fused else 2 * num_keys(self.recipe, self.length)
        return self.num_tokens * self.width.stream * kept

    def after_blocks(self) -> int:
        """Return what the last normalisation and the inputs of the head's layers keep."""
        plan, hidden, full, width = self.plan, self.plan.shape.hidden_size, self._is_full, self.width
        # What a head of target positions multiplies is a copy of them.
        picked = width.products * hidden * self.num_targets if full and plan.head[-1].is_output else 0
        kept = 0
        if plan.norm == "rms":
            # Its input in fp32 with the statistic, before its weight, and after it what a `score` reads.
            kept = FP32_BYTES * (hidden + 1) if full or width.products == BF16_BYTES else 0
            weighed = FP32_BYTES if plan.is_norm_weighed_in_fp32 else width.stream
            kept += (weighed + (0 if picked else width.products)) * hidden if full else 0
        elif not plan.is_post_norm:
            kept = width.stream * ((1 if picked else 2) * hidden + 2) if full else 0
        pooled = sum(m.num_outputs for m in plan.head[:-1]) * self.num_targets
        return kept * self.num_tokens + picked + FP32_BYTES * pooled

    def inside_last_norm(self) -> int:
        """Return what the backward pass of the last normalisation holds beside what is kept, less what the head has let go of."""
        plan, hidden = self.plan, self.plan.shape.hidden_size
        if plan.norm != "rms":
            return 0
        picked = self.width.products * hidden * self.num_targets if self._is_full and plan.head[-1].is_output else 0
        return (RMS_BACKWARD_BYTES + self.width.stream) * hidden * self.num_tokens - picked

    def block_inputs(self) -> int:
        """Return what one block keeps that is computed again."""
        return self.num_tokens * self.width.stream * self.plan.shape.hidden_size

    def again(self, *, is_last: bool = False) -> int:
        """Return what lives beside its input while a block is computed again; what keeps that input too has no copy of it."""
        if self.plan.is_post_norm:
            shares = self._share_input(self.plan.attention_in)
        else:
            shares = self.plan.norm == "layer" or self.width.stream == FP32_BYTES
        return self.block(is_last=is_last) - (self.block_inputs() if shares else 0)

    def block(self, *, is_first: bool = False, is_last: bool = False) -> int:
        """Return what one block keeps, but for cast weights."""
        plan, recipe, width = self.plan, self.recipe, self.width
        if recipe.adapter == "bottleneck" and is_first:  # nothing before what it is behind has a gradient
            return (self.num_targets if is_last and plan.ends_at_first_tokens else self.num_tokens) * self._adapters_per_token(
                plan.block
            )
        needs_grad = self._is_full or not is_first or any(is_wrapped(m, recipe) for m in plan.attention_in)
        of_prefix = self._attended_per_token() if num_prefix_tokens(recipe) else 0
        before = (self._attention_per_token() if needs_grad else of_prefix) + self._adapters_per_token(plan.attention_in)
        after = self._adapters_per_token((*plan.attention_out, *plan.feed_forward_in, *plan.feed_forward_out))
        if not needs_grad and self._share_input(plan.attention_out):
            after += width.products * plan.attention_out[0].num_inputs
        after += self._before_per_token(plan.feed_forward_in)
        after += self._experts_per_token() if self._has_experts else self._activation_per_token()
        # Around stacked experts PEFT adds the product of its factors to the weight, and the sum is what the tokens meet.
        experts = width.products * sum(m.num_params for m in plan.block if m.num_experts > 1 and is_wrapped(m, recipe))
        whole = experts + (SERIES_BYTES + width.products) * sum(rotation_numbers(m, recipe) for m in plan.block)
        if not (is_last and plan.ends_at_first_tokens):
            return int(self.num_tokens * (before + after)) + whole
        # The normalisation that ends it is counted with what is before the next block, for all tokens.
        is_counted = self._is_full or any(is_wrapped(m, recipe) for m in plan.attention_in)
        ended = width.stream * ((2 if self._is_full else 1) * plan.shape.hidden_size + 2) * is_counted
        return int(self.num_tokens * (before - ended)) + self.num_targets * (after + ended) + whole

    def _adapters_per_token(self, stage: tuple[Matrix, ...]) -> int:
        """Return what adapters around matrices keep."""
        recipe, width = self.recipe, self.width
        wrapped = [m for m in stage if is_wrapped(m, recipe) and m.num_experts == 1]
        # A router's adapter is multiplied out, and has no result of its own.
        kept = width.products * num_between(recipe) * sum(m.is_module for m in wrapped)
        copied = FP32_BYTES if casts_input(recipe) else width.products
        kept += copied * sum(m.num_inputs for m in wrapped if self._copies_input(m))
        # What a vector or DoRA's norms scale, or a bottleneck reads, is kept for its gradient.
        read = [m for m in wrapped if recipe.adapter == "dora" or not keeps_input(m, recipe)]
        return kept + width.products * sum(m.num_outputs for m in read)

    def cast_block_weights(self) -> int:
        """Return one block's weights as autocast has cast them; grouped products are not autocast."""
        if not self.width.is_autocast:
            return 0
        matrices = self.plan.block
        full = sum(m.num_params for m in matrices if m.num_experts == 1)
        return BF16_BYTES * (full if self._is_full else factor_params(matrices, self.recipe))

    def cast_head_weights(self) -> int:
        """Return the head's weights as autocast has cast them."""
        if not self.width.is_autocast:
            return 0
        trained = sum(m.num_params for m in self.plan.head if self._is_full or m.trains_with_adapter)
        return BF16_BYTES * (trained + factor_params(self.plan.head, self.recipe))

    def inside_block(self) -> int:
        """Return the most that is held beside what a block keeps, late in its forward pass or early in its backward pass."""
        backward = self._weighing_or_activation_per_token() if self._has_experts else self._backward_per_token()
        # From the backward pass on, and so when a block is computed again, there is the gradient of its result.
        gradient = self.width.stream * self.plan.shape.hidden_size
        inside = max(self._forward_per_token() + (gradient if self.recomputes else 0), backward + gradient)
        if self.plan.norm == "rms":
            inside = max(inside, RMS_BACKWARD_BYTES * self.plan.shape.hidden_size + gradient - self._feed_forward_per_token())
        # What PEFT has multiplied out has a gradient as large, before that becomes those of the factors.
        last = self.plan.feed_forward_out[0]
        merged = last.num_params if self._has_experts and is_wrapped(last, self.recipe) else 0
        later = self._not_yet() if self.recipe.adapter in ("dora", "vera") else []
        beside = max(self._while_rows_are_scaled(later), self._while_results_are_scaled(gradient, later))
        return max(self.num_tokens * inside + self.width.products * merged, beside, self._while_spread_out(gradient))

    def inside_attention(self) -> int:
        """Return what the backward pass of attention holds beside what a block keeps: where little follows, that is the most.

        The gradients of the residual stream, of attention's output, and of queries, keys and values.
        """
        shape, width = self.plan.shape, self.width
        num_kv_heads = num_kept_kv_heads(self.plan, width, is_on_gpu=self.is_on_gpu)
        half = width.products * shape.head_dim * (shape.num_heads + num_kv_heads)
        gradients = self.num_tokens * (width.stream * shape.hidden_size + 2 * half)
        # When the last of the three is made, neither it nor attention's output is kept yet.
        later = [(m, half + FP32_BYTES * shape.num_heads) for m in self.plan.attention_in if is_wrapped(m, self.recipe)]
        return max(gradients, self._while_rows_are_scaled(later), self._while_results_are_scaled(0, later))

    def _while_rows_are_scaled(self, later: list[tuple[Matrix, int]]) -> int:
        """Return what is held beside while DoRA takes the norms of a product's rows, and then while it scales the results.

        The norms: the weight in the format of the factors, their product, that scaled, and the sum. The results, in fp32, as the
        norms that train are: gradients of the scaled sum and of the sum, and what the norms' is the sum of. What the block keeps of
        later products is not there yet.
        """
        if self.recipe.adapter != "dora":
            return 0
        weights = 4 * FP32_BYTES if self.width.is_autocast else 3 * self.width.products
        most = 0
        for m, not_yet in later:
            norms = weights * m.num_inputs * m.num_outputs
            per_token = self.width.products * m.num_outputs
            scaled = 3 * FP32_BYTES * m.num_outputs
            most = max(most, norms + self.num_tokens * (per_token - not_yet), self.num_tokens * (scaled - not_yet))
        return most

    def _while_results_are_scaled(self, gradient: int, later: list[tuple[Matrix, int]]) -> int:
        """Return what is held beside while VeRA scales what it adds to a product, or in the backward pass of that.

        Forward the product's result, what is added and the sum, in fp32 under autocast as the product's input; backward the gradient
        of the sum, that of what is scaled, and its product with it, of which the vector's is the sum.
        """
        if self.recipe.adapter != "vera":
            return 0
        copied, cast = (FP32_BYTES, self.width.products) if self.width.is_autocast else (0, FP32_BYTES)
        before, moments = gradient if self.recomputes else 0, [0]
        for m, not_yet in later:
            forward = copied * m.num_inputs + (2 * FP32_BYTES + cast) * m.num_outputs
            backward = (3 * FP32_BYTES + (cast if copied else 0)) * m.num_outputs
            moments.append(max(forward, backward) + before - not_yet)
        return self.num_tokens * max(moments)

    def _not_yet(self) -> list[tuple[Matrix, int]]:
        """Return the matrices that are wrapped, with the bytes per token that the block keeps after each."""
        # The gate's result and its activation are there before the other factor; of GELU by its formula, as measured, two gradients.
        inner = self.plan.feed_forward_out[0].num_inputs
        is_half_there = self.plan.num_kept_by_activation > 2 and self.plan.feed_forward_in[0].num_outputs == inner
        there = 2 * self.width.products * inner if is_half_there else 0
        feed_forward = self._before_per_token(self.plan.feed_forward_in) + self._feed_forward_per_token()
        later = {
            self.plan.attention_in: self.block() // self.num_tokens - self._before_per_token(self.plan.attention_in),
            self.plan.attention_out: feed_forward,
            self.plan.feed_forward_in: self._activation_per_token() - there,
            self.plan.feed_forward_out: 0,
        }
        return [(m, not_yet) for stage, not_yet in later.items() for m in stage if is_wrapped(m, self.recipe)]

    def _while_spread_out(self, gradient: int) -> int:
        """Return what is held beside in the last product of a block whose weight is quantised: that weight in full, and in the
        backward pass, of the inner width, the gradient of its input.
        """
        last = self.plan.feed_forward_out[0]
        if not is_quantized(last, self.recipe):
            return 0
        inside = self.width.products * last.num_inputs + gradient
        return self.num_tokens * inside + self.width.products * last.num_inputs * last.num_outputs

    def _copies_input(self, matrix: Matrix) -> bool:
        """Return whether an adapter keeps its input in a copy of its own: in fp32, or cast by autocast from what is."""
        if not self.width.is_autocast or not keeps_input(matrix, self.recipe):
            return False
        is_fp32 = self.is_on_gpu and self.plan.norm == "layer" and matrix in (*self.plan.attention_in, *self.plan.feed_forward_in)
        return is_fp32 or casts_input(self.recipe)

    def _is_handed_fp32(self, matrix: Matrix) -> bool:
        """Return whether PEFT hands an adapter its input in fp32, and gets the gradient so."""
        return self.width.is_autocast and is_wrapped(matrix, self.recipe) and casts_input(self.recipe)

    def _share_input(self, stage: tuple[Matrix, ...]) -> bool:
        """Return whether some of the matrices keep their input, and that is no copy."""
        if self._is_full:
            return not self.width.is_autocast
        return any(keeps_input(m, self.recipe) and not self._copies_input(m) for m in stage)

    @property
    def _has_experts(self) -> bool:
        return self.plan.feed_forward_out[0].num_experts > 1

    @property
    def _expert_width(self) -> int:
        """Bytes of the numbers in the experts: grouped products are not autocast, and cast their input to their weights' format."""
        return FP32_BYTES if self.width.is_autocast and self._is_full else self.width.products

    @property
    def _weight_width(self) -> int:
        """Bytes of the numbers that the experts' results become once they are weighed."""
        return FP32_BYTES if self.plan.are_experts_weighed_in_fp32 else self._expert_width

    def _attention_per_token(self) -> float:
        plan, shape, width = self.plan, self.plan.shape, self.width
        kept = self._before_per_token(plan.attention_in) + self._attended_per_token()
        if plan.has_head_norms:
            queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
            weighed = FP32_BYTES if plan.is_norm_weighed_in_fp32 else width.products
            kept += (FP32_BYTES + (weighed if self._is_full else 0)) * (queries + keys)
            kept += FP32_BYTES * (shape.num_heads + shape.num_kv_heads)
        return kept

    def _attended_per_token(self) -> float:
        # The output is the input of the next product; under autocast an adapter's copy is counted with it.
        is_output_kept = self._is_full or self._share_input(self.plan.attention_out)
        return attention_bytes(
            self.plan, self.recipe, self.width, self.length, is_output_kept=is_output_kept, is_on_gpu=self.is_on_gpu
        )

    def _activation_per_token(self) -> int:
        last, num_inner = self.plan.feed_forward_out[0], self.plan.num_kept_by_activation
        if not self._is_full and not self._share_input((last,)):
            num_inner -= 1
        return self.width.products * num_inner * last.num_inputs

    def _experts_per_token(self) -> int:
        """Return what the router and the experts that a token meets keep, sorted by expert as the grouped products want them."""
        last = self.plan.feed_forward_out[0]
        trains = self._is_full or is_wrapped(last, self.recipe)
        # All probabilities and their sum; of those chosen the probability twice, the index, and three orders of the pairs.
        kept = FP32_BYTES * (last.num_experts + 1) + last.num_active * (2 * FP32_BYTES + 4 * INT64_BYTES)
        # The result, for its weighing, and what the activation keeps; the inputs of both products where their weights train.
        num_inner = self.plan.num_kept_by_activation - (0 if trains else 1)
        numbers = last.num_outputs * (2 if trains else 1) + num_inner * last.num_inputs
        return kept + self._expert_width * last.num_active * numbers

    def _before_per_token(self, stage: tuple[Matrix, ...]) -> int:
        """Return the bytes from the residual stream to the inputs of one half's first matrices."""
        plan, width, full, hidden = self.plan, self.width, self._is_full, self.plan.shape.hidden_size
        norms = plan.num_norms_per_block // 2  # around some halves there is a second one
        if plan.norm == "layer":
            # One kernel: its input as it comes, and two statistics.
            kept = width.stream * norms * (hidden + 2)
        else:
            # Written out: its input in fp32 and its statistic, and before its weight where that trains.
            weighed = FP32_BYTES if plan.is_norm_weighed_in_fp32 else width.stream
            kept = norms * (FP32_BYTES * (hidden + 1) + (weighed * hidden if full else 0))
        if width.is_autocast and full:
            # Every product has a copy of its own but the grouped ones; those of adapters are counted with them.
            kept += width.products * hidden * sum(m.num_experts == 1 for m in stage)
        elif self._share_input(stage):
            kept += width.products * hidden
        return kept

    def _feed_forward_per_token(self) -> int:
        """Return what is gone of a block's activations when the normalisation before its feed-forward has its backward pass."""
        plan, recipe, width = self.plan, self.recipe, self.width
        kept = self._experts_per_token() if self._has_experts else self._activation_per_token()
        stages = (*plan.feed_forward_in, *plan.feed_forward_out)
        wrapped = [m for m in stages if keeps_input(m, recipe) and m.num_experts == 1]
        kept += width.products * num_between(recipe) * len(wrapped)
        copied = [m for m in wrapped if self._copies_input(m)]
        if width.is_autocast and self._is_full:
            copied = [m for m in plan.feed_forward_in if m.num_experts == 1]
        kept += width.products * sum(m.num_inputs for m in copied)
        return kept + (width.products * plan.shape.hidden_size if self._share_input(plan.feed_forward_in) else 0)

    def _forward_per_token(self) -> int:
        """Return what is held beside as a block ends: the input and the result of its last product, and what is added to it."""
        plan, width, hidden, last = self.plan, self.width, self.plan.shape.hidden_size, self.plan.feed_forward_out[0]
        wrapped = is_wrapped(last, self.recipe)
        if self._has_experts:
            # The weighed results (computed again, their gradient too), and the inputs of the experts where they are not kept.
            results = self._weight_width * (2 if self.recomputes else 1)
            inputs = 0 if self._is_full or wrapped else self._expert_width
            return last.num_active * last.num_outputs * (results + inputs) + (width.stream * hidden if inputs else 0)
        is_read = wrapped and self.recipe.adapter != "bottleneck"
        is_input_kept = self._is_full or (is_read and not width.is_autocast) or self._share_input((last,))
        inside = 0 if is_input_kept else width.products * last.num_inputs
        if self._is_handed_fp32(last):
            inside += FP32_BYTES * last.num_inputs
        # An adapter's result, that of what it wraps (which a bottleneck keeps), and their sum.
        is_apart = wrapped and not adds_in_place(plan, self.recipe)
        results = width.products * hidden * (2 + is_read if is_apart else 1)
        if not self.plan.is_post_norm:
            return inside + results
        # Normalised after the sum: the residual is no input of a normalisation, and so not kept unless it is that of a product.
        inside += 0 if self._share_input(plan.feed_forward_in) else width.stream * hidden
        return inside + max(results, width.products * hidden + width.stream * hidden)

    def _backward_per_token(self) -> int:
        """Return what the backward pass of a block's feed-forward holds beside the activations.

        Gradients of the inner width: of the activation's output and input. Where a product follows the activation (gated, or GELU
        by its formula) and its result was not kept, of that too; where all trains, a plain GELU has freed the first by then.
        """
        last, full = self.plan.feed_forward_out[0], self._is_full
        is_plain = self.plan.num_kept_by_activation == 2
        is_one = full or (adds_in_place(self.plan, self.recipe) and is_wrapped(last, self.recipe))
        copies = 1 if is_one and is_plain else 2
        if not (full or is_plain or keeps_input(last, self.recipe)):
            copies += 1
        inside = self.width.products * copies
        if self.recipe.adapter == "ia3" and keeps_input(last, self.recipe):
            # The gradients of what is scaled, of the input, and their products with it, of which the vector's is the sum.
            inside = 3 * FP32_BYTES
        elif self._is_handed_fp32(last):
            inside += FP32_BYTES
        # Where the last product is normalised, that comes first.
        norm = RMS_BACKWARD_BYTES * last.num_outputs if self.plan.num_norms_per_block == 4 else 0
        return max(inside * last.num_inputs, norm)

    def _weighing_or_activation_per_token(self) -> int:
        """Return what the backward pass of the experts holds beside the activations, at the larger of two moments.

        The weighing, in the format of the probabilities: gradients of the sorted results, of the unweighted ones (and those cast),
        and their products with the results. The activation: gradients of its output and of both factors; the results are gone by
        then, and the input of the last product too, where that was kept.
        """
        last, width = self.plan.feed_forward_out[0], self._expert_width
        trains = self._is_full or is_wrapped(last, self.recipe)
        weighing = last.num_outputs * (3 * self._weight_width + (width if self._weight_width != width else 0))
        activation = width * ((2 if trains else 3) * last.num_inputs - last.num_outputs)
        return last.num_active * max(weighing, activation)
