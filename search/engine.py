"""One search as a sequence of facts: what was proposed, reported and found, in the order in which it may be lost.

Every fact goes to the ledger first, then to the study, then to the tracker; Ray Tune drives it through `searcher` and knows
none of the three. What it does for one trial does not grow with the trials before it: `benchmarks/scale.py`.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from search.ledger import Ledger, SearchState, replay
from search.pareto import front
from search.provenance import reproduce_command
from search.record import TrialRecord, TrialState
from search.rungs import shares_of
from search.store import Store
from search.study import Proposal, Study
from spaces import constraints
from spaces.config import TrialConfig
from spaces.constraints import Limits
from spaces.spec import Objective, SearchSpec
from trainables.job import Job

# Infeasible proposals cost nothing but a suggestion; this many in a row mean that next to nothing in the space is feasible.
MAX_INFEASIBLE_IN_A_ROW = 200


class SearchExhausted(Exception):
    """The sampler finds no feasible proposal any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A trial that is to run."""

    number: int
    params: Mapping[str, Any]
    config: TrialConfig


class Engine:
    """Proposes trials and records what becomes of them; one per driver, used from one thread."""

    def __init__(
        self,
        *,
        store: Store,
        spec: SearchSpec,
        ledger: Ledger,
        study: Study,
        limits: Limits,
        predict: Callable[[TrialConfig], Mapping[str, Any]] = lambda _: {},
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self._store = store
        self._spec = spec
        self._ledger = ledger
        self._study = study
        self._limits = limits
        self._predict = predict
        self._on_event = on_event
        self._state = replay(ledger.events())
        for record in self._state.records.values():
            self._lower_memory_limit(record)
        self._num_ended = sum(r.state is not TrialState.RUNNING and r.feasible_before_launch for r in self._state.records.values())
        self._members = front(list(self._state.records.values()), self.objectives)
        self._live: set[int] = set()
        self._pending = self._reconcile()

    @property
    def state(self) -> SearchState:
        """All that the ledger knows, up to date."""
        return self._state

    @property
    def objectives(self) -> tuple[Objective, ...]:
        return objectives_of(self._spec, self._state)

    @property
    def num_live(self) -> int:
        """Trials that were handed out and have not ended."""
        return len(self._live)

    @property
    def num_left(self) -> int:
        """Trials of the budget that have not been handed out yet."""
        return max(0, self._spec.budget.trials - self._num_ended - len(self._live))

    def next(self) -> Assignment | None:
        """Return the next trial to run, or None when the budget is handed out; infeasible proposals are told and passed over.

        Raises:
            SearchExhausted: hardly anything in the space is feasible.
        """
        if self._pending:
            number = self._pending.pop(0)
            record = self._state.records[number]
            assignment = Assignment(number=number, params=record.params, config=TrialConfig.from_dict(record.config or {}))
        elif self.num_left == 0:
            return None
        else:
            assignment = self._propose()
        self._live.add(assignment.number)
        return assignment

    def job(self, assignment: Assignment) -> Job:
        """Return what a worker group needs to train the trial."""
        return Job(
            job_id=f"{self._store.name}/trial-{assignment.number:04d}",
            kind="train",
            config=assignment.config.to_dict(),
            directory=str(self._store.trial_path(assignment.number)),
            rungs=shares_of(self._spec, assignment.number),
        )

    def reported(self, number: int, report: Mapping[str, Any], verdict: Mapping[str, Any] | None = None) -> None:
        """Record a report at an evaluation point or the last one, with what its rung says."""
        known = {} if verdict is None else {"verdict": dict(verdict)}
        self._record("trial_reported", number=number, report=dict(report), **known)

    def ended(self, number: int, outcome: Mapping[str, Any]) -> None:
        """Record the end of a trial as the dispatcher told it, and tell the study what it is; a second end changes nothing."""
        if number not in self._live:
            return
        self._live.discard(number)
        reports = self._state.records[number].reports
        final = reports[-1] if reports and reports[-1]["final"] else None
        state, error, values = _classify(outcome, final, self.objectives)
        over_memory = error is not None and error["kind"] == "out_of_memory"
        self._record(
            "trial_finished",
            number=number,
            state=state.value,
            values=values,
            error=error,
            constraints={constraints.memory_within_device.__name__: 1.0} if over_memory else {},
            attempts=outcome.get("attempts", min(1, len(reports))),
            details={**(final["details"] if final else {}), "job_seconds": outcome.get("job_seconds")},
        )
        record = self._state.records[number]
        self._num_ended += 1
        self._lower_memory_limit(record)
        self._tell(record)
        self._sweep(record)

    def referenced(self, metrics: Mapping[str, float]) -> None:
        """Record the untrained model's score."""
        self._record("reference", metrics=dict(metrics))

    def test_scored(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record the score of a member of the front on the test file."""
        self._record("test_scored", number=number, metrics=dict(metrics))

    def finished(self, reason: str) -> None:
        """Record the end of the search; no worker writes any more, so that what is kept is the front's weights alone."""
        self._record("search_finished", reason=reason)
        members = {record.number for record in self.front()}
        for record in self._state.records.values():
            if record.state is not TrialState.RUNNING:
                self._clean(record.number, keeps_weights=record.number in members)

    def front(self) -> list[TrialRecord]:
        """Return the non-dominated, complete, feasible trials."""
        return [self._state.records[member.number] for member in self._members]

    def _propose(self) -> Assignment:
        for _ in range(MAX_INFEASIBLE_IN_A_ROW):
            proposal = self._study.ask()
            config = TrialConfig.from_params(proposal.params, max_length=self._spec.model.max_length)
            values = constraints.violations(config, self._limits)
            known = {"number": proposal.number, "params": proposal.params, "config": config.to_dict()}
            if constraints.is_feasible(values):
                command, predicted = self._reproduce(proposal), dict(self._predict(config))
                self._record("trial_started", **known, command=command, predicted=predicted)
                return Assignment(number=proposal.number, params=proposal.params, config=config)
            self._record("trial_infeasible", **known, constraints=values)
            self._study.tell_infeasible(proposal.number, values)
        raise SearchExhausted(
            f"{MAX_INFEASIBLE_IN_A_ROW} proposals in a row were infeasible (the last: "
            + ", ".join(f"{name} = {value:g}" for name, value in values.items() if value > 0)
            + "); `paretune plan` shows which layouts this cluster can run"
        )

    def _lower_memory_limit(self, record: TrialRecord) -> None:
        """Where a trial ran out of memory, whatever is predicted to hold as much would too."""
        if record.error is None or record.error["kind"] != "out_of_memory":
            return
        predicted = constraints.predicted_memory(TrialConfig.from_dict(record.config or {}), self._limits)
        if predicted is not None:
            known = self._limits.memory_bytes
            below = predicted.peak_bytes - 1
            self._limits = replace(self._limits, memory_bytes=below if known is None else min(known, below))

    def _reproduce(self, proposal: Proposal) -> str:
        return reproduce_command(self._spec, str(self._store.spec_path), self._store.name, proposal.number, proposal.params)

    def _record(self, event: str, **fields: Any) -> None:
        line = self._ledger.append(event, **fields)
        self._state.apply(line)
        self._on_event(line)

    def _tell(self, record: TrialRecord) -> None:
        if record.state is TrialState.COMPLETE:
            self._study.tell_complete(record.number, record.values)
        elif not record.feasible:
            self._study.tell_infeasible(record.number, record.constraints)
        elif record.state is TrialState.PRUNED:
            self._study.tell_pruned(record.number)
        else:
            self._study.tell_failed(record.number)

    def _reconcile(self) -> list[int]:
        """Bring the study up to the ledger, and the disk; return the trials that were cut off in flight.

        One that a rung had stopped is not among them, but ended.
        """
        self._study.restore({number: record.params for number, record in self._state.records.items()})
        members = {member.number for member in self._members}
        for number, record in list(self._state.records.items()):
            if record.state is not TrialState.RUNNING:
                self._tell(record)
                self._clean(number, keeps_weights=number in members)
            elif record.stopped is not None:
                self._live.add(number)
                self.ended(number, {"state": "stopped"})
        return sorted(self._state.in_flight)

    def _sweep(self, ended: TrialRecord) -> None:
        """Keep weights only where the front needs them; checkpoints served their purpose when the trial ended."""
        # Only who stood on the front and who ends now can change it, and the front of both is that of all.
        candidates = [*self._members, ended]
        self._members = front(candidates, self.objectives)
        members = {member.number for member in self._members}
        for candidate in candidates:
            if not _may_be_written(candidate) and (candidate.number not in members or candidate is ended):
                self._clean(candidate.number, keeps_weights=candidate.number in members)

    def _clean(self, number: int, *, keeps_weights: bool) -> None:
        for part in self._store.trial_path(number).glob("*"):
            if not (keeps_weights and part.name == "final"):
                shutil.rmtree(part, ignore_errors=True)


def _may_be_written(record: TrialRecord) -> bool:
    """A worker is still at a trial that runs, and for a step or so at one that was ended from here; that one it cleans up itself."""
    return record.state in (TrialState.RUNNING, TrialState.PRUNED) or (record.error or {}).get("kind") == "driver_lost"


def objectives_of(spec: SearchSpec, state: SearchState) -> tuple[Objective, ...]:
    """Return the objectives; a reference that the spec leaves open is the untrained model's score, where that is known."""
    known = state.reference or {}
    return tuple(
        o if o.reference is not None else Objective(metric=o.metric, direction=o.direction, reference=known.get(o.metric))
        for o in spec.resolved_objectives()
    )


def _classify(
    outcome: Mapping[str, Any], final: Mapping[str, Any] | None, objectives: tuple[Objective, ...]
) -> tuple[TrialState, dict[str, str] | None, dict[str, float]]:
    """Return state, error and values of a trial from how its job ended and its last report."""
    if outcome["state"] == "stopped":
        return TrialState.PRUNED, None, {}
    if outcome["state"] == "failed":
        return TrialState.FAIL, {"kind": outcome["kind"], "message": outcome["message"]}, {}
    values = dict(final["metrics"]) if final else {}
    missing = [o.metric for o in objectives if not math.isfinite(values.get(o.metric, math.nan))]
    if missing:
        message = f"no finite value for {', '.join(missing)}; reported: {', '.join(sorted(values)) or 'nothing'}"
        return TrialState.FAIL, {"kind": "missing_metric", "message": message}, values
    return TrialState.COMPLETE, None, values


def elapsed_seconds(state: SearchState) -> float:
    """Return the wall seconds since the search was first started."""
    return time.time() - state.started["time"] if state.started else 0.0
