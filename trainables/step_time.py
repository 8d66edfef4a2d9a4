"""How long an optimizer step takes: a fixed part, and one that goes by its padded tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainables.batching import StepSizes

# Steps until caches, allocator and clocks have settled: a tenth of the trial, at least three where there are enough.
WARMUP_SHARE, WARMUP_STEPS = 0.1, 3
# Of a trial with fewer, steps are trained once more until there are as many, half of which are the warm-up's, or for so many seconds:
# of long steps what the first one takes beyond the others is a small part.
MIN_TIMED_STEPS, FURTHER_SECONDS = 2 * WARMUP_STEPS, 10.0
# Steps of the fit below; it has settled long before.
MAX_ROUNDS = 50
# Two parts cannot be told apart from fewer steps: a line through two noisy points says anything of a third.
MIN_LINE_STEPS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step of n padded tokens, all ranks together: `fixed_seconds + seconds_per_token * n`."""

    fixed_seconds: float
    """The update, the exchange of gradients, the launch of kernels."""
    seconds_per_token: float

    def of(self, padded_tokens: np.ndarray) -> np.ndarray:
        """Return the seconds of steps: float64 (num_steps,)."""
        return self.fixed_seconds + self.seconds_per_token * np.asarray(padded_tokens, dtype=np.float64)


def fit(seconds: np.ndarray, padded_tokens: np.ndarray) -> StepTime:
    """Return the line with the least sum of absolute errors and no negative part; single slow steps do not move it.

    Where the best line has a negative part, the best without one is the best with that part zero. Of few steps, all time goes by
    the tokens.

    Args:
        seconds: float64 (num_steps,)
        padded_tokens: (num_steps,)
    """
    seconds, padded = np.asarray(seconds, dtype=np.float64), np.asarray(padded_tokens, dtype=np.float64)
    by_tokens = StepTime(fixed_seconds=0.0, seconds_per_token=_weighted_median(seconds / padded, padded))
    if len(seconds) < MIN_LINE_STEPS:
        return by_tokens
    free = _free_line(seconds, padded)
    if free.fixed_seconds >= 0 and free.seconds_per_token >= 0:
        return free
    fixed = StepTime(fixed_seconds=float(np.median(seconds)), seconds_per_token=0.0)
    return min(by_tokens, fixed, key=lambda line: float(np.abs(seconds - line.of(padded)).sum()))


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """Return where half of the weight is reached, between the two values where it is exactly half."""
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / weights.sum()
    low, high = np.searchsorted(reached, [0.5 - 1e-9, 0.5 + 1e-9])
    return float((values[order][low] + values[order][min(high, len(values) - 1)]) / 2)


def _free_line(seconds: np.ndarray, padded_tokens: np.ndarray) -> StepTime:
    """Return the line with the least sum of absolute errors.

    By least squares with every step weighed by the inverse of its error, again and again (Schlossmacher, Journal of the American
    Statistical Association 68, 1973, 857-859); where all steps are alike this is their median.
    """
    # In units of their means, so that the two columns are of one size.
    size, pace = float(np.mean(padded_tokens)), float(np.mean(seconds))
    inputs = np.column_stack([np.ones(len(seconds)), padded_tokens / size])
    weights = np.ones(len(seconds))
    for _ in range(MAX_ROUNDS):
        root = np.sqrt(weights)
        line, *_ = np.linalg.lstsq(inputs * root[:, None], seconds / pace * root, rcond=None)
        weights = 1 / np.maximum(np.abs(seconds / pace - inputs @ line), 1e-9)
    return StepTime(fixed_seconds=float(line[0]) * pace, seconds_per_token=float(line[1]) * pace / size)


def num_warmup(num_done: int) -> int:
    """Return how many of the first steps say nothing about the others."""
    return min(max(WARMUP_STEPS, round(WARMUP_SHARE * num_done)), num_done // 2)


def steady_steps(seconds: Sequence[float]) -> np.ndarray:
    """Return the steps whose time counts: of the undisturbed ones those after the warm-up, one at least; int64 (num_steady,).

    Args:
        seconds: of every step; NaN for one that was disturbed.
    """
    undisturbed = np.flatnonzero(~np.isnan(np.asarray(seconds, dtype=np.float64)))
    return undisturbed[num_warmup(len(undisturbed)) :]


def settling_seconds(seconds: Sequence[float], sizes: StepSizes) -> float:
    """Return what the steps of the warm-up took beyond the steady pace: where blocks are compiled, that is their compilation."""
    first = slice(0, steady_steps(seconds)[0])
    beyond = np.asarray(seconds, dtype=np.float64)[first] - fit_steady(seconds, sizes).of(_padded_tokens(seconds, sizes)[first])
    return float(np.nansum(np.maximum(0.0, beyond)))  # of disturbed steps nothing is known


def fit_steady(seconds: Sequence[float], sizes: StepSizes) -> StepTime:
    """Return the line through the steady steps."""
    steps = steady_steps(seconds)
    return fit(np.asarray(seconds)[steps], _padded_tokens(seconds, sizes)[steps])


def _padded_tokens(seconds: Sequence[float], sizes: StepSizes) -> np.ndarray:
    """Return the size of every step that was timed; behind the last come the first ones once more."""
    return np.resize(sizes.padded_tokens, len(seconds))
