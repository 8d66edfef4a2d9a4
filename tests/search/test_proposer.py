"""From where on nothing is gained."""

from __future__ import annotations

import math

import numpy as np
import pytest

from search.proposer import _reference

COSTS = np.array([[-0.5, 3.0], [-0.2, 1.0], [-0.1, math.nan]])


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([0.0, 4.0], [0.0, 4.0]),
        ([None, 4.0], [-0.1, 4.0]),
        ([None, None], [-0.1, 3.0]),
        # Trial 1 is better than this in both.
        ([-0.1, 2.0], [-0.1, 2.0]),
        # No trial is, and so the worst trial stands for the objective in which it is worse than the reference.
        ([0.0, 0.5], [0.0, 3.0]),
        ([-0.9, 4.0], [-0.1, 4.0]),
    ],
)
def test_the_reference_is_the_users_as_long_as_some_trial_reaches_it(references: list[float | None], expected: list[float]) -> None:
    assert _reference(COSTS, references) == expected
