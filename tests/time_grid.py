"""Trials whose time is predicted from a step profile and then measured whole: the grid that a benchmark prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from search.profiling import NUM_ROUNDS, mean_profile
from spaces.config import TrialConfig
from spaces.inputs import DataSpec, ModelSpec
from spaces.space import SpaceSpec
from trainables import preparation
from trainables.data import TaskData
from trainables.hub import EMBEDDED_MODEL, resolve_model
from trainables.loop import Trainer
from trainables.mesh import World
from trainables.model import BaseModel
from trainables.step_profile import measure_step
from trainables.step_time import StepTime, fit_steady

TASK = "sequence-classification"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trial of the embedded model on the embedded data."""

    max_length: int
    dataset_fraction: float
    params: tuple[tuple[str, Any], ...]

    def config(self) -> TrialConfig:
        params = {**SpaceSpec().first(), "dataset_fraction": self.dataset_fraction, "lora_alpha": 16.0, **dict(self.params)}
        if params["adapter"] == "lora":
            params.setdefault("lora_rank", 8)
        return TrialConfig.from_params({**params, "learning_rate": 1e-4})


def _case(max_length: int, dataset_fraction: float, **params: Any) -> Case:
    return Case(max_length=max_length, dataset_fraction=dataset_fraction, params=tuple(params.items()))


ALONE = [
    *(
        _case(length, 0.008 * batch, adapter=adapter, global_batch_size=batch)
        for length in (24, 64)
        for batch in (8, 16)
        for adapter in ("none", "lora")
    ),
    _case(24, 0.24, adapter="lora", global_batch_size=16, lora_rank=32),
    _case(24, 0.24, adapter="lora", global_batch_size=16, micro_batch_size=4),
    _case(24, 0.24, adapter="lora", global_batch_size=16, recomputation="full"),
    _case(24, 0.24, adapter="none", global_batch_size=16, recomputation="full"),
]
ON_TWO = [
    *(
        _case(24, 0.012 * batch, adapter=adapter, global_batch_size=batch, world_size=2, strategy=strategy)
        for strategy in ("ddp", "fsdp")
        for batch in (8, 16)
        for adapter in ("none", "lora")
    ),
    _case(64, 0.12, adapter="lora", global_batch_size=8, world_size=2),
    _case(24, 0.24, adapter="lora", global_batch_size=16, world_size=2, micro_batch_size=4),
]


def predicted_and_measured(world: World, cases: list[Case]) -> list[dict[str, float]]:
    """Return for each case the seconds of all its steps: predicted from a profile, measured one by one, and as reported.

    All profiles come first, in rounds, as `paretune profile` takes them before a search.
    """
    loaded = {length: _load(length) for length in {case.max_length for case in cases}}
    rounds = [[measure_step(case.config(), *loaded[case.max_length], world) for case in cases] for _ in range(NUM_ROUNDS)]
    profiles = [mean_profile(parts) for parts in zip(*rounds, strict=True)]
    return [_trained(case.config(), *loaded[case.max_length], world, profile) for case, profile in zip(cases, profiles, strict=True)]


def _load(max_length: int) -> tuple[TaskData, BaseModel]:
    model = ModelSpec(name=EMBEDDED_MODEL, task=TASK, max_length=max_length)
    data = preparation.prepare(model, DataSpec(train="embedded:stdlib-docstrings"))
    return data, BaseModel.load(resolve_model(EMBEDDED_MODEL), None, TASK, data.label_names)


def _trained(config: TrialConfig, data: TaskData, base: BaseModel, world: World, profile: dict[str, Any]) -> dict[str, float]:
    trainer = Trainer(config, data, base, world, checkpoints=None)
    for _ in range(trainer.num_steps):
        trainer.train_step()
    seconds = np.array([sum(step) for step in trainer.step_parts()])
    padded = trainer.sizes.padded_tokens
    reported = fit_steady(list(seconds), trainer.sizes).of(padded).sum()
    time = StepTime(fixed_seconds=profile["fixed_seconds"], seconds_per_token=profile["seconds_per_token"])
    # The step whose tensors were followed has no time: what its size takes in the others stands for it.
    timed = ~np.isnan(seconds)
    measured = seconds[timed].sum() * padded.sum() / padded[timed].sum()
    return {
        "num_steps": float(trainer.num_steps),
        "predicted_seconds": float(time.of(padded).sum()),
        "measured_seconds": float(measured),
        "reported_seconds": float(reported),
    }
