"""Proposes by a model of the trials so far that knows what each point would cost: what `sampler.method: auto` begins with."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from search.acquisition import Evaluated, Prospect, choose
from search.pareto import front_indices
from spaces.draws import Draw
from spaces.metrics import is_learned
from spaces.space import SpaceSpec
from spaces.spec import Objective

Params = Mapping[str, Any]

# Points of which one is chosen: half of them anywhere, half near the front and what runs. Where each point is looked at under many
# layouts there are fewer, but no fewer than the least.
NUM_POINTS, LEAST_POINTS = 256, 64


class Look(Protocol):
    """Tells what is known of a point or a trial; `search.prospects.Prospects` is one."""

    def point(self, params: Params) -> Prospect:
        """Return what is known of a point of the space."""

    def trial(self, number: int | None, params: Params) -> Prospect:
        """Return what is known of a trial, by its number; of one of an earlier search, which has none, by its params."""

    def trains_within(self, params: Params, seconds: float) -> bool:
        """Return whether a point can be tried and is expected to train in so many seconds; False as long as no time is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A trial that the model knows."""

    number: int | None
    params: Params
    costs: tuple[float, ...] = ()
    """(num_objectives,), to be minimised; nan where one is not known. Of a trial that runs, empty."""


class Proposer:
    """Draws points of a space and chooses one."""

    def __init__(self, space: SpaceSpec, objectives: Sequence[Objective], seed: int) -> None:
        self._space = space
        self._is_learned = [is_learned(o.metric) for o in objectives]
        self._rng, self._draws = random.Random(seed), np.random.default_rng(seed)

    def propose(
        self,
        *,
        ended: Sequence[Seen],
        running: Sequence[Seen],
        beside: Sequence[tuple[float, ...]],
        references: Sequence[float | None],
        look: Look,
        budget_left: float,
    ) -> dict[str, Any] | None:
        """Return the point that is expected to be worth the most; None where none that was drawn can be tried.

        Args:
            ended: trials; at least one has all objectives.
            running: trials that have not ended.
            beside: costs of what was only timed, which nobody learns from and which is on the front all the same.
            references: of each objective, as costs; None where the worst trial stands for it.
            look: tells what is known of a point.
            budget_left: share of the budget, from 0 to 1.
        """
        costs = np.array([trial.costs for trial in ended])
        indices = front_indices(np.where(np.isnan(costs), np.inf, costs))
        best = [trial for trial, index in zip(ended, indices, strict=True) if index == 0]
        drawn = [(point, look.point(point)) for point in self._points([*best, *running])]
        tried = [(point, prospect) for point, prospect in drawn if prospect.is_open]
        if not tried:
            return None
        chosen = choose(
            [prospect for _, prospect in tried],
            evaluated=[Evaluated(prospect=look.trial(t.number, t.params), costs=t.costs) for t in ended],
            running=[look.trial(t.number, t.params) for t in running],
            beside=beside,
            reference=_reference(costs, references),
            is_learned=self._is_learned,
            budget_left=budget_left,
            rng=self._draws,
        )
        return tried[chosen][0]

    def _points(self, centres: Sequence[Seen]) -> list[dict[str, Any]]:
        num_layouts = len(self._space.measured_layouts(centres[0].params))
        num_points = max(LEAST_POINTS, NUM_POINTS // num_layouts)
        near = [self._space.encode(self._rng.choice(centres).params) for _ in range(num_points // 2)]
        draws = [Draw(self._rng)] * (num_points - len(near)) + [Draw(self._rng, near=encoded) for encoded in near]
        return [self._space.suggest(draw) for draw in draws]


def _reference(costs: np.ndarray, references: Sequence[float | None]) -> list[float]:
    """Return from where on nothing is gained: the user's reference, but as long as no trial is better than it the worst trial.

    Otherwise nothing would be expected of any point, and none be better than another.
    """
    worst = np.nanmax(costs, axis=0)
    wanted = np.array([w if known is None else known for known, w in zip(references, worst, strict=True)])
    is_reached = bool((costs < wanted).all(axis=1).any())
    return [float(x) for x in (wanted if is_reached else np.maximum(wanted, worst))]
