"""One search as a sequence of facts: what was proposed, reported and found, in the order in which it may be lost.

Every fact goes to the ledger first, then to the study, then to the tracker; Ray Tune drives it through `searcher` and knows
none of the three. What it does for one trial does not grow with the trials before it: `benchmarks/scale.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from search.budget import Spending, Used, has_counted
from search.growth import Growth
from search.known import Known
from search.layouts import Forecaster, details_under, layout_to_train
from search.ledger import Ledger, SearchState, objectives_of, replay
from search.pareto import hypervolume_of
from search.profiles import scattered
from search.proposals import Proposal
from search.prospects import Prospects
from search.provenance import reproduce_command
from search.record import TrialRecord, TrialState, classify
from search.rungs import shares_of
from search.store import Store
from search.study import Study
from search.weights import Weights
from spaces import constraints
from spaces.config import TrialConfig
from spaces.constraints import Limits
from spaces.metrics import NOT_FROM_PROFILE, TRAIN_SECONDS
from spaces.spec import Objective, SearchSpec
from trainables.job import Job
from trainables.report import Diverged

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
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._spec = spec
        self._ledger = ledger
        self._study = study
        self._outlook = outlook
        self._on_event = on_event
        self._state = replay(ledger.events())
        records = list(self._state.records.values())
        # Under another layout a trial is only timed where all objectives follow from that.
        self._reuses = spec.reuse and not NOT_FROM_PROFILE & {o.metric for o in spec.resolved_objectives()}
        self._known = Known(self._state.records, outlook.has_profile)
        self._exhausted = ""
        self._violated: dict[str, float] = {}
        self._spending = Spending(spec, self._state, clock)
        self._growth = Growth(spec.budget, records, self.objectives)
        self._weights = Weights(store, self._state, spec.resolved_objectives())
        self._prospects = Prospects(
            spec,
            outlook,
            limits,
            records=self._state.records,
            is_known=lambda config: spec.reuse and self._standing(config) != (None, None),
            is_trained=lambda config: self._source_of(config) is not None,
            seconds_left=self._spending.seconds_left,
            device_seconds_left=self._spending.device_seconds_left,
        )
        self._prospects.restore(records)
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
    def num_left(self) -> float:
        """Trials of the budget that have not been handed out yet; infinite where only other limits end the search."""
        return 0 if self._growth.ended else self._spending.num_left(self._state.records[number] for number in self._live)

    @property
    def used(self) -> Used:
        """What was used of the budget up to now."""
        return self._spending.now()

    @property
    def reached(self) -> str:
        """In words, the limit that ends even what still trains; empty until there is one."""
        return self._spending.reached()

    @property
    def why_over(self) -> str:
        """In words, why nothing is proposed any more."""
        most = self._spec.budget.max_trials
        is_used_up = most is not None and self.num_left == 0
        return self.reached or self._growth.ended or (f"{most} trial{'s' * (most != 1)}" if is_used_up else "all points were tried")

    @property
    def is_handed_out(self) -> bool:
        """Whether nothing comes any more: what still trains may want to be timed under other layouts, and others may wait for it."""
        return (self.num_left == 0 or self._study.is_over) and not (self._pending or self._live or self._known.has_returned)

    def next(self) -> Assignment | None:
        """Return the next trial to run, or None if there is none now; infeasible proposals are told and passed over.

        Raises:
            SearchExhausted: hardly anything in the space is left, and nothing runs any more.
        """
        assignment = self._next_pending() or self._propose()
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
            is_judged=bool(self._spec.rung_objectives()),
            predicted_seconds=self._state.records[assignment.number].predicted.get(TRAIN_SECONDS),
        )

    def began(self, number: int, at: float, attempt: int = 1) -> None:
        """Take note that a worker group has taken the trial, in Unix seconds; a later attempt follows workers that were lost."""
        if number in self._live:
            self._spending.began(number, at)
            self._record("trial_placed", number=number, attempt=attempt)

    def reported(self, number: int, report: Mapping[str, Any], verdict: Mapping[str, Any] | None = None) -> None:
        """Record a report at an evaluation point or the last one, with what its rung says."""
        known = {} if verdict is None else {"verdict": dict(verdict)}
        self._record("trial_reported", number=number, report=dict(report), held_seconds=self._spending.held(number), **known)

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
                self._outlook.keep_profile(before.trial_config, outcome["profile"])
            final = self._timed(before)
            self._record("trial_reported", number=number, report=final)
        state, error, values = classify(outcome, final, self.objectives)
        held_by = (self._state.device or {}).get("workers_per_node", ())
        details = scattered(final, outcome.get("profile"), before.trial_config.layout.world_size, held_by)
        self._record(
            "trial_finished",
            number=number,
            state=state.value,
            values=values,
            error=error,
            constraints={constraints.memory_within_device.__name__: 1.0} if (error or {}).get("kind") == "out_of_memory" else {},
            attempts=outcome.get("attempts", min(1, len(reports))),
            held_seconds=self._spending.held(number, until=outcome.get("at")),
            details={**(final["details"] if final else {}), "job_seconds": outcome.get("job_seconds"), **details},
        )
        record = self._state.records[number]
        self._spending.ended(record)
        self._prospects.ended(record)
        self._tell(record)
        self._known.ended(record)
        self._propose_again(record)
        if record.is_whole:
            self._spread(record)
        self._weights.sweep(record, (*self._pending, *self._live))
        if self._spec.budget.patience and has_counted(record):
            self._growth.add(hypervolume_of(self.front(), self.objectives))

    def held_seconds(self) -> dict[int, float]:
        """Return for how long each trial in flight held its worker group since its last event, by number."""
        return {number: self._spending.held(number) for number in sorted(self._live)}

    def referenced(self, metrics: Mapping[str, float]) -> None:
        """Record the untrained model's score."""
        self._record("reference", metrics=dict(metrics))
        self._study.judge(self.objectives)

    def test_scored(self, number: int, metrics: Mapping[str, float]) -> None:
        """Record the score of a member of the front on the test file."""
        self._record("test_scored", number=number, metrics=dict(metrics))

    def finished(self, reason: str) -> None:
        """Record the end of the search; no worker writes any more, so that what is kept is the front's weights alone.

        What still waits for its turn was cut off by the budget.
        """
        for number in list(self._pending):
            self._end_at_once(number, {"state": "stopped"})
        self._record("search_finished", reason=reason)
        self._weights.settle()

    def front(self) -> list[TrialRecord]:
        """Return the non-dominated, complete, feasible trials."""
        return self._weights.front

    def _next_pending(self) -> Assignment | None:
        """Return the oldest trial that waits, but for those whose steps are being timed, or now were."""
        live = (self._state.records[number] for number in self._live)
        timed_now = {record.trial_config.of_step() for record in live if record.source is not None}
        for number in list(self._pending):
            record = self._state.records[number]
            config = record.trial_config
            error = self._known.why_untimed(config)
            if record.source is not None and (error or self._outlook.has_profile(config)):
                self._end_at_once(number, {"state": "failed", **error} if error else {"state": "complete"})
            elif record.source is None or config.of_step() not in timed_now:
                self._pending.remove(number)
                return Assignment(number=number, config=config, is_trained=record.source is None)
        return None

    def _end_at_once(self, number: int, outcome: Mapping[str, Any]) -> None:
        """End a trial that waits."""
        self._pending.remove(number)
        self._live.add(number)
        self.ended(number, outcome)

    def _propose(self) -> Assignment | None:
        """Return a proposal that is to run, of those that waited first; whatever else is proposed costs nothing."""
        num_asked = 0
        while num_asked < MAX_IDLE_IN_A_ROW:
            proposal = self._known.returned()
            if proposal is None:
                if self.num_left == 0 or self._study.is_over or self._exhausted:
                    return None
                live = (self._state.records[n] for n in (*self._live, *self._pending))
                proposal = self._study.ask(self._prospects, budget_left=1 - self._spending.share(live))
                num_asked += 1
            assignment = self._consider(proposal)
            if assignment is not None:
                return assignment
        self._exhausted = (
            f"{MAX_IDLE_IN_A_ROW} proposals in a row were infeasible or known"
            + "".join(f"; {name} = {value:g}" for name, value in self._violated.items() if value > 0)
            + "; `paretune plan` shows which layouts this cluster can run"
        )
        return None

    def _consider(self, proposal: Proposal) -> Assignment | None:
        """Make a proposal a trial, unless it cannot run, is known, or waits for what is being found out."""
        chosen = layout_to_train(self._prospects.candidates(proposal.params), self._outlook)
        number, config, self._violated = proposal.number, chosen.config, chosen.constraints
        if not chosen.is_feasible:
            known = {"params": chosen.params, "config": config.to_dict(), "constraints": chosen.constraints}
            self._record("trial_infeasible", number=number, **known, why=constraints.why_not(config, self._prospects.limits))
            self._study.tell_infeasible(number, chosen.constraints)
            return None
        if self._spec.reuse and self._is_known(proposal, config):
            return None
        source = self._source_of(config)
        if source is None and self.num_left == 0 and (proposal.again is None or self.reached or self._growth.ended):
            self._study.tell_failed(number)  # what it waited for came to nothing, and so late
            return None
        self._start(number, chosen.params, config, source=source, again=proposal.again)
        if source is None:
            return Assignment(number=number, config=config, is_trained=True)
        self._pending.append(number)
        return self._next_pending()

    def _is_known(self, proposal: Proposal, config: TrialConfig) -> bool:
        """Tell the study what is known of this very trial, if anything is, or let the proposal wait until it is known."""
        ended, awaited = self._standing(config)
        if ended is not None and self._study.learns_from_repeats:
            self._tell(replace(self._state.records[ended], number=proposal.number))
        elif ended is not None:
            self._study.drop(proposal.number)
        elif awaited is not None:
            self._known.wait(awaited, proposal)
        return ended is not None or awaited is not None

    def _standing(self, config: TrialConfig) -> tuple[int | None, int | None]:
        """Return the trial that tells what is known of a config, and the one that a proposal of it waits for.

        It waits for a trial of the same config, and for one that trains the same recipe.
        """
        same = self._known.trial_of(config)
        state = None if same is None else self._state.records[same].state
        is_trained = self._source_of(config) is not None
        ended = same if state in (TrialState.COMPLETE, TrialState.PRUNED) else self._known.hopeless(config, is_trained=is_trained)
        awaited = same if state is TrialState.RUNNING else None
        if awaited is None and self._reuses and not is_trained:
            awaited = self._known.in_training(config.recipe)
        return ended, None if ended is not None else awaited

    def _source_of(self, config: TrialConfig) -> int | None:
        """Return the trial that trained this recipe, as long as its weights are there: the front may come to need them."""
        number = self._known.trained(config.recipe) if self._reuses else None
        return number if number is not None and self._weights.has(number) else None

    def _spread(self, record: TrialRecord) -> None:
        """Have a trained recipe timed under every other layout that is to be measured, and can be."""
        for other in self._prospects.candidates(record.params):
            if other.config.layout != record.trial_config.layout and other.is_feasible and self._known.may_time(other.config, record):
                number = self._study.reserve()
                self._start(number, other.params, other.config, source=record.number, was_proposed=False)
                self._pending.append(number)

    def _propose_again(self, record: TrialRecord) -> None:
        """Have what ran out of memory tried with less of it, where that is left open."""
        if self._prospects.fits_smaller(record):
            with contextlib.suppress(ValueError):  # the user has changed the space since
                self._known.put_back(self._study.again(record.number, record.params))

    def _start(self, number: int, params: Mapping[str, Any], config: TrialConfig, **origin: Any) -> None:
        command = reproduce_command(self._spec, str(self._store.spec_path), self._store.name, number, params)
        predicted = self._prospects.corrected(self._outlook(config)) if origin["source"] is None else {}
        known = {"params": dict(params), "config": config.to_dict(), "predicted": predicted}
        self._record("trial_started", number=number, **known, command=command, **origin)
        self._known.started(self._state.records[number])

    def _timed(self, record: TrialRecord) -> dict[str, Any]:
        """Return the final report of a trial whose recipe was trained: its times are those of a step profile."""
        source = self._state.records[record.root]
        config, trained = (r.trial_config for r in (record, source))
        values = self._outlook.values_under(config, trained, source.values)
        return {**source.reports[-1], "metrics": dict(values), "details": {**details_under(source.details), "time_source": "profile"}}

    def _record(self, event: str, **fields: Any) -> None:
        line = self._ledger.append(event, **fields)
        self._state.apply(line)
        self._on_event(line)

    def _tell(self, record: TrialRecord) -> None:
        known = constraints.violations(record.trial_config, self._prospects.limits)
        if record.state is TrialState.COMPLETE:
            # It ran, whatever the limits are since then.
            self._study.tell_complete(record.number, record.values, {name: min(0.0, value) for name, value in known.items()})
        elif record.was_cut_off:
            self._study.tell_failed(record.number)
        elif not record.feasible:
            self._study.tell_infeasible(record.number, {**known, **record.constraints})
        elif record.state is TrialState.PRUNED or (record.error or {}).get("kind") == Diverged.kind:
            self._study.tell_pruned(record.number, {name: min(0.0, value) for name, value in known.items()})
        else:
            self._study.tell_failed(record.number)

    def _reconcile(self) -> None:
        """Bring the study up to the ledger, and the disk; what was cut off in flight waits, unless a rung had stopped it."""
        records = self._state.records
        again = {number: record.again for number, record in records.items()}
        asked = {n: record.params if record.was_proposed else None for n, record in records.items()}
        self._study.restore(asked, again, cut_off={n for n, record in records.items() if record.was_cut_off})
        for number, record in list(records.items()):
            if record.state is not TrialState.RUNNING:
                self._tell(record)
            elif record.stopped is not None:
                self._end_at_once(number, {"state": "stopped"})
        # A crash may have come between a trial's end and what follows from it, or a budget's end that is no end any more.
        is_spread = bool(self._spec.space.profiled_knobs()) and not self.reached
        for record in list(records.values()):
            if record.number not in again.values():
                self._propose_again(record)
            if is_spread and record.is_whole and self._weights.has(record.number):
                self._spread(record)
        self._weights.settle(self._pending)
