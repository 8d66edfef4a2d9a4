"""Times and memory from closed forms."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spaces.config import TrialConfig
from spaces.flops import StepFlops, TrainingFlops
from spaces.space import SpaceSpec
from trainables.batching import StepSizes
from trainables.device import _cpu_peak, device_peak, gemm_flops_per_second
from trainables.memory_meter import MemoryMeter
from trainables.mesh import World
from trainables.meter import UNCOUNTED, StepTimer, details, mean_parts, rank_spread, speed, time_drift, train_seconds

TRIAL = TrialConfig.from_params(SpaceSpec().first())


def sizes(padded: list[int]) -> StepSizes:
    array = np.array(padded)
    return StepSizes(
        rows=np.ones_like(array),
        tokens=array,
        targets=array,
        padded_tokens=array,
        squared_lengths=array.astype(float) ** 2,
        micro_targets=array,
        micro_batches=np.ones_like(array),
        micro_tokens=array,
        micro_rows=np.ones_like(array),
    )


def test_equal_steps_give_steps_times_the_median_step() -> None:
    seconds = [9.0, 9.0, 9.0, 1.0, 1.1, 0.9, 1.0, 1.0, 50.0, 1.0]  # warm-up, and one disturbed step
    assert train_seconds(seconds, sizes([8] * 10)) == pytest.approx(10.0)


def test_unequal_steps_give_their_exact_sum_where_time_goes_by_tokens() -> None:
    padded = [100, 700, 300, 50, 900, 400, 20, 800]
    assert train_seconds([p * 1e-3 for p in padded], sizes(padded)) == pytest.approx(sum(padded) * 1e-3)


def test_a_trial_that_is_not_done_is_extrapolated_to_all_its_steps() -> None:
    assert train_seconds([2.0, 2.0], sizes([8] * 10)) == pytest.approx(20.0)


def test_the_metrics_of_speed_are_sums_over_all_steps_by_the_time_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainables.meter.device_peak", lambda *_: (100.0, "made up"))
    rows, tokens, padded = np.array([2, 2, 1, 2]), np.array([10, 14, 3, 13]), np.array([12, 16, 4, 16])
    shapes = replace(sizes(list(padded)), rows=rows, tokens=tokens, targets=rows, squared_lengths=tokens**2.0)
    flops = StepFlops(
        model=TrainingFlops(per_token=6.0, per_target=2.0, per_squared_length=0.5),
        recomputed=TrainingFlops(per_token=2.0, per_target=0.0, per_squared_length=0.0),
    )
    parts = [[0.0, p / 80, p / 40, 0.0, p / 80] for p in padded]  # 20 padded tokens a second
    found = speed(parts, shapes, World.alone(), flops, TRIAL)
    seconds, model = (12 + 16 + 4 + 16) / 20, 6.0 * 40 + 2.0 * 7 + 0.5 * (100 + 196 + 9 + 169)
    assert found == pytest.approx(
        {
            "train_seconds": seconds,
            "device_seconds": seconds,
            "step_seconds": seconds / 4,
            "tokens_per_second": 40 / seconds,
            "samples_per_second": 7 / seconds,
            "padding_fraction": 1 - 40 / 48,
            "flops_per_step": model / 4,
            "mfu": model / seconds / 100.0,
            "hfu": (model + 2.0 * 40) / seconds / 100.0,
            # Of four steps the first two warm up.
            **{"data_seconds": 0.0, "forward_seconds": 0.125, "backward_seconds": 0.25, "optimizer_seconds": 0.125},
        }
    )
    two = replace(World.alone(), world_size=2)
    monkeypatch.setattr("trainables.meter.rank_spread", lambda *_: None)
    shared = speed(parts, shapes, two, flops, TRIAL)
    assert shared["device_seconds"] == pytest.approx(2 * seconds)
    assert shared["mfu"] == pytest.approx(found["mfu"] / 2)
    monkeypatch.setattr("trainables.meter.device_peak", lambda *_: (None, "unknown device X"))
    assert not {"mfu", "hfu"} & speed(parts, shapes, World.alone(), flops, TRIAL).keys()


def test_where_not_all_is_counted_there_are_no_flops_and_it_is_said_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainables.meter.device_peak", lambda *_: (100.0, "made up"))
    once = TrainingFlops(per_token=1.0, per_target=0.0, per_squared_length=0.0)
    for is_whole in (True, False):
        flops = StepFlops.from_dict(asdict(StepFlops(model=once, recomputed=once, is_whole=is_whole)))
        found = speed([[0.0, 1.0, 0.0, 0.0, 0.0]] * 4, sizes([8] * 4), World.alone(), flops, TRIAL)
        assert len({"flops_per_step", "mfu", "hfu"} & found.keys()) == (3 if is_whole else 0)
        memory = MemoryMeter(torch.device("cpu"), torch.nn.Linear(1, 1), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
        source = details(World.alone(), TRIAL, memory, flops)["peak_source"]
        assert source == ("made up" if is_whole else UNCOUNTED)


def test_what_is_compiled_takes_its_time_once_beside_the_steady_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainables.meter.rank_spread", lambda *_: None)
    compiled = replace(TRIAL, layout=replace(TRIAL.layout, compile="blocks"))
    parts = [[0.0, s, 0.0, 0.0, 0.0] for s in (float("nan"), 7.0, 2.0, 1.0, *[1.0] * 36)]
    once = TrainingFlops(per_token=1.0, per_target=0.0, per_squared_length=0.0)
    flops = StepFlops(model=once, recomputed=once)
    two = replace(World.alone(), world_size=2)
    for trial, compiling in ((TRIAL, 0.0), (compiled, 6.0 + 1.0)):
        found = speed(parts, sizes([8] * 50), two, flops, trial)
        assert found["train_seconds"] == pytest.approx(50 + compiling)
        assert found["device_seconds"] == pytest.approx(2 * (50 + compiling))
        assert found["step_seconds"] == pytest.approx(1.0)
        assert found["tokens_per_second"] == pytest.approx(8.0)
        assert found.get("compile_seconds", 0.0) == pytest.approx(compiling)


def test_a_timer_goes_on_from_a_checkpoint() -> None:
    timer = StepTimer(torch.device("cpu"), [[0.1, 0.5, 0.8, 0.0, 0.1]])
    with timer.step() as mark:
        for part in ("data", "forward", "backward", "forward", "backward", "optimizer"):
            mark(part)
    first, second = timer.parts()
    assert first == [0.1, 0.5, 0.8, 0.0, 0.1]
    assert timer.parts() == [first, second]
    assert len(second) == len(first)


def test_the_parts_of_a_step_are_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 6.0, 7.0, 11.0, 11.5])
    monkeypatch.setattr("trainables.meter.time.perf_counter", lambda: next(clock))
    timer = StepTimer(torch.device("cpu"), [])
    with timer.step() as mark:
        for part in ("data", "forward", "backward", "forward", "backward", "optimizer"):
            mark(part)
    assert timer.parts() == [[1.0, 2.0 + 1.0, 3.0 + 4.0, 0.0, 0.5]]


def test_what_the_computation_waits_for_is_in_no_other_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("trainables.meter.time.perf_counter", lambda: now[0])
    timer = StepTimer(torch.device("cpu"), [])

    def takes(seconds: float) -> None:
        now[0] += seconds

    with timer.step() as mark:
        mark("data")
        takes(2.0)
        timer.begin_exchange()
        takes(0.5)
        timer.end_exchange()
        takes(1.0)
        mark("forward")
        takes(4.0)
        timer.begin_exchange()
        takes(0.25)
        timer.end_exchange()
        timer.end_exchange()  # the second says nothing
        mark("backward")
        mark("optimizer")
    timer.begin_exchange()  # an evaluation between steps
    takes(9.0)
    timer.end_exchange()
    with timer.step(is_disturbed=True) as mark:
        takes(7.0)
        mark("optimizer")
    assert timer.parts()[0] == [0.0, 3.0, 4.0, 0.75, 0.0]
    assert np.isnan(timer.parts()[1]).all()
    assert mean_parts(timer.parts()) == {"data": 0.0, "forward": 3.0, "backward": 4.0, "communication": 0.75, "optimizer": 0.0}
    assert "communication" not in mean_parts([[0.0, 3.0, 4.0, 0.0, 0.0]])


def test_a_trial_that_was_disturbed_shows_it() -> None:
    padded = np.random.default_rng(0).integers(100, 900, size=60)
    quiet = [p * 1e-3 for p in padded]
    assert time_drift(quiet, sizes(list(padded))) == pytest.approx(0, abs=1e-6)
    disturbed = [s * (2 if step > 40 else 1) for step, s in enumerate(quiet)]
    assert time_drift(disturbed, sizes(list(padded))) == pytest.approx((2 - 1) / 1.25, rel=0.2)
    single = [s * (9 if step == 30 else 1) for step, s in enumerate(quiet)]
    assert time_drift(single, sizes(list(padded))) == pytest.approx(0, abs=1e-6)
    assert time_drift(quiet[:12], sizes(list(padded))) is None


def test_the_peak_of_memory_is_that_since_the_reset() -> None:
    device = torch.device("cpu")
    before = torch.ones(80_000_000)  # 320 MB
    del before
    module = torch.nn.Linear(1, 1)
    meter = MemoryMeter(device, module, torch.optim.AdamW(module.parameters()))
    low = meter.peak_bytes()
    held = torch.ones(60_000_000)  # 240 MB
    del held
    assert 200e6 < meter.peak_bytes() - low < 300e6


def test_a_cpu_is_measured_at_the_precision_of_the_trial_and_never_below_fp32() -> None:
    fp32, source = device_peak(torch.device("cpu"), "fp32")
    bf16, _ = device_peak(torch.device("cpu"), "bf16")
    assert source == "measured_gemm"
    assert fp32 is not None
    assert bf16 is not None
    assert fp32 > 1e8
    assert bf16 > 0.5 * fp32  # measured anew, so only nearly equal


def test_what_other_processes_take_from_a_core_does_not_lower_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product has its core for 10 ms of the 300 that go by."""
    cpu_seconds = [0.0]
    clocks = SimpleNamespace(process_time=lambda: cpu_seconds[0], perf_counter=lambda: 30 * cpu_seconds[0])
    monkeypatch.setattr("trainables.device.time", clocks)
    monkeypatch.setattr(torch, "mm", lambda a, b: cpu_seconds.__setitem__(0, cpu_seconds[0] + 0.01))
    assert gemm_flops_per_second("fp32", 1) == pytest.approx(2 * 1024**3 / 0.01)
    assert gemm_flops_per_second("fp32", 2) == pytest.approx(2 * 1024**3 / 0.005), "the process's seconds are those of both threads"


def test_the_best_peak_that_was_seen_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "paretune/cpu_peaks.json"
    seen = []
    for measured in (5e10, 7e10, 6e10):
        monkeypatch.setattr("trainables.device.gemm_flops_per_second", lambda *_, m=measured: m)
        seen.append(_cpu_peak.__wrapped__("fp32", 1))
    assert seen == [5e10, 7e10, 7e10]
    assert list(json.loads(file.read_text()).values()) == [7e10]
    assert _cpu_peak.__wrapped__("bf16", 1) == 6e10, "another precision is another peak"
    file.write_text("{damaged")
    assert _cpu_peak.__wrapped__("fp32", 1) == 6e10
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("no directory")
    assert _cpu_peak.__wrapped__("fp32", 1) == 6e10


def test_ranks_are_compared_by_the_medians_of_enough_steps() -> None:
    class TwoRanks:
        world_size = 2

        def gather(self, value: float) -> list[float]:
            return [value, 1.5 * value]

    def parts(num_steps: int) -> list[list[float]]:
        return [[0.0, 1.0, 2.0, 0.0, 0.1]] * num_steps

    assert rank_spread(parts(20), TwoRanks()) == pytest.approx(0.4)  # type: ignore[arg-type]
    assert rank_spread(parts(7), TwoRanks()) is None  # type: ignore[arg-type]
    assert rank_spread(parts(20), World.alone()) is None
