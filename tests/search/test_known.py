"""A recipe that is being trained is not trained a second time beside itself: whoever proposes it waits."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import STOP, Profiles, make, report

from search.engine import Assignment, Engine, SearchExhausted
from search.record import TrialState
from spaces.config import Recipe

SPACE: dict[str, Any] = {
    "learning_rate": {"choice": [1e-3, 2e-3, 3e-3]},
    "global_batch_size": 16,
    "dataset_fraction": 1.0,
    "lora_rank": 4,
    "world_size": {"choice": [1, 2]},
}
ONE, OTHER = ({"learning_rate": rate, "world_size": 1} for rate in (1e-3, 2e-3))
WIDE = {**ONE, "world_size": 2}
# The first, itself under another layout, itself again, and something else.
POINTS = [ONE, WIDE, ONE, OTHER]


def end(engine: Engine, assignment: Assignment, outcome: dict[str, Any], *, accuracy: float = 0.5) -> None:
    if outcome["state"] == "complete" and assignment.is_trained:
        (engine._store.trial_path(assignment.number) / "final").mkdir(parents=True, exist_ok=True)
        engine.reported(assignment.number, report(accuracy, 9.0))
    if outcome["state"] == "stopped" and assignment.is_trained:
        engine.reported(assignment.number, report(accuracy, 1.0, final=False, step=1), STOP)
    engine.ended(assignment.number, outcome if assignment.is_trained else {**outcome, "profile": {}})


def two(engine: Engine) -> tuple[Assignment, Assignment]:
    """Return the two that train; what is proposed between them waits."""
    first, second = engine.next(), engine.next()
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (0, 3)
    assert first.is_trained
    assert second.is_trained
    assert sorted(engine.state.records) == [0, 3], "nobody hears of what waits"
    return first, second


def states(engine: Engine) -> list[tuple[str, list[float] | None]]:
    """What the sampler was told of each trial, with seconds for their logarithms."""
    trials = engine._study._study.trials
    return [(t.state.name, t.values and [t.values[0], pytest.approx(math.exp(t.values[1]))]) for t in trials]


def test_another_layout_is_timed_once_the_first_is_trained_and_a_duplicate_is_told_the_same(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2, points=POINTS, **SPACE)
    first, second = two(engine)
    assert engine.next() is None
    assert not engine.is_handed_out
    end(engine, first, {"state": "complete"}, accuracy=0.8)
    timed = engine.next()
    assert timed == Assignment(number=1, config=timed.config, is_trained=False) if timed else False
    assert engine.state.records[1].source == 0
    assert states(engine)[2] == ("RUNNING", None), "the one that waits comes after it"
    end(engine, timed, {"state": "complete"})
    end(engine, second, {"state": "complete"})
    assert engine.next() is None
    assert engine.is_handed_out
    assert states(engine) == [("COMPLETE", [0.8, 9.0]), ("COMPLETE", [0.8, 0.7]), ("COMPLETE", [0.8, 9.0]), ("COMPLETE", [0.5, 9.0])]
    assert sorted(engine.state.records) == [0, 1, 3]


@pytest.mark.parametrize("outcome", [{"state": "failed", "kind": "worker_lost", "message": "x"}, {"state": "stopped"}])
def test_who_waited_in_vain_is_trained_instead_of_a_new_proposal(tmp_path: Path, outcome: dict[str, Any]) -> None:
    engine, _, _ = make(tmp_path, trials=3, points=POINTS, **SPACE)
    first, _ = two(engine)
    end(engine, first, outcome)
    instead = engine.next()
    assert instead is not None
    assert (instead.number, instead.is_trained, instead.config.layout.world_size) == (1, True, 2)
    assert engine.next() is None
    assert engine.num_left == 0
    end(engine, instead, {"state": "complete"})
    again = engine.next()
    if outcome["state"] == "failed":  # which says nothing of the recipe
        assert again is not None
        assert (again.number, again.is_trained) == (2, False)
        end(engine, again, {"state": "complete"})
        assert states(engine)[2] == ("COMPLETE", [0.5, 1.0])
    else:
        assert again is None
        assert states(engine)[2] == ("PRUNED", None)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_what_diverged_is_not_trained_again_under_any_layout(tmp_path: Path, is_resumed: bool) -> None:
    diverged = {"state": "failed", "kind": "diverged", "message": "the loss is nan"}
    engine, _, _ = make(tmp_path, trials=4, points=POINTS, **SPACE)
    first, second = two(engine)
    end(engine, first, diverged)
    if is_resumed:
        end(engine, second, diverged)
        engine, _, _ = make(tmp_path, trials=4, points=POINTS, **SPACE)
    third = engine.next()
    assert third is not None
    assert third.config.recipe.learning_rate == 3e-3
    assert engine.num_left == 1, "what is told costs nothing"
    others = [state for number, (state, _) in enumerate(states(engine)) if number not in (second.number, third.number)]
    # The sampler takes them for bad ones, and not for ones of which nothing is known.
    assert set(others) <= {"PRUNED", "RUNNING"}
    assert others[:3] == ["PRUNED"] * 3


def test_what_the_budget_cut_off_is_trained_where_there_is_more_of_it(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=3, points=[ONE, ONE], **SPACE)
    first = engine.next()
    assert first is not None
    engine.reported(first.number, report(0.4, 1.0, final=False, step=1), {**STOP, "goes_on": True})
    engine.ended(first.number, {"state": "stopped"})
    engine.finished("1 minutes used up")
    resumed, _, _ = make(tmp_path, trials=3, points=[ONE, ONE], **SPACE)
    again = resumed.next()
    assert again == replace(first, number=1)
    end(resumed, again, {"state": "complete"})
    resumed, _, _ = make(tmp_path, trials=3, points=[ONE, ONE, ONE], **SPACE)
    resumed.next()
    assert states(resumed)[2] == ("COMPLETE", [0.5, 9.0]), "now it is known"


def test_points_that_a_limit_cut_off_have_a_place_in_a_budget_of_as_many(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2, points=[ONE, OTHER], **SPACE)
    first, second = engine.next(), engine.next()
    assert first is not None
    assert second is not None
    end(engine, first, {"state": "complete"})
    engine.ended(second.number, {"state": "stopped"})
    assert engine.num_left == 0
    engine.finished("1 minutes used up")
    resumed, _, _ = make(tmp_path, trials=2, points=[ONE, OTHER], **SPACE)
    assert resumed.num_left == 1
    again = resumed.next()
    assert again is not None
    assert again.config == second.config
    end(resumed, again, {"state": "complete"})
    assert resumed.num_left == 0


def test_who_waited_in_vain_until_the_budget_was_used_up_is_left(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2, points=POINTS, **SPACE)
    first, second = two(engine)
    for assignment in (first, second):
        end(engine, assignment, {"state": "failed", "kind": "error", "message": "x"})
    assert not engine.is_handed_out
    assert engine.next() is None
    assert engine.is_handed_out
    assert [state for state, _ in states(engine)] == ["FAIL"] * 4
    assert sorted(engine.state.records) == [0, 3]


def test_a_resume_waits_for_what_was_in_flight_too(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2, points=POINTS, **SPACE)
    two(engine)
    resumed, _, _ = make(tmp_path, trials=3, points=[*POINTS[:3], ONE, ONE], **SPACE)
    assert [a.number for a in (resumed.next(), resumed.next()) if a] == [0, 3]
    new = resumed.next()
    assert new is None or new.config.recipe.learning_rate == 3e-3
    assert all(r.trial_config.recipe.learning_rate != 1e-3 for r in resumed.state.records.values() if r.number > 3)


def test_without_reuse_everything_is_trained(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=4, points=POINTS, reuse=False, **SPACE)
    assert [a.number for a in (engine.next() for _ in range(4)) if a] == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(8))
def test_no_recipe_trains_twice_whatever_ends_how_and_when(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    space = {**SPACE, "learning_rate": {"choice": [1e-3 * n for n in range(1, 9)]}}
    engine, _, _ = make(tmp_path, trials=12, outlook=Profiles(), **space)
    live: list[Assignment] = []
    trained: set[Recipe] = set()
    num_trained = 0
    while True:
        try:
            while len(live) < 4 and (assignment := engine.next()) is not None:
                recipe = assignment.config.recipe
                num_trained += assignment.is_trained
                assert assignment.is_trained == (recipe not in trained)
                live.append(assignment)
        except SearchExhausted:
            break
        in_training = Counter(a.config.recipe for a in live if a.is_trained)
        assert max(in_training.values(), default=0) <= 1
        if not live:
            break
        assignment = live.pop(rng.randrange(len(live)))
        outcome = rng.choice(
            [{"state": "complete"}] * 3 + [{"state": "stopped"}, {"state": "failed", "kind": "error", "message": "x"}]
        )
        end(engine, assignment, outcome, accuracy=rng.random())
        whole = [r for r in engine.state.records.values() if r.is_whole and engine._weights.has(r.number)]
        trained = {r.trial_config.recipe for r in whole}
    assert num_trained <= 12
    assert {state for state, _ in states(engine)} <= {"COMPLETE", "PRUNED", "FAIL"}, "nothing waits for ever"
    complete = [r for r in engine.state.records.values() if r.state is TrialState.COMPLETE]
    assert len({r.trial_config.key() for r in complete}) == len(complete), "no config stands twice"
