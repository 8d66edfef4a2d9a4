"""What a trial costs: step times, tokens per second, MFU and memory, of its own steady state."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spaces import metrics
from spaces.architecture import ModelShape
from spaces.flops import CONVENTION, AttentionUse, LinearUse, StepFlops, attention_products, recomputed_flops, training_flops
from spaces.hardware import peak_flops_per_second
from trainables.batching import Batch, StepSizes
from trainables.mesh import World

# Steps until caches, allocator and clocks have settled: a tenth of the trial, at least three where there are enough.
WARMUP_SHARE, WARMUP_STEPS = 0.1, 3
STEP_PARTS = tuple(metrics.PART_SECONDS)
# Five steady steps a quarter: the median of fewer is that of single steps.
DRIFT_STEPS = 20


class StepTimer:
    """Seconds of every optimizer step, by part; on a GPU by events, so that timing never waits for the device."""

    def __init__(self, device: torch.device, parts: Sequence[Sequence[float]]) -> None:
        self._cuda = device.type == "cuda"
        self._parts = [list(step) for step in parts]
        self._marks: list[list[tuple[int, Any]]] = []

    @contextmanager
    def step(self) -> Iterator[Callable[[str], None]]:
        """Time one step; what it gives books the time since it was last called on one of `STEP_PARTS`."""
        marks = [(-1, self._now())]
        yield lambda part: marks.append((STEP_PARTS.index(part), self._now()))
        self._marks.append(marks)

    def parts(self) -> list[list[float]]:
        """Return the seconds of all steps so far, by part."""
        if self._marks and self._cuda:
            torch.cuda.synchronize()
        for marks in self._marks:
            seconds = [0.0] * len(STEP_PARTS)
            for (_, begin), (part, end) in pairwise(marks):
                seconds[part] += begin.elapsed_time(end) / 1000 if self._cuda else end - begin
            self._parts.append(seconds)
        self._marks.clear()
        return [list(step) for step in self._parts]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def train_seconds(seconds: list[float], sizes: StepSizes) -> float:
    """Return the time of all steps of the trial at its steady pace.

    The median over the steady steps of seconds per padded token, times all padded tokens: where batches have unequal lengths
    this is the robust form of steps times median step time, and equal to it where they are alike.
    """
    return float(np.median(_steady_pace(seconds, sizes)) * sizes.padded_tokens.sum())


def _num_warmup(num_done: int) -> int:
    return min(max(WARMUP_STEPS, round(WARMUP_SHARE * num_done)), num_done // 2)


def _steady_pace(seconds: Sequence[float], sizes: StepSizes) -> np.ndarray:
    """Return the seconds per padded token of every step after the warm-up."""
    skipped = _num_warmup(len(seconds))
    return np.asarray(seconds)[skipped:] / sizes.padded_tokens[skipped : len(seconds)]


def time_drift(seconds: Sequence[float], sizes: StepSizes) -> float | None:
    """Return how much the pace changed while the trial ran: the range of its quarters' medians over their mean.

    None for a trial with fewer than `DRIFT_STEPS` steady steps, whose quarters say nothing.
    """
    pace = _steady_pace(seconds, sizes)
    if len(pace) < DRIFT_STEPS:
        return None
    medians = [float(np.median(quarter)) for quarter in np.array_split(pace, 4)]
    return (max(medians) - min(medians)) / float(np.mean(medians))


def rank_spread(parts: Sequence[Sequence[float]], world: World) -> float | None:
    """Return how much slower the slowest rank is: the range of the ranks' median forward seconds over their mean.

    The forward pass is what a rank does before it waits for others. None at world size 1; every rank must call it.
    """
    if world.world_size == 1:
        return None
    forward = np.asarray(parts)[_num_warmup(len(parts)) :, STEP_PARTS.index("forward")]
    medians = world.gather(float(np.median(forward)))
    return float((max(medians) - min(medians)) / np.mean(medians))


def speed(parts: Sequence[Sequence[float]], sizes: StepSizes, world: World, flops: StepFlops, precision: str) -> dict[str, float]:
    """Return the metrics that follow from step times and shapes; every rank must call it.

    No `mfu` and `hfu` where the device's peak is unknown.
    """
    seconds = [sum(step) for step in parts]
    total = train_seconds(seconds, sizes)
    model, recomputed = (
        part.total(
            num_tokens=float(sizes.tokens.sum()),
            num_rows=float(sizes.rows.sum()),
            sum_of_squared_lengths=float(sizes.squared_lengths.sum()),
        )
        for part in (flops.model, flops.recomputed)
    )
    num_steps = len(sizes.rows)
    result = {
        metrics.TRAIN_SECONDS: total,
        metrics.DEVICE_SECONDS: total * world.world_size,
        metrics.STEP_SECONDS: total / num_steps,
        metrics.TOKENS_PER_SECOND: float(sizes.tokens.sum()) / total,
        metrics.SAMPLES_PER_SECOND: float(sizes.rows.sum()) / total,
        metrics.PADDING_FRACTION: 1 - float(sizes.tokens.sum() / sizes.padded_tokens.sum()),
        metrics.FLOPS_PER_STEP: model / num_steps,
    }
    steady = np.asarray(parts)[_num_warmup(len(parts)) :].mean(axis=0)
    result |= {metrics.PART_SECONDS[part]: float(mean) for part, mean in zip(STEP_PARTS, steady, strict=True)}
    spreads = {metrics.TIME_DRIFT: time_drift(seconds, sizes), metrics.RANK_SPREAD: rank_spread(parts, world)}
    result |= {name: spread for name, spread in spreads.items() if spread is not None}
    peak, _ = device_peak(world.device, precision)
    if peak is not None:
        result[metrics.MFU] = model / total / (peak * world.world_size)
        result[metrics.HFU] = (model + recomputed) / total / (peak * world.world_size)
    return result


def device_peak(device: torch.device, precision: str) -> tuple[float | None, str]:
    """Return a device's peak FLOP/s at a precision and where the number is from."""
    if device.type == "cuda":
        peak = peak_flops_per_second(torch.cuda.get_device_name(device), precision)
        return peak, "data_sheet" if peak else f"unknown device {torch.cuda.get_device_name(device)}"
    return _cpu_peak(precision, torch.get_num_threads()), "measured_gemm"


@cache
def _cpu_peak(precision: str, threads: int) -> float:
    """Return the best FLOP/s that any process of this user has measured here: cores that are busy get in each other's way.

    The first job of a search measures while nothing else runs. The file is in the user's cache directory; without one that can be
    written to, the measurement of this process counts.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "paretune" / "cpu_peaks.json"
    key = f"{_cpu_name()}, torch {version('torch')}, {precision}, {threads} threads"
    peaks: dict[str, float] = {}
    with suppress(OSError, ValueError):
        peaks = json.loads(path.read_text())
    best = max(gemm_flops_per_second(precision, threads), float(peaks.get(key, 0.0)))
    if best > peaks.get(key, 0.0):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps({**peaks, key: best}, indent=1))
            fresh.replace(path)
    return best


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gemm_flops_per_second(precision: str, threads: int) -> float:
    """Return the best FLOP/s of nine products of 1024 x 1024 matrices; a CPU's data sheet says nothing that holds.

    Seconds are those that the threads had on their cores: other workers start while this one measures, and what they take
    must not lower the peak. A CPU without bf16 instructions emulates them, slower than its fp32: what it can do is then the
    fp32 product.
    """
    dtypes = (torch.float32, torch.bfloat16) if precision == "bf16" else (torch.float32,)
    size = 1024
    best = float("inf")
    for dtype in dtypes:
        a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
        for _ in range(9):
            started = time.process_time()
            torch.mm(a, b)
            seconds = (time.process_time() - started) / threads
            if seconds > 5 * best:
                break  # emulated: eight more would take seconds and change nothing
            best = min(best, seconds)
    return 2 * size**3 / best


class CountingPass(TorchFunctionMode):
    """Notes every matrix product that is computed inside it: its weights, where it is applied, and which gradients it needs.

    It sees the functions that are called, not the modules, so that routed experts and adapters of any kind are seen too.
    """

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self._num_rows, self._length = batch.input_ids.shape
        self.linears: list[LinearUse] = []
        self.attention: list[int] = []
        """Of every call of `scaled_dot_product_attention`, the products forward and backward."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        # Recomputation ends with an exception inside the first product whose result nothing needs: that one is none.
        result = func(*args, **named)
        if func is functional.linear:
            self._note(args[0], args[1] if len(args) > 1 else named["weight"])
        elif func is torch.addmm:
            self._note(args[1], args[2])
        elif func is functional.scaled_dot_product_attention:
            self.attention.append(attention_products(*(x.requires_grad for x in args[:3])))
        elif getattr(func, "__name__", "") == "_grouped_mm":  # `functional.grouped_mm` calls it and is not seen itself
            self._note(args[0], args[1], num_experts=args[1].shape[0])
        return result

    def _note(self, x: torch.Tensor, weight: torch.Tensor, num_experts: int = 1) -> None:
        positions = x.numel() // x.shape[-1]
        # With one token per row the two are the same number, and the same FLOPs. An expert is a slice of a parameter; it may
        # see as many tokens as there are rows.
        per_row = positions == self._num_rows and self._length > 1 and isinstance(weight, torch.nn.Parameter)
        self.linears.append(
            LinearUse(
                num_weights=weight.numel() // num_experts,
                per="row" if per_row else "token",
                input_needs_grad=x.requires_grad,
                weight_needs_grad=weight.requires_grad,
                share=1.0 if per_row else positions / (self._num_rows * self._length),
            )
        )


class FlopWatch:
    """Counts the FLOPs of one micro batch: those of its forward pass and their gradients, and those that are computed again.

    Attention that is no `scaled_dot_product_attention` is taken from the model's shape, with every layer trained through.
    """

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
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
        if forward.attention:
            # Fused attention keeps no scores: its backward pass computes one of the two products of the forward pass again.
            products_again = 2 * len(again.attention) + sum(products > 2 for products in forward.attention)
        else:
            products_again = 2 * self._shape.num_layers if again.linears else 0
        layers = forward.attention or [attention_products(True, True, True)] * self._shape.num_layers
        return StepFlops(
            model=training_flops(forward.linears, self._attention(sum(layers))),
            recomputed=recomputed_flops(again.linears, self._attention(products_again)),
        )

    def _attention(self, num_products: int) -> AttentionUse:
        return AttentionUse(
            num_products=num_products,
            num_heads=self._shape.num_heads,
            head_dim=self._shape.head_dim,
            causal=self._shape.causal,
        )


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure the peak anew: the worker has trained other trials before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (control := Path("/proc/self/clear_refs")).exists():
        control.write_text("5")


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak since the reset: of the allocator on a GPU, of the resident set on a CPU.

    Without Linux's high-water mark, the resident set of now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def details(world: World, precision: str) -> dict[str, Any]:
    """Return what a reader needs to trust the numbers; every rank calls it, and all get the same."""
    peak, source = device_peak(world.device, precision)
    ranks = world.gather({**world.place(), "peak_memory_bytes": peak_memory_bytes(world.device)})
    return {
        "process_map": [{k: v for k, v in rank.items() if k != "peak_memory_bytes"} for rank in ranks],
        "peak_memory_bytes_by_rank": [rank["peak_memory_bytes"] for rank in ranks],
        "mfu_convention": CONVENTION,
        "peak_flops_per_second": peak,
        "peak_source": source,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")} | {"python": platform.python_version()},
    }
