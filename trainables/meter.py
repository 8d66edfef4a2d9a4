"""What a trial costs: step times, tokens per second, MFU and memory, of its own steady state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spaces import metrics
from spaces.architecture import ModelShape
from spaces.config import TrialConfig
from spaces.flops import CONVENTION, AttentionUse, LinearUse, StepFlops, attention_products, recomputed_flops, training_flops
from trainables.batching import Batch, StepSizes
from trainables.device import device_peak, package_versions
from trainables.head_loss import head_loss
from trainables.low_rank import adapted_product
from trainables.memory_meter import MemoryMeter
from trainables.mesh import World
from trainables.packed import attention_by_rows
from trainables.quantize import quantized_product
from trainables.rotation import rotate
from trainables.step_time import fit, fit_steady, settling_seconds, steady_steps
from trainables.tensor_parallel import piece_of

STEP_PARTS = tuple(metrics.PART_SECONDS)
# The median of fewer steady steps is that of single ones; the drift has one for every quarter.
MEDIAN_STEPS = 5
DRIFT_STEPS = 4 * MEDIAN_STEPS
# Why there is no MFU whatever the device.
UNCOUNTED = "not all FLOPs of layers that keep a state, or choose what they attend to, are counted"


class StepTimer:
    """Seconds of every optimizer step, by part; on a GPU by events, so that timing never waits for the device."""

    def __init__(self, device: torch.device, parts: Sequence[Sequence[float]]) -> None:
        self._cuda = device.type == "cuda"
        self._parts = [list(step) for step in parts]
        self._steps: list[_StepMarks] = []
        self._step: _StepMarks | None = None
        self._begun: Any = None

    @contextmanager
    def step(self, *, is_disturbed: bool = False) -> Iterator[Callable[[str], None]]:
        """Time one step; what it gives books the time since it was last called on one of `STEP_PARTS`.

        Args:
            is_disturbed: something is done in this step that others do not do: its time counts nowhere.
        """
        marks = self._step = _StepMarks(is_disturbed=is_disturbed, stamps=[(-1, self._now())], exchanges=[])
        yield lambda part: marks.stamps.append((STEP_PARTS.index(part), self._now()))
        self._step = None
        self._steps.append(marks)

    def begin_exchange(self) -> None:
        """From now on, the computation waits for other ranks; outside a step, as in an evaluation, nobody counts it."""
        self._begun = self._now()

    def end_exchange(self) -> None:
        """It goes on; without a begin, nothing."""
        if self._begun is not None and self._step is not None:
            self._step.exchanges.append((len(self._step.stamps), self._begun, self._now()))
        self._begun = None

    def parts(self) -> list[list[float]]:
        """Return the seconds of all steps so far, by part; NaN for a step that was disturbed."""
        if self._steps and self._cuda:
            torch.cuda.synchronize()
        self._parts += [self._seconds(marks) for marks in self._steps]
        self._steps.clear()
        return [list(step) for step in self._parts]

    def _seconds(self, marks: _StepMarks) -> list[float]:
        if marks.is_disturbed:
            return [math.nan] * len(STEP_PARTS)
        seconds = [0.0] * len(STEP_PARTS)
        for (_, begin), (part, end) in pairwise(marks.stamps):
            seconds[part] += self._between(begin, end)
        for position, begin, end in marks.exchanges:
            waited = self._between(begin, end)
            seconds[marks.stamps[position][0]] -= waited
            seconds[STEP_PARTS.index("communication")] += waited
        return seconds

    def _between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._cuda else end - begin

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass(frozen=True, kw_only=True, slots=True)
class _StepMarks:
    """The clock's readings in one step."""

    is_disturbed: bool
    stamps: list[tuple[int, Any]]
    """The part that ended, and when; first the begin of the step."""
    exchanges: list[tuple[int, Any, Any]]
    """The position of the next stamp, and begin and end."""


def train_seconds(seconds: list[float], sizes: StepSizes) -> float:
    """Return the time of all steps of the trial at its steady pace.

    What `step_time` fits to the steady steps, summed over all: steps times the median step where all are alike.
    """
    return float(fit_steady(seconds, sizes).of(sizes.padded_tokens).sum())


def compile_seconds(seconds: Sequence[float], sizes: StepSizes, config: TrialConfig) -> float:
    """Return what compiling a trial's blocks took; 0 where nothing is compiled."""
    return settling_seconds(seconds, sizes) if config.layout.compile != "none" else 0.0


def mean_parts(parts: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean seconds of the steady steps by part.

    No `communication` where there is none: on one rank, or unknown: of FSDP2 on GPUs.
    """
    means = np.asarray(parts)[steady_steps([sum(step) for step in parts])].mean(axis=0)
    return {part: float(mean) for part, mean in zip(STEP_PARTS, means, strict=True) if part != "communication" or mean}


def time_drift(seconds: Sequence[float], sizes: StepSizes) -> float | None:
    """Return how much the pace changed while the trial ran: the range of its quarters' medians over their mean.

    The pace of a step is its time over that of an even trial: a long batch is no slow one.

    None for a trial with fewer than `DRIFT_STEPS` steady steps, whose quarters say nothing.
    """
    steps = steady_steps(seconds)
    if len(steps) < DRIFT_STEPS:
        return None
    times, padded_tokens = np.asarray(seconds)[steps], sizes.padded_tokens[steps]
    pace = times / fit(times, padded_tokens).of(padded_tokens)
    medians = [float(np.median(quarter)) for quarter in np.array_split(pace, 4)]
    return (max(medians) - min(medians)) / float(np.mean(medians))


def rank_spread(parts: Sequence[Sequence[float]], world: World) -> float | None:
    """Return how much slower the slowest rank is: the range of the ranks' median forward seconds over their mean.

    The forward pass is what a rank does before it waits for others. None at world size 1, and with too few steady steps to tell;
    every rank must call it.
    """
    steps = steady_steps([sum(step) for step in parts])
    if world.world_size == 1 or len(steps) < MEDIAN_STEPS:
        return None
    forward = np.asarray(parts)[steps, STEP_PARTS.index("forward")]
    medians = world.gather(float(np.median(forward)))
    return float((max(medians) - min(medians)) / np.mean(medians))


def disturbance(parts: Sequence[Sequence[float]], sizes: StepSizes, world: World) -> dict[str, float]:
    """Return `time_drift` and `rank_spread`, each where it can be told; every rank must call it."""
    found = {metrics.TIME_DRIFT: time_drift([sum(step) for step in parts], sizes), metrics.RANK_SPREAD: rank_spread(parts, world)}
    return {name: value for name, value in found.items() if value is not None}


def speed(
    parts: Sequence[Sequence[float]], sizes: StepSizes, world: World, flops: StepFlops, config: TrialConfig
) -> dict[str, float]:
    """Return the metrics that follow from step times and shapes; every rank must call it.

    No `mfu` and `hfu` where the device's peak is unknown, and no FLOPs where not all of them are counted. What is compiled takes its
    time once, whatever the pace is then.
    """
    seconds = [sum(step) for step in parts]
    total = train_seconds(seconds, sizes)
    compiling = compile_seconds(seconds, sizes, config)
    model, recomputed = (
        part.total(
            num_tokens=float(sizes.tokens.sum()),
            num_targets=float(sizes.targets.sum()),
            sum_of_squared_lengths=float(sizes.squared_lengths.sum()),
        )
        for part in (flops.model, flops.recomputed)
    )
    num_steps = len(sizes.rows)
    result = {
        metrics.TRAIN_SECONDS: total + compiling,
        metrics.DEVICE_SECONDS: (total + compiling) * world.world_size,
        metrics.STEP_SECONDS: total / num_steps,
        metrics.TOKENS_PER_SECOND: float(sizes.tokens.sum()) / total,
        metrics.SAMPLES_PER_SECOND: float(sizes.rows.sum()) / total,
        metrics.PADDING_FRACTION: 1 - float(sizes.tokens.sum() / sizes.padded_tokens.sum()),
    }
    if flops.is_whole:
        result[metrics.FLOPS_PER_STEP] = model / num_steps
    if compiling:
        result[metrics.COMPILE_SECONDS] = compiling
    result |= {metrics.PART_SECONDS[part]: mean for part, mean in mean_parts(parts).items()}
    result |= disturbance(parts, sizes, world)
    peak, _ = device_peak(world.device, config.recipe.precision)
    if peak is not None and flops.is_whole:
        result[metrics.MFU] = model / total / (peak * world.world_size)
        result[metrics.HFU] = (model + recomputed) / total / (peak * world.world_size)
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Attended:
    """One layer's attention."""

    keys: int
    """Width of a head's queries and keys."""
    values: int
    """Width of its values: another one where keys are compressed, as DeepSeek's are."""
    of_keys: int
    """Products forward and backward that are as wide as the keys."""
    of_values: int
    """Those that are as wide as the values."""
    keeps_scores: bool = False
    """Whether the backward pass has the scores of the forward pass: torch has no fused kernel for it."""

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Attended:
        of_keys, of_values = attention_products(query.requires_grad, key.requires_grad, value.requires_grad)
        keys, values = key.shape[-1], value.shape[-1]
        return cls(keys=keys, values=values, of_keys=of_keys, of_values=of_values, keeps_scores=keys != values and not key.is_cuda)

    @property
    def width(self) -> int:
        return self.keys * self.of_keys + self.values * self.of_values


class CountingPass(TorchFunctionMode):
    """Notes every matrix product that is computed inside it: its weights, where it is applied, and which gradients it needs.

    It sees the functions that are called, not the modules, so that routed experts and adapters of any kind are seen too.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        num_rows, self._num_positions = batch.num_rows, batch.input_ids.numel()
        # The head of a classifier is applied to every row, that of a language model to every target.
        self._num_targets = {num_rows, len(batch.targets)}
        self.linears: list[LinearUse] = []
        self.attention: list[Attended] = []
        """By layer."""
        self.num_entered = 0

    def __enter__(self) -> CountingPass:
        self.num_entered += 1
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func is adapted_product:  # whose products are all computed before recomputation ends with what it keeps
            x, weight, _, first, second, _ = args
            self._note(x, weight)
            self._note(x, first)
            self._note(x, second, input_needs_grad=True)
        # Recomputation ends with an exception inside the first product whose result nothing needs: that one is none.
        result = func(*args, **named)
        if func is functional.linear:
            self._note(args[0], args[1] if len(args) > 1 else named["weight"])
        elif func is quantized_product:
            self._note_product(args[0], args[1].in_features * args[1].out_features)
        elif func is rotate:
            self._note_product(args[0], args[1].numel(), weight_needs_grad=True)
        elif func is head_loss:
            self._note(args[0], args[1])
        elif func is torch.addmm:
            self._note(args[1], args[2])
        elif func in (functional.scaled_dot_product_attention, attention_by_rows):
            self.attention.append(Attended.of(*args[:3]))
        elif getattr(func, "__name__", "") == "matmul" and isinstance(args[1]._base, torch.nn.Parameter):  # Falcon's, by hand
            self._note(args[0], args[1])
        elif getattr(func, "__name__", "") == "_grouped_mm":  # `functional.grouped_mm` calls it and is not seen itself
            self._note(args[0], args[1], num_experts=args[1].shape[0])
        return result

    def _note(self, x: torch.Tensor, weight: torch.Tensor, num_experts: int = 1, *, input_needs_grad: bool | None = None) -> None:
        # An expert is a slice of a parameter, and may see as many tokens as there are targets; VeRA's factors are slices of buffers.
        is_whole = isinstance(weight, torch.nn.Parameter) or not isinstance(weight._base, torch.nn.Parameter)
        num_weights = weight.numel() // num_experts
        piece = piece_of(weight)
        if piece is not None:  # a matrix that is split over ranks is one product of the model
            num_weights *= piece.num_pieces
        self._note_product(
            x, num_weights, weight_needs_grad=weight.requires_grad, input_needs_grad=input_needs_grad, is_whole=is_whole
        )

    def _note_product(
        self,
        x: torch.Tensor,
        num_weights: int,
        *,
        input_needs_grad: bool | None = None,
        weight_needs_grad: bool = False,
        is_whole: bool = True,
    ) -> None:
        positions = x.numel() // x.shape[-1]
        # With one token per row the two are the same number, and the same FLOPs.
        is_elsewhere = positions != self._num_positions and is_whole
        per_target = is_elsewhere and positions in self._num_targets
        self.linears.append(
            LinearUse(
                num_weights=num_weights,
                per="target" if per_target else "token",
                input_needs_grad=x.requires_grad if input_needs_grad is None else input_needs_grad,
                weight_needs_grad=weight_needs_grad,
                share=1.0 if per_target else positions / self._num_positions,
            )
        )


class FlopWatch:
    """Counts the FLOPs of one micro batch: those of its forward pass and their gradients, and those that are computed again.

    Attention that is no `scaled_dot_product_attention` is taken from the model's shape, with every layer trained through.
    """

    def __init__(self, shape: ModelShape, num_before: int = 0) -> None:
        """Watch a model.

        Args:
            shape: its sizes.
            num_before: keys of a prefix.
        """
        self._shape, self._num_before = shape, num_before
        self._forward: CountingPass | None = None
        self._again: CountingPass | None = None

    def forward(self, batch: Batch) -> CountingPass:
        """Return what is to be entered around the forward pass."""
        self._forward, self._again = CountingPass(batch), CountingPass(batch)
        return self._forward

    def recomputation(self) -> AbstractContextManager[object]:
        """Return what is to be entered around the recomputation of a part of the forward pass that is under way."""
        return self._again or nullcontext()

    def flops(self) -> StepFlops:
        """Return what was seen, once the backward pass is over; nothing is watched after it."""
        forward, again = self._forward, self._again
        assert forward is not None
        assert again is not None
        self._forward = self._again = None
        width = self._shape.head_dim
        if forward.attention:
            # Fused attention keeps no scores: its backward pass computes them again.
            fused = [layer for layer in forward.attention if not layer.keeps_scores and layer.of_keys + layer.of_values > 2]
            width_again = sum(layer.keys + layer.values for layer in again.attention) + sum(layer.keys for layer in fused)
        else:
            width_again = 2 * width * again.num_entered
        of_keys, of_values = attention_products(True, True, True)
        written_out = Attended(keys=width, values=width, of_keys=of_keys, of_values=of_values)
        layers = forward.attention or [written_out] * self._shape.num_layers
        return StepFlops(
            model=training_flops(forward.linears, self._attention(sum(layer.width for layer in layers))),
            recomputed=recomputed_flops(again.linears, self._attention(width_again)),
            is_whole=self._shape.is_counted,
        )

    def _attention(self, width: int) -> AttentionUse:
        shape = self._shape
        return AttentionUse(width=width, num_heads=shape.num_heads, causal=shape.causal, num_before=self._num_before)


def details(world: World, config: TrialConfig, memory: MemoryMeter, flops: StepFlops) -> dict[str, Any]:
    """Return what a reader needs to trust the numbers; every rank calls it, and all get the same."""
    peak, source = device_peak(world.device, config.recipe.precision)
    measured = memory.measured()
    return {
        "process_map": world.gather(world.place(config.layout)),
        "peak_memory_bytes_by_rank": world.gather(memory.peak_bytes()),
        "memory_by_rank": world.gather(None if measured is None else measured.to_dict()),
        "mfu_convention": CONVENTION,
        "peak_flops_per_second": peak,
        "peak_source": source if flops.is_whole else UNCOUNTED,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }
