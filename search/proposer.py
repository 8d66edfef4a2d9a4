"""Proposes by a model of the trials so far that knows what each point would cost: what `sampler.method: auto` begins with."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from search.acquisition import Evaluated, Prospect, choose
from search.pareto import front_indices
from spaces.draws import Draw
from spaces.metrics import LEARNED
from spaces.space import SpaceSpec
from spaces.spec import Objective

Params = Mapping[str, Any]
Look = Callable[[Params], Prospect]

# Points of which one is chosen: half of them anywhere, half near the front and what runs. With four times as many a simulated search
# found no more.
NUM_POINTS = 256


class Proposer:
    """Draws points of a space and chooses one."""

    def __init__(self, space: SpaceSpec, objectives: Sequence[Objective], references: Sequence[float | None], seed: int) -> None:
        """Take what does not change.

        Args:
            space: the user's.
            objectives: those of the search.
            references: of each objective, as costs; None where the worst trial stands for it.
            seed: of the draws.
        """
        self._space, self._references = space, references
        self._is_learned = [o.metric in LEARNED for o in objectives]
        self._rng, self._draws = random.Random(seed), np.random.default_rng(seed)

    def propose(
        self, ended: Sequence[tuple[Params, tuple[float, ...]]], running: Sequence[Params], look: Look, budget_left: float
    ) -> dict[str, Any] | None:
        """Return the point that is expected to be worth the most; None where none that was drawn can be tried.

        Args:
            ended: params of trials and their objectives as costs, nan where one is not known; at least two have all.
            running: params of those that have not ended.
            look: tells what is known of a point.
            budget_left: share of the budget, from 0 to 1.
        """
        costs = np.array([c for _, c in ended])
        worst = np.nanmax(costs, axis=0)
        indices = front_indices(np.where(np.isnan(costs), np.inf, costs))
        best = [params for (params, _), index in zip(ended, indices, strict=True) if index == 0]
        drawn = [(point, look(point)) for point in self._points([*best, *running])]
        tried = [(point, prospect) for point, prospect in drawn if prospect.is_open]
        if not tried:
            return None
        chosen = choose(
            [prospect for _, prospect in tried],
            evaluated=[Evaluated(prospect=look(params), costs=c) for params, c in ended],
            running=[look(params) for params in running],
            reference=[w if known is None else known for known, w in zip(self._references, worst, strict=True)],
            is_learned=self._is_learned,
            budget_left=budget_left,
            rng=self._draws,
        )
        return tried[chosen][0]

    def _points(self, centres: Sequence[Params]) -> list[dict[str, Any]]:
        near = [self._space.encode(self._rng.choice(centres)) for _ in range(NUM_POINTS // 2)]
        draws = [Draw(self._rng)] * (NUM_POINTS - len(near)) + [Draw(self._rng, near=encoded) for encoded in near]
        return [self._space.suggest(draw) for draw in draws]
