from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spaces.fidelity import LAST_SHARE, rung_shares, rung_steps


def test_by_default_a_trial_is_looked_at_after_a_ninth_and_a_third():
    assert rung_shares() == pytest.approx((1 / 9, 1 / 3))


@pytest.mark.parametrize(
    ("grace_period", "reduction_factor", "shares"),
    [(0.25, 2, (0.25, 0.5)), (0.1, 4, (0.1, 0.4)), (1 / 27, 3, (1 / 27, 1 / 9, 1 / 3)), (0.5, 3, (0.5,)), (0.95, 2, ())],
)
def test_each_rung_is_further_by_the_factor_and_none_is_close_to_the_end(grace_period, reduction_factor, shares):
    assert rung_shares(grace_period, reduction_factor) == pytest.approx(shares)


@pytest.mark.parametrize(
    ("num_steps", "steps"),
    [
        (108, {12: 1 / 9, 36: 1 / 3}),
        (10, {1: 1 / 9, 3: 1 / 3}),
        (4, {1: 1 / 3}),  # both rungs fall on the first step
        (2, {1: 1 / 3}),
        (1, {}),
    ],
)
def test_a_step_that_stands_for_two_rungs_counts_for_the_later_and_the_last_step_is_none(num_steps, steps):
    assert rung_steps(rung_shares(), num_steps) == pytest.approx(steps)


@given(st.integers(1, 10**6), st.floats(0.001, 0.999), st.floats(2, 100))
def test_a_rung_is_the_step_nearest_to_its_share(num_steps, grace_period, reduction_factor):
    steps = rung_steps(rung_shares(grace_period, reduction_factor), num_steps)
    for step, share in steps.items():
        assert 1 <= step < num_steps
        assert share <= LAST_SHARE
        assert step == 1 or abs(step - Fraction(share) * num_steps) <= Fraction(1, 2) + Fraction(1, 10**6)
    assert list(steps) == sorted(steps)
