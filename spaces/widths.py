"""Bytes of the numbers that a step of training computes with."""

from __future__ import annotations

from dataclasses import dataclass

from spaces.config import TrialConfig

FP32_BYTES, BF16_BYTES, INT64_BYTES = 4, 2, 8


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
    """Whether every product casts its own copy of an input in fp32, and trained weights are cast once a step."""


def widths(config: TrialConfig) -> Widths:
    """Return the number formats of a trial, as `trainables.model.build` and `trainables.parallelize` make them."""
    if config.recipe.precision == "fp32":
        return Widths(frozen=FP32_BYTES, stream=FP32_BYTES, products=FP32_BYTES, is_autocast=False)
    is_autocast = not config.layout.is_sharded  # FSDP2 casts by itself
    # The embedding's number format goes through the residual stream: fp32 where it trains under autocast.
    stream = FP32_BYTES if is_autocast and config.recipe.adapter == "none" else BF16_BYTES
    return Widths(frozen=BF16_BYTES, stream=stream, products=BF16_BYTES, is_autocast=is_autocast)
