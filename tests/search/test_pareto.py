from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from dominance import dominates
from hypothesis import given
from hypothesis import strategies as st

from search.hypervolume import hypervolume
from search.pareto import cost_objective, costs, front, hypervolume_of
from search.record import TrialRecord, TrialState
from spaces.spec import Objective

ACCURACY = Objective(metric="accuracy", direction="maximize", reference=0.0)
SECONDS = Objective(metric="train_seconds", direction="minimize", reference=100.0)
MEMORY = Objective(metric="peak_memory_bytes", direction="minimize", reference=10.0)
TWO = (ACCURACY, SECONDS)
THREE = (ACCURACY, SECONDS, MEMORY)


def trial(number: int, values: Sequence[float], **fields: Any) -> TrialRecord:
    names = ("accuracy", "train_seconds", "peak_memory_bytes")
    known = {"state": TrialState.COMPLETE, "params": {}, "values": dict(zip(names, values, strict=False))}
    return TrialRecord(number=number, **{**known, **fields})


VALUES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(1, 4)), max_size=12)


@given(values=VALUES, objectives=st.sampled_from([TWO, THREE]))
def test_the_front_is_what_brute_force_finds(values: list[tuple[int, int, int]], objectives: Sequence[Objective]) -> None:
    trials = [trial(n, v) for n, v in enumerate(values)]
    turned = {n: (-a, s, m)[: len(objectives)] for n, (a, s, m) in enumerate(values)}
    expected = {n for n, v in turned.items() if not any(dominates(w, v) for w in turned.values())}
    found = front(trials, objectives)
    assert {t.number for t in found} == expected
    seconds = [t.values["train_seconds"] for t in found]
    assert seconds == sorted(seconds)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=3, max_size=3),
)
def test_dominance_is_a_strict_order(points: list[tuple[int, int]]) -> None:
    a, b, c = points
    assert not dominates(a, a)
    assert not (dominates(a, b) and dominates(b, a))
    if dominates(a, b) and dominates(b, c):
        assert dominates(a, c)


def test_only_complete_feasible_and_finite_trials_stand_on_the_front() -> None:
    best = (1.0, 1.0)
    trials = [
        trial(0, (0.5, 50.0)),
        trial(1, best, state=TrialState.PRUNED),
        trial(2, best, state=TrialState.FAIL),
        trial(3, best, state=TrialState.RUNNING),
        trial(4, best, constraints={"memory": 0.1}),
        trial(5, (1.0,)),
        trial(6, (math.nan, 1.0)),
        trial(7, (1.0, -math.inf)),
        trial(8, (0.4, 20.0), constraints={"memory": 0.0}),
    ]
    assert [t.number for t in front(trials, TWO)] == [8, 0]


def test_equal_trials_all_stay_in_the_order_of_their_numbers() -> None:
    trials = [trial(2, (0.5, 5.0)), trial(1, (0.5, 5.0)), trial(0, (0.5, 6.0))]
    assert [t.number for t in front(trials, TWO)] == [1, 2]


def test_no_trial_no_front() -> None:
    assert front([], TWO) == []
    assert hypervolume_of([], TWO) == 0.0


def test_directions_are_turned_once() -> None:
    assert costs([trial(0, (0.5, 5.0))], TWO).tolist() == [[-0.5, 5.0]]
    backwards = Objective(metric="train_seconds", direction="maximize", reference=0.0)
    assert [t.number for t in front([trial(0, (1, 1)), trial(1, (1, 2))], (ACCURACY, backwards))] == [1]


def test_the_cost_objective_is_the_first_that_is_a_price() -> None:
    assert cost_objective(THREE) is SECONDS
    loss = Objective(metric="eval_loss", direction="minimize", reference=None)
    assert cost_objective((ACCURACY, loss)) is ACCURACY


def test_the_hypervolume_is_that_of_the_turned_objectives() -> None:
    trials = [
        trial(0, (0.5, 50.0)),
        trial(1, (0.9, 90.0)),
        trial(2, (0.1, 99.0)),
        trial(3, (0.99, 1.0), state=TrialState.FAIL),
    ]
    assert hypervolume_of(trials, TWO) == pytest.approx(0.5 * 50 + 0.4 * 10)
    assert hypervolume_of(trials, TWO) == pytest.approx(hypervolume([(-0.5, 50), (-0.9, 90), (-0.1, 99)], (0, 100)))
    unknown = Objective(metric="eval_loss", direction="minimize", reference=None)
    assert hypervolume_of(trials, (unknown, SECONDS)) is None
