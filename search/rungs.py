"""Early stopping for several objectives: asynchronous successive halving on the non-dominated rank.

At a rung a trial is held against all that reported there before it. Fronts come first, and inside a front an epsilon-net's
order: what stands for most of the front first (Salinas et al. 2021; Schmucker et al. 2021, arXiv:2106.12639). A trial goes on when
it is among the best 1 / reduction factor or on the first front, of which only a finished trial is worth anything. Every decision is
final and waits for nobody, as in ASHA's stopping variant.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from search.hypervolume import Points
from search.pareto import cost_vector, front_indices
from search.record import TrialRecord
from spaces.fidelity import rung_steps
from spaces.spec import SearchSpec

# Multiples of it, modulo 1, spread evenly however many are taken.
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What one trial reached at a rung."""

    number: int
    costs: tuple[float, ...]
    """Finite, all to be minimised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether a trial goes on from a rung, and why."""

    goes_on: bool
    place: int
    """From 1, the best, among all that reported at the rung so far."""
    num_entries: int
    quota: int
    """Places that go on: 1 / reduction factor, and at least the non-dominated front."""
    front: int
    """From 1, the non-dominated one."""
    num_fronts: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def decide(recorded: Iterable[Entry], newcomer: Entry, reduction_factor: float) -> Verdict:
    """Hold a trial against what was recorded at its rung.

    An earlier entry of the same trial counts no more: it was reported before its workers were lost. As long as there are fewer
    entries than the reduction factor, all go on. After that whatever nothing dominates still does, duplicates aside, and a dominated
    trial of the last front never, even where the better fronts are so small that they leave it a place.
    """
    entries = sorted([*(e for e in recorded if e.number != newcomer.number), newcomer], key=lambda e: e.number)
    me = next(i for i, e in enumerate(entries) if e.number == newcomer.number)
    rows = np.asarray([e.costs for e in entries], dtype=np.float64)
    fronts = front_indices(rows)
    peers = np.flatnonzero(fronts == fronts[me])
    place = int((fronts < fronts[me]).sum()) + net_order(rows[peers]).index(int(np.searchsorted(peers, me))) + 1
    is_early = len(entries) < reduction_factor
    # Duplicates come last in a front, so these are the places of all that is new in it.
    num_best = len(np.unique(rows[fronts == 0], axis=0))
    quota = len(entries) if is_early else max(int(len(entries) / reduction_factor), num_best)
    is_last = fronts[me] == fronts.max() > 0
    return Verdict(
        goes_on=is_early or (place <= quota and not is_last),
        place=place,
        num_entries=len(entries),
        quota=quota,
        front=int(fronts[me]) + 1,
        num_fronts=int(fronts.max()) + 1,
    )


def net_order(rows: Points) -> list[int]:
    """Order the rows of one front so that its first *k* are spread over it, for every *k*.

    The first is the best in the first objective; each further one is the farthest from all before it (Clarkson 2006, section 3.1).
    Every objective is scaled to [0, 1] over the front. Of equals the one that stands first comes first, so a duplicate comes
    after all that is new.
    """
    lowest, span = rows.min(axis=0), np.ptp(rows, axis=0)
    scaled = (rows - lowest) / np.where(span > 0, span, 1.0)
    order = [int(np.lexsort(rows.T[::-1])[0])]
    distances = np.full(len(rows), np.inf)
    while len(order) < len(rows):
        # Rounded, so that what is a tie does not hang on the last bit.
        distances = np.minimum(distances, ((scaled - scaled[order[-1]]) ** 2).sum(axis=1).round(12))
        distances[order[-1]] = -1.0
        order.append(int(distances.argmax()))
    return order


def bracket_of(number: int, num_shares: int, brackets: int) -> int:
    """Return a trial's bracket, by its number alone; bracket *s* spares its trials the first *s* rungs.

    As in Ray's ASHA a bracket gets trials in proportion to e to the power of its rungs, the end of a trial among them.
    """
    weights = [math.exp(-s) for s in range(min(brackets, num_shares + 1))]
    position = (number * GOLDEN_RATIO) % 1.0 * sum(weights)
    for bracket, weight in enumerate(weights):
        position -= weight
        if position < 0:
            return bracket
    return len(weights) - 1


def shares_of(spec: SearchSpec, number: int) -> tuple[float, ...]:
    """Return the shares of its own steps at which a trial reports, before its end."""
    shares = spec.scheduler.shares
    return shares[bracket_of(number, len(shares), spec.scheduler.brackets) :] if spec.rung_objectives() else shares


class Rungs:
    """What the trials of a search reported at their rungs; rebuilt from the ledger's records."""

    def __init__(self, spec: SearchSpec, records: Iterable[TrialRecord] = ()) -> None:
        self._spec = spec
        self._objectives = spec.rung_objectives()
        # A bracket's trials are held against one another alone; all that share a rung in it are comparable.
        self._entries: dict[tuple[int, float], dict[int, Entry]] = defaultdict(dict)
        for record in records:
            for report in record.reports:
                self._enter(record.number, report)

    def judge(self, number: int, report: Mapping[str, Any]) -> dict[str, Any] | None:
        """Enter a report and return the verdict with its rung's `share`; None where nothing is to be decided.

        Nothing is decided at a report that is at no rung, as the last one, and at one that lacks a finite value for an
        objective: it cannot be compared, so it neither stops its trial nor counts for others.
        """
        found = self._enter(number, report)
        if found is None:
            return None
        share, entry, entries = found
        return {"share": share, **decide(entries.values(), entry, self._spec.scheduler.reduction_factor).to_dict()}

    def _enter(self, number: int, report: Mapping[str, Any]) -> tuple[float, Entry, dict[int, Entry]] | None:
        shares = shares_of(self._spec, number)
        share = rung_steps(shares, report["num_steps"]).get(report["step"])
        values = [report["metrics"].get(o.metric, math.nan) for o in self._objectives]
        if share is None or not values or not all(map(math.isfinite, values)):
            return None
        entry = Entry(number=number, costs=cost_vector(report["metrics"], self._objectives))
        entries = self._entries[len(shares), share]
        entries[number] = entry
        return share, entry, entries
