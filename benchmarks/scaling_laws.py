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
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from heading import heading  # noqa: E402

from search.data_scaling import WORTHWHILE_NATS  # noqa: E402
from search.scaling import LEVEL, NoLaw, fit_law  # noqa: E402
from spaces import metrics  # noqa: E402
from spaces.config import TrialConfig  # noqa: E402
from spaces.loading import load_spec  # noqa: E402
from spaces.spec import SearchSpec  # noqa: E402
from trainables import preparation  # noqa: E402
from trainables.data import TaskData, TokenTable  # noqa: E402
from trainables.hub import resolve_model  # noqa: E402
from trainables.loop import Trainer  # noqa: E402
from trainables.mesh import World  # noqa: E402
from trainables.model import BaseModel  # noqa: E402
from trainables.report import Diverged  # noqa: E402

QUARTER = 0.25
# Laws are fitted to sizes from a sixteenth up, and once more with those that take ten steps or so to train.
SMALLEST = (1 / 16, 1 / 32)
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
                yield fraction, TrialConfig.from_params(params)


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
    try:
        trainer = Trainer(config, data, base, World.alone(), checkpoints=None)
        for _ in range(trainer.num_steps):
            trainer.train_step()
        report = trainer.final_report(0)
    except Diverged as error:
        return {"diverged": str(error)}
    scores = {name: report.metrics[name] for name in (metrics.EVAL_LOSS, metrics.ACCURACY)}
    return {"distinct_rows": report.details["distinct_rows"], "steps": trainer.num_steps, **scores}


def run_grid(arguments: argparse.Namespace) -> None:
    """Train what is not yet among the rows."""
    spec = load_spec(arguments.spec, arguments.set).spec
    data = preparation.prepare(spec.model, spec.data)
    data = replace(data, evaluation=thinned(data.evaluation, arguments.evaluation_rows))
    base = BaseModel.load(resolve_model(spec.model.name), spec.model.revision, spec.model.task, data.label_names)
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


def analysed(task: str, smallest: float, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a quarter of the rows foretold of all of them, for every configuration and for the best of each adapter."""
    rows = [row for row in rows if row["fraction"] >= smallest]
    curves: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        if metrics.EVAL_LOSS in row:
            curves.setdefault(f"{row['adapter']} at {row['learning_rate']:g}", {})[row["fraction"]] = row
    configs = {name: foretold(curve) for name, curve in curves.items() if 1.0 in curve and QUARTER in curve}
    best = {}
    for adapter in sorted({row["adapter"] for row in rows}):
        mine = [curve for name, curve in curves.items() if name.startswith(adapter)]
        there = sorted({fraction for curve in mine for fraction in curve})
        envelope = {f: min((c[f] for c in mine if f in c), key=lambda row: row[metrics.EVAL_LOSS]) for f in there}
        best[adapter] = foretold(envelope)
    full, quarter = ([config[key] for config in configs.values()] for key in ("measured", "quarter"))
    return {
        "task": task,
        "smallest_fraction": smallest,
        "trials": len(rows),
        "train_rows": max(row["distinct_rows"] for row in rows),
        "evaluation_rows": rows[0]["evaluation_rows"],
        "spearman_quarter_and_full": float(spearmanr(quarter, full).statistic),
        "mean_absolute_error": spread([c["error"] for c in configs.values() if "error" in c]),
        "mean_absolute_error_of_best": spread([c["error"] for c in best.values() if "error" in c]),
        "mean_absolute_error_of_quarter": spread([c["quarter"] / c["measured"] - 1 for c in configs.values()]),
        "within_interval": [sum(c.get("within", False) for c in configs.values()), sum("within" in c for c in configs.values())],
        "best": best,
        "configs": configs,
    }


def foretold(curve: dict[float, dict[str, Any]]) -> dict[str, Any]:
    """Return the full loss as a law says from at most a quarter of the rows, as it was, and the law through all sizes."""
    points = sorted((row["distinct_rows"], row[metrics.EVAL_LOSS], fraction) for fraction, row in curve.items())
    all_rows, measured, _ = points[-1]
    result: dict[str, Any] = {"measured": measured, "quarter": curve[QUARTER][metrics.EVAL_LOSS]}
    few = [point for point in points if point[2] <= QUARTER]
    try:
        fit = fit_law([rows for rows, _, _ in few], [loss for _, loss, _ in few])
        said = fit.loss(all_rows)
        result |= {"predicted": said.value, "low": said.low, "high": said.high, "error": said.value / measured - 1}
        result |= {"within": said.low <= measured <= said.high, "law": asdict(fit.law)}
        whole = fit_law([rows for rows, _, _ in points], [loss for _, loss, _ in points])
        stop = {k: v if math.isfinite(v) else None for k, v in asdict(whole.stops_paying(WORTHWHILE_NATS)).items()}
        result |= {"law_of_all": asdict(whole.law), "noise_of_all": whole.noise, "stops_paying_at_rows": stop}
    except NoLaw as error:
        result["no_law"] = str(error)
    return result


def spread(errors: list[float]) -> float | None:
    return float(np.mean(np.abs(errors))) if errors else None


def show(task: dict[str, Any]) -> None:
    print(f"\n{task['task']}: {task['trials']} trials on 1/{1 / task['smallest_fraction']:.0f} to all of {task['train_rows']:,} rows")
    for name, one in [*task["configs"].items(), *((f"best of {k}", v) for k, v in task["best"].items())]:
        law = (
            f"{one['predicted']:.3f} ({one['low']:.3f} to {one['high']:.3f}) {one['error']:+.1%}" if "error" in one else one["no_law"]
        )
        print(f"  {name:14} quarter {one['quarter']:.3f}  all {one['measured']:.3f}  predicted {law}")
    print(f"  Spearman of quarter and full loss over {len(task['configs'])} configurations: {task['spearman_quarter_and_full']:.3f}")
    for key in ("mean_absolute_error", "mean_absolute_error_of_best", "mean_absolute_error_of_quarter"):
        print(f"  {key.replace('_', ' ')}: {'-' if task[key] is None else f'{task[key]:.1%}'}")
    print(f"  within the {LEVEL:.0%} interval: {' of '.join(map(str, task['within_interval']))}")


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(row["task"] for row in rows)
    tasks = [analysed(task, smallest, [r for r in rows if r["task"] == task]) for smallest in SMALLEST for task in names]
    return {
        **heading(
            "python benchmarks/scaling_laws.py SPEC.yaml ... --rows runs.jsonl --results benchmarks/results/scaling_laws.json",
            "one thread of a CPU, at low priority",
            ("torch", "transformers", "peft", "numpy", "scipy"),
        ),
        "tasks": tasks,
        "trials": [{k: v for k, v in row.items() if k not in ("config", "fingerprint", "seconds")} for row in rows],
    }


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
    found = results(read_rows(arguments.rows))
    for task in found["tasks"]:
        show(task)
    if arguments.results:
        arguments.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
