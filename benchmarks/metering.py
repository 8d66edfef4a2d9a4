"""How right the meters are: model FLOPs against torch's own counter, memory against the tensors that live, time against the clock.

Run `python benchmarks/metering.py --results benchmarks/results/metering.json` in the project's environment. Every case is a small
random model. The reference of the FLOPs is `torch.utils.flop_counter.FlopCounterMode` around one real forward and backward pass with
the mathematical attention kernel (the default one of the CPU is not in its table). Both counts of paretune are compared: the one
that is seen in a forward pass, which a search reports, and the one from `config.json` alone. The reference of the memory is the
largest sum of all tensors' storages, followed through every operation of two steps. The times are of the embedded model on the
embedded data: 30 steps of every trial are profiled, then all trials are trained whole, each alone on the machine; the reference is
the sum of the seconds of all steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import distributed  # noqa: E402
from families import NUM_LABELS, SOME_TARGETS, batch_of, config_of, make  # noqa: E402
from heading import heading  # noqa: E402
from memory_grid import ALONE, SHARDED, SPLIT, error, peaks_of  # noqa: E402
from time_grid import ALONE as TIMED_ALONE  # noqa: E402
from time_grid import ON_TWO as TIMED_ON_TWO  # noqa: E402
from time_grid import predicted_and_measured  # noqa: E402

from spaces.architecture import ModelShape  # noqa: E402
from spaces.blueprint import FAMILIES, blueprint  # noqa: E402
from spaces.config import Recipe  # noqa: E402
from spaces.flops import TrainingFlops, flops_of_blueprint  # noqa: E402
from trainables.adapters import add_lora  # noqa: E402
from trainables.evaluation import summed_loss  # noqa: E402
from trainables.mesh import World  # noqa: E402
from trainables.meter import FlopWatch  # noqa: E402

ENCODERS = {"bert", "roberta", "xlm-roberta", "distilbert"}
STACKED = {"mixtral", "qwen3_moe"}
BATCHES = {"equal": [32, 32, 32, 32], "ragged": [32, 21, 9, 4]}


def recipe(targets: tuple[str, ...] | None) -> Recipe:
    return Recipe(
        learning_rate=1e-3,
        global_batch_size=4,
        dataset_fraction=1.0,
        epochs=1.0,
        warmup_fraction=0.0,
        weight_decay=0.0,
        precision="fp32",
        seed=0,
        adapter="lora" if targets else "none",
        adapter_rank=8 if targets else None,
        adapter_alpha=16.0 if targets else None,
        adapter_target_modules=targets,
    )


def cases() -> Iterator[tuple[str, str, tuple[str, ...] | None, str]]:
    """Yield family, name of the adapter, its targets and the name of the batch."""
    for family in FAMILIES:
        targets = {"full": None, "all-linear": ("all-linear",), "some": SOME_TARGETS.get(family, ("q_proj", "v_proj"))}
        for name, modules in targets.items():
            # Around stacked experts PEFT multiplies out its two matrices: an overhead that is no model FLOP.
            if not (family in STACKED and name == "all-linear"):
                for batch in BATCHES:
                    yield family, name, modules, batch


def measure(family: str, targets: tuple[str, ...] | None, lengths: list[int]) -> tuple[float, float, float]:
    """Return the FLOPs of one step by torch's counter, by the counting pass and by the blueprint."""
    task = "sequence-classification" if family in ENCODERS else "causal-lm"
    module: Any = make(family, task)
    if family in STACKED:
        module.set_experts_implementation("eager")  # the counter does not know grouped products
    config, trial = config_of(module), recipe(targets)
    plan = blueprint(config, task, NUM_LABELS)
    if targets:
        module = add_lora(module, trial, task, ())
    theirs, seen = 0.0, None
    for length in lengths:  # each row alone: what padding would add is no model FLOP
        flops, seen = one_row(module, config, task, length)
        theirs += flops
    assert seen is not None
    return theirs, total(seen, lengths, plan.shape.causal), total(flops_of_blueprint(plan, trial), lengths, plan.shape.causal)


def one_row(module: Any, config: dict[str, Any], task: str, length: int) -> tuple[float, TrainingFlops]:
    batch = batch_of(task, torch.randint(3, 97, (1, length)))
    watch = FlopWatch(ModelShape.from_config(config))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        with watch.forward(batch):
            loss, _ = summed_loss(module, batch, task)
        loss.backward()
    return float(counter.get_total_flops()), watch.flops().model


def total(flops: TrainingFlops, lengths: list[int], causal: bool) -> float:
    """Return FLOPs in torch's convention, which does not halve causal attention."""
    squares = sum(n**2 for n in lengths) * (2 if causal else 1)
    return flops.total(
        num_tokens=sum(lengths), num_targets=sum(n - 1 for n in lengths) if causal else len(lengths), sum_of_squared_lengths=squares
    )


def memory_rows() -> list[dict[str, Any]]:
    """Return measured and predicted peaks, on one rank, and with FSDP2 and tensor parallelism on two."""
    rows = []
    for num_ranks, strategy, cases in ((1, "ddp", ALONE), (2, "fsdp", SHARDED), (2, "tp", SPLIT)):
        measured_peaks = (
            peaks_of(World.alone(), cases, strategy) if num_ranks == 1 else distributed.run(2, peaks_of, cases, strategy)[0]
        )
        for case, (peak, _) in zip(cases, measured_peaks, strict=True):
            off = error(case, num_ranks, peak, strategy)
            what = {k: v for k, v in asdict(case).items() if k != "changes"} | dict(case.changes)
            rows.append({"num_ranks": num_ranks, "strategy": strategy, **what, "peak_bytes": peak, "error": off})
            shape = f"{case.rows:2} x {case.length} {case.precision} recomputation {case.recomputation} on {num_ranks} ({strategy})"
            print(f"{case.family:11} {case.adapter:10} {shape}: {peak:10,} bytes  {off:+.1%}")
    return rows


def time_rows() -> list[dict[str, Any]]:
    """Return the predicted and the measured seconds of trials on one rank and on two."""
    rows = []
    results = {1: predicted_and_measured(World.alone(), TIMED_ALONE), 2: distributed.run(2, predicted_and_measured, TIMED_ON_TWO)[0]}
    for num_ranks, cases in ((1, TIMED_ALONE), (2, TIMED_ON_TWO)):
        for case, seconds in zip(cases, results[num_ranks], strict=True):
            off = seconds["predicted_seconds"] / seconds["measured_seconds"] - 1
            knobs = " ".join(f"{k}={v}" for k, v in case.params if k != "world_size")
            rows.append({"num_ranks": num_ranks, "max_length": case.max_length, **dict(case.params), **seconds, "error": off})
            print(f"{num_ranks} x {case.max_length} {knobs}: {seconds['measured_seconds']:.2f} s measured, {off:+.1%} predicted")
    return rows


def spread(errors: list[float]) -> dict[str, float]:
    """Return how large errors are, without their sign."""
    sizes = [abs(e) for e in errors]
    return {"cases": len(sizes), "median": statistics.median(sizes), "worst": max(sizes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, help="where the results are written as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for family, adapter, targets, batch in cases():
        theirs, seen, planned = measure(family, targets, BATCHES[batch])
        rows.append(
            {
                "family": family,
                "adapter": adapter,
                "batch": batch,
                "flops": theirs,
                "error_seen": seen / theirs - 1,
                "error_planned": planned / theirs - 1,
            }
        )
        print(
            f"{family:11} {adapter:10} {batch:6} {theirs:12.4g}  {seen / theirs - 1:+.3%} seen  {planned / theirs - 1:+.3%} planned"
        )
    memory, times = memory_rows(), time_rows()
    time_errors = [row["error"] for row in times]
    summary = {
        "flops_seen": spread([row["error_seen"] for row in rows]),
        "flops_planned": spread([row["error_planned"] for row in rows]),
        **{
            f"memory_on_{ranks}_{strategy}": spread([row["error"] for row in memory if row["strategy"] == strategy])
            for ranks, strategy in sorted({(row["num_ranks"], row["strategy"]) for row in memory})
        },
        "time": {**spread(time_errors), "share_within_10_percent": sum(abs(e) <= 0.1 for e in time_errors) / len(time_errors)},
        "time_reported": spread([row["reported_seconds"] / row["measured_seconds"] - 1 for row in times]),
    }
    result = {
        **heading(
            "python benchmarks/metering.py --results benchmarks/results/metering.json",
            "one thread of a CPU, no GPU",
            ("torch", "transformers", "peft", "bitsandbytes"),
        ),
        "absolute_error": summary,
        "flops": rows,
        "memory": memory,
        "time": times,
    }
    print(json.dumps({k: v for k, v in result.items() if k not in ("flops", "memory", "time")}, indent=2))
    if arguments.results:
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
