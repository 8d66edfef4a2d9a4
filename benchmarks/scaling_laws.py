"""How well the loss on all rows is foretold from a quarter of them: a grid of real trials, in one process and without Ray.

Run it once for each task in the project's environment. Every finished trial is a line of ROWS, and a run that was cut off goes on
there; the results are of all lines.

    python benchmarks/scaling_laws.py examples/shakespeare.yaml --set model.name=stories260k/hf \
        --set data.train=tinyshakespeare/input.txt --share 0.65 --batch 4 --evaluation-rows 100 \
        --rows runs.jsonl --results benchmarks/results/scaling_laws.json

The grid is fractions x learning rates x {full fine-tuning, LoRA of rank 8}, one epoch each. `--share` of the training rows counts
as all of them, so that one core is enough.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from spaces import metrics  # noqa: E402
from spaces.config import TrialConfig  # noqa: E402
from spaces.loading import load_spec  # noqa: E402
from spaces.spec import SearchSpec  # noqa: E402
from trainables import data as task_data  # noqa: E402
from trainables.data import TaskData, TokenTable  # noqa: E402
from trainables.hub import resolve_model  # noqa: E402
from trainables.loop import Trainer  # noqa: E402
from trainables.mesh import World  # noqa: E402
from trainables.model import BaseModel  # noqa: E402
from trainables.report import Diverged  # noqa: E402

QUARTER = 0.25
# A factor of the square root of two apart up to the quarter that predicts, then of two.
FRACTIONS = [2.0 ** (-k / 2) for k in range(10, 3, -1)] + [0.5, 1.0]
# Around what the examples search; the extremes of each row are meant to be worse than its middle.
LEARNING_RATES = {
    "sequence-classification": {"none": (1e-4, 3e-4, 1e-3), "lora": (1e-3, 3e-3, 1e-2)},
    "causal-lm": {"none": (1e-3, 3e-3, 1e-2), "lora": (3e-3, 1e-2, 3e-2)},
}


def grid(spec: SearchSpec, share: float, batch: int) -> Iterator[tuple[float, TrialConfig]]:
    """Yield the fraction of the rows that count as all, and the trial; cheap ones first."""
    for fraction in FRACTIONS:
        for adapter, rates in LEARNING_RATES[spec.model.task].items():
            for rate in rates:
                params = {**spec.space.first(), "adapter": adapter, "lora_rank": 8, "lora_alpha": 16.0, "learning_rate": rate}
                params |= {"dataset_fraction": fraction * share, "global_batch_size": batch, "epochs": 1.0}
                params |= {"world_size": 1, "strategy": "ddp", "micro_batch_size": "auto"}
                yield fraction, TrialConfig.from_params(params, max_length=spec.model.max_length)


def thinned(table: TokenTable, num_rows: int) -> TokenTable:
    """Return a random part of a table, the same at every call."""
    if num_rows >= table.num_rows:
        return table
    chosen = np.sort(np.random.default_rng(0).permutation(table.num_rows)[:num_rows])
    places = np.concatenate([np.arange(table.offsets[i], table.offsets[i + 1]) for i in chosen])
    return TokenTable(
        input_ids=table.input_ids[places],
        offsets=np.concatenate([[0], np.cumsum(table.lengths[chosen])]),
        targets=None if table.targets is None else table.targets[places],
        labels=None if table.labels is None else table.labels[chosen],
    )


def train(config: TrialConfig, data: TaskData, base: BaseModel) -> dict[str, Any]:
    """Train one trial whole and score it once."""
    started = time.perf_counter()
    try:
        trainer = Trainer(config, data, base, World.alone(), checkpoints=None)
        for _ in range(trainer.num_steps):
            trainer.train_step()
        report = trainer.final_report(0)
    except Diverged as error:
        return {"diverged": str(error)}
    scores = {name: report.metrics[name] for name in (metrics.EVAL_LOSS, metrics.ACCURACY)}
    seconds = time.perf_counter() - started
    return {"distinct_rows": report.details["distinct_rows"], "steps": trainer.num_steps, **scores, "seconds": seconds}


def run_grid(arguments: argparse.Namespace) -> None:
    """Train what is not yet among the rows."""
    spec = load_spec(arguments.spec, arguments.set).spec
    data = task_data.prepare(spec.model, spec.data)
    data = replace(data, evaluation=thinned(data.evaluation, arguments.evaluation_rows), answers=None)
    base = BaseModel.load(resolve_model(spec.model.name, spec.model.revision), spec.model.revision, spec.model.task, data.label_names)
    known = {(row["fingerprint"], row["config"], row["evaluation_rows"]) for row in read_rows(arguments.rows)}
    for fraction, config in grid(spec, arguments.share, arguments.batch):
        key = {"fingerprint": data.fingerprint[:12], "config": config.key(), "evaluation_rows": data.evaluation.num_rows}
        if tuple(key.values()) in known:
            continue
        recipe = config.recipe
        what = {"adapter": recipe.adapter, "learning_rate": recipe.learning_rate, "fraction": fraction}
        row = {"task": arguments.spec.stem, **what, "batch": arguments.batch, **key, **train(config, data, base)}
        with arguments.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("spec", type=Path)
    parser.add_argument("--set", action="append", default=[], help="as of `paretune search`")
    parser.add_argument("--share", type=float, default=1.0, help="share of the training rows that counts as all of them")
    parser.add_argument("--batch", type=int, default=8, help="rows per optimizer step")
    parser.add_argument("--evaluation-rows", type=int, default=150)
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines of the finished trials")
    parser.add_argument("--results", type=Path, help="where the results are written as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run_grid(arguments)


if __name__ == "__main__":
    main()
