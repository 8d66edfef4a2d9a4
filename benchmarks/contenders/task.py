"""What all contenders of `benchmarks/time_to_front.py` share: the space, the data, the model, a plain loop, and how a result is told.

The loop is made of paretune's parts (batches bucketed by length, fused AdamW, evaluation in batches that fit the caches), so that the
same params learn the same, whoever proposes them. Loops of their own have transformers' `Trainer` and paretune, which besides lays
rows end to end and leaves rows of the embedding alone that the data never read.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spaces import metrics
from spaces.config import TrialConfig
from spaces.inputs import DataSpec, ModelSpec

# What a user's file says; `paretune` takes it as it is. Layouts are left out: none but paretune has any.
MODEL = {"name": "embedded:all-MiniLM-L6-v2", "task": "sequence-classification", "max_length": 32}
SPACE: dict[str, Any] = {
    "adapter": {"choice": ["none", "lora"]},
    "learning_rate": {"log_uniform": [2e-4, 5e-3]},
    "global_batch_size": {"choice": [8, 16, 32]},
    "dataset_fraction": {"log_uniform": [0.1, 1.0]},
    "epochs": {"int": [1, 4]},
    "lora_rank": {"choice": [4, 8, 16]},
}
FIXED = {
    "lora_alpha": 16,
    "warmup_fraction": 0.1,
    "weight_decay": 0.0,
    "precision": "fp32",
    "seed": 0,
    "world_size": 1,
    "strategy": "ddp",
    "micro_batch_size": "auto",
    "recomputation": "none",
}
EVALUATION_ROWS_PER_CLASS = 4
# The worst that is still worth anything; nothing in the space takes as long on one core.
LAST_SECONDS = 120.0
# The shares of its own steps at which a trial may be stopped early, by whoever does that.
RUNGS = (1 / 9, 1 / 3, 1.0)
# Of the remeasured time: steps that are timed, and steps before them.
TIMED_STEPS, WARMUP_STEPS = 16, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a contender's process is told."""

    seed: int
    started: float
    """When the process was started, as `time.time()` tells it."""
    limit_seconds: float
    """Since then; afterwards nothing is started any more."""
    data: str
    """Directory of `train.csv` and `evaluation.csv`."""
    scratch: str
    """Directory for whatever else the contender writes."""
    rows: str
    """File of JSON lines: the finished trials."""
    path: str
    """Where all this stands."""

    @classmethod
    def from_command_line(cls) -> Run:
        return cls(**json.loads(Path(sys.argv[1]).read_text()))

    @property
    def seconds_left(self) -> float:
        return max(1.0, self.limit_seconds - (time.time() - self.started))

    def finished(self, params: Mapping[str, Any], accuracy: float, train_seconds: float) -> None:
        """Tell of a trial that was trained to its end; one write, so that several processes may tell at once."""
        row = {"seconds": time.time() - self.started, "params": dict(params), "accuracy": accuracy, "train_seconds": train_seconds}
        line = (json.dumps(row) + "\n").encode()
        file = os.open(self.rows, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """Where a trial stands."""

    share: float
    """Of its steps."""
    accuracy: float
    train_seconds: float
    """Of its steps so far."""


def write_data(source: Path, directory: Path, rows_per_class: int) -> None:
    """Write a small part of the training rows, the same share of every class, and other rows to evaluate on."""
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    members: dict[str, list[dict[str, str]]] = defaultdict(list)
    for i in np.random.default_rng(0).permutation(len(rows)):
        members[rows[i]["category"]].append(rows[i])
    evaluation = [row for label in sorted(members) for row in members[label][:EVALUATION_ROWS_PER_CLASS]]
    last = EVALUATION_ROWS_PER_CLASS + rows_per_class
    train = [row for label in sorted(members) for row in members[label][EVALUATION_ROWS_PER_CLASS:last]]
    for name, part in (("train.csv", train), ("evaluation.csv", evaluation)):
        with (directory / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "category"])
            writer.writeheader()
            writer.writerows(part)


def data_spec(directory: str) -> dict[str, str]:
    return {"train": f"{directory}/train.csv", "evaluation": f"{directory}/evaluation.csv"}


def config_of(params: Mapping[str, Any]) -> TrialConfig:
    return TrialConfig.from_params({**FIXED, **params})


def suggest(trial: Any) -> dict[str, Any]:
    """Propose params through an Optuna trial, in the way that its documentation shows."""
    params: dict[str, Any] = {}
    for name, domain in SPACE.items():
        ((kind, values),) = domain.items()
        if kind == "choice":
            params[name] = trial.suggest_categorical(name, values)
        elif kind == "int":
            params[name] = trial.suggest_int(name, *values)
        else:
            params[name] = trial.suggest_float(name, *values, log=True)
    return params


class Task:
    """Data and model, loaded once in a process."""

    def __init__(self, directory: str) -> None:
        from trainables.hub import resolve_model
        from trainables.mesh import World
        from trainables.model import BaseModel
        from trainables.preparation import prepare

        self.data = prepare(ModelSpec(**MODEL), DataSpec(**data_spec(directory)))
        self.base = BaseModel.load(resolve_model(MODEL["name"]), None, MODEL["task"], self.data.label_names)
        self._world = World.alone()

    def train(self, params: Mapping[str, Any], shares: tuple[float, ...] = (1.0,)) -> Iterator[Point]:
        """Train a trial and yield where it stands at these shares of its steps."""
        from trainables.evaluation import evaluate

        config = config_of(params)
        loop = _Loop(config, self)
        at = {max(1, round(share * loop.num_steps)): share for share in shares}
        seconds = 0.0
        for step in range(loop.num_steps):
            seconds += loop.step(step)
            if step + 1 in at:
                scores = evaluate(loop.module, config, self.data, self.data.evaluation, self._world)
                yield Point(share=at[step + 1], accuracy=scores[metrics.ACCURACY], train_seconds=seconds)

    def finish(self, params: Mapping[str, Any]) -> Point:
        """Train a trial to its end."""
        (point,) = self.train(params)
        return point

    def measure(self, params: Mapping[str, Any]) -> float:
        """Return the seconds of a trial's steps, of which some are timed, spread evenly over the trial."""
        from trainables.step_time import fit

        loop = _Loop(config_of(params), self)
        for step in range(min(WARMUP_STEPS, loop.num_steps)):
            loop.step(step)
        timed = np.unique(np.linspace(0, loop.num_steps - 1, min(TIMED_STEPS, loop.num_steps)).round().astype(int))
        padded = loop.plan.sizes().padded_tokens
        return float(fit(np.array([loop.step(int(step)) for step in timed]), padded[timed]).of(padded).sum())


class _Loop:
    """A trial, step by step."""

    def __init__(self, config: TrialConfig, task: Task) -> None:
        from trainables.batching import BatchPlan
        from trainables.mesh import World
        from trainables.model import build, trainable
        from trainables.optim import make_optimizer

        self._recipe, self._task = config.recipe, task.data.task
        self.module = build(config, task.base, World.alone())
        self.module.train()
        self._parameters = list(trainable(self.module).values())
        self._optimizer = make_optimizer(trainable(self.module), config.recipe)
        self.plan = BatchPlan(config, task.data)
        self.num_steps = self.plan.num_steps

    def step(self, step: int) -> float:
        """Train one batch; return the seconds that it took."""
        from trainables.loss import TrainingLoss
        from trainables.optim import learning_rate, update

        started = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._recipe, step, self.num_steps)
        for batch in self.plan.micro_batches(step, 0):
            loss = TrainingLoss(self._task)(self.module, batch)
            (loss / self.plan.num_targets(step)).backward()
        update(self._optimizer, self._parameters)
        self._optimizer.zero_grad()
        return time.perf_counter() - started
