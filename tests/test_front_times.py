"""`benchmarks/time_to_front.py`: its arithmetic against brute force, and which runs it takes for fair."""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import time_to_front
from benchmarks.front_times import Trial, at, entrants, growth, ratios, time_to, volume

LAST = 100.0
# Few values, so that there are many equals.
accuracies, costs = st.integers(0, 8).map(lambda k: k / 8), st.integers(1, 12).map(lambda k: 10.0 * k)
points = st.lists(st.tuples(accuracies, costs), max_size=12)


def covered(found: list[tuple[float, float]]) -> float:
    """Cut the area into cells between all values that occur, and add up those that some point dominates."""
    xs = sorted({0.0, *(a for a, _ in found)})
    ys = sorted({min(math.log(s), math.log(LAST)) for _, s in found} | {math.log(LAST)})
    area = 0.0
    for left, right in pairwise(xs):
        for low, high in pairwise(ys):
            if any(a >= right and math.log(s) <= low for a, s in found):
                area += (right - left) * (high - low)
    return area


@given(points)
def test_the_volume_is_the_area_that_some_point_dominates(found):
    assert volume(found, LAST) == pytest.approx(covered(found))


@given(points)
def test_entrants_are_those_that_nothing_earlier_is_as_good_as(found):
    trials = [Trial(finished_seconds=float(-i), accuracy=a, own_seconds=s) for i, (a, s) in enumerate(found)]
    expected = [
        i
        for i in reversed(range(len(found)))
        if not any(found[j][0] >= found[i][0] and found[j][1] <= found[i][1] for j in range(i + 1, len(found)))
    ]
    assert entrants(trials) == expected


@given(points, st.floats(0.01, 8.0), st.integers(0, 130))
def test_a_target_is_reached_when_the_trials_so_far_cover_it(found, target, moment):
    finished = [10.0 * i for i in range(1, len(found) + 1)]
    curve = growth(finished, found, LAST)
    there = [t for i, t in enumerate(finished, start=1) if covered(found[:i]) >= target - 1e-12]
    reached = time_to(curve, target - 1e-9)
    assert reached == (there[0] if there else None) or math.isclose(at(curve, reached or 1e9), target, abs_tol=1e-6)
    assert at(curve, moment) == pytest.approx(covered([p for p, t in zip(found, finished, strict=True) if t <= moment]))


def test_ratios_are_pair_by_pair():
    found = ratios([10.0, 40.0], [5.0, 5.0])
    assert found["mean"] == pytest.approx(4.0)
    assert (found["least"], found["most"]) == (pytest.approx(2.0), pytest.approx(8.0))
    assert found["least"] <= found["low"] <= found["mean"] <= found["high"] <= found["most"]
    same = ratios([3.0] * 5, [1.5] * 5)
    assert np.allclose(list(same.values()), 2.0)


def settings(directory: Path, **changes: Any) -> argparse.Namespace:
    known = {"out": directory / "runs.jsonl", "minutes": 1.0, "rows_per_class": 16, "seeds": 1, "contenders": "a", "results": None}
    return argparse.Namespace(
        **known, longer="", syne_python=Path(sys.executable), logs=None, figure=directory / "growth.png", data=None, **changes
    )


@pytest.mark.parametrize(
    ("code", "seconds", "num_trials", "is_kept"),
    [
        (0, 30, 2, True),
        (0, 61, 2, True),
        (-15, 85, 2, True),
        (-15, 85, 0, True),
        (1, 61, 2, True),
        (1, 61, 0, False),
        (1, 30, 2, False),
        (-9, 30, 2, False),
    ],
)
def test_a_contender_that_dies_before_its_time_is_over_is_run_again(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    code: int,
    seconds: float,
    num_trials: int,
    is_kept: bool,
) -> None:
    now, runs = 1e9, []

    def watched(_: object, __: object, scratch: str, log: Path, ___: float) -> tuple[int, list[tuple[float, float]]]:
        nonlocal now
        now += seconds
        runs.append(now)
        (Path(scratch) / "rows.jsonl").write_text('{"seconds": 20, "accuracy": 0.5, "train_seconds": 3}\n' * num_trials)
        log.write_text("what it printed")
        return code, [(1.0, 1.0)]

    monkeypatch.setattr(time_to_front.time, "time", lambda: now)
    monkeypatch.setattr(time_to_front, "watched", watched)
    monkeypatch.setattr(time_to_front, "written_data", lambda _: nullcontext(tmp_path))
    arguments = settings(tmp_path)
    for _ in range(2):
        with nullcontext() if is_kept else pytest.raises(SystemExit, match=r"failed: \(a\) seed 0; the same command again"):
            time_to_front.run_all(arguments)
    kept = time_to_front.read_runs(arguments)
    assert [(run["exit_code"], run["wall_seconds"]) for run in kept] == ([(code, seconds)] if is_kept else [])
    assert len(runs) == (1 if is_kept else 2)
    assert (f"exit code {code}" in capsys.readouterr().err) == (not is_kept)


def outcome(contender: str, seed: int, reached_at: float | None) -> time_to_front.Outcome:
    """Return a run of 100 s that has a hypervolume of 10 from some time on, or only ever half of it."""
    curve = [(5.0, 5.0)] if reached_at is None else [(5.0, 5.0), (reached_at, 10.0)]
    cpu = [(0.0, 0.0), (100.0, 200.0)]
    return time_to_front.Outcome(
        contender=contender, seed=seed, curve=curve, limit_seconds=100.0, common_seconds=100.0, cpu=cpu, num_trials=2
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "mean", "words"),
    [
        ([10.0, 10.0], [40.0, 90.0], 6.0, "exact"),
        ([10.0, 10.0], [40.0, None], math.sqrt(4 * 10), "at least"),
        ([None, 10.0], [50.0, 80.0], 2.0, "at most"),
        ([10.0, None], [None, 40.0], 2.0, "no bound"),
        ([10.0, None], [40.0, None], 2.0, "no bound"),
    ],
)
def test_ratios_with_a_missed_target_are_marked_as_the_bound_that_they_are(
    capsys: pytest.CaptureFixture[str], ours: list[float | None], theirs: list[float | None], mean: float, words: str
) -> None:
    found = [outcome(name, seed, at_) for name, times in (("a", ours), ("d", theirs)) for seed, at_ in enumerate(times)]
    result = time_to_front.compared(found)
    row = result["contenders"]["d"]
    assert row["times_as_long"]["mean"] == pytest.approx(mean)
    assert row["times_the_cpu_seconds"]["mean"] == pytest.approx(mean)
    assert row["ratios_of_times_are"] == words
    assert row["seeds_that_a_missed"] == [seed for seed, at_ in enumerate(ours) if at_ is None]
    time_to_front.show(result)
    lines = capsys.readouterr().out.splitlines()
    for key in ("times as long", "times the cpu seconds"):
        assert any(line.startswith(f"    {key}: {'' if words == 'exact' else words + ' '}{mean:.2f} (") for line in lines)
    assert any("(a) missed the target on seeds " in line for line in lines) == (None in ours)


def test_a_report_before_its_time_says_what_comes_first(tmp_path: Path) -> None:
    arguments = settings(tmp_path)
    with pytest.raises(SystemExit, match=r"runs.jsonl: holds no runs; `run` comes before `report`$"):
        time_to_front.report(arguments)
    arguments.out.touch()
    with pytest.raises(SystemExit, match="holds no runs"):
        time_to_front.report(arguments)
    params = {"adapter": "none", "learning_rate": 1e-3, "global_batch_size": 16, "dataset_fraction": 1.0, "epochs": 1}
    trials = [
        {"seconds": 20.0 + n, "accuracy": 0.5, "train_seconds": 3.0 - n, "params": {**params, "epochs": 1 + n}} for n in range(2)
    ]
    run = {
        "contender": "a",
        "seed": 0,
        "limit_seconds": 60.0,
        "task": time_to_front.fingerprint(16),
        "cpu": [[1.0, 1.0]],
        "trials": trials,
    }
    time_to_front.append(arguments.out, run)
    for left, row in zip((2, 1), trials, strict=True):
        with pytest.raises(
            SystemExit, match=rf"{left} of 2 configurations are not measured again yet; `remeasure` comes before `report`$"
        ):
            time_to_front.report(arguments)
        time_to_front.append(arguments.out, {"measured": time_to_front.key_of(row), "train_seconds": 2.0})
    time_to_front.report(arguments)
    assert arguments.figure.stat().st_size > 0


def test_who_is_given_longer_is_compared_at_the_same_time() -> None:
    """What (b) has after 100 s it had after 80, and (a) after 10; the target it has in the time that it alone is given, after 150."""
    cpu = [(0.0, 0.0), (200.0, 200.0)]
    ours = time_to_front.Outcome(
        contender="a", seed=0, curve=[(10.0, 1.0), (50.0, 2.0)], limit_seconds=100.0, common_seconds=100.0, cpu=cpu, num_trials=2
    )
    theirs = replace(ours, contender="b", curve=[(80.0, 1.0), (150.0, 2.0)], limit_seconds=200.0)
    row = time_to_front.compared([ours, theirs])["contenders"]["b"]
    assert row["final_hypervolume"] == [1.0]
    assert row["seconds_to_target"] == [150.0]
    assert row["times_as_long"]["mean"] == pytest.approx(3.0)
    assert row["ratios_of_times_are"] == "exact"
    assert row["times_sooner_a_has_theirs"]["mean"] == pytest.approx(8.0)


@pytest.mark.parametrize(("longer", "seconds"), [("", 60.0), ("b=12", 720.0), ("c=6.5,b=2", 120.0)])
def test_minutes_of_single_contenders(tmp_path: Path, longer: str, seconds: float) -> None:
    arguments = settings(tmp_path)
    arguments.longer = longer
    assert time_to_front.limit_of("b", arguments) == seconds
    assert time_to_front.limit_of("a", arguments) == 60.0


@pytest.mark.parametrize("longer", ["a=12", "x=3", "b", "b=0.5", "b=soon"])
def test_minutes_that_are_none(tmp_path: Path, longer: str) -> None:
    arguments = settings(tmp_path)
    arguments.longer = longer
    with pytest.raises(SystemExit, match=f"--longer {longer}: allowed: one of b, c, d, e, and minutes from 1, as b=12"):
        time_to_front.limit_of("b", arguments)
