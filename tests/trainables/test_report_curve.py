"""The curve of a trial's training losses."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_data import token_data
from tiny import make_model

from spaces.config import TrialConfig
from spaces.space import SpaceSpec
from trainables.loop import Command, train
from trainables.mesh import World
from trainables.model import BaseModel
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


def test_every_report_of_a_trial_tells_its_losses_so_far(tmp_path: Path) -> None:
    data, base = token_data(), BaseModel.load(str(make_model(tmp_path / "model")), None, "sequence-classification", ("a", "b", "c"))
    config = TrialConfig.from_params({**SpaceSpec().first(), "dataset_fraction": 1.0, "global_batch_size": 4, "lora_rank": 2})
    reports = list(train(config, data, base, World.alone(), control=lambda _: Command.CONTINUE, checkpoints=None))
    assert len(reports) == 3
    whole = reports[-1].details["train_losses"]
    for report in reports:
        assert report.details["steps_per_loss"] == 1
        assert report.details["train_losses"] == whole[: report.step]
        assert len(report.details["train_losses"]) == report.step
