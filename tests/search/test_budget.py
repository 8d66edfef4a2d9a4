"""The budget: what trials took of it by a clock that the test moves, and which limit ends a search."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from engines import Clock, make, report
from synthetic import confirmed_event, synthetic_events

from search.budget import Spending, used
from search.interruption import Interrupted
from search.ledger import Ledger, replay
from search.record import TrialState
from search.session import _cut_short
from spaces.spec import SearchSpec

SPACE = {"world_size": {"choice": [1, 2]}, "global_batch_size": 16}


def test_device_hours_are_the_workers_of_every_trial_times_the_time_that_it_held_them(tmp_path: Path) -> None:
    clock, rng = Clock(), random.Random(0)
    engine, _, store = make(tmp_path, trials=40, clock=clock, price=2.0, **SPACE)
    running: dict[int, SimpleNamespace] = {}
    total = 0.0
    for _ in range(300):
        seconds = rng.uniform(0, 5)
        clock.now += seconds
        total += seconds * sum(trial.workers for trial in running.values() if trial.has_group)
        number = rng.choice([*running, None])
        if number is None:
            assignment = engine.next()
            if assignment is not None:
                running[assignment.number] = SimpleNamespace(workers=assignment.config.layout.world_size, has_group=False)
        elif not running[number].has_group or rng.random() < 0.1:
            running[number].has_group = True
            engine.began(number, clock.now)  # a second time after its group was lost
        elif rng.random() < 0.5:
            engine.reported(number, report(0.5, 3.0, final=False))
        else:
            engine.ended(number, {"state": rng.choice(["complete", "stopped"])})
            del running[number]
        spent = engine.used
        assert spent.device_hours * 3600 == pytest.approx(total)
        assert spent.dollars == pytest.approx(total / 3600 * 2.0)
        assert spent.minutes == pytest.approx((clock.now - clock.began) / 60, abs=0.01)
    for number in running:
        engine.ended(number, {"state": "stopped"})
    state = replay(Ledger(store.ledger_path).events())
    assert used(engine_spec(tmp_path), state).device_hours * 3600 == pytest.approx(total), "the ledger knows as much"


def test_a_trial_holds_its_group_until_it_ended_whenever_that_is_told(tmp_path: Path) -> None:
    clock = Clock()
    engine, _, _ = make(tmp_path, trials=3, clock=clock, **SPACE)
    assignment = engine.next()
    assert assignment is not None
    engine.began(assignment.number, clock.now)
    clock.now += 10
    engine.reported(assignment.number, report(0.5, 3.0))
    ended = clock.now + 2
    clock.now += 9
    engine.ended(assignment.number, {"state": "complete", "at": ended})
    assert engine.state.records[assignment.number].held_seconds == pytest.approx(12)
    assert engine.used.device_hours * 3600 == pytest.approx(12 * assignment.config.layout.world_size)


def engine_spec(directory: Path) -> SearchSpec:
    from spaces.loading import load_spec

    return load_spec(directory / "spec.yaml").spec


@pytest.mark.parametrize(
    ("budget", "seconds", "words"),
    [
        ({"device_hours": 1.0}, 1800, "1 device hour used up"),
        ({"dollars": 3.0}, 2700, "3.00 dollars used up"),
        ({"minutes": 25}, 1500, "25 minutes used up"),
        ({"minutes": 50, "dollars": 2.0, "device_hours": 1.5}, 1800, "2.00 dollars used up"),
    ],
)
def test_the_first_limit_that_is_reached_ends_the_search(tmp_path: Path, budget: dict, seconds: float, words: str) -> None:
    clock = Clock()
    engine, _, _ = make(tmp_path, trials=None, budget=budget, price=2.0, clock=clock, global_batch_size=16, world_size=2)
    assignment = engine.next()
    assert assignment is not None
    clock.now += 0 if "minutes" in words else 600  # what waits for a group holds no device
    engine.began(assignment.number, clock.now)
    clock.now = clock.began + seconds + (0 if "minutes" in words else 600) - 1
    assert engine.reached == ""
    assert engine.num_left > 1e9
    clock.now += 2
    assert engine.reached == words
    assert engine.why_over == words
    assert engine.next() is None
    assert not engine.is_handed_out, "it still trains"
    engine.ended(assignment.number, {"state": "stopped"})
    assert engine.is_handed_out
    assert engine.state.records[assignment.number].state is TrialState.PRUNED
    assert engine.state.records[assignment.number].held_seconds == pytest.approx(seconds + 1 if "minutes" not in words else 1501)


@pytest.mark.parametrize("error", [Interrupted(2, "paretune resume s"), RuntimeError("bug")])
def test_what_was_used_up_to_an_interruption_counts_after_the_resume(tmp_path: Path, error: Exception) -> None:
    clock = Clock()
    engine, _, store = make(tmp_path, trials=3, clock=clock, price=2.0, **SPACE)
    first, waits = engine.next(), engine.next()
    assert first is not None
    assert waits is not None
    engine.began(first.number, clock.now)
    clock.now += 100
    engine.reported(first.number, report(0.5, 3.0, final=False))
    left: list[str] = []
    tracker = SimpleNamespace(is_open=True, leave=lambda state, _: left.append(state))
    clock.now += 50
    with pytest.raises(type(error)), _cut_short(Ledger(store.ledger_path), lambda _: None, cast(Any, tracker), [engine]):
        raise error
    assert left == ["KILLED" if isinstance(error, Interrupted) else "FAILED"]
    resumed, _, _ = make(tmp_path, trials=3, clock=clock, price=2.0, **SPACE)
    assert resumed.used.device_hours * 3600 == pytest.approx(150 * first.config.layout.world_size)
    assert resumed.next() == first
    resumed.began(first.number, clock.now)
    clock.now += 10
    resumed.reported(first.number, report(0.5, 3.0))
    resumed.ended(first.number, {"state": "complete"})
    assert [resumed.state.records[a.number].held_seconds for a in (first, waits)] == pytest.approx([160, 0])
    assert resumed.used.dollars == pytest.approx(160 * first.config.layout.world_size / 3600 * 2.0)


def test_a_search_that_is_cut_short_before_its_first_trial_says_so_too(tmp_path: Path) -> None:
    ledger, tracker = Ledger(tmp_path / "ledger.jsonl"), SimpleNamespace(is_open=False, leave=lambda *_: None)

    def fail() -> None:
        with pytest.raises(KeyError), _cut_short(ledger, lambda _: None, cast(Any, tracker), []):
            raise KeyError("x")

    fail()
    assert ledger.events() == [], "a search whose run was never opened has nothing to close"
    tracker.is_open = True
    fail()
    assert [(e["event"], e["held_seconds"]) for e in ledger.events()] == [("search_cut_short", {})]
    assert replay([{"event": "search_cut_short", "time": 1.0, "reason": "x"}]).records == {}, "as it was written before"


def test_what_was_used_before_a_crash_counts_after_it_and_the_time_between_does_not(tmp_path: Path) -> None:
    clock = Clock()
    engine, _, store = make(tmp_path, trials=3, clock=clock, **SPACE)
    first = engine.next()
    assert first is not None
    engine.began(first.number, clock.now)
    clock.now += 100
    engine.reported(first.number, report(0.5, 3.0, final=False))
    clock.now += 50  # lost with the driver: nobody wrote it down
    events = Ledger(store.ledger_path).events()
    events[-1]["time"] = events[0]["time"] + 100
    later = events[0]["time"] + 86_400
    state = replay([*events, {"event": "resumed", "time": later}, {"event": "reference", "time": later + 7, "metrics": {}}])
    assert state.active_seconds == pytest.approx(107)
    resumed, _, _ = make(tmp_path, trials=3, clock=clock, **SPACE)
    again = resumed.next()
    assert again == first
    resumed.began(first.number, clock.now)
    clock.now += 10
    resumed.reported(first.number, report(0.5, 3.0))
    resumed.ended(first.number, {"state": "complete"})
    record = resumed.state.records[first.number]
    assert record.held_seconds == pytest.approx(110)
    assert resumed.used.device_hours * 3600 == pytest.approx(110 * first.config.layout.world_size)
    assert resumed.used.trials == 1


@pytest.mark.parametrize("end", ["search_finished", "search_cut_short"])
def test_confirming_takes_nothing_of_the_minutes(tmp_path: Path, end: str) -> None:
    make(tmp_path, trials=None, budget={"minutes": 60})
    spec, began = engine_spec(tmp_path), 1e9
    first = next(event for event in synthetic_events(3) if event["event"] == "trial_started")
    events = [{"event": "search_started", "time": began}, {**first, "time": began + 600}, {"event": end, "time": began + 1800}]
    later = began + 86_400
    for seed in (1, 2):
        events.append({**confirmed_event(0, seed, accuracy=0.8, seconds=9.0), "time": later + 1000 * seed})
    assert used(spec, replay(events)).minutes == pytest.approx(30)

    events.append({"event": "resumed", "time": later + 9000, "in_flight": [0]})
    clock = Clock()
    clock.now = later + 9000 + 1790
    spending = Spending(spec, replay(events), clock)
    assert spending.reached() == ""
    clock.now += 20
    assert spending.reached() == "60 minutes used up"
