"""How much of a trial is trained before it is judged, at the rungs of successive halving, and how much only to time it."""

from __future__ import annotations

from collections.abc import Sequence

# With these a trial reports at a ninth, a third and all of its steps.
GRACE_PERIOD, REDUCTION_FACTOR = 1 / 9, 3.0
# Beyond this share there is too little left to save for an evaluation.
LAST_SHARE = 0.9
# Steps that are trained for the time of a step alone.
PROFILE_STEPS = 30


def rung_shares(grace_period: float = GRACE_PERIOD, reduction_factor: float = REDUCTION_FACTOR) -> tuple[float, ...]:
    """Return the rungs, ascending, each `reduction_factor` times further than the one before; the end of a trial is none."""
    shares = []
    share = grace_period
    while share <= LAST_SHARE:
        shares.append(share)
        share *= reduction_factor
    return tuple(shares)


def rung_steps(shares: Sequence[float], num_steps: int) -> dict[int, float]:
    """Return the rung of every step of a trial that is one.

    Of rungs that fall on one step, as they do in very short trials, the last counts; one that falls on the last step is none.
    """
    steps = {max(1, round(share * num_steps)): share for share in shares}
    return {step: share for step, share in steps.items() if step < num_steps}
