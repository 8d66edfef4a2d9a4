"""What a second rank on the same machine gives, over gloo: tokens per second of each layout, alone, relative to one rank.

On a machine that does nothing else, with two cores or more and the two data sets in the working directory:

    python benchmarks/ranks.py --banking77 banking77/train.csv --gsm8k gsm8k/train.jsonl --model stories260k/hf \
        --results benchmarks/results/ranks.json

The steps are those of `paretune profile`: 30 real ones of each layout, in two rounds, one thread a rank. The global batch stays, so
that each of two ranks has half of its rows. Efficiency is tokens per second on two ranks over twice those on one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.heading import heading  # noqa: E402

SPACE = {
    "adapter": {"choice": ["none", "lora"]},
    "lora_rank": 16,
    "global_batch_size": 32,
    "world_size": {"profile": [1, 2]},
    "strategy": {"profile": ["ddp", "fsdp"]},
}


def cases(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the specs by what they train."""
    encoder = {"name": "embedded:all-MiniLM-L6-v2", "task": "sequence-classification", "max_length": 96}
    decoder = {"name": str(arguments.model.absolute()), "task": "causal-lm", "max_length": 512}
    split = {**SPACE, "strategy": {"profile": ["ddp", "fsdp", "tp"]}}
    return {
        "MiniLM, banking77": {"model": encoder, "data": {"train": str(arguments.banking77.absolute())}, "space": SPACE},
        "stories260k, gsm8k": {"model": decoder, "data": {"train": str(arguments.gsm8k.absolute())}, "space": split},
    }


def measure(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each layout: throughput, how far its pace changed, what the ranks waited for each other, and efficiency."""
    from search.profiling import profile_space
    from spaces.loading import load_spec

    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        os.environ["XDG_CACHE_HOME"] = directory  # nothing that was measured before
        path = Path(directory) / "spec.yaml"
        path.write_text(yaml.safe_dump({**spec, "directory": directory}))
        found = profile_space(load_spec(path), lambda line: print(line, file=sys.stderr))
    alone = {row["adapter"]: row["tokens_per_second"] for row in found if row["world_size"] == 1}
    return [
        {
            **{name: row[name] for name in ("adapter", "world_size", "strategy", "tokens_per_second", "step_seconds", "time_drift")},
            "waiting_share": row["part_seconds"].get("communication", 0.0) / row["step_seconds"],
            "efficiency": row["tokens_per_second"] / (row["world_size"] * alone[row["adapter"]]),
        }
        for row in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--banking77", type=Path, required=True, help="banking77's train.csv")
    parser.add_argument("--gsm8k", type=Path, required=True, help="gsm8k's train.jsonl")
    parser.add_argument("--model", type=Path, required=True, help="a small causal language model")
    parser.add_argument("--results", type=Path, help="where the results are written as JSON")
    arguments = parser.parse_args()
    found = {name: measure(spec) for name, spec in cases(arguments).items()}
    for name, rows in found.items():
        print(name)
        for row in rows:
            print(
                f"  {row['adapter']:5} {row['world_size']} {row['strategy']:5} {row['tokens_per_second']:9,.0f} tokens/s,"
                f" efficiency {row['efficiency']:.2f}, waits {row['waiting_share']:.0%}, pace changed by {row['time_drift']:.0%}"
            )
    if arguments.results:
        command = "python benchmarks/ranks.py --banking77 banking77/train.csv --gsm8k gsm8k/train.jsonl --model stories260k/hf"
        machine = f"{psutil.cpu_count()} cores, no GPU, one thread a rank"
        head = heading(f"{command} --results FILE", machine, ("ray", "torch", "transformers", "peft"))
        arguments.results.write_text(json.dumps({**head, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
