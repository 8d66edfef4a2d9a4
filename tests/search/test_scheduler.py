"""The scheduler and the searcher as Tune calls them, without Tune: what is recorded once, what is stopped, what is told."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from engines import make, report
from ray.tune.schedulers import TrialScheduler

from search.engine import Engine
from search.ledger import Ledger
from search.record import TrialState
from search.relay import MESSAGE
from search.rungs import Rungs
from search.scheduler import RungScheduler
from search.searcher import EngineSearcher
from search.store import Store
from trainables.job import Job


class Tune:
    """What Tune's controller does with a result, in its order."""

    def __init__(self, directory: Path, **changes: Any) -> None:
        self.engine, _, self.store = make(directory, **changes)
        self.stopped_jobs: list[str] = []
        self.submitted: list[Job] = []
        self.searcher = EngineSearcher(
            self.engine,
            max_concurrent=4,
            submit_job=self.submitted.append,
            stop_job=self.stopped_jobs.append,
            interrupted=lambda: False,
        )
        self.scheduler = RungScheduler(self.engine, Rungs(self.engine._spec, self.engine.state.records.values()))
        self.configs: dict[str, dict[str, Any]] = {}

    def start(self, trial_id: str) -> None:
        config = self.searcher.suggest(trial_id)
        assert isinstance(config, dict)
        self.configs[trial_id] = config

    def result(self, trial_id: str, **message: Any) -> str:
        result = {MESSAGE: json.dumps(message), "training_iteration": 1}
        trial = SimpleNamespace(trial_id=trial_id, config=self.configs[trial_id])
        decision = self.scheduler.on_trial_result(cast(Any, None), cast(Any, trial), result)
        if decision == TrialScheduler.STOP:
            self.searcher.on_trial_complete(trial_id, result)
        else:
            self.searcher.on_trial_result(trial_id, result)
        return decision

    def reports(self, trial_id: str, accuracy: float, seconds: float, step: int = 1) -> str:
        known = report(accuracy, seconds, final=step == 9, step=step)
        known["metrics"]["eval_loss"] = 1 - accuracy
        return self.result(trial_id, event="report", report=known)


def events(store: Store) -> list[tuple[str, int]]:
    return [(e["event"], e["number"]) for e in Ledger(store.ledger_path).events() if e["event"] != "trial_started"]


def test_a_dominated_trial_is_stopped_at_its_rung_and_all_of_it_is_recorded_once(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    for trial_id, accuracy, seconds in [("a", 0.5, 5.0), ("b", 0.6, 4.0)]:
        tune.start(trial_id)
        assert tune.reports(trial_id, accuracy, seconds) == TrialScheduler.CONTINUE
    tune.start("c")
    assert tune.reports("c", 0.4, 6.0) == TrialScheduler.STOP
    assert events(tune.store) == [("trial_reported", 0), ("trial_reported", 1), ("trial_reported", 2), ("trial_finished", 2)]
    record = tune.engine.state.records[2]
    assert record.state is TrialState.PRUNED
    assert record.stopped is not None
    assert (record.stopped["share"], record.stopped["place"]) == (pytest.approx(1 / 9), 3)
    assert record.reports[-1]["metrics"]["accuracy"] == 0.4, "the report that it was stopped at is not lost"
    assert tune.stopped_jobs == [tune.configs["c"]["job"].job_id]
    assert len(tune.engine.state.in_flight) == 2


def test_the_last_report_stops_nothing_and_the_end_is_the_searchers(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    for trial_id in "abc":
        tune.start(trial_id)
    for trial_id, accuracy in [("a", 0.9), ("b", 0.8), ("c", 0.1)]:
        assert tune.reports(trial_id, accuracy, 10 - 9 * accuracy, step=9) == TrialScheduler.CONTINUE
        assert tune.result(trial_id, event="ended", state="complete", attempts=1) == TrialScheduler.CONTINUE
        tune.searcher.on_trial_complete(trial_id, {})
    assert [r.state for r in tune.engine.state.records.values()] == [TrialState.COMPLETE] * 3


def test_a_resumed_search_holds_its_trials_against_those_from_before(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    for trial_id, accuracy in [("a", 0.5), ("b", 0.6)]:
        tune.start(trial_id)
        tune.reports(trial_id, accuracy, 5.0)
        tune.reports(trial_id, accuracy, 5.0, step=9)
        tune.result(trial_id, event="ended", state="complete", attempts=1)
    resumed = Tune(tmp_path)
    resumed.start("c")
    assert resumed.reports("c", 0.4, 6.0) == TrialScheduler.STOP


def test_a_trial_that_reports_a_rung_again_after_lost_workers_is_judged_by_what_it_says_now(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    for trial_id, accuracy in [("a", 0.5), ("b", 0.6)]:
        tune.start(trial_id)
        tune.reports(trial_id, accuracy, 5.0)
    tune.start("c")
    assert tune.reports("c", 0.7, 4.0) == TrialScheduler.CONTINUE
    assert tune.reports("c", 0.4, 6.0) == TrialScheduler.STOP
    assert tune.engine.state.records[2].stopped == {
        **{"share": pytest.approx(1 / 9), "goes_on": False, "place": 3, "num_entries": 3, "quota": 1},
        **{"front": 3, "num_fronts": 3},
    }


def test_the_searcher_tells_when_a_group_takes_a_trial_and_stops_what_tune_leaves_running(tmp_path: Path) -> None:
    tune = Tune(tmp_path)
    for trial_id in "abc":
        tune.start(trial_id)
    assert [job.job_id for job in tune.submitted] == [tune.configs[t]["job"].job_id for t in "abc"], "before a relay is there"
    tune.result("a", event="started", group_id="g", attempt=1, at=time.time() - 60)
    tune.reports("a", 0.5, 5.0, step=9)
    tune.result("a", event="ended", state="complete", attempts=1)
    tune.searcher.on_trial_complete("a", {})
    tune.result("b", event="started", group_id="g", attempt=1, at=time.time())
    tune.stopped_jobs.clear()
    # The budget is used up: Tune ends its trials, and tells nobody.
    tune.searcher.stop_rest()
    records = tune.engine.state.records
    assert [records[n].state for n in range(3)] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]
    assert records[0].held_seconds >= 60, "from when the group took it, not from when the relay told it"
    assert records[1].held_seconds > 0
    assert records[2].held_seconds == 0
    assert [number for event, number in events(tune.store) if event == "trial_placed"] == [0, 1], "the third has waited"
    assert tune.stopped_jobs == [tune.configs[trial_id]["job"].job_id for trial_id in "bc"]


def test_tune_may_pickle_and_question_it(tmp_path: Path) -> None:
    scheduler = Tune(tmp_path).scheduler
    assert isinstance(pickle.loads(pickle.dumps(scheduler)), RungScheduler)
    assert scheduler.set_search_properties(None, None)
    # A list here would end Tune's loop with a TypeError, a name that stands in no result with a ValueError.
    from ray.tune.result import DEFAULT_METRIC

    assert scheduler.metric == DEFAULT_METRIC


def test_the_engine_of_these_tests_stops_early_by_default(tmp_path: Path) -> None:
    engine: Engine = Tune(tmp_path).engine
    assert [o.metric for o in engine._spec.rung_objectives()] == ["eval_loss", "train_seconds"]


def test_what_is_handed_out_is_begun_at_once_and_no_more_is_before_one_ends(tmp_path: Path) -> None:
    tune = Tune(tmp_path, trials=8)
    for trial_id in "abcd":
        tune.start(trial_id)
    assert len(tune.submitted) == 4
    assert tune.searcher.suggest("e") is None
    tune.searcher.on_trial_complete("a", {})
    tune.start("e")
    assert len(tune.submitted) == 5
