"""When the hypervolume has stopped growing, against areas that are counted cell by cell."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engines import STOP, make, report

from search.engine import Engine
from search.growth import has_stopped
from search.record import TrialRecord, TrialState


@pytest.mark.parametrize(
    ("volumes", "patience", "min_growth", "stopped"),
    [
        ([], 1, 0.0, False),
        ([5.0], 1, 0.0, False),
        ([5.0, 5.0], 1, 0.0, True),
        ([5.0, 5.1], 1, 0.0, False),
        ([5.0, 5.0, 5.1], 2, 0.0, False),
        ([100.0, 101.0], 1, 0.01, False),
        ([100.0, 100.9], 1, 0.01, True),
        ([1.0, 100.0, 100.4, 100.9], 2, 0.01, True),  # each half a percent, together less than one
        ([100.0, 100.6, 101.2], 2, 0.01, False),  # each less than one percent, together more
        ([0.0, 0.0], 2, 0.0, False),
        ([0.0, 0.0, 0.0], 2, 0.0, True),  # nothing within the reference point
        ([0.0, 3.0], 1, 0.5, False),
    ],
)
def test_growth_is_that_of_the_last_trials_together(volumes: list[float], patience: int, min_growth: float, stopped: bool) -> None:
    assert has_stopped(volumes, patience, min_growth) is stopped


def cells(records: list[TrialRecord]) -> int:
    """Count the squares of a tenth by a second, below accuracy 0 and 60 s, that a trial dominates."""
    points = [(round(r.values["accuracy"] * 10), round(r.values["train_seconds"])) for r in records if r.state is TrialState.COMPLETE]
    return sum(any(a < tenth and s <= second for tenth, s in points) for a in range(10) for second in range(60))


SPEC: dict[str, Any] = {"trials": None, "budget": {"patience": 6, "min_growth": 0.05, "minutes": 1}, "world_size": {"choice": [1, 2]}}


def run(engine: Engine, rng: random.Random, ended: list[int], most: int) -> None:
    """Train trials, two at once, until the search ends or `most` have ended; `ended` has the volume after each."""
    live = []
    while len(ended) < most:
        while len(live) < 2 and (assignment := engine.next()) is not None:
            live.append(assignment)
        if not live:
            return
        assignment = live.pop(rng.randrange(len(live)))
        last, state = report(rng.randrange(1, 10) / 10, rng.randrange(1, 59)), rng.choice(["complete", "complete", "stopped"])
        engine.reported(assignment.number, last, STOP if state == "stopped" else None)
        engine.ended(assignment.number, {"state": state})
        ended.append(cells(list(engine.state.records.values())))


@pytest.mark.parametrize("seed", range(4))
def test_a_search_ends_when_no_trial_adds_anything_and_says_so(tmp_path: Path, seed: int) -> None:
    rng, volumes = random.Random(seed), []
    engine, _, _ = make(tmp_path, reuse=False, clock=lambda: 0.0, **SPEC)
    run(engine, rng, volumes, 3 + seed)
    assert engine.num_left > 0
    # Killed and resumed: it goes on from the volumes in the ledger.
    engine, _, _ = make(tmp_path, reuse=False, clock=lambda: 0.0, **SPEC)
    run(engine, rng, volumes, 100)
    stopped = [n for n in range(6, len(volumes)) if volumes[n] <= volumes[n - 6] or volumes[n] < volumes[n - 6] * 1.05]
    assert stopped[0] in (len(volumes) - 2, len(volumes) - 1), "no trial is begun after it; the one beside it is let finish"
    assert stopped[-1] == len(volumes) - 1
    assert engine.why_over == "the hypervolume grew by less than 0.05 of itself in 6 trials"
    assert engine.is_handed_out
    resumed, _, _ = make(tmp_path, reuse=False, clock=lambda: 0.0, **SPEC)
    assert resumed.next() is None


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_search_whose_trials_all_lie_beyond_the_reference_point_ends_too(tmp_path: Path, is_resumed: bool) -> None:
    """The loss has no reference point before the untrained model's is known; what ends before that counts for nothing."""

    def search() -> Engine:
        return make(tmp_path, trials=None, budget={"patience": 3}, reuse=False, objectives=["eval_loss", "train_seconds"])[0]

    engine = search()
    num_ended = 0
    while (assignment := engine.next()) is not None and num_ended < 20:
        if num_ended == 5:
            engine.referenced({"eval_loss": 1.0})
        last = report(0.5, 3.0)
        engine.reported(assignment.number, {**last, "metrics": {"eval_loss": 2.0, "train_seconds": 3.0}})
        engine.ended(assignment.number, {"state": "complete"})
        num_ended += 1
        engine = search() if is_resumed and num_ended == 7 else engine
    assert engine.why_over == "the hypervolume stayed 0 in 3 trials: none is better than the reference point"
    assert num_ended == (7 if is_resumed else 9), "after a resume the reference is known of all"


def test_what_a_limit_cut_off_is_no_trial_without_growth(tmp_path: Path) -> None:
    limits: dict[str, Any] = {"trials": None, "budget": {"patience": 3, "minutes": 60}, "reuse": False}
    engine, _, _ = make(tmp_path, **limits)
    for state in ("complete", "stopped", "stopped", "stopped", "stopped"):
        assignment = engine.next()
        assert assignment is not None
        if state == "complete":
            engine.reported(assignment.number, report(0.5, 3.0))
        engine.ended(assignment.number, {"state": state})
    for each in (engine, make(tmp_path, **limits)[0]):
        assert each.num_left > 0, "the search goes on where it has more time"
