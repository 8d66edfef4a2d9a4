"""Model FLOPs from shapes and from what needs a gradient.

Per real token of a matrix with W weights: 2W forward, 2W for the gradient of its input where that is needed, 2W for its own
gradient where it trains. So full fine-tuning costs 6 per weight and token, and LoRA about 4 for a frozen weight. Attention has no
weights: 4 x heads x head dim x length² forward (scores and weighted sum) and twice that backward, LoRA or not; a causal mask halves
it, but not what a token has with a prefix. Embedding look-ups, padding, recomputation, and what no first token needs of an encoder's
last block, count nothing. The split by what needs a gradient follows from the chain rule; the 6N and the attention term are those of
PaLM (https://arxiv.org/abs/2204.02311, appendix B), and so is the name of what counts recomputation too: hardware FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spaces.adapters import adds_in_place, num_between, num_prefix_tokens, rotation_numbers
from spaces.blueprint import Blueprint, Matrix
from spaces.config import Recipe, TrialConfig

CONVENTION = "model FLOPs of real tokens; frozen weights 4N, trained 6N; causal attention halved; no recomputation"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingFlops:
    """Model FLOPs of forward and backward, by what they grow with."""

    per_token: float
    per_target: float
    """Of what is applied only where the loss counts: target tokens, or once a classified row."""
    per_squared_length: float
    """Attention's, per token pair of a row."""

    def total(self, *, num_tokens: float, num_targets: float, sum_of_squared_lengths: float) -> float:
        """Return the FLOPs of training on these rows once."""
        return self.per_token * num_tokens + self.per_target * num_targets + self.per_squared_length * sum_of_squared_lengths


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """What training computes."""

    model: TrainingFlops
    """Forward and backward, each product once: what MFU counts."""
    recomputed: TrainingFlops
    """What the backward pass computes a second time; HFU counts it too."""
    is_whole: bool = True
    """Whether all of it is known: `ModelShape.is_counted`."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepFlops:
        """Read back what `dataclasses.asdict` wrote."""
        parts = {name: TrainingFlops(**data[name]) for name in ("model", "recomputed")}
        return cls(**parts, is_whole=data.get("is_whole", True))


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearUse:
    """One matrix product of the forward pass."""

    num_weights: int
    per: Literal["token", "target"]
    """Whether it is applied at every position, or only where the loss counts."""
    input_needs_grad: bool
    weight_needs_grad: bool
    share: float = 1.0
    """Share of the positions that it is applied at: an expert sees only the tokens that are routed to it."""

    @property
    def forward_flops(self) -> float:
        """FLOPs at one position."""
        return 2.0 * self.num_weights * self.share

    @property
    def flops(self) -> float:
        """Forward and backward FLOPs at one position."""
        return self.forward_flops * (1 + self.input_needs_grad + self.weight_needs_grad)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionUse:
    """The products of attention over all layers."""

    width: int
    """Numbers of a head that are multiplied with one another for a token pair: sum over the products of all layers."""
    num_heads: int
    causal: bool
    num_before: int = 0
    """Keys of a prefix, which every token sees beside those of its row."""

    @property
    def flops(self) -> float:
        """Forward and backward FLOPs per token pair; key-value heads that query heads share save memory, not FLOPs."""
        return self._of_pair / 2 if self.causal else self._of_pair

    @property
    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of a token with the prefix."""
        return self._of_pair * self.num_before

    @property
    def _of_pair(self) -> float:
        return 2.0 * self.width * self.num_heads


def attention_products(query_needs_grad: bool, key_needs_grad: bool, value_needs_grad: bool) -> tuple[int, int]:
    """Return the products of one layer that are as wide as its keys, and those that are as wide as its values.

    Scores and weighted sum, and of the four backward those whose result is needed. Forward S = Q K' and O = P V; backward
    dV = P' dO, dP = dO V', dQ = dS K, dK = dS' Q. All of them: three times the forward.
    """
    return 1 + query_needs_grad + key_needs_grad, 1 + value_needs_grad + (query_needs_grad or key_needs_grad)


def training_flops(linears: Iterable[LinearUse], attention: AttentionUse) -> TrainingFlops:
    """Sum the products of a forward pass and their gradients."""
    uses = list(linears)
    return TrainingFlops(
        per_token=sum(use.flops for use in uses if use.per == "token") + attention.flops_per_token,
        per_target=sum(use.flops for use in uses if use.per == "target"),
        per_squared_length=attention.flops,
    )


def recomputed_flops(linears: Iterable[LinearUse], attention: AttentionUse) -> TrainingFlops:
    """Sum products that are computed once more; of attention, those that `attention.width` sums."""
    uses = list(linears)
    return TrainingFlops(
        per_token=sum(use.forward_flops for use in uses if use.per == "token") + attention.flops_per_token,
        per_target=sum(use.forward_flops for use in uses if use.per == "target"),
        per_squared_length=attention.flops,
    )


def flops_of_blueprint(plan: Blueprint, recipe: Recipe) -> TrainingFlops:
    """Return the FLOPs that a blueprint and a recipe imply.

    It walks the model as the gradient does: what is before the first weight that trains needs none for its input.
    """
    shape = plan.shape
    needs_grad = recipe.adapter == "none"
    linears: list[LinearUse] = []
    num_products, num_before = 0, num_prefix_tokens(recipe)
    for layer in range(shape.num_layers):
        heads = [_uses((matrix,), recipe, needs_grad) for matrix in plan.attention_in]
        linears += [use for uses, _ in heads for use in uses]
        # Queries, keys and values, or one matrix for all three.
        query, key, value = [grad for _, grad in heads] * (3 // len(heads))
        grads = (query, key or num_before > 0, value or num_before > 0)
        num_products += sum(attention_products(*grads))
        after = any(grads)
        for stage in plan.after_attention(is_last=layer == shape.num_layers - 1):
            uses, after = _uses(stage, recipe, after or needs_grad)
            linears += uses
            # The residual stream carries the gradient around every stage.
            needs_grad = needs_grad or after
    for matrix in plan.head:
        uses, needs_grad = _uses((matrix,), recipe, needs_grad)
        linears += uses
    attention = AttentionUse(
        width=num_products * shape.head_dim,
        num_heads=shape.num_heads,
        causal=shape.causal,
        num_before=num_before,
    )
    return training_flops(linears, attention)


def recomputed_flops_of_blueprint(plan: Blueprint, config: TrialConfig) -> TrainingFlops:
    """Return the FLOPs that the backward pass computes a second time: the forward pass of blocks, and attention's scores.

    A block's last product is not, where nothing after it in the block needs its result: recomputation ends before it.
    """
    recipe, shape = config.recipe, plan.shape
    # DoRA and VeRA scale what is multiplied last, and keep it; LoRA as one operation keeps what it needs at its end.
    is_kept = adds_in_place(plan, recipe) or recipe.adapter in ("dora", "vera")
    is_computed = is_kept and _is_wrapped(plan.feed_forward_out[-1], recipe)
    again: list[LinearUse] = []
    recomputed = [layer for layer in range(shape.num_layers) if config.layout.recomputes(layer)]
    for layer in recomputed:
        later = [m for stage in plan.after_attention(is_last=layer == shape.num_layers - 1) for m in stage]
        uses = [use for matrix in (*plan.attention_in, *later) for use in _with_adapter(matrix, recipe, True)]
        again += uses if plan.is_last_result_needed or is_computed else uses[:-1]
    attention = AttentionUse(
        width=(2 * len(recomputed) + plan.is_attention_fused * shape.num_layers) * shape.head_dim,
        num_heads=shape.num_heads,
        causal=shape.causal,
        num_before=num_prefix_tokens(recipe),
    )
    return recomputed_flops(again, attention)


def _is_wrapped(matrix: Matrix, recipe: Recipe) -> bool:
    return recipe.adapter != "none" and matrix.is_wrapped_by(recipe.adapter_target_modules or ())


def _uses(matrices: Sequence[Matrix], recipe: Recipe, needs_grad: bool) -> tuple[list[LinearUse], bool]:
    """Return the products of linear layers side by side, and whether what comes out of them needs a gradient."""
    uses = [use for matrix in matrices for use in _with_adapter(matrix, recipe, needs_grad)]
    return uses, needs_grad or any(use.weight_needs_grad for use in uses) or any(_is_wrapped(m, recipe) for m in matrices)


def _with_adapter(matrix: Matrix, recipe: Recipe, needs_grad: bool) -> Iterator[LinearUse]:
    trains = recipe.adapter == "none" or matrix.trains_with_adapter
    rank, num_rotated = num_between(recipe), rotation_numbers(matrix, recipe)
    if num_rotated:
        yield LinearUse(num_weights=num_rotated, per=matrix.per, input_needs_grad=needs_grad, weight_needs_grad=True)
        needs_grad = True
    yield LinearUse(num_weights=matrix.num_weights, per=matrix.per, input_needs_grad=needs_grad, weight_needs_grad=trains)
    if not trains and _is_wrapped(matrix, recipe) and rank:
        factors_train = recipe.adapter != "vera"
        first = matrix.num_outputs if recipe.adapter == "bottleneck" else matrix.num_inputs
        for width, input_needs_grad in ((first, needs_grad), (matrix.num_outputs, True)):
            yield LinearUse(
                num_weights=rank * width, per=matrix.per, input_needs_grad=input_needs_grad, weight_needs_grad=factors_train
            )
