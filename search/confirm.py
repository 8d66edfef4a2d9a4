"""`paretune confirm`: train the members of a front again with further seeds, one at a time, and score them on unseen rows.

What comes out is appended to the ledger of the search, seed by seed, so that a confirmation that was cut off goes on. Neither the
front nor the study changes by it: a trial that is trained more often than the others would win by chance.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from search import cluster
from search.confidence import failure_lines
from search.errors import UserError
from search.formatting import number_text
from search.interruption import Interruption
from search.jobs import DispatcherSession, run_to_end
from search.ledger import Ledger, SearchState, objectives_of
from search.pareto import eligible, front
from search.publication import LEAVING_FLUSH_SECONDS, publish, publish_again, reopen
from search.record import LASTING, Confirmation, TrialRecord, TrialState, classify
from search.results import Results
from search.session import Prepared, check_same_data, connected_tracker, prepare
from search.store import Store
from search.tracking import Tracker
from spaces.config import TrialConfig
from spaces.metrics import TRAIN_SECONDS, metric_of
from spaces.spec import Objective
from trainables.job import Job

NUM_SEEDS = 2**32


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One trial with one further seed."""

    record: TrialRecord
    config: TrialConfig

    @classmethod
    def of(cls, record: TrialRecord, seed: int) -> Training:
        config = record.trial_config
        return cls(record=record, config=replace(config, recipe=replace(config.recipe, seed=seed)))

    @property
    def seed(self) -> int:
        return self.config.recipe.seed


def confirm(store: Store, *, num_seeds: int, trials: str | None, say: Callable[[str], None]) -> list[str]:
    """Train what is not confirmed yet, and publish what all of it says; return a line for each seed that gave no result.

    Args:
        store: the search.
        num_seeds: further seeds of each trial.
        trials: numbers of complete trials with commas; None for the members of the front.
        say: takes a line on what happens.

    Raises:
        UserError: the data changed since the search began, or there is no such trial; nothing was started.
        spaces.loading.SpecError: model, data or tracking server cannot be used; nothing was started.
        search.interruption.Interrupted: a signal came; what was in flight is saved.
    """
    if num_seeds < 1:
        raise UserError(f"--seeds {num_seeds}: at least one further seed; allowed: 1 or more, and from 2 on there is an interval")
    with store.lock():
        loaded, state = store.load_spec_here(), store.state()
        chosen = chosen_trials(list(state.records.values()), objectives_of(loaded.spec, state), trials, store.name)
        left = outstanding(chosen, num_seeds)
        named = [] if trials is None else ["--trials", trials]
        command = store.command("confirm", store.name, "--seeds", str(num_seeds), *named)
        if left:
            prepared = prepare(loaded)
            check_same_data(prepared.data.fingerprint, store, state)
            _drive(store, prepared, state, left, command, say)
        else:
            say(f"confirmed already: {len(chosen)} trials with {num_seeds} further seeds")
            publish_again(store, connected_tracker(loaded), state, command_for_rest=command)
    wanted = {(r.number, seed) for r in chosen for seed in further_seeds(r, num_seeds)}
    records = [
        replace(r, confirmations=tuple(c for c in r.confirmations if (r.number, c.seed) in wanted)) for r in state.records.values()
    ]
    return [line for record in records for line in failure_lines(record)]


def chosen_trials(
    records: Sequence[TrialRecord], objectives: Sequence[Objective], trials: str | None, name: str
) -> list[TrialRecord]:
    """Return the trials that are named, or the members of the front.

    Raises:
        UserError: there is none, or a name is none.
    """
    members = front(records, objectives)
    if not members:
        raise UserError(f"{name} has no front: no trial is complete and feasible, and so there is none to take")
    if trials is None:
        return members
    known = {record.number: record for record in eligible(records, objectives)}
    return [known[number] for number in dict.fromkeys(_number(text, known, records, members) for text in trials.split(","))]


def _number(text: str, known: Mapping[int, TrialRecord], records: Sequence[TrialRecord], members: Sequence[TrialRecord]) -> int:
    if not text.strip().isdecimal():
        raise UserError(f"--trials: '{text}' is not the number of a trial; allowed: numbers with commas, such as {min(known)}")
    number = int(text)
    if number not in known:
        states = {record.number: record.state.value for record in records}
        what = f"trial {number} is {states[number]}, and only complete trials can be taken" if number in states else "no such trial"
        raise UserError(f"--trials {number}: {what}; the front: {', '.join(str(member.number) for member in members)}")
    return number


def further_seeds(record: TrialRecord, num_seeds: int) -> list[int]:
    """Return seeds that are not the trial's own; more of them begin with the same ones."""
    own = record.trial_config.recipe.seed
    return [(own + 1 + i) % NUM_SEEDS for i in range(num_seeds)]


def outstanding(chosen: Sequence[TrialRecord], num_seeds: int) -> list[Training]:
    """Return what is to be trained, seed by seed: an interruption leaves all trials with as many, and a slow hour meets them all."""
    rounds: list[list[Training]] = [[] for _ in range(num_seeds)]
    for record in chosen:
        done = {c.seed for c in record.confirmations if c.error is None or c.error["kind"] == LASTING}
        for number, seed in enumerate(further_seeds(record, num_seeds)):
            if seed not in done:
                rounds[number].append(Training.of(record, seed))
    ordered: list[Training] = []
    for number, trainings in enumerate(rounds):
        # There and back, so that the last world size of a round is the first of the next, and its worker group stays.
        ordered += sorted(trainings, key=lambda t: t.config.layout.world_size, reverse=number % 2 == 1)
    return ordered


def _drive(
    store: Store, prepared: Prepared, state: SearchState, left: Sequence[Training], command: str, say: Callable[[str], None]
) -> None:
    spec = prepared.spec
    if cluster.is_submitted():
        cluster.check_reachable()
    else:
        _check_fits(left, cluster.local_capacity(spec.resources))
    for line in (*announcement(left), *split_lines(prepared.data.summary)):
        say(line)
    with Interruption(command) as interruption, cluster.connected(spec.resources) as capacity, interruption.following_ray():
        _check_fits(left, capacity)
        ledger, tracker = Ledger(store.ledger_path), prepared.tracker
        reopen(tracker, store, state)
        with cut_short(tracker, state), DispatcherSession(store, spec, prepared.data, capacity) as dispatcher:
            for number, training in enumerate(left, start=1):
                interruption.check()
                found = _train(dispatcher, store, training, prepared, objectives_of(spec, state), interruption)
                event = ledger.append("confirmed", number=training.record.number, seed=training.seed, **found)
                tracker.submit(event)
                state.apply(event)
                shutil.rmtree(store.confirmation_path(training.record.number, training.seed), ignore_errors=True)
                record = state.records[training.record.number]
                (done,) = (c for c in record.confirmations if c.seed == training.seed)
                say(f"{number} of {len(left)}: {progress_text(record, done, objectives_of(spec, state))}")
        publish(Results.of(store, state), tracker, command_for_rest=command)


@contextmanager
def cut_short(tracker: Tracker, state: SearchState) -> Iterator[None]:
    """Leave the search's run in MLflow as it was found, whatever ends the confirmation."""
    try:
        yield
    except BaseException:
        tracker.leave("FINISHED" if state.finished else "KILLED", LEAVING_FLUSH_SECONDS)
        raise


def _check_fits(left: Sequence[Training], capacity: int) -> None:
    for training in left:
        if training.config.layout.world_size > capacity:
            raise UserError(
                f"trial {training.record.number} needs {training.config.layout.world_size} workers and the cluster holds {capacity}; "
                "confirm it where it was trained, or name others with --trials"
            )


def _train(
    dispatcher: Any,
    store: Store,
    training: Training,
    prepared: Prepared,
    objectives: tuple[Objective, ...],
    interruption: Interruption,
) -> dict[str, Any]:
    """Train one trial with one further seed, and score it; nothing else runs meanwhile."""
    number, seed = training.record.number, training.seed

    def job(kind: str) -> Job:
        return Job(
            job_id=f"{store.name}/confirm-{kind}-{number:04d}-{seed}",
            kind=kind,
            config=training.config.to_dict(),
            directory=str(store.confirmation_path(number, seed)),
            rungs=(),
        )

    began = time.time()
    ended, reports = run_to_end(dispatcher, job("train"), interruption)
    final = reports[-1] if reports and reports[-1]["final"] else None
    state, error, values = classify(ended, final, objectives)
    test: dict[str, float] = {}
    if state is TrialState.COMPLETE and prepared.data.test is not None:
        scored, _ = run_to_end(dispatcher, job("test"), interruption)
        if scored["state"] == "complete":
            test = dict(scored["metrics"])
        else:
            state, error = TrialState.FAIL, {"kind": scored["kind"], "message": f"not scored on the test rows: {scored['message']}"}
    return {"state": state.value, "values": values, "test": test, "error": error, "started_at": began}


def announcement(left: Sequence[Training]) -> list[str]:
    """Return what is about to be trained, and about how long that takes."""
    numbers = sorted({training.record.number for training in left})
    seconds = sum(training.record.values.get(TRAIN_SECONDS, 0.0) for training in left)
    trials = f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
    about = f"; about {number_text(TRAIN_SECONDS, seconds)} of training" if seconds else ""
    return [f"confirming {trials}: {len(left)} training{'s' if len(left) > 1 else ''}, one at a time{about}"]


def split_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return on which rows is scored, and how many of them are no news to the model or to the search."""
    if "test_rows" not in summary:
        chosen_by = "by which the search chose its trials, so scores are optimistic"
        return [f"data.test names no test rows: scored on the evaluation rows, {chosen_by}"]
    known = ", ".join(f"{summary[f'test_rows_also_in_{role}']} also in {role}" for role in ("train", "evaluation"))
    return [f"scored on the {summary['test_rows']} test rows ({known})"]


def progress_text(record: TrialRecord, done: Confirmation, objectives: Sequence[Objective]) -> str:
    """Return what one further seed gave, in one line."""
    text = f"trial {record.number:04d} seed {done.seed}"
    if done.error is not None:
        return f"{text} FAIL {done.error['kind']}: {done.error['message']}"
    parts = []
    for metric in (o.metric for o in objectives):
        scores, rows = (done.test, "on test rows, ") if metric in done.test else (done.values, "")
        is_test = metric_of(metric).section == "eval" and bool(rows)
        value = scores[metric] if is_test else done.values[metric]
        searched = number_text(metric, record.values.get(metric))
        parts.append(f"{metric} {number_text(metric, value)} ({rows if is_test else ''}{searched} in the search)")
    return f"{text}: {', '.join(parts)}"
