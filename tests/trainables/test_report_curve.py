"""The curve of a trial's training losses."""

from __future__ import annotations

import pytest

from trainables.report import MAX_LOSSES, thinned


@pytest.mark.parametrize("num_steps", [1, 7, MAX_LOSSES, MAX_LOSSES + 1, 250, 1000])
def test_every_step_is_in_one_point_and_there_are_few_points(num_steps: int) -> None:
    losses = [float(n) for n in range(num_steps)]
    told = thinned(losses, num_steps)
    span, points = told["steps_per_loss"], told["train_losses"]
    assert num_steps / MAX_LOSSES <= span < num_steps / MAX_LOSSES + 1
    lengths = [min(span, num_steps - start) for start in range(0, num_steps, span)]
    assert len(points) == len(lengths) <= MAX_LOSSES
    assert sum(n * point for n, point in zip(lengths, points, strict=True)) == pytest.approx(sum(losses))
    for done in range(num_steps):
        early = thinned(losses[:done], num_steps)["train_losses"]
        assert early == points[: done // span], "what is told on the way is not told otherwise at the end"
