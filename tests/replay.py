"""Recorded trials on a simulated clock, for `benchmarks/early_stopping.py`: what a rule that stops trials makes of them.

Trials start in a given order on a given number of workers. At every rung a judge says whether the trial goes on; a worker that is
free takes the next trial at once. A trial that was stopped is no result, however far it came.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from search.hypervolume import hypervolume
from spaces.fidelity import rung_steps


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """What a trial has reached when it is looked at."""

    number: int
    step: int
    num_steps: int
    share: float
    """Of its own steps, as the rung has it."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A recorded trial."""

    number: int
    seconds: float
    """Of its whole training."""
    spent: Mapping[int, float]
    """Share of the seconds that is spent after each recorded step."""
    metrics: Mapping[int, Mapping[str, float]]
    """By recorded step, the last one among them."""
    costs: tuple[float, ...]
    """The objectives at its end, to be minimised."""

    @property
    def num_steps(self) -> int:
        return max(self.metrics)

    def looks(self, shares: Sequence[float]) -> list[tuple[float, Look]]:
        """Return what is seen at the rungs, each with the seconds from the start of the trial."""
        return [
            (
                self.spent[step] * self.seconds,
                Look(number=self.number, step=step, num_steps=self.num_steps, share=share, metrics=self.metrics[step]),
            )
            for step, share in sorted(rung_steps(shares, self.num_steps).items())
        ]


Judge = Callable[[Look], bool]
"""Whether a trial goes on."""


@dataclass(kw_only=True, slots=True)
class Run:
    """What came of one order of trials under one rule."""

    completed: list[tuple[float, Curve]] = field(default_factory=list)
    """In the order of their ends, with the moment."""
    stopped: dict[int, float] = field(default_factory=dict)
    """The share at which each stopped trial ended."""
    trained: dict[int, float] = field(default_factory=dict)
    """The seconds that each trial took."""

    def hypervolumes(self, reference: Sequence[float]) -> list[tuple[float, float]]:
        """Return the hypervolume after every completed trial that raised it, with the moment."""
        steps: list[tuple[float, float]] = []
        for i, (moment, _) in enumerate(self.completed):
            volume = hypervolume([curve.costs for _, curve in self.completed[: i + 1]], reference)
            if volume > (steps[-1][1] if steps else 0.0):
                steps.append((moment, volume))
        return steps


def replay(order: Sequence[Curve], judge: Judge, shares: Sequence[float], num_workers: int) -> Run:
    """Run trials in their order; of events at one moment that of the trial that started first comes first."""
    run = Run()
    waiting = iter(enumerate(order))
    # Moment, place in the order, curve, moment of its start, looks that are left.
    events: list[tuple[float, int, Curve, float, list[tuple[float, Look]]]] = []

    def start(now: float) -> None:
        for place, curve in waiting:
            looks = curve.looks(shares)
            heapq.heappush(events, (now + (looks[0][0] if looks else curve.seconds), place, curve, now, looks))
            return

    for _ in range(num_workers):
        start(0.0)
    while events:
        now, place, curve, began, looks = heapq.heappop(events)
        if looks and judge(looks[0][1]):
            left = looks[1:]
            heapq.heappush(events, (began + (left[0][0] if left else curve.seconds), place, curve, began, left))
            continue
        if looks:
            run.stopped[curve.number] = looks[0][1].share
        else:
            run.completed.append((now, curve))
        run.trained[curve.number] = now - began
        start(now)
    return run


def time_to(steps: Sequence[tuple[float, float]], volume: float) -> float:
    """Return the first moment at which a hypervolume is reached; infinite if it never is."""
    return next((moment for moment, reached in steps if reached >= volume * (1 - 1e-12)), float("inf"))


def volume_at(steps: Sequence[tuple[float, float]], moment: float) -> float:
    """Return the hypervolume at a moment."""
    return max((volume for at, volume in steps if at <= moment), default=0.0)


def mean_regret(steps: Sequence[tuple[float, float]], best: float, until: float) -> float:
    """Return the mean over time, from zero to a moment, of what is missing to the best hypervolume."""
    total, last, missing = 0.0, 0.0, best
    for moment, volume in steps:
        if moment >= until:
            break
        total += (moment - last) * missing
        last, missing = moment, best - volume
    return (total + (until - last) * missing) / until
