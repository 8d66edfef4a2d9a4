"""The training of one trial, from its config to its last report. Knows nothing of Ray."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from spaces import metrics
from spaces.adapters import num_prefix_tokens
from spaces.config import TrialConfig
from spaces.fidelity import rung_shares, rung_steps
from spaces.flops import StepFlops
from trainables.batching import Batch, BatchPlan
from trainables.checkpoint import Checkpoint, CheckpointStore, read_checkpoint
from trainables.compilation import Compilation, as_written
from trainables.data import TaskData
from trainables.evaluation import evaluate, score_completions
from trainables.loss import TrainingLoss
from trainables.memory_meter import MemoryMeter
from trainables.mesh import World
from trainables.meter import FlopWatch, StepTimer, details, speed
from trainables.model import BaseModel, build, trainable, unwrapped
from trainables.optim import learning_rate, make_optimizer, update
from trainables.packed import packing_for
from trainables.parallelize import GradientExchange, autocast, blocks_of, recompute, summing
from trainables.report import Diverged, OutOfMemory, TrialError, TrialReport, thinned
from trainables.step_time import FURTHER_SECONDS, MIN_TIMED_STEPS
from trainables.tensor_parallel import marked_while_gathered, sum_partial_gradients
from trainables.trained_rows import rows_of
from trainables.whole import load_state, load_weights, whole_state, whole_weights

# Whether the loss is still finite is looked at this often: every look makes a GPU wait.
CHECK_STEPS = 16
# Of a trial's training in full that each further point of its learning curve may take.
EVALUATION_SHARE = 0.02
# What a checkpoint takes before one was written: a weight and AdamW's two moments, at the pace of a slow disk.
STATES, SAVED_BYTES_PER_SECOND = 3, 200e6
# What else says that memory ran out, without a class of its own: torch's allocators of a CPU and of pinned memory, CUDA's driver,
# cuBLAS and NCCL.
FULL = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


class Command(Enum):
    """What a trial is told after every step; all ranks are told the same."""

    CONTINUE = 0
    STOP = 1
    SAVE = 2
    SUSPEND = 3
    """Save and stop."""


def train(
    config: TrialConfig,
    data: TaskData,
    base: BaseModel,
    world: World,
    *,
    control: Callable[[bool], Command],
    checkpoints: CheckpointStore | None,
    exact_match_rows: int = 0,
    rungs: tuple[float, ...] = rung_shares(),
) -> Iterator[TrialReport]:
    """Train a trial and yield its reports; it goes on from the newest good checkpoint if there is one.

    Every rank of the world runs it with the same arguments. A stop ends the iteration without a final report.

    Args:
        control: asked after every step, and told whether a report follows; all ranks must get the same answer.

    Raises:
        Diverged: the loss is not finite any more; on all ranks at the same step.
        OutOfMemory: on the rank that ran out.
    """
    with memory_errors():
        trainer = Trainer(config, data, base, world, checkpoints, rungs)
        if trainer.step in trainer.rungs and trainer.step < trainer.num_steps:
            yield trainer.report()  # which may not have come through before the trial was cut off
        while trainer.step < trainer.num_steps:
            trainer.train_step()
            is_rung = trainer.step in trainer.rungs
            command = control(is_rung)
            if command is Command.STOP:
                return
            if command in (Command.SAVE, Command.SUSPEND):
                trainer.save()
            if command is Command.SUSPEND:
                return
            if is_rung and trainer.step < trainer.num_steps:
                yield trainer.report()
        yield trainer.final_report(exact_match_rows)


def affordable_rungs(rungs: tuple[float, ...], config: TrialConfig, data: TaskData) -> tuple[float, ...]:
    """Return the rungs, or none where to evaluate at one of them would take too much of what the trial costs.

    The same on every rank, and every time: it counts tokens, of which the evaluation computes a third as much as the training.
    """
    trained = data.train.lengths[data.subset(config.recipe.dataset_fraction)].sum() * config.recipe.epochs
    share = data.evaluation.lengths.sum() / 3 / trained
    return rungs if share <= EVALUATION_SHARE else ()


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Have Python search for no garbage meanwhile; what is due comes behind it."""
    was_searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_searching:
            gc.enable()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn torch's error of a device without memory into that of a trial.

    Raises:
        OutOfMemory: the device has no memory left.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error).splitlines()[0]) from error
    except RuntimeError as error:
        if not any(text in str(error) for text in FULL):
            raise
        raise OutOfMemory(str(error).splitlines()[0]) from error


class Trainer:
    """One trial in training: the model, its optimizer, and how far it is."""

    def __init__(
        self,
        config: TrialConfig,
        data: TaskData,
        base: BaseModel,
        world: World,
        checkpoints: CheckpointStore | None,
        rungs: tuple[float, ...] = rung_shares(),
    ) -> None:
        self.config, self.data, self.base, self.world, self.checkpoints = config, data, base, world, checkpoints
        self._rows_world = world.data_parallel(config.layout)
        self._started = time.perf_counter()
        self._watch = FlopWatch(base.shape, num_prefix_tokens(config.recipe))
        saved = checkpoints.latest_valid() if checkpoints else None
        self._timer = StepTimer(world.device, saved.state["step_parts"] if saved else [])
        self._sum_pieces = summing(world.tensor_parallel(config.layout), self._timer)
        self._plan = BatchPlan(config, data, packing_for(base.module, config, data), base.shape)
        self._compilation = Compilation.of(self._plan.forms()) if config.layout.compile == "blocks" else None
        self.module = build(config, base, world, self._timer, self._compilation, data.tokens())
        self.module.train()
        self._parameters = trainable(self.module)
        self._idle_rows = [rows for p in self._parameters.values() if (rows := rows_of(p)) is not None]
        self._loss = TrainingLoss(data.task, self._compilation)
        self._exchange = GradientExchange(self.module)
        self._optimizer = make_optimizer(self._parameters, config.recipe)
        if checkpoints is not None:
            checkpoints.save_seconds = sum(p.nbytes for p in self._parameters.values()) * STATES / SAVED_BYTES_PER_SECOND
        self.sizes = self._plan.sizes()
        self._fullest = self.sizes.fullest
        self.num_steps = self._plan.num_steps
        self.rungs = {*rung_steps(rungs, self.num_steps), self.num_steps}
        self.step = 0
        self._ahead: tuple[int, list[Batch]] = (-1, [])  # a step, and its micro batches
        self._losses = torch.zeros(self.num_steps, device=world.device)
        self._global_losses: list[float] = []
        self.flops: StepFlops | None = None
        self.memory = MemoryMeter(world.device, self.module, self._optimizer)
        self._saved_state: dict[str, torch.Tensor] = {}
        if saved is not None:
            self._restore(saved)

    def train_step(self) -> None:
        """Train one global batch: this rank's micro batches, one exchange of gradients, one update."""
        recipe = self.config.recipe
        followed = self.memory.follow() if self._is_to_be_followed() else nullcontext(False)
        rate = learning_rate(recipe, self.step, self.num_steps)
        with garbage_kept(), followed as is_disturbed, self._timer.step(is_disturbed=is_disturbed) as mark:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            # DDP and FSDP2 average gradients over the ranks; the loss is a mean over the whole global batch.
            scale = self._rows_world.world_size / self._plan.num_targets(self.step)
            micro_batches = self._ahead[1] if self._ahead[0] == self.step else self._micro_batches(self.step)
            mark("data")
            for i, batch in enumerate(micro_batches, start=1):
                runs_as_written = as_written(self._runs_as_written(batch, is_disturbed))
                with self._exchange.passing(is_last=i == len(micro_batches)), runs_as_written:
                    self._losses[self.step] += self._backward(batch, scale, mark)
            sum_partial_gradients(self._parameters.values(), self._sum_pieces)
            if self._saved_state:
                # Not before: until then DDP may hold its buckets twice (`GradientExchange`).
                load_state(self._optimizer, self._parameters, self._saved_state)
                self._saved_state = {}
            update(self._optimizer, self._parameters.values())
            self._exchange.end_step(self._optimizer)
            for rows in self._idle_rows:
                rows.scale *= 1 - rate * recipe.weight_decay
            mark("optimizer")
            # While a GPU computes this step, and before anything waits for that: the next finds its batches on the device.
            if self.step + 1 < self.num_steps:
                self._ahead = self.step + 1, self._micro_batches(self.step + 1)
            mark("data")
        self.step += 1
        if self.step % CHECK_STEPS == 0 or self.step in self.rungs:
            self._collect_losses()

    def _micro_batches(self, step: int) -> list[Batch]:
        return [batch.to(self.world.device) for batch in self._plan.micro_batches(step, self._rows_world.rank)]

    def step_parts(self) -> list[list[float]]:
        """Return the seconds of every step so far, by `STEP_PARTS`."""
        return self._timer.parts()

    def report(self) -> TrialReport:
        """Evaluate and report."""
        return self._report(self._evaluate(is_final=False))

    def final_report(self, exact_match_rows: int) -> TrialReport:
        """Evaluate all that is asked for, save the weights, and report what the trial cost."""
        scores = self._evaluate(is_final=True)
        with self.memory.pause():
            table = self.data.evaluation
            scores |= score_completions(self.module, self.config, self.data, table, self.world, self.base, exact_match_rows)
        if self.checkpoints is not None:
            weights = whole_weights(self._parameters, is_kept=self.world.rank == 0)
            if self.world.rank == 0:
                state = {"config": self.config.to_dict(), "step": self.step}
                self.checkpoints.save_final(Checkpoint(weights=weights, optimizer={}, state=state))
        assert self.flops is not None  # a step was trained
        facts: dict[str, Any] = {
            **details(self.world, self.config, self.memory, self.flops),
            "distinct_rows": self._plan.num_distinct_rows,
            "train_rows": self.data.train.num_rows,
        }
        if metrics.EXACT_MATCH in scores:
            facts["exact_match_rows"] = min(exact_match_rows, self.data.evaluation.num_rows)
        scores[metrics.PEAK_MEMORY_BYTES] = float(max(facts["peak_memory_bytes_by_rank"]))
        self._time_further_steps()
        return self._report(scores, facts)

    def save(self) -> None:
        """Write a checkpoint; every rank must call it, because shards are gathered."""
        self._collect_losses()
        if self.checkpoints is None:
            return
        started = time.perf_counter()
        is_writer = self.world.rank == 0
        weights = whole_weights(self._parameters, is_kept=is_writer)
        optimizer = whole_state(self._optimizer, self._parameters, is_kept=is_writer)
        assert self.flops is not None  # a step was trained
        state = {
            "step": self.step,
            "losses": self._global_losses,
            "step_parts": self.step_parts(),
            "flops": asdict(self.flops),
            "layout": self.config.layout.key(),
            "memory_by_rank": self.world.gather(self.memory.state()),
        }
        if is_writer:
            self.checkpoints.save(self.step, Checkpoint(weights=weights, optimizer=optimizer, state=state))
            self.checkpoints.save_seconds = time.perf_counter() - started
        # The others wait here, and not in the next exchange, which gives up sooner than a large file is written.
        self.world.gather(None)

    def _time_further_steps(self) -> None:
        """Train steps once more where too few were timed to tell the pace; nothing is kept of what is learned in them."""
        num_further = MIN_TIMED_STEPS - self.num_steps
        if num_further <= 0:
            return
        slowest = max(self.world.gather(max(sum(step) for step in self.step_parts() if not math.isnan(sum(step)))))
        for number in range(min(num_further, int(FURTHER_SECONDS / slowest))):
            self.step = number % self.num_steps
            self.train_step()
        self.step = self.num_steps

    def _is_to_be_followed(self) -> bool:
        """Return whether this step may hold the most, or comes after these and none was followed."""
        is_over = len(self._global_losses) == self.num_steps  # what is trained now is timed, and no part of the trial
        is_missed = self.step > self._fullest[-1] and not self.memory.is_measured
        return not is_over and bool(self._optimizer.state) and (self.step in self._fullest or is_missed)

    def _evaluate(self, *, is_final: bool) -> dict[str, float]:
        with self.memory.pause():
            return evaluate(self.module, self.config, self.data, self.data.evaluation, self.world, is_final=is_final)

    def _backward(self, batch: Batch, scale: float, mark: Callable[[str], None]) -> torch.Tensor:
        """Run one micro batch forward and backward; return its part of the step's loss."""
        is_first = self.flops is None
        if is_first:
            recompute(unwrapped(self.module), self.config.layout, self._watch.recomputation)
        with autocast(self.config, self.world), self._watched(batch) if is_first else nullcontext():
            loss = self._loss(self.module, batch)
        mark("forward")
        loss = loss * scale
        loss.backward()
        self._timer.end_exchange()
        mark("backward")
        if is_first:
            self.flops = self._watch.flops()
            recompute(unwrapped(self.module), self.config.layout)
        return loss.detach() / self._rows_world.world_size

    @contextmanager
    def _watched(self, batch: Batch) -> Iterator[None]:
        """Count the FLOPs of a forward pass."""
        with marked_while_gathered(blocks_of(self.module)), self._watch.forward(batch):
            yield

    def _runs_as_written(self, batch: Batch, is_followed: bool) -> bool:
        """Return whether compiled blocks run uncompiled: what torch compiles is seen by nobody."""
        compilation = self._compilation
        return compilation is not None and (is_followed or self.flops is None or not compilation.covers(batch.form))

    def _collect_losses(self) -> None:
        """Sum the ranks' parts of the losses since the last time, and stop a trial that has none any more."""
        start = len(self._global_losses)
        if start >= self.step:
            return
        recent = self._rows_world.sum(self._losses[start : self.step].clone()).tolist()
        for offset, loss in enumerate(recent):
            if not math.isfinite(loss):
                raise Diverged(f"the training loss is {loss} at step {start + offset + 1} of {self.num_steps}")
        self._global_losses += recent

    def _report(self, scores: dict[str, float], facts: dict[str, object] | None = None) -> TrialReport:
        if not math.isfinite(scores[metrics.EVAL_LOSS]):
            raise Diverged(f"the evaluation loss is {scores[metrics.EVAL_LOSS]} at step {self.step} of {self.num_steps}")
        self._collect_losses()
        # The same window, whether or not a trial reports at the rungs before its end.
        earlier = max((rung for rung in rung_steps(rung_shares(), self.num_steps) if rung < self.step), default=0)
        assert self.flops is not None  # a step was trained, here or before the checkpoint
        cost = speed(self.step_parts(), self.sizes, self.world, self.flops, self.config)
        recent = self._global_losses[earlier : self.step]
        return TrialReport(
            step=self.step,
            num_steps=self.num_steps,
            fidelity=float(self.sizes.tokens[: self.step].sum() / self.sizes.tokens.sum()),
            metrics={
                **scores,
                **cost,
                metrics.TRAIN_LOSS: sum(recent) / len(recent),
                metrics.TOTAL_SECONDS: time.perf_counter() - self._started,
            },
            final=facts is not None,
            details={**(facts or {}), **thinned(self._global_losses, self.num_steps)},
        )

    def _restore(self, saved: Checkpoint) -> None:
        self.step = saved.state["step"]
        self._global_losses = list(saved.state["losses"])
        self.flops = StepFlops.from_dict(saved.state["flops"])
        if saved.state.get("layout") == self.config.layout.key():  # under another one, ranks hold something else
            self.memory.restore(saved.state["memory_by_rank"][self.world.rank])
        load_weights(self._parameters, saved.weights)
        for rows in self._idle_rows:
            rates = (learning_rate(self.config.recipe, step, self.num_steps) for step in range(self.step))
            rows.scale = math.prod(1 - rate * self.config.recipe.weight_decay for rate in rates)
        self._saved_state = saved.optimizer


def evaluate_untrained(config: TrialConfig, data: TaskData, base: BaseModel, world: World, exact_match_rows: int) -> dict[str, float]:
    """Return the scores of the model before any training, with the config's seed for the new weights.

    The user's own score may not be defined of completions that are none yet. Other adapters change nothing before they are
    trained, but a prefix begins at random: the model is scored with another one, which has it frozen and quantised as a prefix has.
    """
    if config.recipe.adapter == "prefix":
        lora: dict[str, Any] = {"adapter": "lora", "adapter_rank": 1, "adapter_alpha": 1.0, "adapter_target_modules": ("all-linear",)}
        config = replace(config, recipe=replace(config.recipe, **lora))
    module = build(config, base, world)
    scores = evaluate(module, config, data, data.evaluation, world, is_final=False)
    with suppress(TrialError):
        scores |= score_completions(module, config, data, data.evaluation, world, base, exact_match_rows)
    return scores


def evaluate_saved(
    config: TrialConfig, data: TaskData, base: BaseModel, world: World, weights: Path, exact_match_rows: int
) -> dict[str, float]:
    """Return the scores on the test rows of a finished trial's saved weights."""
    assert data.test is not None  # the caller asks only for data with a test file
    module = build(config, base, world)
    load_weights(trainable(module), read_checkpoint(weights).weights)
    scores = evaluate(module, config, data, data.test, world)
    # Not before: FSDP2 has to see a forward pass of the whole model first, and generation calls the model inside PEFT's.
    return scores | score_completions(module, config, data, data.test, world, base, exact_match_rows)
