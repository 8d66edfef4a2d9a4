"""What a rank's device can do: its peak FLOP/s, its memory and its bandwidth, from its data sheet or measured."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from spaces.config import Precision
from spaces.hardware import device_of_cuda_name, peak_flops_per_second, why_no_peak
from trainables.mesh import World

# Far beyond any cache; eight passes take a tenth of a second.
COPIED_BYTES, NUM_COPIES = 2**28, 8


def examine(world: World, precisions: Iterable[Precision]) -> dict[str, Any]:
    """Return what predictions at these precisions need to know of this rank's device, in plain values.

    `peak_flops_per_second` by precision and `bytes_per_second` of its memory are absent where the data sheet is not known.
    `memory_bytes` is a GPU's; `process_bytes` is what this process holds of the host's before it trains anything.
    """
    peaks = {precision: device_peak(world.device, precision)[0] for precision in precisions}
    facts: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
        "peak_flops_per_second": {precision: peak for precision, peak in peaks.items() if peak is not None},
    }
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
        sheet = device_of_cuda_name(name)
        known = {} if sheet is None else {"bytes_per_second": sheet.gigabytes_per_second * 1e9}
        if sheet is not None:
            known["link_bytes_per_second"] = sheet.link_bytes_per_second
        total = torch.cuda.get_device_properties(world.device).total_memory
        return {**facts, **known, **_process(), "type": "cuda", "name": name, "memory_bytes": total}
    copied = copied_bytes_per_second()
    # Ranks of one machine hand each other bytes through its memory.
    return {
        **facts,
        "type": "cpu",
        "name": cpu_name(),
        "bytes_per_second": copied,
        "link_bytes_per_second": copied / 2,
        **_process(),
    }


def _process() -> dict[str, int]:
    return {"process_bytes": psutil.Process().memory_info().rss}


def cache_directory() -> Path:
    """Return where what was measured on this machine is kept for later."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "paretune"


def package_versions() -> dict[str, str]:
    """Return the versions that the numbers and the speed of a trial depend on."""
    return {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")} | {"python": platform.python_version()}


def copied_bytes_per_second() -> float:
    """Return the best rate, read and written, of copies beyond the caches, by the seconds that the threads had on their cores."""
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(NUM_COPIES):
        started = time.process_time()
        target.copy_(source)
        best = min(best, (time.process_time() - started) / torch.get_num_threads())
    return 2 * COPIED_BYTES / best


def device_peak(device: torch.device, precision: str) -> tuple[float | None, str]:
    """Return a device's peak FLOP/s at a precision and where the number is from, or why there is none."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = peak_flops_per_second(name, precision)
        return peak, "data_sheet" if peak else why_no_peak(name, precision)
    return _cpu_peak(precision, torch.get_num_threads()), "measured_gemm"


@cache
def _cpu_peak(precision: str, threads: int) -> float:
    """Return the best FLOP/s that any process of this user has measured here: cores that are busy get in each other's way.

    The first job of a search measures before anything trains. The file is in the user's cache directory; without one that can be
    written to, the measurement of this process counts.
    """
    path = cache_directory() / "cpu_peaks.json"
    key = f"{cpu_name()}, torch {version('torch')}, {precision}, {threads} threads"
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


def cpu_name() -> str:
    """Return what the processor calls itself."""
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
