"""Whether a search finds more in the same time when the sampler guesses each recipe's layout, or when every layout is measured.

On a machine that does nothing else:

    python benchmarks/layouts.py --data banking77/train.csv --out runs.jsonl --results benchmarks/results/layouts.json

Each run is a search in a process of its own, from its start on, on the task of `time_to_front.py`: MiniLM, 16 rows of each of 77
intents, LoRA or full, two cores. The layout is a knob as in the examples, world sizes 1 and 2 and ddp or fsdp: as `choice`, where a
proposal has one layout, or as `profile`, where each recipe is trained once and its other layouts are timed for some steps. A front is
by the times that the search saw; its hypervolume is over accuracy from 0 and the logarithm of seconds up to 120. Runs that are in the
file are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import task  # noqa: E402
from benchmarks.contenders.process import watched  # noqa: E402
from benchmarks.front_times import at, growth, ratios  # noqa: E402
from benchmarks.heading import heading  # noqa: E402
from benchmarks.time_to_front import ROWS_PER_CLASS, append, read_rows  # noqa: E402

KINDS = ("choice", "profile")


def search(told: Path) -> None:
    """Run a search as it is told, and write each trial as it ends; this is what the process of a run does."""
    from search.session import start
    from spaces.loading import load_spec

    run = json.loads(told.read_text())
    finished: list[dict[str, Any]] = []

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "trial_finished" and event["state"] == "COMPLETE":
            values = {name: event["values"][name] for name in ("accuracy", "train_seconds")}
            finished.append({"seconds": time.time() - run["started"], **values})
            Path(run["rows"]).write_text(json.dumps(finished))

    start(load_spec(Path(run["spec"])), emit)


def run_one(kind: str, seed: int, minutes: float, data: Path) -> dict[str, Any]:
    """Return what a search found.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory(prefix=f"layouts-{kind}-") as scratch:
        rows, told, path, log = (Path(scratch) / name for name in ("rows.json", "run.json", "spec.yaml", "log.txt"))
        spec = {
            "name": kind,
            "model": task.MODEL,
            "data": task.data_spec(str(data)),
            "space": {**task.SPACE, "lora_alpha": 16, "world_size": {kind: [1, 2]}, "strategy": {kind: ["ddp", "fsdp"]}},
            "objectives": [{"metric": "accuracy"}, {"metric": "train_seconds", "reference": task.LAST_SECONDS}],
            "sampler": {"seed": seed},
            "budget": {"minutes": minutes},
            "directory": scratch,
        }
        path.write_text(yaml.safe_dump(spec))
        told.write_text(json.dumps({"started": time.time(), "rows": str(rows), "spec": str(path)}))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        code, _ = watched([sys.executable, __file__, "--told", str(told)], environment, scratch, log, 60 * minutes + 120)
        if code != 0:
            raise SystemExit(f"{kind}, seed {seed}: exit code {code}:\n{log.read_text()[-3000:]}")
        return {"kind": kind, "seed": seed, "minutes": minutes, "trials": json.loads(rows.read_text())}


def report(runs: list[dict[str, Any]], minutes: float, results: Path | None) -> None:
    """Print hypervolume at half of the time and at its end, and write it."""
    volumes: dict[str, dict[int, list[float]]] = {kind: {} for kind in KINDS}
    for run in runs:
        points = [(t["accuracy"], t["train_seconds"]) for t in run["trials"]]
        curve = growth([t["seconds"] for t in run["trials"]], points, task.LAST_SECONDS)
        volumes[run["kind"]][run["seed"]] = [at(curve, 60 * minutes * share) for share in (0.5, 1.0)]
    seeds = sorted(volumes["choice"].keys() & volumes["profile"].keys())
    result = {
        **heading(
            "python benchmarks/layouts.py --data banking77/train.csv --out runs.jsonl --results FILE",
            f"{psutil.cpu_count()} cores, no GPU",
            ("ray", "torch", "transformers", "optuna", "peft"),
        ),
        "minutes": minutes,
        "hypervolume_at_half_and_end": volumes,
        "trials": {kind: [len(run["trials"]) for run in runs if run["kind"] == kind] for kind in KINDS},
        "profile_to_choice": {
            when: ratios([volumes["profile"][s][i] for s in seeds], [volumes["choice"][s][i] for s in seeds])
            for i, when in enumerate(("half", "end"))
        },
    }
    print(json.dumps({k: result[k] for k in ("hypervolume_at_half_and_end", "trials", "profile_to_choice")}, indent=1))
    if results:
        results.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="banking77's train.csv, with the columns text and category")
    parser.add_argument("--out", type=Path, help="JSON lines of the runs")
    parser.add_argument("--results", type=Path, help="where the results are written as JSON")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=4.0, help="of one search")
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.told:
        search(arguments.told)
        return
    out: Path = arguments.out
    runs = read_rows(out)
    done = {(run["kind"], run["seed"]) for run in runs}
    with tempfile.TemporaryDirectory(prefix="layouts-data-") as data:
        task.write_data(arguments.data, Path(data), ROWS_PER_CLASS)
        for seed in range(arguments.seeds):
            for kind in KINDS if seed % 2 == 0 else KINDS[::-1]:
                if (kind, seed) not in done:
                    runs.append(run_one(kind, seed, arguments.minutes, Path(data)))
                    append(out, runs[-1])
                    print(f"seed {seed}, {kind}: {len(runs[-1]['trials'])} trials", flush=True)
    report(runs, arguments.minutes, arguments.results)


if __name__ == "__main__":
    main()
