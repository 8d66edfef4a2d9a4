"""The replay of recorded trials, against a clock that moves second by second."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from replay import Curve, Look, mean_regret, replay, time_to, volume_at

SHARES = (1 / 9, 1 / 3)


def curve(number: int, seconds: int, quality: int) -> Curve:
    """A trial of nine steps of equal length; its seconds are a multiple of nine."""
    steps = (1, 3, 9)
    return Curve(
        number=number,
        seconds=float(seconds),
        spent={step: step / 9 for step in steps},
        metrics={step: {"quality": quality * step} for step in steps},
        costs=(-float(quality), float(seconds)),
    )


def by_the_second(order: list[Curve], patience: dict[int, float], num_workers: int) -> dict[int, tuple[int, bool]]:
    """When each trial ended, and whether it was complete: every worker looked at in every second."""
    waiting = list(order)
    running: dict[int, tuple[Curve, int]] = {}
    ended: dict[int, tuple[int, bool]] = {}
    for now in itertools.count():
        for worker, (trial, began) in list(running.items()):
            done = now - began
            for step in (1, 3, 9):
                if done == step * trial.seconds / 9 and (step == 9 or step / 9 >= patience[trial.number]):
                    ended[trial.number] = now, step == 9
                    del running[worker]
                    break
        for worker in range(num_workers):
            if worker not in running and waiting:
                running[worker] = waiting.pop(0), now
        if not running:
            return ended


TRIALS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9), st.sampled_from([0.1, 0.3, 2.0])), min_size=1, max_size=12)


@given(TRIALS, st.integers(1, 4))
def test_a_replay_is_what_a_clock_by_the_second_shows(trials: list[tuple[int, int, float]], num_workers: int) -> None:
    order = [curve(i, 9 * ninths, quality) for i, (ninths, quality, _) in enumerate(trials)]
    patience = {i: p for i, (_, _, p) in enumerate(trials)}
    looks: list[Look] = []

    def judge(look: Look) -> bool:
        looks.append(look)
        return look.share < patience[look.number]

    run = replay(order, judge, SHARES, num_workers)
    expected = by_the_second(order, patience, num_workers)
    assert {c.number: at for at, c in run.completed} == pytest.approx({n: at for n, (at, whole) in expected.items() if whole})
    assert set(run.stopped) == {n for n, (_, whole) in expected.items() if not whole}
    assert set(run.trained) == set(expected) == set(range(len(order)))
    assert all(look.metrics["quality"] == order[look.number].metrics[look.step]["quality"] for look in looks)


def test_a_judge_sees_reports_in_the_order_of_their_moments() -> None:
    seen: list[tuple[int, float]] = []

    def judge(look: Look) -> bool:
        seen.append((look.number, look.share))
        return True

    replay([curve(0, 90, 1), curve(1, 9, 1), curve(2, 9, 1)], judge, SHARES, 2)
    assert [(n, round(1 / s)) for n, s in seen] == [(1, 9), (1, 3), (0, 9), (2, 9), (2, 3), (0, 3)]


def test_only_what_is_complete_makes_a_front() -> None:
    order = [curve(0, 9, 1), curve(1, 9, 9), curve(2, 9, 4)]
    run = replay(order, lambda look: look.number != 1, SHARES, 1)
    assert run.hypervolumes((0.0, 19.0)) == [(9.0, 10.0), (pytest.approx(19.0), 40.0)]


def test_figures_of_a_hypervolume_over_time() -> None:
    steps = [(2.0, 1.0), (4.0, 3.0), (9.0, 8.0)]
    assert time_to(steps, 1.0) == 2.0
    assert time_to(steps, 2.5) == 4.0
    assert math.isinf(time_to(steps, 8.1))
    assert [volume_at(steps, t) for t in (0.0, 2.0, 8.9, 9.0)] == [0.0, 1.0, 3.0, 8.0]
    rng = random.Random(0)
    for until in (1.0, 3.0, 5.0, 12.0):
        sampled = [8.0 - volume_at(steps, rng.uniform(0, until)) for _ in range(20_000)]
        assert mean_regret(steps, 8.0, until) == pytest.approx(sum(sampled) / len(sampled), rel=0.03)
