"""How right the meters are: model FLOPs against torch's own counter, memory against the tensors that live, time against the clock.

Run `python benchmarks/metering.py --results benchmarks/results/metering.json` in the project's environment. Every case is a small
random model. The reference of the FLOPs is `torch.utils.flop_counter.FlopCounterMode` around one real forward and backward pass, of
model FLOPs with the mathematical attention kernel, which computes nothing twice, of hardware FLOPs with recomputation and the kernel
that training takes. Both counts of paretune are compared: the one that is seen in a pass, which a search reports, and the one from
`config.json` alone. The reference of the memory is the
largest sum of all tensors' storages, followed through every operation of two steps. The times are of the embedded model on the
embedded data: 30 steps of every trial are profiled, then all trials are trained whole, each alone on the machine; the reference is
the sum of the seconds of all steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import distributed  # noqa: E402
from flop_grid import CASES, counted, make_batch, make_model, targets_of, total, trial  # noqa: E402
from heading import heading  # noqa: E402
from memory_grid import ALONE, REPLICATED, SHARDED, SPLIT, error, peaks_of  # noqa: E402
from time_grid import ALONE as TIMED_ALONE  # noqa: E402
from time_grid import ON_TWO as TIMED_ON_TWO  # noqa: E402
from time_grid import predicted_and_measured  # noqa: E402

from spaces.flops import StepFlops, flops_of_blueprint, recomputed_flops_of_blueprint  # noqa: E402
from trainables.mesh import World  # noqa: E402

FLOP_ERRORS = [f"error_{kind}_{source}" for kind in ("model", "hardware") for source in ("seen", "planned")]
# Lengths of the rows whose FLOPs torch counts pass by pass, and of all of them as they are counted.
LENGTHS = [32, 21, 9, 4]
BATCHES = {
    "equal": ([[32] * 4], [32] * 4),
    # What pads would add is no model FLOP: each row alone.
    "ragged": ([[n] for n in LENGTHS], LENGTHS),
    # Torch computes pads like any token: as many tokens as the batch has places.
    "padded": ([LENGTHS], [32] * 4),
}


def flop_row(family: str, task: str, adapter: str, name: str) -> dict[str, Any]:
    """Return the FLOPs of one batch by torch's counter, and the errors of the counting pass and of the blueprint.

    The hardware FLOPs are those with recomputation. What is seen is seen in one pass over the whole batch, with its pads.
    """
    passes, lengths = BATCHES[name]
    row: dict[str, Any] = {"family": family, "task": task, "adapter": adapter, "batch": name}
    whole = make_batch(task, [n for rows in passes for n in rows])
    for kind, recomputation in (("model", "none"), ("hardware", "full")):
        is_hardware = kind == "hardware"
        config = trial(targets_of(family, adapter), recomputation)
        theirs = 0.0
        for rows in passes:
            theirs += counted(make_model(family, task)[0], task, make_batch(task, rows), config, is_hardware=is_hardware)[0]
        module, plan = make_model(family, task)
        _, seen = counted(module, task, whole, config, is_hardware=is_hardware)
        planned = StepFlops(model=flops_of_blueprint(plan, config.recipe), recomputed=recomputed_flops_of_blueprint(plan, config))
        row[f"{kind}_flops"] = theirs
        for source, flops in (("seen", seen), ("planned", planned)):
            parts = (flops.model, flops.recomputed) if is_hardware else (flops.model,)
            ours = sum(total(part, lengths, family, len(whole.targets)) for part in parts)
            row[f"error_{kind}_{source}"] = ours / theirs - 1
    return row


def flop_rows() -> list[dict[str, Any]]:
    """Return the FLOPs of every family, task, adapter and kind of batch."""
    rows = [flop_row(*case, name) for case in CASES for name in BATCHES]
    for row in rows:
        errors = "  ".join(f"{row[key]:+.3%} {key.removeprefix('error_')}" for key in FLOP_ERRORS)
        print(f"{row['family']:11} {row['task']:23} {row['adapter']:10} {row['batch']:6} {row['model_flops']:12.4g}  {errors}")
    return rows


def memory_rows() -> list[dict[str, Any]]:
    """Return measured and predicted peaks, on one rank, and with DDP, FSDP2 and tensor parallelism on two."""
    rows = []
    for num_ranks, strategy, cases in ((1, "ddp", ALONE), (2, "ddp", REPLICATED), (2, "fsdp", SHARDED), (2, "tp", SPLIT)):
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
    rows = flop_rows()
    memory, times = memory_rows(), time_rows()
    time_errors = [row["error"] for row in times]
    summary = {
        **{key.replace("error", "flops"): spread([row[key] for row in rows]) for key in FLOP_ERRORS},
        **{
            f"memory_on_{ranks}_{strategy}": spread(
                [row["error"] for row in memory if (row["num_ranks"], row["strategy"]) == (ranks, strategy)]
            )
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
