"""A recipe is trained once: duplicates cost nothing, and other layouts some steps."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from engines import Profiles, make, report

from search.engine import Assignment, Engine, SearchExhausted
from search.record import TrialState

# One recipe, and what only changes how fast it runs.
ONE_RECIPE: dict[str, Any] = {"learning_rate": 1e-3, "global_batch_size": 16, "dataset_fraction": 1.0, "lora_rank": 4}
PROFILED: dict[str, Any] = {"world_size": {"profile": [1, 2, 4]}, "strategy": "profile"}


def train(engine: Engine, assignment: Assignment | None, accuracy: float = 0.5, seconds: float = 9.0) -> None:
    assert assignment is not None
    assert assignment.is_trained
    (engine._store.trial_path(assignment.number) / "final").mkdir(parents=True, exist_ok=True)
    engine.reported(assignment.number, report(accuracy, seconds))
    engine.ended(assignment.number, {"state": "complete"})


def profile(engine: Engine, assignment: Assignment | None) -> None:
    assert assignment is not None
    assert engine.job(assignment).kind == "profile"
    engine.ended(assignment.number, {"state": "complete", "profile": {}})


def test_a_recipe_that_was_trained_is_only_timed_under_another_layout_and_that_is_none_of_the_budget(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2, **ONE_RECIPE, world_size={"choice": [1, 2]})
    first = engine.next()
    assert first is not None
    train(engine, first)
    second = engine.next()
    profile(engine, second)
    assert second is not None
    record = engine.state.records[second.number]
    assert (record.state, record.source) == (TrialState.COMPLETE, first.number)
    assert record.values["accuracy"] == 0.5
    assert record.values["train_seconds"] == (0.7 if second.config.layout.world_size == 2 else 1.0)
    assert record.details["time_source"] == "profile"
    assert record.details["peak_source"] == "measured_gemm", "its MFU follows from that of the trained trial"
    trained = engine.state.records[first.number].details
    assert trained["train_losses"]
    assert (record.details["train_losses"], record.details["steps_per_loss"]) == (trained["train_losses"], trained["steps_per_loss"])
    assert engine.num_left == 1
    assert {trial.state.name for trial in engine._study._study.trials} == {"COMPLETE"}, "a proposal that the sampler learns from"
    # Nothing else is in this space: whatever is proposed is known, is told to the sampler alone, and ends the search.
    with pytest.raises(SearchExhausted, match="known"):
        engine.next()
    assert len(engine.state.records) == 2
    told = [trial.values for trial in engine._study._study.trials if trial.number > second.number]
    assert len(told) > 100
    assert {v[1] for v in told} == {math.log(9.0), math.log(record.values["train_seconds"])}
    engine.finished("test")
    assert len(engine.front()) == 1


def test_what_is_known_of_a_space_does_not_end_what_still_runs(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=5, **ONE_RECIPE, world_size={"choice": [1, 2]})
    train(engine, engine.next())
    timed = engine.next()
    assert timed is not None
    for _ in range(10):
        assert engine.next() is None, "its steps are being timed"
    assert len(engine.state.records) == 2
    assert not engine.is_handed_out
    profile(engine, timed)
    with pytest.raises(SearchExhausted):
        engine.next()


def test_a_recipe_whose_weights_are_gone_is_trained_again(tmp_path: Path) -> None:
    """The front may come to need them."""
    engine, _, store = make(tmp_path, trials=3, **ONE_RECIPE, world_size={"choice": [1, 2]})
    first = engine.next()
    train(engine, first)
    assert first is not None
    (store.trial_path(first.number) / "final").rmdir()
    again = engine.next()
    assert again is not None
    assert again.is_trained


def test_objectives_that_no_profile_tells_are_trained_for(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2, objectives=["accuracy", "total_seconds"], **ONE_RECIPE, world_size={"choice": [1, 2]})
    for _ in range(2):
        assignment = engine.next()
        assert assignment is not None
        assert assignment.is_trained
        (engine._store.trial_path(assignment.number) / "final").mkdir(parents=True)
        last = report(0.5, 9.0)
        engine.reported(assignment.number, {**last, "metrics": {**last["metrics"], "total_seconds": 9.0}})
        engine.ended(assignment.number, {"state": "complete"})


def test_the_time_limit_ends_what_waits_to_be_timed(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=1, global_batch_size=16, **PROFILED)
    train(engine, engine.next())
    engine.finished("minutes")
    assert [r.state for r in engine.state.records.values()] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.PRUNED]


def test_what_the_time_limit_cut_off_is_timed_after_a_resume_with_more_time(tmp_path: Path) -> None:
    engine, _, store = make(tmp_path, trials=2, budget={"minutes": 1}, global_batch_size=16, **PROFILED)
    first, second = engine.next(), engine.next()
    train(engine, first, accuracy=0.9)
    train(engine, second, accuracy=0.1)
    engine.finished("1 minutes used up")
    assert len(list(store.root.glob("trials/*/final"))) == 1, "the front's weights alone stay"

    def resume(minutes: float) -> tuple[Engine, set[str]]:
        budget = {"minutes": minutes}
        resumed, seen, _ = make(tmp_path, trials=2, budget=budget, clock=lambda: time.time() + 600, global_batch_size=16, **PROFILED)
        return resumed, {e["event"] for e in seen}

    resumed, events = resume(1)
    assert resumed.reached
    assert not events, "there is no time to time it"
    resumed, _ = resume(60)
    for _ in range(2):
        profile(resumed, resumed.next())
    assert resumed.is_handed_out
    assert not resume(60)[1], "it is timed, and what has no weights any more is left"


def test_a_crash_before_the_other_layouts_were_started_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, _ = make(tmp_path, trials=1, global_batch_size=16, **PROFILED)
    monkeypatch.setattr(engine, "_spread", lambda _: None)
    train(engine, engine.next())
    resumed, _, _ = make(tmp_path, trials=1, global_batch_size=16, **PROFILED)
    for _ in range(2):
        profile(resumed, resumed.next())
    assert resumed.is_handed_out


def test_reuse_can_be_turned_off(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2, reuse=False, **ONE_RECIPE)
    for _ in range(2):
        train(engine, engine.next())
    assert engine.is_handed_out


def test_every_recipe_has_a_point_for_each_feasible_layout(tmp_path: Path) -> None:
    outlook = Profiles()
    engine, _, _ = make(tmp_path, trials=2, outlook=outlook, global_batch_size=16, lora_rank=4, **PROFILED)
    first = engine.next()
    assert first is not None
    assert first.config.layout.world_size == 1, "nothing is known of the times: the smallest world size"
    train(engine, first, accuracy=0.5)
    # One rank has no strategy, and four ranks are more than the cluster holds.
    assert not engine.is_handed_out
    timed = [engine.next(), engine.next()]
    assert [a.config.layout.strategy for a in timed if a] == ["ddp", "fsdp"]
    for assignment in timed:
        profile(engine, assignment)
    second = engine.next()
    assert second is not None
    train(engine, second, accuracy=0.6)
    assert engine.next() is None, "all of its layouts were timed before"
    assert engine.is_handed_out
    points = [(r.root, r.values["accuracy"], r.values["train_seconds"]) for r in engine.state.records.values()]
    one, two = first.number, second.number
    assert sorted(points) == [(one, 0.5, 0.7)] * 2 + [(one, 0.5, 9.0)] + [(two, 0.6, 0.7)] * 2 + [(two, 0.6, 9.0)]
    assert {r.root for r in engine.front()} == {two}
    told = [t.values for t in engine._study._study.trials if t.state.name == "COMPLETE"]
    assert told == [[0.5, math.log(9.0)], [0.6, math.log(9.0)]], "the sampler learns of each recipe once"


def test_one_measurement_serves_all_that_wait_for_it(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2, global_batch_size=16, lora_rank=4, world_size={"profile": [1, 2]})
    first, second = engine.next(), engine.next()
    train(engine, first)
    timed = engine.next()
    train(engine, second)
    assert engine.next() is None, "the same steps are being timed"
    assert not engine.is_handed_out
    profile(engine, timed)
    assert engine.next() is None
    assert engine.is_handed_out
    assert sum(r.source is not None and r.state is TrialState.COMPLETE for r in engine.state.records.values()) == 2


def test_the_layout_that_takes_the_least_of_the_devices_is_trained(tmp_path: Path) -> None:
    class Knows(Profiles):
        is_profiled = True

        def rough_seconds(self, config: Any) -> tuple[float, str]:
            return {1: 10.0, 2: 4.0}[config.layout.world_size], "profile"

        def has_profile(self, config: Any) -> bool:
            return self.is_profiled

    for is_profiled, chosen in ((True, 2), (False, 1)):
        outlook = Knows()
        outlook.is_profiled = is_profiled
        engine, _, _ = make(tmp_path / str(chosen), outlook=outlook, global_batch_size=16, world_size={"profile": [2, 1]})
        assignment = engine.next()
        assert assignment is not None
        assert assignment.config.layout.world_size == chosen, "an estimate does not decide it"
        assert engine.state.records[0].params["world_size"] == chosen


def test_a_layout_that_cannot_be_timed_is_a_failure_of_its_own(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=1, global_batch_size=16, world_size={"profile": [1, 2]})
    train(engine, engine.next())
    assignment = engine.next()
    assert assignment is not None
    engine.ended(assignment.number, {"state": "failed", "kind": "out_of_memory", "message": "x"})
    assert engine.state.records[assignment.number].state is TrialState.FAIL
    assert [r.number for r in engine.front()] == [0]
    assert engine.is_handed_out


def test_weights_stay_as_long_as_a_layout_of_theirs_may_come_onto_the_front(tmp_path: Path) -> None:
    engine, _, store = make(tmp_path, trials=2, global_batch_size=16, world_size={"profile": [1, 2]})
    better, worse = engine.next(), engine.next()
    assert better is not None
    assert worse is not None
    train(engine, better, accuracy=0.9, seconds=5.0)
    train(engine, worse, accuracy=0.8, seconds=6.0)
    assert (store.trial_path(worse.number) / "final").exists(), "dominated on one rank, and nobody knows of two"
    profile(engine, engine.next())
    assert engine.next() is None
    assert [r.root for r in engine.front()] == [better.number]
    assert (store.trial_path(better.number) / "final").exists(), "its point on two ranks is the front"
    assert not (store.trial_path(worse.number) / "final").exists()


def test_a_resume_goes_on_with_what_was_to_be_timed(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2, global_batch_size=16, lora_rank=4, **PROFILED)
    train(engine, engine.next())
    assert engine.next() is not None  # killed while it is timed
    resumed, _, _ = make(tmp_path, trials=2, global_batch_size=16, lora_rank=4, **PROFILED)
    assert resumed.num_left == 1
    for _ in range(2):
        profile(resumed, resumed.next())
    train(resumed, resumed.next())
    assert resumed.next() is None
    assert resumed.is_handed_out
    assert [t.state.name for t in resumed._study._study.trials if t.values] == ["COMPLETE"] * 2
    assert sorted(r.root for r in resumed.state.records.values()) == [0, 0, 0, 3, 3, 3]
