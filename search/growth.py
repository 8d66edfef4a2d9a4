"""Whether the hypervolume still grows: where it has stopped, further trials are not worth their time to whoever asked for that."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from search.budget import has_counted
from search.pareto import front, hypervolume_of
from search.record import TrialRecord, TrialState
from spaces.budget import BudgetSpec
from spaces.spec import Objective


def has_stopped(volumes: Sequence[float], patience: int, min_growth: float) -> bool:
    """Return whether the last `patience` trials together let the hypervolume grow by less than `min_growth`, relative.

    From 0 to 0 is none either: nothing came to lie within the reference point.

    Args:
        volumes: after each trial, from the first or from any one on, against one reference point.
        patience: trials.
        min_growth: 0.001 is one in a thousand; with 0, any growth is enough.
    """
    if len(volumes) <= patience:
        return False
    then, now = volumes[-1 - patience], volumes[-1]
    return now <= then or now < then * (1 + min_growth)


class Growth:
    """Follows the hypervolume of a search, over the trials that its budget counts.

    Off unless `budget.patience` asks for it, as Ray's `ExperimentPlateauStopper` and Optuna's terminator are, whose rules are for one
    objective: how little growth is too little, the search cannot know.
    """

    def __init__(self, budget: BudgetSpec, records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> None:
        self._budget = budget
        self._volumes: deque[float] = deque(maxlen=(budget.patience or 0) + 1)
        ended = sorted((r for r in records if r.state is not TrialState.RUNNING), key=lambda r: r.finished_at or 0.0)
        counted = [n for n, record in enumerate(ended, start=1) if has_counted(record)]
        for n in counted[-(budget.patience or 0) - 1 :] if budget.patience else ():
            self.add(hypervolume_of(front(ended[:n], objectives), objectives))

    def add(self, volume: float | None) -> None:
        """Take the hypervolume after a trial that ended; None, where the reference point is not known yet, says nothing."""
        if volume is not None:
            self._volumes.append(volume)

    @property
    def ended(self) -> str:
        """In words, that it has stopped growing; empty while it grows, and where nobody asked."""
        patience, least = self._budget.patience, self._budget.min_growth
        if patience is None or not has_stopped(list(self._volumes), patience, least):
            return ""
        if self._volumes[-1] == 0:
            return f"the hypervolume stayed 0 in {patience} trials: none is better than the reference point"
        return f"the hypervolume grew by less than {least:.2g} of itself in {patience} trials"
