"""What is tried next: against exact hypervolume, and in cases that leave one answer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from search.acquisition import Evaluated, Prospect, _Process, _table, choose, gains
from search.hypervolume import hypervolume


def prospect(x: float, *, cost: float = 1.0, seconds: float = 0.0, belief: float = 0.0) -> Prospect:
    return Prospect(learned={"x": x}, timed={"seconds": seconds}, belief=belief, device_seconds=cost, is_open=True)


def chosen(candidates: list[Prospect], evaluated: list[tuple[float, float, float]], **how: Any) -> int:
    """Return the index, where each evaluated trial is (x, cost of what is learned, logarithm of its seconds)."""
    given: dict[str, Any] = {"running": [], "budget_left": 0.0, "rng": np.random.default_rng(0)} | how
    return choose(
        candidates,
        evaluated=[Evaluated(prospect=prospect(x, seconds=t), costs=(y, t)) for x, y, t in evaluated],
        reference=(0.0, 5.0),
        is_learned=(True, False),
        **given,
    )


@pytest.mark.parametrize(("num_objectives", "sphere"), [(2, math.pi / 4), (3, math.pi / 6)])
def test_gains_are_those_of_the_hypervolume(num_objectives: int, sphere: float) -> None:
    rng = np.random.default_rng(0)
    reference = np.array([1.0, 20.0, 0.5][:num_objectives])
    front = rng.uniform(size=(6, num_objectives)) * reference
    outcomes = rng.uniform(size=(9, num_objectives)) * reference * 1.2
    gained = gains(outcomes, front, reference, np.abs(rng.standard_normal((200_000, num_objectives))))
    span = np.prod(reference - front.min(axis=0))
    for outcome, gain in zip(outcomes, gained, strict=True):
        before, after = hypervolume(front, reference), hypervolume([*front, outcome], reference)
        assert gain * sphere * span == pytest.approx(after - before, abs=0.01 * before)


# A parabola whose best is at 1, seen everywhere but there.
PARABOLA = [(x, (x - 1) ** 2 - 2, 3.0) for x in (-3.0, -2.0, -1.0, 0.0, 2.0, 3.0, 4.0)]


def test_the_best_is_found_between_what_is_known() -> None:
    candidates = [prospect(x, seconds=3.0) for x in (-2.5, 1.0, 3.5)]
    assert chosen(candidates, PARABOLA) == 1


def test_of_equal_points_the_cheaper_is_taken_and_a_better_one_is_worth_its_cost_when_the_budget_is_used_up() -> None:
    equal = [prospect(1.0, cost=c, seconds=3.0) for c in (10.0, 2.0, 5.0)]
    assert chosen(equal, PARABOLA, budget_left=1.0) == 1
    # What gains a little, and what gains much and costs a thousand times as much.
    unequal = [prospect(1.9, cost=1.0, seconds=3.0), prospect(1.0, cost=1000.0, seconds=3.0)]
    assert chosen(unequal, PARABOLA, budget_left=1.0) == 0
    assert chosen(unequal, PARABOLA, budget_left=0.0) == 1


def test_a_belief_decides_as_long_as_few_trials_are_known() -> None:
    candidates = [prospect(0.5, seconds=3.0), prospect(1.0, seconds=3.0, belief=-0.5)]
    assert chosen(candidates, PARABOLA) == 0
    # What is known, seen fifty times: the gain alone decides.
    assert chosen(candidates, PARABOLA * 50) == 1


def test_what_runs_is_not_tried_again() -> None:
    evaluated = [(x, y, t) for (x, y, _), t in zip(PARABOLA, (4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 4.5), strict=True)]
    candidates = [prospect(1.0, seconds=2.0), prospect(2.0, seconds=1.5)]
    assert chosen(candidates, evaluated) == 0
    assert chosen(candidates, evaluated, running=[prospect(1.0, seconds=2.0)]) == 1


def test_a_trial_that_only_failed_to_learn_says_nothing_of_time() -> None:
    bad = [(x, y, t if i else math.nan) for i, (x, y, t) in enumerate(PARABOLA)]
    candidates = [prospect(x, seconds=3.0) for x in (-2.5, 1.0, 3.5)]
    assert chosen(candidates, bad) == 1


def test_times_follow_from_the_predicted_seconds() -> None:
    evaluated = [(x, y, 1.0 + t) for (x, y, _), t in zip(PARABOLA, (3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 3.5), strict=True)]
    candidates = [prospect(1.0, seconds=s) for s in (4.0, 0.5, 2.0)]
    assert chosen(candidates, evaluated) == 1, "of points that learn the same the fastest adds the most"


def test_where_nothing_is_gained_the_likeliest_and_cheapest_is_taken() -> None:
    beaten = [prospect(3.0, cost=9.0, seconds=4.9), prospect(3.0, cost=2.0, seconds=4.9), prospect(3.0, seconds=4.9, belief=-9.0)]
    assert chosen(beaten, PARABOLA, budget_left=1.0, beside=[(-9.0, 0.1)]) == 1


def test_points_that_are_only_timed_are_on_the_front_that_is_to_be_widened() -> None:
    evaluated = [(x, y, t) for (x, y, _), t in zip(PARABOLA, (4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 4.5), strict=True)]
    candidates = [prospect(1.0, seconds=2.0), prospect(2.0, seconds=1.0)]
    assert chosen(candidates, evaluated) == 0
    assert chosen(candidates, evaluated, beside=[(-2.1, 1.9)]) == 1


@pytest.fixture
def line() -> tuple[Any, Any]:
    """Return a table of one feature and values that rise with it."""
    x = np.linspace(-1.0, 1.0, 9)[:, None]
    return x, 3.0 + 2.0 * x[:, 0]


def test_a_process_goes_on_along_a_line_and_is_less_sure_the_farther_it_goes(line: tuple[Any, Any]) -> None:
    process = _Process(*line)
    mean, deviation = process.predict(np.array([[0.05], [2.0], [6.0]]))
    assert mean == pytest.approx([3.1, 7.0, 15.0], rel=0.1)
    assert deviation[0] < deviation[1] < deviation[2]


def test_noise_is_no_hope(line: tuple[Any, Any]) -> None:
    x, y = line
    noisy = y + np.random.default_rng(0).normal(0.0, 0.3, size=(30, 9))
    process = _Process(np.tile(x, (30, 1)), noisy.ravel())
    _, deviation = process.predict(x)
    # The standard error of a mean of thirty, and not what one more value would spread by.
    assert deviation.max() < 0.15


def test_what_is_assumed_is_taken_as_seen(line: tuple[Any, Any]) -> None:
    process = _Process(*line)
    there = np.array([[3.0]])
    _, before = process.predict(there)
    process.assume(there, np.array([12.0]))
    mean, after = process.predict(there)
    assert mean == pytest.approx([12.0], abs=1.0), "along the line it would be 9"
    assert after < before / 2


def test_features_that_a_row_has_not_are_the_mean_of_the_others_and_of_two_names_one_is_enough() -> None:
    rows = [
        {"adapter=lora": 1.0, "rank": 2.0, "same": 5.0},
        {"adapter=lora": 1.0, "rank": 4.0, "same": 5.0},
        {"adapter=none": 1.0, "same": 5.0},
    ]
    table = _table(rows)
    assert table.shape == (3, 2)
    assert table[:, 0] == pytest.approx([1 / 3, 1 / 3, -2 / 3])
    assert table[:, 1] == pytest.approx([-1.0, 1.0, 0.0])
