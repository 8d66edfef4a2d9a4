"""The line through the times of steps, and what a profile makes of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import run
from synthetic_data import token_data
from tiny import make_model

from spaces.config import TrialConfig
from spaces.fidelity import PROFILE_STEPS as NUM_STEPS
from spaces.space import SpaceSpec
from trainables.batching import Batch, BatchPlan, StepSizes
from trainables.checkpoint import CheckpointStore, read_checkpoint
from trainables.data import TaskData, TokenTable
from trainables.loop import Command, Trainer, train
from trainables.loss import TrainingLoss
from trainables.memory_meter import MemoryMeter
from trainables.mesh import World
from trainables.model import BaseModel
from trainables.packed import packing_for
from trainables.report import TrialReport
from trainables.step_profile import measure_step
from trainables.step_time import MIN_TIMED_STEPS, WARMUP_STEPS, StepTime, fit, fit_steady, num_warmup, steady_steps
from trainables.tokenization import Encoded

RNG = np.random.default_rng(0)


def sizes(padded: np.ndarray) -> StepSizes:
    return StepSizes(
        rows=np.ones_like(padded),
        tokens=padded,
        targets=padded,
        padded_tokens=padded,
        squared_lengths=padded**2.0,
        micro_targets=padded,
        micro_batches=np.ones_like(padded),
        micro_tokens=padded,
        micro_rows=np.ones_like(padded),
    )


def test_a_line_is_found_whatever_some_slow_steps_took() -> None:
    padded = RNG.integers(100, 900, size=40)
    seconds = 0.3 + 0.002 * padded
    assert fit(seconds, padded) == StepTime(fixed_seconds=pytest.approx(0.3), seconds_per_token=pytest.approx(0.002))
    slow = seconds * np.where(RNG.random(40) < 0.25, RNG.uniform(2, 9, size=40), 1)
    assert fit(slow, padded).of(padded).sum() == pytest.approx(seconds.sum(), rel=1e-6)


def test_it_has_the_least_sum_of_absolute_errors() -> None:
    """Against all lines through two of the points, one of which is the best there is."""
    padded = RNG.integers(100, 900, size=25)
    seconds = 0.3 + 0.002 * padded + RNG.exponential(0.2, size=25)

    def cost(fixed: float, slope: float) -> float:
        return float(np.abs(seconds - fixed - slope * padded).sum())

    pairs = itertools.combinations(range(25), 2)
    slopes = {(i, j): (seconds[i] - seconds[j]) / (padded[i] - padded[j]) for i, j in pairs if padded[i] != padded[j]}
    best = min(cost(seconds[i] - slope * padded[i], slope) for (i, _), slope in slopes.items())
    found = fit(seconds, padded)
    assert cost(found.fixed_seconds, found.seconds_per_token) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("num_steps", [2, 3, 4, 6, 8, 12])
def test_no_noise_makes_the_time_of_a_short_trial_absurd(num_steps: int) -> None:
    """A free line through two steps of nearly one size says that larger ones take less than nothing."""
    for _ in range(300):
        padded = RNG.integers(400, 1600, size=36)
        seconds = (0.05 + 0.001 * padded) * RNG.normal(1, 0.05, size=36)
        found = fit(seconds[:num_steps], padded[:num_steps])
        assert found.fixed_seconds >= 0
        assert found.seconds_per_token >= 0
        assert 0.6 < found.of(padded).sum() / seconds.sum() < 1.6


def test_the_best_line_without_a_negative_part_is_found() -> None:
    """Against a fine grid of all lines with none."""
    padded = RNG.integers(100, 900, size=15).astype(float)
    for seconds in (0.002 * padded - 0.1 + RNG.normal(0, 0.02, 15), 3 - 0.001 * padded + RNG.normal(0, 0.02, 15)):
        found = fit(seconds, padded)
        cost = np.abs(seconds - found.of(padded)).sum()
        grid = [np.abs(seconds - a - b * padded).sum() for a in np.linspace(0, 4, 160) for b in np.linspace(0, 0.01, 400)]
        assert cost <= min(grid) + 1e-2


def test_equal_steps_give_their_median() -> None:
    seconds = np.array([1.0, 1.2, 0.9, 7.0, 1.1])
    assert fit(seconds, np.full(5, 64)).of(np.full(5, 64)).sum() == pytest.approx(5 * 1.1)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8])
def test_the_shortest_trial_has_a_step_that_counts(num_steps: int) -> None:
    for disturbed in range(1, num_steps + 1):  # the first step is never followed
        seconds = [math.nan if step == disturbed else 1.0 for step in range(num_steps)]
        steps = steady_steps(seconds)
        assert len(steps) >= 1
        assert disturbed not in steps


def test_warm_up_and_disturbed_steps_count_nowhere() -> None:
    padded = np.full(20, 64)
    seconds = [9.0] * num_warmup(20) + [1.0] * (20 - num_warmup(20))
    seconds[10] = float("nan")
    assert fit_steady(seconds, sizes(padded)).of(padded).sum() == pytest.approx(20.0)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5])
def test_of_a_trial_of_few_steps_what_the_first_ones_take_counts_nowhere(
    num_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a profile, beside which it stands on the front; and it learns what it would without further steps."""
    data, base = token_data(), BaseModel.load(str(make_model(tmp_path / "model")), None, "sequence-classification", ("a", "b", "c"))
    params = {**SpaceSpec().first(), "dataset_fraction": 0.1, "global_batch_size": 9, "lora_rank": 2, "epochs": float(num_steps)}
    clock, num_trained, backward = [0.0], [0], Trainer._backward

    def slow(self: Trainer, batch: Batch, *how: Any) -> torch.Tensor:
        clock[0] += 1e-5 * batch.input_ids.numel() * (9 if num_trained[0] < WARMUP_STEPS - 1 else 1)
        num_trained[0] += 1
        return backward(self, batch, *how)

    def final(directory: Path) -> tuple[TrialReport, dict[str, torch.Tensor]]:
        store = CheckpointStore(tmp_path / directory)
        config = TrialConfig.from_params(params)
        *_, last = train(config, data, base, World.alone(), control=lambda _: Command.CONTINUE, checkpoints=store)
        return last, read_checkpoint(tmp_path / directory / "final").weights

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_backward", slow)
        patched.setattr("trainables.meter.time.perf_counter", lambda: clock[0])
        timed, weights = final(Path("timed"))
    assert num_trained == [max(num_steps, MIN_TIMED_STEPS)], "of one micro batch each"
    config = TrialConfig.from_params(params)
    padded = BatchPlan(config, data, packing_for(base.module, config, data)).sizes().padded_tokens
    assert timed.metrics["train_seconds"] == pytest.approx(1e-5 * padded.sum())
    monkeypatch.setattr("trainables.loop.FURTHER_SECONDS", 0.0)
    plain, expected = final(Path("plain"))
    assert (timed.step, timed.num_steps) == (plain.step, plain.num_steps) == (num_steps, num_steps)
    assert timed.details["train_losses"] == plain.details["train_losses"]
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@dataclass
class Measured:
    """A profile with a clock that goes by what is computed."""

    profile: dict[str, Any]
    sizes: StepSizes
    """Of the trial whose steps were trained."""
    steps: list[int]
    """Those that were trained, in order."""
    followed: list[int]
    """Those whose tensors were followed."""


def measured(
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: TaskData,
    *,
    slow_from: int = NUM_STEPS,
    slow_down: float = 1.0,
    is_followed: bool = True,
) -> Measured:
    """Measure with a clock of a second a step and a hundredth a token, from some step on slower."""
    clock, steps, followed = [0.0], [], []
    base = BaseModel.load(str(make_model(directory)), None, data.task, data.label_names)
    weights = {name: value.clone() for name, value in base.module.state_dict().items()}
    params = {**SpaceSpec().first(), "dataset_fraction": 0.1, "global_batch_size": 8, "lora_rank": 2}
    config = TrialConfig.from_params(params)
    backward, follow = Trainer._backward, MemoryMeter.follow

    def slow(self: Trainer, batch: Batch, *how: Any) -> torch.Tensor:
        """Be a step's one micro batch."""
        clock[0] += (1 + 0.01 * batch.input_ids.numel()) * (slow_down if len(steps) >= slow_from else 1)
        steps.append(self.step)
        assert batch.input_ids.numel() == self.sizes.padded_tokens[self.step], "not of the step that comes behind another one"
        return backward(self, batch, *how)

    @contextmanager
    def noted(self: MemoryMeter) -> Iterator[bool]:
        with follow(self) if is_followed else nullcontext(False) as is_disturbed:
            yield is_disturbed
            followed.extend(steps[-1:] if is_disturbed else [])

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_backward", slow)
        patched.setattr(MemoryMeter, "follow", noted)
        patched.setattr("trainables.meter.time.perf_counter", lambda: clock[0])
        profile = measure_step(config, data, base, World.alone())
    assert all(torch.equal(value, weights[name]) for name, value in base.module.state_dict().items()), "nothing is learned"
    epochs = float(math.ceil(NUM_STEPS * 8 / data.train.num_rows))
    whole = replace(config, recipe=replace(config.recipe, dataset_fraction=1.0, epochs=epochs))
    return Measured(profile=profile, sizes=BatchPlan(whole, data).sizes(), steps=steps, followed=followed)


def test_a_profile_is_the_line_of_the_real_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = measured(tmp_path, monkeypatch, token_data()).profile
    assert profile["num_steps"] == NUM_STEPS - 1 - num_warmup(NUM_STEPS - 1)
    assert profile["fixed_seconds"] == pytest.approx(1.0)
    assert profile["seconds_per_token"] == pytest.approx(0.01)
    assert profile["part_seconds"]["forward"] == pytest.approx(sum(profile["part_seconds"].values()))
    assert profile["num_nodes"] == 1
    assert "rank_spread" not in profile, "there is one rank"


@pytest.mark.parametrize("is_followed", [True, False], ids=["on a CPU", "as on a GPU, which follows no tensors"])
def test_the_largest_step_is_trained_wherever_it_lies_and_its_time_counts_nowhere(
    is_followed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = np.random.default_rng(0).integers(4, 20, size=900)
    lengths[0] = 31  # the trial's seed puts this row late
    rows = [Encoded(input_ids=[1] * int(length), targets=None) for length in lengths]
    data = replace(token_data(), train=TokenTable.build(rows, [0] * 900), fraction_key=np.arange(900) / 900)
    found = measured(tmp_path, monkeypatch, data, is_followed=is_followed, slow_from=NUM_STEPS - 1, slow_down=9)
    largest = int(np.argmax(found.sizes.padded_tokens))
    assert largest >= NUM_STEPS
    assert found.steps == [*range(NUM_STEPS - 1), largest]
    assert found.followed == ([largest] if is_followed else [])
    assert found.profile["num_steps"] == NUM_STEPS - 1 - num_warmup(NUM_STEPS - 1)
    assert found.profile["part_seconds"]["forward"] < 3, "the one that takes nine times as long would show in a mean"


def test_a_machine_that_is_busy_for_a_quarter_of_the_steps_shows_in_the_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = measured(tmp_path, monkeypatch, token_data()).profile
    assert quiet["time_drift"] == pytest.approx(0, abs=1e-6)
    busy = measured(tmp_path, monkeypatch, token_data(), slow_from=24, slow_down=2.0).profile
    assert busy["time_drift"] == pytest.approx((2 - 1) / 1.25, rel=0.2)


def of_two_ranks(world: World, model: str) -> dict[str, Any]:
    """Measure where the second rank's forward passes take half as long again, on a node of its own."""
    data, clock = token_data(), [0.0]
    base = BaseModel.load(model, None, data.task, data.label_names)
    params = {**SpaceSpec().first(), "dataset_fraction": 0.5, "global_batch_size": 8, "lora_rank": 2, "world_size": 2}

    plain = TrainingLoss.__call__

    def slow(*given: Any) -> Any:
        clock[0] += 1 + 0.5 * world.rank
        return plain(*given)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TrainingLoss, "__call__", slow)
        patched.setattr("trainables.meter.time.perf_counter", lambda: clock[0])
        config = TrialConfig.from_params(params)
        return measure_step(config, data, base, replace(world, node_id=f"node {world.rank}"))


def test_a_profile_tells_how_far_ranks_are_apart_and_on_how_many_nodes_they_are(tmp_path: Path) -> None:
    for profile in run(2, of_two_ranks, str(make_model(tmp_path))):
        assert profile["rank_spread"] == pytest.approx(0.5 / 1.25)
        assert profile["num_nodes"] == 2
