"""How soon a search has a good front: paretune against what a user could pick instead, on one task, in one space, on two cores.

On a machine that does nothing else:

    pip install -e '.[bench]'
    python benchmarks/time_to_front.py all --data banking77/train.csv --out runs.jsonl --results benchmarks/results/time_to_front.json

`run` starts every contender's search as a fresh process, seed after seed, the contenders in turn, and appends what it found to the
file when it ends; runs that are in the file are not run again, so a comparison that was cut off goes on. `remeasure` then times what
stood on any contender's front, and `report` compares.

The rules:

- The task: MiniLM (embedded weights) tells 77 intents apart; 16 training rows of each class of banking77 and 4 others to evaluate on.
- The space: full fine-tuning or LoRA of rank 4 to 16, learning rate, batch size, dataset fraction, epochs; one core a trial.
- The clock runs from the start of the process: imports, Ray and all. Nothing is carried over from an earlier run, caches included.
- After `--minutes` nothing is started any more, and what ends later does not count. Others than (a), which plans for its time, may be
  given longer (`--longer b=12,c=6`), to see when they reach what (a) has; all else is compared after `--minutes`.
- A trial counts when it was trained to its end; one that was stopped early leaves no model. (b), (d) and (e) train with the loop in
  `contenders/task.py`, of paretune's batches, model and optimizer; (c) has transformers' own and (a) paretune's, which lays rows end
  to end and leaves rows of the embedding alone that the data never read: how fast a tool trains is part of it.
- Each contender has both cores: (a), (b), (e) two trials of one thread at once, (c), (d) one trial of two threads.
- A contender's front is by the times that it saw itself. For the hypervolume the time of every trial that was ever on it is measured
  again, alone, on one core, by the plain loop, once for each configuration, so that the same configuration is as fast for all.
- Hypervolume: over accuracy, from 0, and the logarithm of training seconds, up to 120 s.
- Who misses the target is given the limit as time; the ratios are then bounds, and say which. So there is a second ratio: what
  another has after `--minutes`, of the time after which it had that to the time after which (a) had as much.
- CPU seconds are those of all processes that descend from the contender's, sampled twice a second.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.contenders import task as shared  # noqa: E402
from benchmarks.contenders.process import watched  # noqa: E402
from benchmarks.front_times import Trial, at, entrants, growth, ratios, time_to  # noqa: E402
from benchmarks.heading import heading  # noqa: E402

CONTENDERS = {
    "a": ("paretune", "with_paretune.py"),
    "b": ("Ray Tune, OptunaSearch, a TorchTrainer a trial", "with_ray.py"),
    "c": ("transformers' hyperparameter_search, Optuna", "with_transformers.py"),
    "d": ("Optuna around a plain loop", "with_optuna.py"),
    "e": ("Syne Tune, MOASHA", "with_syne_tune.py"),
}
# How many times sooner than these (a) shall be.
GOALS = {"b": 5.0, "c": 2.0, "d": 2.0, "e": 2.0}
ROWS_PER_CLASS = 16
TARGET_SHARE = 0.9


class RunFailed(Exception):
    """A contender ended in an error before its time was over, or without a single trial."""


def run_one(contender: str, seed: int, arguments: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Run one contender's search in a process of its own; return the run and its trials.

    Raises:
        RunFailed: what it found is not what it would have found.
    """
    limit = limit_of(contender, arguments)
    with tempfile.TemporaryDirectory(prefix=f"ttf-{contender}-") as scratch:
        rows, told, log = Path(scratch) / "rows.jsonl", Path(scratch) / "run.json", Path(scratch) / "log.txt"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "2" if contender in "cd" else "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": f"{scratch}/cache",
            "SYNETUNE_FOLDER": f"{scratch}/syne-tune",
            "RAY_TRAIN_V2_ENABLED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        }
        for name in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
            environment.pop(name, None)
        python = str(arguments.syne_python) if contender == "e" else sys.executable
        command = [python, str(ROOT / "benchmarks" / "contenders" / CONTENDERS[contender][1]), str(told)]
        run = shared.Run(
            seed=seed, started=time.time(), limit_seconds=limit, data=str(data), scratch=scratch, rows=str(rows), path=str(told)
        )
        told.write_text(json.dumps(run.to_dict()))
        code, cpu = watched(command, environment, scratch, log, limit)
        seconds = time.time() - run.started
        trials = read_rows(rows)
        if arguments.logs:
            arguments.logs.mkdir(parents=True, exist_ok=True)
            (arguments.logs / f"{contender}-{seed}.txt").write_text(log.read_text())
        # A negative code after the limit is that of a contender that had to be made to leave.
        if (code != 0 and seconds < limit) or (code > 0 and not trials):
            when = f"after {seconds:.0f} of {limit:.0f} s, {len(trials)} trials"
            raise RunFailed(f"({contender}) seed {seed} failed with exit code {code} {when}:\n{log.read_text()[-3000:]}")
    return {
        "contender": contender,
        "seed": seed,
        "limit_seconds": limit,
        "task": fingerprint(arguments.rows_per_class),
        "exit_code": code,
        "wall_seconds": seconds,
        "cpu": cpu,
        "trials": trials,
    }


def limit_of(contender: str, arguments: argparse.Namespace) -> float:
    """Return the seconds that a contender is given.

    Raises:
        SystemExit: `--longer` is no list of contenders with minutes.
    """
    minutes = {name: arguments.minutes for name in CONTENDERS}
    for part in filter(None, arguments.longer.split(",")):
        name, _, number = part.partition("=")
        try:
            longer = float(number)
        except ValueError:
            longer = 0.0
        if name not in GOALS or longer < arguments.minutes:
            raise SystemExit(f"--longer {part}: allowed: one of {', '.join(GOALS)}, and minutes from {arguments.minutes:g}, as b=12")
        minutes[name] = longer
    return minutes[contender] * 60


def fingerprint(rows_per_class: int) -> str:
    """Return what tells one task from another; rows of different tasks must not be compared."""
    what = [shared.MODEL, shared.SPACE, shared.FIXED, rows_per_class, shared.EVALUATION_ROWS_PER_CLASS]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the runs in the file.

    Raises:
        SystemExit: one is of another task or another time limit.
    """
    runs = [row for row in read_rows(arguments.out) if "contender" in row]
    task = fingerprint(arguments.rows_per_class)
    if any((run["task"], run["limit_seconds"]) != (task, limit_of(run["contender"], arguments)) for run in runs):
        raise SystemExit(f"{arguments.out}: holds runs of another task or another time limit; name another file")
    return runs


@contextlib.contextmanager
def written_data(arguments: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ttf-data-") as directory:
        shared.write_data(arguments.data, Path(directory), arguments.rows_per_class)
        yield Path(directory)


def run_all(arguments: argparse.Namespace) -> None:
    """Run what is not in the file yet; every other seed in the opposite order, so that nobody always comes first.

    Raises:
        SystemExit: some run failed; the others are in the file.
    """
    done = {(run["contender"], run["seed"]) for run in read_runs(arguments)}
    names, failed = arguments.contenders.split(","), []
    with written_data(arguments) as data:
        for seed in range(arguments.seeds):
            for contender in names if seed % 2 == 0 else names[::-1]:
                if (contender, seed) in done:
                    continue
                try:
                    run = run_one(contender, seed, arguments, data)
                except RunFailed as failure:
                    failed.append(f"({contender}) seed {seed}")
                    print(failure, file=sys.stderr, flush=True)
                    continue
                append(arguments.out, run)
                counted = [t for t in run["trials"] if t["seconds"] <= run["limit_seconds"]]
                first = min((t["seconds"] for t in counted), default=float("nan"))
                cpu = run["cpu"][-1][1]
                print(
                    f"seed {seed} ({contender}) {CONTENDERS[contender][0]}: {len(counted)} trials, the first after {first:.0f} s; "
                    f"{cpu:.0f} CPU s, {run['wall_seconds']:.0f} s",
                    flush=True,
                )
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}; the same command again runs these alone")


def trials_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the trials that were ever on a run's own front within its time, as they finished."""
    rows = [row for row in run["trials"] if row["seconds"] <= run["limit_seconds"]]
    seen = [Trial(finished_seconds=r["seconds"], accuracy=r["accuracy"], own_seconds=r["train_seconds"]) for r in rows]
    return [rows[i] for i in entrants(seen)]


def key_of(row: dict[str, Any]) -> str:
    return shared.config_of(row["params"]).key()


def measured(path: Path) -> dict[str, float]:
    """Return the training seconds that were measured again, by configuration."""
    return {row["measured"]: row["train_seconds"] for row in read_rows(path) if "measured" in row}


def remeasure(arguments: argparse.Namespace) -> None:
    """Time every trial that was on a front, one after the other, alone, on one core."""
    import torch

    torch.set_num_threads(1)
    wanted = {key_of(row): row["params"] for run in read_runs(arguments) for row in trials_of(run)}
    known = measured(arguments.out)
    missing = {key: params for key, params in wanted.items() if key not in known}
    with written_data(arguments) as data:
        task = shared.Task(str(data))
        started = time.time()
        for key, params in missing.items():
            append(arguments.out, {"measured": key, "params": params, "train_seconds": task.measure(params)})
    print(f"{len(missing)} of {len(wanted)} configurations measured in {time.time() - started:.0f} s", flush=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a run."""

    contender: str
    seed: int
    curve: list[tuple[float, float]] = field(repr=False)
    """(seconds, hypervolume)"""
    limit_seconds: float
    common_seconds: float
    """What all contenders were given at least."""
    cpu: list[tuple[float, float]] = field(repr=False)
    num_trials: int

    @property
    def final(self) -> float:
        """The hypervolume after what all contenders were given."""
        return at(self.curve, self.common_seconds)

    def seconds_to(self, target: float) -> float:
        """Return when the target was reached; the time limit where it was not, which is less than it would have taken."""
        reached = time_to(self.curve, target)
        return self.limit_seconds if reached is None else reached

    def misses(self, target: float) -> bool:
        return time_to(self.curve, target) is None

    def cpu_seconds_at(self, seconds: float) -> float:
        times, used = zip(*self.cpu, strict=True)
        return float(np.interp(seconds, times, used))


def outcomes(arguments: argparse.Namespace) -> list[Outcome]:
    """Return what became of the runs in the file.

    Raises:
        SystemExit: there is none, or what stood on a front was not measured again yet.
    """
    runs, known = read_runs(arguments), measured(arguments.out)
    if not runs:
        raise SystemExit(f"{arguments.out}: holds no runs; `run` comes before `report`")
    wanted = {key_of(row) for run in runs for row in trials_of(run)}
    left = wanted - known.keys()
    if left:
        many = f"{len(left)} of {len(wanted)} configurations"
        raise SystemExit(f"{arguments.out}: {many} are not measured again yet; `remeasure` comes before `report`")
    found = []
    for run in runs:
        members = trials_of(run)
        points = [(row["accuracy"], known[key_of(row)]) for row in members]
        found.append(
            Outcome(
                contender=run["contender"],
                seed=run["seed"],
                curve=growth([row["seconds"] for row in members], points, shared.LAST_SECONDS),
                limit_seconds=run["limit_seconds"],
                common_seconds=arguments.minutes * 60,
                cpu=run["cpu"],
                num_trials=sum(row["seconds"] <= arguments.minutes * 60 for row in run["trials"]),
            )
        )
    return found


def compared(found: list[Outcome]) -> dict[str, Any]:
    """Return each contender's numbers, and its ratios to (a), seed by seed."""
    best = max(outcome.final for outcome in found)
    target = TARGET_SHARE * best
    by_name = {name: {o.seed: o for o in found if o.contender == name} for name in CONTENDERS}
    result: dict[str, Any] = {"best_final_hypervolume": best, "target": target, "contenders": {}}
    for name, runs in by_name.items():
        if not runs:
            continue
        times = {seed: run.seconds_to(target) for seed, run in runs.items()}
        result["contenders"][name] = row = {
            "what": CONTENDERS[name][0],
            "seeds": len(runs),
            "trials": [run.num_trials for run in runs.values()],
            "seconds_to_target": list(times.values()),
            "reached_target": sum(not run.misses(target) for run in runs.values()),
            "final_hypervolume": [run.final for run in runs.values()],
            "cpu_seconds_to_target": [run.cpu_seconds_at(times[seed]) for seed, run in runs.items()],
        }
        pairs = [(run, by_name["a"][seed]) for seed, run in runs.items() if seed in by_name["a"]]
        if name == "a" or not pairs:
            continue
        row["times_as_long"] = ratios([p.seconds_to(target) for p, _ in pairs], [q.seconds_to(target) for _, q in pairs])
        row["seconds_until_a_has_theirs"] = [q.seconds_to(p.final) for p, q in pairs]
        row["seconds_until_they_have_it"] = [p.seconds_to(p.final) for p, _ in pairs]
        row["times_sooner_a_has_theirs"] = ratios(row["seconds_until_they_have_it"], row["seconds_until_a_has_theirs"])
        row["hypervolume_of_a_to_theirs"] = ratios([q.final for _, q in pairs], [p.final for p, _ in pairs])
        cpu = [(p.cpu_seconds_at(p.seconds_to(target)), q.cpu_seconds_at(q.seconds_to(target))) for p, q in pairs]
        row["times_the_cpu_seconds"] = ratios([p for p, _ in cpu], [q for _, q in cpu])
        row["seeds_that_a_missed"] = [q.seed for _, q in pairs if q.misses(target)]
        row["ratios_of_times_are"] = bound_of(
            theirs_missed=any(p.misses(target) for p, _ in pairs), ours_missed=bool(row["seeds_that_a_missed"])
        )
        row["goal"] = GOALS[name]
    return result


def bound_of(*, theirs_missed: bool, ours_missed: bool) -> str:
    """Return what the ratios of their times to ours are, where a time is only the limit if the target was missed."""
    if theirs_missed and ours_missed:
        return "no bound"
    return "at least" if theirs_missed else "at most" if ours_missed else "exact"


def show(result: dict[str, Any]) -> None:
    print(f"best final hypervolume {result['best_final_hypervolume']:.3f}; target {result['target']:.3f}")
    for name, row in result["contenders"].items():
        middle = {
            key: float(np.median(row[key])) for key in ("trials", "seconds_to_target", "final_hypervolume", "cpu_seconds_to_target")
        }
        print(
            f"({name}) {row['what']}: medians of {row['seeds']} seeds: {middle['trials']:.0f} trials, target after "
            f"{middle['seconds_to_target']:.0f} s (reached by {row['reached_target']}), "
            f"hypervolume {middle['final_hypervolume']:.3f}, "
            f"{middle['cpu_seconds_to_target']:.0f} CPU s to the target"
        )
        for key in ("times_as_long", "times_sooner_a_has_theirs", "hypervolume_of_a_to_theirs", "times_the_cpu_seconds"):
            if key in row:
                r = row[key]
                spread = f"{r['mean']:.2f} ({r['low']:.2f} to {r['high']:.2f}; seeds {r['least']:.2f} to {r['most']:.2f})"
                goal = f", goal {row['goal']:g}" if key == "times_as_long" else ""
                is_open = key in ("times_as_long", "times_the_cpu_seconds") and row["ratios_of_times_are"] != "exact"
                print(f"    {key.replace('_', ' ')}: {row['ratios_of_times_are'] + ' ' if is_open else ''}{spread}{goal}")
        if row.get("seeds_that_a_missed"):
            print(
                f"    (a) missed the target on seeds {', '.join(map(str, row['seeds_that_a_missed']))}: its time there is the limit"
            )


def report(arguments: argparse.Namespace) -> None:
    found = outcomes(arguments)
    result = {
        **heading(
            "python benchmarks/time_to_front.py all --data banking77/train.csv --out runs.jsonl --results FILE --figure FILE"
            + (f" --longer {arguments.longer}" if arguments.longer else ""),
            f"{psutil.cpu_count()} cores, no GPU",
            ("ray", "torch", "transformers", "optuna", "mlflow", "peft"),
        ),
        "limit_seconds": {o.contender: o.limit_seconds for o in found},
        "common_seconds": found[0].common_seconds,
        **compared(found),
        "curves": [{"contender": o.contender, "seed": o.seed, "seconds_and_hypervolume": o.curve} for o in found],
    }
    show(result)
    if arguments.results:
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.figure:
        draw(found, result["target"], arguments.figure)


def draw(found: list[Outcome], target: float, path: Path) -> None:
    """Draw how each contender's hypervolume grew: the median of its seeds, and from the least to the most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    limit = found[0].common_seconds
    times = np.linspace(0, limit, 481)
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (what, _) in CONTENDERS.items():
        curves = np.array([[at(o.curve, second) for second in times] for o in found if o.contender == name])
        if not len(curves):
            continue
        (line,) = axes.plot(times, np.median(curves, axis=0), label=what, linewidth=2.5 if name == "a" else 1.2)
        axes.fill_between(times, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.12, linewidth=0)
    axes.axhline(target, color="grey", linestyle="--", linewidth=0.8)
    axes.text(2, target, f"{TARGET_SHARE:.0%} of the best", color="grey", va="bottom", fontsize=8)
    axes.set(xlim=(0, limit), ylim=(0, None), xlabel="seconds since the process began", ylabel="hypervolume of the front")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", choices=["run", "remeasure", "report", "all"])
    parser.add_argument("--data", type=Path, help="banking77's train.csv, with the columns text and category")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines of the runs and of what was measured again")
    parser.add_argument("--results", type=Path, help="where the results are written as JSON")
    parser.add_argument("--figure", type=Path, help="where the growth of the fronts is drawn as PNG")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=4.0, help="of one search")
    parser.add_argument("--longer", default="", help="minutes of single contenders but (a), as b=12,c=6")
    parser.add_argument("--rows-per-class", type=int, default=ROWS_PER_CLASS, help="to train on; fewer to see whether all works")
    parser.add_argument("--syne-python", type=Path, default=Path(sys.executable), help="Python with syne-tune, if it is not this one")
    parser.add_argument("--logs", type=Path, help="directory for what the contenders print")
    arguments = parser.parse_args()
    steps = {"run": run_all, "remeasure": remeasure, "report": report}
    for name, step in steps.items():
        if arguments.steps in (name, "all"):
            step(arguments)


if __name__ == "__main__":
    main()
