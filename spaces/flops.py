"""Model FLOPs from shapes and from what needs a gradient.

Per real token of a matrix with W weights: 2W forward, 2W for the gradient of its input where that is needed, 2W for its own
gradient where it trains. So full fine-tuning costs 6 per weight and token, and LoRA about 4 for a frozen weight. Attention has no
weights: 4 x heads x head dim x length² forward (scores and weighted sum) and twice that backward, LoRA or not; a causal mask halves
it. Embedding look-ups, padding and recomputation count nothing. The split by what needs a gradient follows from the chain rule; the
6N and the attention term are those of PaLM (https://arxiv.org/abs/2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONVENTION = "model FLOPs of real tokens; frozen weights 4N, trained 6N; causal attention halved; no recomputation"


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearUse:
    """One matrix product of the forward pass."""

    num_weights: int
    per: Literal["token", "row"]
    """Whether it is applied at every position, or once per row (a classification head)."""
    input_needs_grad: bool
    weight_needs_grad: bool

    def flops(self, num_tokens: float, num_rows: float) -> float:
        """Return forward and backward FLOPs for this many real tokens in this many rows."""
        products = 1 + self.input_needs_grad + self.weight_needs_grad
        return 2.0 * self.num_weights * products * (num_tokens if self.per == "token" else num_rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """What attention costs by, beside the lengths of the rows."""

    num_layers: int
    num_heads: int
    head_dim: int
    causal: bool

    def flops(self, sum_of_squared_lengths: float) -> float:
        """Return forward and backward FLOPs; a key-value head that several query heads share saves memory, not FLOPs.

        The backward pass is counted for every layer. An adapter that leaves out the first layer's attention projections (LoRA
        on `down_proj` alone) does not need it there: one layer's share too much.
        """
        whole = 12.0 * self.num_layers * self.num_heads * self.head_dim * sum_of_squared_lengths
        return whole / 2 if self.causal else whole


def training_flops(
    linears: Sequence[LinearUse],
    attention: AttentionShape,
    *,
    num_tokens: float,
    num_rows: float,
    sum_of_squared_lengths: float,
) -> float:
    """Return the model FLOPs of training on these rows once."""
    return sum(use.flops(num_tokens, num_rows) for use in linears) + attention.flops(sum_of_squared_lengths)
