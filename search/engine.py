"""One search as a sequence of facts: what was proposed, reported and found, in the order in which it may be lost.

Every fact goes to the ledger first, then to the study, then to the tracker; Ray Tune drives it through `searcher` and knows
none of the three. What it does for one trial does not grow with the trials before it: `benchmarks/scale.py`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from search.layouts import Forecaster, layout_to_train, layouts_of, timed_knobs
from search.ledger import Ledger, SearchState, replay
from search.pareto import front
from search.provenance import reproduce_command
from search.record import TrialRecord, TrialState
from search.rungs import shares_of
from search.store import Store
from search.study import Study
from spaces import constraints
from spaces.config import TrialConfig
from spaces.constraints import Limits
from spaces.metrics import NOT_FROM_PROFILE
from spaces.spec import Objective, SearchSpec
from trainables.job import Job

# Infeasible proposals and duplicates cost nothing but a suggestion; this many in a row: next to nothing in the space is left.
MAX_IDLE_IN_A_ROW = 200


class SearchExhausted(Exception):
    """The sampler finds no feasible proposal any more that was not trained before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """A trial that is to run: to be trained, or only timed where its recipe was trained under another layout."""

    number: int
    config: TrialConfig
    is_trained: bool


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
        outlook: Forecaster,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self._store = store
        self._spec = spec
        self._ledger = ledger
        self._study = study
        self._limits = limits
        self._outlook = outlook
        self._on_event = on_event
        self._state = replay(ledger.events())
        for record in self._state.records.values():
            self._lower_memory_limit(record)
        records = list(self._state.records.values())
        # Under another layout a trial is only timed where all objectives follow from that.
        self._reuses = spec.reuse and not NOT_FROM_PROFILE & {o.metric for o in spec.resolved_objectives()}
        self._trained = {_config(r).recipe.key(): r.number for r in records if _is_whole(r)}
        self._known = {_config(r).key(): r.number for r in records if r.feasible_before_launch}
        self._exhausted = ""
        self._num_ended = sum(r.state is not TrialState.RUNNING and _counts(r) for r in records)
        self._members = front(records, self.objectives)
        self._live: set[int] = set()
        self._pending = sorted(self._state.in_flight)
        self._reconcile()

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
        live = sum(_counts(self._state.records[number]) for number in self._live)
        return max(0, self._spec.budget.trials - self._num_ended - live)

    @property
    def is_handed_out(self) -> bool:
        """Whether nothing comes any more: what still trains may want to be timed under other layouts."""
        return self.num_left == 0 and not self._pending and not self._live

    def next(self) -> Assignment | None:
        """Return the next trial to run, or None if there is none now; infeasible proposals are told and passed over.

        Raises:
            SearchExhausted: hardly anything in the space is left, and nothing runs any more.
        """
        assignment = self._next_pending()
        if assignment is None and self.num_left > 0 and not self._exhausted:
            assignment = self._propose()
        if assignment is None and self._exhausted and not self._live and not self._pending:
            raise SearchExhausted(self._exhausted)
        if assignment is not None:
            self._live.add(assignment.number)
        return assignment

    def job(self, assignment: Assignment) -> Job:
        """Return what a worker group needs to train the trial, or to time it."""
        return Job(
            job_id=f"{self._store.name}/trial-{assignment.number:04d}",
            kind="train" if assignment.is_trained else "profile",
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
        before = self._state.records[number]
        reports = before.reports
        final = reports[-1] if reports and reports[-1]["final"] else None
        if before.source is not None and outcome["state"] == "complete":
            if "profile" in outcome:
                self._outlook.keep_profile(_config(before), outcome["profile"])
            final = self._timed(before)
            self._record("trial_reported", number=number, report=final)
        state, error, values = classify(outcome, final, self.objectives)
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
        self._num_ended += _counts(record)
        self._lower_memory_limit(record)
        self._tell(record)
        if _is_whole(record):
            self._trained[_config(record).recipe.key()] = number
            self._spread(record)
        self._sweep(record)

    def referenced(self, metrics: Mapping[str, float]) -> None:
        """Record the untrained model's score."""
        self._record("reference", metrics=dict(metrics))

    def test_scored(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record the score of a member of the front on the test file."""
        self._record("test_scored", number=number, metrics=dict(metrics))

    def finished(self, reason: str) -> None:
        """Record the end of the search; no worker writes any more, so that what is kept is the front's weights alone.

        What still waits for its turn was cut off by the time limit.
        """
        for number in list(self._pending):
            self._pending.remove(number)
            self._live.add(number)
            self.ended(number, {"state": "stopped"})
        self._record("search_finished", reason=reason)
        kept = self._kept()
        for record in self._state.records.values():
            if record.state is not TrialState.RUNNING:
                self._clean(record.number, keeps_weights=record.number in kept)

    def front(self) -> list[TrialRecord]:
        """Return the non-dominated, complete, feasible trials."""
        return [self._state.records[member.number] for member in self._members]

    def _next_pending(self) -> Assignment | None:
        """Return the oldest trial that waits, but for those whose steps are being timed, or now were."""
        timed_now = {self._time_key(number) for number in self._live if self._state.records[number].source is not None}
        for number in list(self._pending):
            record = self._state.records[number]
            config = _config(record)
            if record.source is not None and self._outlook.has_profile(config):
                self._pending.remove(number)
                self._finish_timed(number)
            elif record.source is None or self._time_key(number) not in timed_now:
                self._pending.remove(number)
                return Assignment(number=number, config=config, is_trained=record.source is None)
        return None

    def _propose(self) -> Assignment | None:
        for _ in range(MAX_IDLE_IN_A_ROW):
            proposal = self._study.ask()
            chosen = layout_to_train(layouts_of(proposal.params, self._spec, self._limits), self._outlook)
            params, config, values = chosen.params, chosen.config, chosen.constraints
            if not chosen.is_feasible:
                known = {"number": proposal.number, "params": params, "config": config.to_dict()}
                self._record("trial_infeasible", **known, constraints=values)
                self._study.tell_infeasible(proposal.number, values)
                continue
            if self._spec.reuse and self._is_told_as_duplicate(proposal.number, config):
                continue
            source = self._source_of(config)
            self._start(proposal.number, params, config, source=source)
            if source is None:
                return Assignment(number=proposal.number, config=config, is_trained=True)
            self._pending.append(proposal.number)
            assignment = self._next_pending()
            if assignment is not None:
                return assignment
        self._exhausted = (
            f"{MAX_IDLE_IN_A_ROW} proposals in a row were infeasible or known"
            + "".join(f"; {name} = {value:g}" for name, value in values.items() if value > 0)
            + "; `paretune plan` shows which layouts this cluster can run"
        )
        return None

    def _is_told_as_duplicate(self, number: int, config: TrialConfig) -> bool:
        """Tell the study what is known of this very trial, if anything is; nothing else happens, and nobody else hears of it."""
        known = self._state.records.get(self._known.get(config.key(), -1))
        if known is None or known.state is TrialState.FAIL:
            return False
        if known.state is TrialState.RUNNING:
            self._study.tell_failed(number)
        else:
            self._tell(replace(known, number=number))
        return True

    def _source_of(self, config: TrialConfig) -> int | None:
        """Return the trial that trained this recipe, as long as its weights are there: the front may come to need them."""
        number = self._trained.get(config.recipe.key()) if self._reuses else None
        return number if number is not None and (self._store.trial_path(number) / "final").exists() else None

    def _spread(self, record: TrialRecord) -> None:
        """Have a trained recipe timed under every other layout that is to be measured."""
        trained = _config(record).layout
        for other in layouts_of(record.params, self._spec, self._limits):
            if other.config.layout != trained and other.is_feasible and other.config.key() not in self._known:
                number = self._study.reserve()
                self._start(number, other.params, other.config, source=record.number, was_proposed=False)
                self._pending.append(number)

    def _start(self, number: int, params: Mapping[str, Any], config: TrialConfig, **origin: Any) -> None:
        command = reproduce_command(self._spec, str(self._store.spec_path), self._store.name, number, params)
        predicted = dict(self._outlook(config)) if origin["source"] is None else {}
        known = {"params": dict(params), "config": config.to_dict(), "predicted": predicted}
        self._record("trial_started", number=number, **known, command=command, **origin)
        self._known[config.key()] = number

    def _finish_timed(self, number: int) -> None:
        """End a trial of which all is known."""
        self._live.add(number)
        self.ended(number, {"state": "complete"})

    def _timed(self, record: TrialRecord) -> dict[str, Any]:
        """Return the final report of a trial whose recipe was trained: its times are those of a step profile."""
        source = self._state.records[record.root]
        config, trained = (_config(r) for r in (record, source))
        values = self._outlook.values_under(config, trained, source.values)
        return {**source.reports[-1], "metrics": dict(values), "details": {"time_source": "profile"}}

    def _time_key(self, number: int) -> str:
        """Return what trials share that are timed by the same steps."""
        return str(timed_knobs(_config(self._state.records[number])))

    def _lower_memory_limit(self, record: TrialRecord) -> None:
        """Where a trial ran out of memory, whatever is predicted to hold as much would too."""
        if record.error is None or record.error["kind"] != "out_of_memory":
            return
        predicted = constraints.predicted_memory(_config(record), self._limits)
        if predicted is not None:
            known = self._limits.memory_bytes
            below = predicted.peak_bytes - 1
            self._limits = replace(self._limits, memory_bytes=below if known is None else min(known, below))

    def _record(self, event: str, **fields: Any) -> None:
        line = self._ledger.append(event, **fields)
        self._state.apply(line)
        self._on_event(line)

    def _tell(self, record: TrialRecord) -> None:
        known = constraints.violations(_config(record), self._limits)
        if record.state is TrialState.COMPLETE:
            # It ran, whatever the limits are since then.
            self._study.tell_complete(record.number, record.values, {name: min(0.0, value) for name, value in known.items()})
        elif not record.feasible:
            self._study.tell_infeasible(record.number, {**known, **record.constraints})
        elif record.state is TrialState.PRUNED:
            self._study.tell_pruned(record.number)
        else:
            self._study.tell_failed(record.number)

    def _reconcile(self) -> None:
        """Bring the study up to the ledger, and the disk; what was cut off in flight waits, unless a rung had stopped it."""
        self._study.restore({n: record.params if record.was_proposed else None for n, record in self._state.records.items()})
        kept = self._kept(self._pending)
        for number, record in list(self._state.records.items()):
            if record.state is not TrialState.RUNNING:
                self._tell(record)
                self._clean(number, keeps_weights=number in kept)
            elif record.stopped is not None:
                self._pending.remove(number)
                self._live.add(number)
                self.ended(number, {"state": "stopped"})
        # A crash may have come between a trial's end and the start of its other layouts.
        for record in list(self._state.records.values()) if self._spec.space.profiled_knobs() else ():
            if _is_whole(record):
                self._spread(record)

    def _sweep(self, ended: TrialRecord) -> None:
        """Keep weights only where the front needs them; checkpoints served their purpose when the trial ended."""
        # Only who stood on the front and who ends now can change it, and the front of both is that of all.
        candidates = [*self._members, ended]
        self._members = front(candidates, self.objectives)
        kept = self._kept((*self._pending, *self._live))
        for candidate in candidates:
            owner = self._state.records[candidate.root]
            if not _may_be_written(owner) and (owner.number not in kept or candidate is ended):
                self._clean(owner.number, keeps_weights=owner.number in kept)

    def _kept(self, waiting: Iterable[int] = ()) -> set[int]:
        """Return whose weights are kept: those of the front, and of what may come onto it under another layout."""
        return {member.root for member in self._members} | {self._state.records[number].root for number in waiting}

    def _clean(self, number: int, *, keeps_weights: bool) -> None:
        for part in self._store.trial_path(number).glob("*"):
            if not (keeps_weights and part.name == "final"):
                shutil.rmtree(part, ignore_errors=True)


def _config(record: TrialRecord) -> TrialConfig:
    assert record.config is not None  # proposed by this program, which always writes one
    return TrialConfig.from_dict(record.config)


def _counts(record: TrialRecord) -> bool:
    """Whether it takes from the budget of trials: it was launched, and its recipe trained."""
    return record.feasible_before_launch and record.source is None


def _is_whole(record: TrialRecord) -> bool:
    """Whether its recipe was trained to the end, in this trial."""
    return record.state is TrialState.COMPLETE and record.source is None


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


def classify(
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
