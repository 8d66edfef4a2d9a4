"""How a front grew, and how contenders compare: pure arithmetic for `time_to_front.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.hypervolume import hypervolume


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A finished trial."""

    finished_seconds: float
    """Since the start of its contender's process."""
    accuracy: float
    own_seconds: float
    """Training time as its contender saw it."""


def entrants(trials: Sequence[Trial]) -> list[int]:
    """Return which trials were on their contender's own front when they finished, oldest first; of equals the oldest."""
    chosen: list[int] = []
    for i in sorted(range(len(trials)), key=lambda i: trials[i].finished_seconds):
        mine = trials[i]
        others = (trials[j] for j in chosen)
        if not any(o.accuracy >= mine.accuracy and o.own_seconds <= mine.own_seconds for o in others):
            chosen.append(i)
    return chosen


def volume(points: Sequence[tuple[float, float]], last_seconds: float) -> float:
    """Return the area that (accuracy, training seconds) dominate: accuracy from 0, times the logarithm of seconds up to the last."""
    costs = [(-accuracy, math.log(seconds)) for accuracy, seconds in points]
    return hypervolume(costs, (0.0, math.log(last_seconds)))


def growth(finished: Sequence[float], points: Sequence[tuple[float, float]], last_seconds: float) -> list[tuple[float, float]]:
    """Return the hypervolume after each entrant: (seconds since the start, volume).

    Args:
        finished: of each entrant, ascending.
        points: (accuracy, training seconds) of each, measured alike for all.
        last_seconds: the reference.
    """
    return [(seconds, volume(points[:i], last_seconds)) for i, seconds in enumerate(finished, start=1)]


def time_to(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Return when the target was reached; None if it never was."""
    return next((seconds for seconds, reached in curve if reached >= target), None)


def at(curve: Sequence[tuple[float, float]], seconds: float) -> float:
    """Return the volume at a time."""
    return max((reached for when, reached in curve if when <= seconds), default=0.0)


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Return how many times as much theirs is, pair by pair: geometric mean, its 95 % interval by bootstrap, least, most."""
    logs = np.log(np.asarray(theirs, dtype=float) / np.asarray(ours, dtype=float))
    drawn = np.random.default_rng(0).choice(logs, size=(10_000, len(logs))).mean(axis=1)
    low, high = np.exp(np.quantile(drawn, [0.025, 0.975]))
    return {
        "mean": float(np.exp(logs.mean())),
        "low": float(low),
        "high": float(high),
        "least": float(np.exp(logs.min())),
        "most": float(np.exp(logs.max())),
    }
