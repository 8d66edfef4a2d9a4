from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna._hypervolume import compute_hypervolume

from search.hypervolume import hypervolume

# Few distinct values, so that ties, repeats and points on the reference are common.
COORDINATE = st.integers(-2, 8).map(lambda n: n / 4)


def points_of(num_objectives: int) -> st.SearchStrategy[list[tuple[float, ...]]]:
    return st.lists(st.tuples(*[COORDINATE] * num_objectives), max_size=7)


def by_inclusion_and_exclusion(points: list[tuple[float, ...]], reference: tuple[float, ...]) -> float:
    """The volume of a union of boxes: subsets add and subtract the box at their worst corner."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            edges = np.asarray(reference) - np.max(subset, axis=0)
            total += (-1) ** (size + 1) * float(np.prod(np.maximum(edges, 0.0)))
    return total


@settings(max_examples=150)
@given(data=st.data(), num_objectives=st.sampled_from([2, 3]))
def test_equals_inclusion_and_exclusion_and_optuna(data: st.DataObject, num_objectives: int) -> None:
    points = data.draw(points_of(num_objectives))
    reference = (1.5,) * num_objectives
    found = hypervolume(points, reference)
    assert found == pytest.approx(by_inclusion_and_exclusion(points, reference), abs=1e-12)
    inside = np.asarray([p for p in points if max(p) < 1.5]).reshape(-1, num_objectives)
    assert found == pytest.approx(compute_hypervolume(inside, np.asarray(reference)), abs=1e-12)


@pytest.mark.parametrize("num_objectives", [2, 3])
def test_equals_optuna_on_many_points(num_objectives: int) -> None:
    points = np.random.default_rng(0).normal(size=(150, num_objectives))
    reference = np.full(num_objectives, 1.0)
    inside = points[(points < reference).all(axis=1)]
    assert hypervolume(points, reference) == pytest.approx(compute_hypervolume(inside, reference))


@given(points=points_of(3), extra=st.tuples(COORDINATE, COORDINATE, COORDINATE), data=st.data())
def test_more_points_never_shrink_it_and_their_order_does_not_matter(
    points: list[tuple[float, ...]], extra: tuple[float, ...], data: st.DataObject
) -> None:
    reference = (1.5, 1.25, 1.0)
    before = hypervolume(points, reference)
    assert hypervolume([*points, extra], reference) >= before - 1e-12
    assert hypervolume(data.draw(st.permutations(points)), reference) == pytest.approx(before)
    assert hypervolume([*points, *points], reference) == pytest.approx(before)


def test_closed_forms() -> None:
    n = 10
    staircase = [(i, n - i - 1) for i in range(n)]
    assert hypervolume(staircase, (n, n)) == n * n - n * (n - 1) // 2
    assert hypervolume([(1, 2)], (4, 6)) == 12
    assert hypervolume([(1, 2, 3)], (2, 4, 6)) == 6
    assert hypervolume([(0, 0, 0), (-1, -1, 1)], (2, 2, 2)) == 8 + 9 - 4
    assert hypervolume([], (1, 1)) == 0
    assert hypervolume([], (1, 1, 1)) == 0
    assert hypervolume([(1, 0), (0, 1), (3, -5)], (1, 1)) == 0


@pytest.mark.parametrize(
    ("points", "reference"),
    [
        ([(1.0,)], (1.0,)),
        ([(1.0, 2.0)], (1.0, 2.0, 3.0)),
        ([(1.0, 2.0, 3.0)], (1.0, 2.0)),
        ([1.0, 2.0], (1.0, 2.0)),
        ([(0.0,) * 4], (1.0,) * 4),
        ([(float("nan"), 0.0)], (1.0, 1.0)),
        ([(-float("inf"), 0.0)], (1.0, 1.0)),
        ([(0.0, 0.0)], (float("inf"), 1.0)),
    ],
)
def test_what_has_no_hypervolume_is_refused(points: object, reference: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape|finite"):
        hypervolume(points, reference)
