"""A tape of learning curves: real trials of the three examples, drawn at random from their spaces, each trained to its end.

Run it in the project's environment; no Ray, one thread. Every finished trial is a line of ROWS, and a run that was cut off goes on
there; the tape is made of all lines. `benchmarks/early_stopping.py` replays it.

    python benchmarks/learning_curves.py --data DIR --model stories260k/hf --rows runs.jsonl \
        --tape benchmarks/results/learning_curves.json

DIR holds banking77/, tinyshakespeare/ and gsm8k/ as the examples name them. So that one core is enough, a share of the training rows
counts as all of them, batches and texts are shorter, and everything runs on one rank; the rest is the examples' space.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from heading import heading  # noqa: E402
from scaling_laws import read_rows, thinned  # noqa: E402

from spaces import metrics  # noqa: E402
from spaces.config import TrialConfig  # noqa: E402
from spaces.loading import load_spec  # noqa: E402
from spaces.spec import SearchSpec  # noqa: E402
from trainables import preparation  # noqa: E402
from trainables.data import TaskData  # noqa: E402
from trainables.hub import resolve_model  # noqa: E402
from trainables.loop import Trainer, evaluate_untrained  # noqa: E402
from trainables.mesh import World  # noqa: E402
from trainables.model import BaseModel  # noqa: E402
from trainables.report import Diverged  # noqa: E402
from trainables.step_time import fit_steady  # noqa: E402

# Where a trial is looked at, as shares of its own steps: the default rungs, and one between them.
SHARES = (1 / 9, 2 / 9, 1 / 3)
KNOBS = ("adapter", "learning_rate", "global_batch_size", "dataset_fraction", "epochs", "lora_rank")
COLUMNS = ("step", "tokens", metrics.EVAL_LOSS, metrics.ACCURACY, metrics.TRAIN_LOSS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """An example, and what of it is smaller here."""

    name: str
    share: float
    """Of the training rows, what counts as all of them."""
    evaluation_rows: int
    num_trials: int
    overrides: tuple[str, ...]


def tasks(data: Path, model: Path) -> list[Task]:
    """Return the examples on local files."""
    # Both adapters at the rates that the demo gives full fine-tuning of this model and the example gives LoRA.
    rates = "space.learning_rate={by_adapter: {none: {log_uniform: [2e-4, 8e-4]}, lora: {log_uniform: [5e-4, 3e-3]}}}"
    banking = (
        "model.name=embedded:all-MiniLM-L6-v2",
        f"data.train={data}/banking77/train.csv",
        f"data.test={data}/banking77/test.csv",
        "model.max_length=32",
        "space.adapter={choice: [none, lora]}",
        rates,
        "space.global_batch_size={choice: [8, 16]}",
    )
    shakespeare = (
        f"model.name={model}",
        f"data.train={data}/tinyshakespeare/input.txt",
        "model.max_length=128",
        "space.global_batch_size={choice: [4, 8]}",
    )
    gsm8k = (
        f"model.name={model}",
        f"data.train={data}/gsm8k/train.jsonl",
        f"data.evaluation={data}/gsm8k/test.jsonl",
        "space.global_batch_size={choice: [2, 4]}",
    )
    alone = ("space.world_size=1", "space.strategy=ddp", "sampler.points_to_evaluate=[]")
    return [
        Task(name="shakespeare", share=0.08, evaluation_rows=40, num_trials=84, overrides=shakespeare + alone),
        Task(name="gsm8k", share=0.05, evaluation_rows=20, num_trials=48, overrides=gsm8k + alone),
        Task(name="banking77", share=0.07, evaluation_rows=120, num_trials=33, overrides=banking + alone),
    ]


class Draw:
    """A suggester that knows nothing."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return low * (high / low) ** self._random.random() if log else self._random.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._random.choice(choices)


class Recorder:
    """One task, ready to train its trials."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.spec: SearchSpec = load_spec(ROOT / "examples" / f"{task.name}.yaml", list(task.overrides)).spec
        data: TaskData = preparation.prepare(self.spec.model, self.spec.data)
        self.data = replace(data, evaluation=thinned(data.evaluation, task.evaluation_rows), test=None)
        model = self.spec.model
        self.base = BaseModel.load(resolve_model(model.name), model.revision, model.task, data.label_names)

    def untrained(self) -> dict[str, float]:
        """Return the scores before any training: the corner of a hypervolume over the loss."""
        config = TrialConfig.from_params(self.spec.space.first())
        scores = evaluate_untrained(config, self.data, self.base, World.alone(), exact_match_rows=0)
        return {name: scores[name] for name in (metrics.EVAL_LOSS, metrics.ACCURACY)}

    def record(self, number: int) -> dict[str, Any]:
        """Train one trial whole; return its row."""
        params = self.spec.space.suggest(Draw(f"{self.task.name} {number}"))
        smaller = {**params, "dataset_fraction": params["dataset_fraction"] * self.task.share}
        config = TrialConfig.from_params(smaller)
        row: dict[str, Any] = {"task": self.task.name, "number": number, **{k: params[k] for k in KNOBS if k in params}}
        try:
            return row | self._train(Trainer(config, self.data, self.base, World.alone(), checkpoints=None, rungs=SHARES))
        except Diverged as error:
            return row | {"diverged": str(error)}

    def _train(self, trainer: Trainer) -> dict[str, Any]:
        curve, cpu_seconds = [], []
        padded = trainer.sizes.padded_tokens.cumsum()
        while trainer.step < trainer.num_steps:
            began = time.process_time()
            trainer.train_step()
            cpu_seconds.append(time.process_time() - began)
            if trainer.step in trainer.rungs:
                report = trainer.report() if trainer.step < trainer.num_steps else trainer.final_report(0)
                curve.append([trainer.step, int(padded[trainer.step - 1]), *(report.metrics[name] for name in COLUMNS[2:])])
        # A step that the memory meter followed is none to time.
        is_disturbed = np.isnan(trainer.step_parts()).any(axis=1)
        steady = fit_steady(np.where(is_disturbed, np.nan, cpu_seconds).tolist(), trainer.sizes)
        return {
            "num_steps": trainer.num_steps,
            "cpu_seconds": float(steady.of(trainer.sizes.padded_tokens).sum()),
            **{name: report.metrics[name] for name in (metrics.TRAIN_SECONDS, metrics.TOTAL_SECONDS)},
            "curve": curve,
        }


def run(recorders: Sequence[Recorder], rows: Path) -> None:
    """Train what is not yet among the rows, all tasks in step, so that a run that is cut off has its share of each."""
    known = {(row["task"], row["number"]) for row in read_rows(rows)}
    wanted = [(number, r) for r in recorders for number in range(r.task.num_trials) if (r.task.name, number) not in known]
    for number, recorder in sorted(wanted, key=lambda w: w[0] / w[1].task.num_trials):
        row = recorder.record(number)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        last = row.get("diverged") or f"{row['total_seconds']:.1f} s, {row['num_steps']} steps, {row['curve'][-1]}"
        print(recorder.task.name, number, {k: row.get(k) for k in KNOBS}, last, flush=True)


def paces(rows: Sequence[dict[str, Any]]) -> dict[tuple[Any, ...], float]:
    """Return the seconds per padded token of every profile, the median over its trials.

    Other programs ran beside, so they are seconds of the CPU: on one thread that is what a step takes alone. They depend on the
    profile alone, and its median has less noise than each trial's own.
    """
    found = defaultdict(list)
    for row in rows:
        if "curve" in row:
            found[profile(row)].append(row["cpu_seconds"] / row["curve"][-1][1])
    return {key: statistics.median(values) for key, values in found.items()}


def profile(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a step's cost depends on, besides its tokens."""
    return row["task"], row["adapter"], row.get("lora_rank"), row["global_batch_size"]


def tape(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the trials, each with the `train_seconds` of its profile's pace."""
    pace = paces(rows)
    for row in sorted(rows, key=lambda r: (r["task"], r["number"])):
        if "curve" not in row:
            yield row
            continue
        short = [[step, tokens, *(float(f"{value:.5g}") for value in values)] for step, tokens, *values in row["curve"]]
        seconds = row["curve"][-1][1] * pace[profile(row)]
        clocks = {f"wall_{name}": round(row[name], 3) for name in (metrics.TRAIN_SECONDS, metrics.TOTAL_SECONDS)}
        known = {k: v for k, v in row.items() if k not in (metrics.TRAIN_SECONDS, metrics.TOTAL_SECONDS, "cpu_seconds", "curve")}
        yield {
            **known,
            metrics.TRAIN_SECONDS: round(seconds, 3),
            "cpu_seconds": round(row["cpu_seconds"], 3),
            **clocks,
            "curve": short,
        }


def write_tape(path: Path, rows: Sequence[dict[str, Any]], recorders: Sequence[Recorder]) -> None:
    """Write all trials, one a line."""
    head = {
        **heading(
            "python benchmarks/learning_curves.py --data DIR --model stories260k/hf --rows runs.jsonl "
            "--tape benchmarks/results/learning_curves.json",
            "two cores of a shared server, no GPU; one thread, other programs beside",
            ("torch", "transformers", "peft", "numpy"),
        ),
        "shares": SHARES,
        "columns": COLUMNS,
        "tasks": {
            r.task.name: {"share": r.task.share, "evaluation_rows": r.task.evaluation_rows, "untrained": r.untrained()}
            for r in recorders
        },
    }
    lines = ",\n".join(json.dumps(row) for row in tape(rows))
    path.write_text(json.dumps(head, indent=1)[:-2] + ',\n "trials": [\n' + lines + "\n ]\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77/, tinyshakespeare/ and gsm8k/")
    parser.add_argument("--model", type=Path, required=True, help="stories260K in the Hugging Face format")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines of the finished trials")
    parser.add_argument("--tape", type=Path, help="where the tape is written as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recorders = [Recorder(task) for task in tasks(arguments.data.resolve(), arguments.model.resolve())]
    run(recorders, arguments.rows)
    if arguments.tape:
        write_tape(arguments.tape, read_rows(arguments.rows), recorders)


if __name__ == "__main__":
    main()
