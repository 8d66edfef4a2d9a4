"""The front: which trials no other trial beats in every objective, and which of them to take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from search.hypervolume import hypervolume
from search.record import TrialRecord, TrialState
from spaces.spec import Objective

Limits = Mapping[str, tuple[str, float]]
"""`{metric: ("<=" | ">=", value)}`"""


def dominates(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether a is as good as b everywhere and better somewhere; both minimised, float (d,)."""
    return bool((a <= b).all() and (a < b).any())


def costs(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> np.ndarray:
    """Return the objectives, turned so that less is better: float (num_records, num_objectives)."""
    signs = [-1.0 if o.direction == "maximize" else 1.0 for o in objectives]
    rows = [[s * r.values[o.metric] for s, o in zip(signs, objectives, strict=True)] for r in records]
    return np.array(rows, dtype=float).reshape(len(records), len(objectives))


def eligible(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the trials that may enter a front: complete, feasible, with a finite value for every objective."""
    return [
        r
        for r in records
        if r.state is TrialState.COMPLETE
        and r.feasible
        and all(math.isfinite(r.values.get(o.metric, math.nan)) for o in objectives)
    ]


def front(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the non-dominated eligible trials, sorted by the last objective; equal ones all stay."""
    candidates = eligible(records, objectives)
    values = costs(candidates, objectives)
    members = [r for i, r in enumerate(candidates) if not any(dominates(other, values[i]) for other in values)]
    last = objectives[-1]
    return sorted(members, key=lambda r: (r.values[last.metric], r.number))


def knee(members: Sequence[TrialRecord], objectives: Sequence[Objective]) -> TrialRecord | None:
    """Return the member farthest below the line between the ends of the front, where each pays most for the other.

    Every objective is scaled to [0, 1] over the front. Of more than two objectives the plane through the best of each takes
    the place of the line. With one or two members it is the best in the first objective; None without members.
    """
    if not members:
        return None
    values = costs(members, objectives)
    span = values.max(axis=0) - values.min(axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    # The ends lie on sum(x) = 1 after scaling with two objectives, so the distance below the line orders like the sum.
    sums = scaled.sum(axis=1)
    if len(members) <= 2 or sums.max() - sums.min() < 1e-12:
        return members[int(np.argmin(values[:, 0]))]
    return members[int(np.argmin(sums))]


def reference_point(objectives: Sequence[Objective]) -> np.ndarray | None:
    """Return the references, turned so that less is better, or None while one is unknown: float (num_objectives,)."""
    if any(o.reference is None for o in objectives):
        return None
    return np.array([-(o.reference or 0.0) if o.direction == "maximize" else o.reference for o in objectives], dtype=float)


def hypervolume_of(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> float | None:
    """Return the hypervolume of the eligible trials, or None while a reference is unknown."""
    reference = reference_point(objectives)
    if reference is None:
        return None
    return hypervolume(costs(eligible(records, objectives), objectives), reference)


def pick(members: Sequence[TrialRecord], limits: Limits) -> list[TrialRecord]:
    """Return the members that satisfy every limit; a member without the metric does not."""

    def within(record: TrialRecord) -> bool:
        for metric, (op, bound) in limits.items():
            value = record.values.get(metric)
            if value is None or not (value <= bound if op == "<=" else value >= bound):
                return False
        return True

    return [record for record in members if within(record)]
