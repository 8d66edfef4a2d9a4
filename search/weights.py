"""Which files of the trials stay: the weights of the front, and of what may come onto it; checkpoints until a trial has ended."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Sequence

from search.ledger import SearchState
from search.pareto import front
from search.record import TrialRecord, TrialState
from search.store import Store
from spaces.spec import Objective


class Weights:
    """Keeps the front up to date, trial by trial, and the disk with it."""

    def __init__(self, store: Store, state: SearchState, objectives: Sequence[Objective]) -> None:
        self._store, self._state, self._objectives = store, state, objectives
        self._members = front(list(state.records.values()), objectives)

    @property
    def front(self) -> list[TrialRecord]:
        """The non-dominated, complete, feasible trials."""
        return [self._state.records[member.number] for member in self._members]

    def has(self, number: int) -> bool:
        """Return whether a trial's final weights are there."""
        return (self._store.trial_path(number) / "final").exists()

    def settle(self, waiting: Iterable[int] = ()) -> None:
        """Leave of all trials that ended what the front needs, and what waits may need; no worker writes to them any more."""
        kept = self._kept(waiting)
        for record in self._state.records.values():
            if record.state is not TrialState.RUNNING:
                self._clean(record.number, kept)

    def sweep(self, ended: TrialRecord, waiting: Iterable[int]) -> None:
        """Keep weights only where the front needs them; checkpoints served their purpose when the trial ended."""
        # Only who stood on the front and who ends now can change it, and the front of both is that of all.
        candidates = [*self._members, ended]
        self._members = front(candidates, self._objectives)
        kept = self._kept(waiting)
        for candidate in candidates:
            owner = self._state.records[candidate.root]
            if not _may_be_written(owner) and (owner.number not in kept or candidate is ended):
                self._clean(owner.number, kept)

    def _kept(self, waiting: Iterable[int]) -> set[int]:
        """Return whose weights are kept: those of the front, and of what may come onto it under another layout."""
        return {member.root for member in self._members} | {self._state.records[number].root for number in waiting}

    def _clean(self, number: int, kept: Collection[int]) -> None:
        for part in self._store.trial_path(number).glob("*"):
            if not (number in kept and part.name == "final"):
                shutil.rmtree(part, ignore_errors=True)


def _may_be_written(record: TrialRecord) -> bool:
    """A worker is still at a trial that runs, and for a step or so at one that was ended from here; that one it cleans up itself."""
    return record.state in (TrialState.RUNNING, TrialState.PRUNED) or (record.error or {}).get("kind") == "driver_lost"
