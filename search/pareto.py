"""The front: which trials no other trial beats, and which of them a user wants.

Objectives are turned to "minimise" once, in `costs`; everything below it only minimises.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from search.hypervolume import Points, hypervolume
from search.record import TrialRecord, TrialState
from spaces.metrics import METRICS

if TYPE_CHECKING:
    from spaces.spec import Objective

COMPARISONS = {"<=": operator.le, ">=": operator.ge}


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Return whether `a` is nowhere worse than `b` and somewhere better; both are minimised."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def eligible(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the trials that may stand on a front: complete, feasible, with a finite value for every objective."""
    return [
        record
        for record in records
        if record.state is TrialState.COMPLETE
        and record.feasible
        and all(math.isfinite(record.values.get(o.metric, math.nan)) for o in objectives)
    ]


def costs(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> Points:
    """Return the objectives' values, all turned to minimise: (num_records, num_objectives)."""
    rows = [[_sign(o) * record.values[o.metric] for o in objectives] for record in records]
    return np.asarray(rows, dtype=np.float64).reshape(len(records), len(objectives))


def front(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the non-dominated trials, cheapest first; trials with equal values all stay."""
    candidates = eligible(records, objectives)
    rows = costs(candidates, objectives)
    members = [
        record
        for record, row in zip(candidates, rows, strict=True)
        if not ((rows <= row).all(axis=1) & (rows < row).any(axis=1)).any()
    ]
    order = [cost_objective(objectives), *objectives]
    return sorted(members, key=lambda r: ([_sign(o) * r.values[o.metric] for o in order], r.number))


def cost_objective(objectives: Sequence[Objective]) -> Objective:
    """Return the first objective that is a price (time, memory), or the first of all if there is none."""
    for objective in objectives:
        if METRICS[objective.metric].section in ("perf", "cost"):
            return objective
    return objectives[0]


def knee(members: Sequence[TrialRecord], objectives: Sequence[Objective]) -> TrialRecord | None:
    """Return the member furthest on the good side of the chord between the front's ends; None of none.

    Every objective is scaled to [0, 1] over the front. The chord becomes, for any number of objectives, the plane on
    which the scaled objectives sum to a constant, so the knee has the smallest sum. Of up to two members, or of equals,
    it is the first.
    """
    if len(members) <= 2:
        return members[0] if members else None
    rows = costs(members, objectives)
    lowest = rows.min(axis=0)
    span = rows.max(axis=0) - lowest
    scaled = (rows - lowest) / np.where(span > 0, span, 1.0)
    return members[int(scaled.sum(axis=1).argmin())]


def pick(members: Sequence[TrialRecord], limits: Mapping[str, tuple[str, float]]) -> list[TrialRecord]:
    """Return the members within all limits, such as `{"train_seconds": ("<=", 60)}`; a missing metric is not within.

    Raises:
        KeyError: the comparison is neither `<=` nor `>=`.
    """
    wanted = [(metric, COMPARISONS[op], bound) for metric, (op, bound) in limits.items()]
    return [
        record
        for record in members
        if all(metric in record.values and holds(record.values[metric], bound) for metric, holds, bound in wanted)
    ]


def hypervolume_of(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> float | None:
    """Return the hypervolume of the trials' front; None while a reference is not known."""
    references = [o.reference for o in objectives]
    if any(reference is None for reference in references):
        return None
    corner = [_sign(o) * o.reference for o in objectives if o.reference is not None]
    return hypervolume(costs(eligible(records, objectives), objectives), corner)


def _sign(objective: Objective) -> float:
    return -1.0 if objective.direction == "maximize" else 1.0
