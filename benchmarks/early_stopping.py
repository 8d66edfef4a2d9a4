"""What early stopping saves: recorded learning curves, replayed on a simulated clock under several rules.

    python benchmarks/early_stopping.py --tape benchmarks/results/learning_curves.json \
        --results benchmarks/results/early_stopping.json

The environment is the project's with the extra `bench` (Syne Tune). `benchmarks/learning_curves.py` recorded the tape. Every seed is
an order of a task's trials, the same for all rules. Random search lets the first quarter of them (or all) finish; every other rule
goes on along the same order until the tape ends. Only completed trials count.

- none: random search;
- ASHA on loss: Ray's `ASHAScheduler` on the evaluation loss;
- ASHA, equal or random weights: its rule on the weighted sum of the objectives, each as its z-score at the rung;
- Syne Tune MOASHA: its own class with its own defaults;
- paretune: `search/rungs.py`; "quota alone" without what the first front has beyond 1 / factor, "by the objective" without the
  loss for the accuracy;
- foresight: stops what will be dominated at its end by a trial that came to the rung before it. No rule knows that.

All see the same rungs, the same reports and `train_seconds` of the whole trial, which a step profile tells before it starts.
Evaluation takes no time here.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from dominance import dominates  # noqa: E402
from heading import heading  # noqa: E402
from ray.tune.schedulers import ASHAScheduler, TrialScheduler  # noqa: E402
from replay import Curve, Judge, Look, Run, mean_regret, replay, time_to, volume_at  # noqa: E402
from syne_tune.backend.trial_status import Trial  # noqa: E402
from syne_tune.optimizer.scheduler import SchedulerDecision  # noqa: E402
from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA  # noqa: E402

from search.hypervolume import hypervolume  # noqa: E402
from search.pareto import cost_vector, front_indices  # noqa: E402
from search.rungs import Entry, Rungs, decide  # noqa: E402
from spaces import metrics  # noqa: E402
from spaces.fidelity import rung_shares  # noqa: E402
from spaces.spec import SearchSpec  # noqa: E402

# The first objective of each example.
QUALITY = {"banking77": metrics.ACCURACY, "shakespeare": metrics.EVAL_LOSS, "gsm8k": metrics.EVAL_LOSS}
GRACE_PERIOD, REDUCTION_FACTOR = 1 / 9, 3
FORESIGHT = "foresight"
# Of random search's final hypervolume; the rest may hang on one trial.
MOST = 0.95
# Share of the tape that random search lets finish, and workers. After a quarter every rule has four times as many trials to see.
EXPERIMENTS = ((0.25, 2), (0.25, 4), (1.0, 2))


def spec_of(task: str) -> SearchSpec:
    kind = "sequence-classification" if QUALITY[task] == metrics.ACCURACY else "causal-lm"
    return SearchSpec.model_validate(
        {
            "model": {"name": "m", "task": kind},
            "data": {"train": "t.csv"},
            "objectives": [{"metric": QUALITY[task]}, {"metric": metrics.TRAIN_SECONDS}],
            "scheduler": {"method": "asha", "grace_period": GRACE_PERIOD, "reduction_factor": REDUCTION_FACTOR},
        }
    )


def curves_of(tape: dict[str, Any], task: str) -> list[Curve]:
    """Return the trials of a task that did not diverge."""
    objectives = spec_of(task).resolved_objectives()
    curves = []
    for trial in tape["trials"]:
        if trial["task"] != task or "curve" not in trial:
            continue
        rows = {row[0]: dict(zip(tape["columns"][1:], row[1:], strict=True)) for row in trial["curve"]}
        tokens = trial["curve"][-1][1]
        known = {metrics.TRAIN_SECONDS: trial["train_seconds"]}
        curves.append(
            Curve(
                number=trial["number"],
                seconds=trial["train_seconds"],
                spent={step: row.pop("tokens") / tokens for step, row in rows.items()},
                metrics={step: {**row, **known} for step, row in rows.items()},
                costs=cost_vector({**rows[trial["num_steps"]], **known}, objectives),
            )
        )
    return curves


def reference_of(tape: dict[str, Any], task: str, curves: Sequence[Curve]) -> tuple[float, float]:
    """Return the hypervolume's corner: as in a search no accuracy or the untrained model's loss, and a time that no trial takes."""
    untrained = tape["tasks"][task]["untrained"]
    quality = 0.0 if QUALITY[task] == metrics.ACCURACY else untrained[QUALITY[task]]
    return quality, 1.05 * max(c.seconds for c in curves)


# -- the rules -------------------------------------------------------------------------------------------------------------


def none(task: str, seed: int) -> Judge:
    return lambda look: True


def on_loss(task: str, seed: int) -> Judge:
    """Ray's own scheduler; time is in units of the first rung."""
    scheduler = ASHAScheduler(
        time_attr="t", metric="loss", mode="min", max_t=round(1 / GRACE_PERIOD), grace_period=1, reduction_factor=REDUCTION_FACTOR
    )
    known: dict[int, Any] = {}

    def judge(look: Look) -> bool:
        if look.number not in known:
            known[look.number] = SimpleNamespace(trial_id=str(look.number))
            scheduler.on_trial_add(None, known[look.number])
        result = {"t": round(look.share / GRACE_PERIOD), "loss": look.metrics[metrics.EVAL_LOSS]}
        return scheduler.on_trial_result(None, known[look.number], result) == TrialScheduler.CONTINUE

    return judge


def scalarised(weigh: Callable[[random.Random], float]) -> Callable[[str, int], Judge]:
    """ASHA's rule on a weighted sum of z-scores at the rung: go on if not worse than the best 1 / factor of those before."""

    def rule(task: str, seed: int) -> Judge:
        rng = random.Random(seed)
        objectives = spec_of(task).resolved_objectives()
        recorded: dict[float, list[tuple[float, ...]]] = {}

        def judge(look: Look) -> bool:
            rows = recorded.setdefault(look.share, [])
            rows.append(cost_vector(look.metrics, objectives))
            weight = weigh(rng)
            known = np.asarray(rows)
            spread = known.std(axis=0)
            scores = (known - known.mean(axis=0)) / np.where(spread > 0, spread, 1.0) @ np.array([weight, 1 - weight])
            return len(rows) == 1 or bool(scores[-1] <= np.percentile(scores[:-1], 100 / REDUCTION_FACTOR))

        return judge

    return rule


def syne_tune(task: str, seed: int) -> Judge:
    """Syne Tune's own scheduler, all objectives to be minimised."""
    scheduler = MOASHA(
        config_space={},
        metrics=["a", "b"],
        time_attr="t",
        max_t=round(1 / GRACE_PERIOD),
        grace_period=1,
        reduction_factor=REDUCTION_FACTOR,
        random_seed=seed,
    )
    objectives = spec_of(task).resolved_objectives()
    known: dict[int, Trial] = {}

    def judge(look: Look) -> bool:
        if look.number not in known:
            known[look.number] = Trial(trial_id=look.number, config={}, creation_time=datetime.now(UTC))
            scheduler.on_trial_add(known[look.number])
        a, b = cost_vector(look.metrics, objectives)
        decision = scheduler.on_trial_result(known[look.number], {"t": round(look.share / GRACE_PERIOD), "a": a, "b": b})
        return decision == SchedulerDecision.CONTINUE

    return judge


def paretune(task: str, seed: int) -> Judge:
    rungs = Rungs(spec_of(task))

    def judge(look: Look) -> bool:
        verdict = rungs.judge(look.number, {"step": look.step, "num_steps": look.num_steps, "metrics": look.metrics})
        return verdict is None or bool(verdict["goes_on"])

    return judge


def ranked(*, whole_front: bool, by_objective: bool) -> Callable[[str, int], Judge]:
    """Return paretune's rank with less than its rule."""

    def rule(task: str, seed: int) -> Judge:
        spec = spec_of(task)
        objectives = spec.resolved_objectives() if by_objective else spec.rung_objectives()
        recorded: dict[float, list[Entry]] = {}

        def judge(look: Look) -> bool:
            known = recorded.setdefault(look.share, [])
            entry = Entry(number=look.number, costs=cost_vector(look.metrics, objectives))
            verdict = decide(known, entry, REDUCTION_FACTOR)
            known.append(entry)
            return verdict.goes_on and (
                whole_front or verdict.place * REDUCTION_FACTOR <= len(known) or len(known) < REDUCTION_FACTOR
            )

        return judge

    return rule


def foresight(curves: Sequence[Curve]) -> Callable[[str, int], Judge]:
    ends = {curve.number: curve.costs for curve in curves}

    def rule(task: str, seed: int) -> Judge:
        recorded: dict[float, list[int]] = {}

        def judge(look: Look) -> bool:
            earlier = recorded.setdefault(look.share, [])
            goes_on = not any(dominates(ends[number], ends[look.number]) for number in earlier)
            earlier.append(look.number)
            return goes_on

        return judge

    return rule


RULES: dict[str, Callable[[str, int], Judge]] = {
    "none": none,
    "ASHA on loss": on_loss,
    "ASHA, equal weights": scalarised(lambda rng: 0.5),
    "ASHA, random weights": scalarised(lambda rng: rng.random()),
    "Syne Tune MOASHA": syne_tune,
    "paretune": paretune,
    "paretune, quota alone": ranked(whole_front=False, by_objective=False),
    "paretune, by the objective": ranked(whole_front=True, by_objective=True),
    "paretune, neither": ranked(whole_front=False, by_objective=True),
}


# -- what they make of the tape --------------------------------------------------------------------------------------------


def measured(tape: dict[str, Any], task: str, share: float, num_workers: int, num_seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Return what every rule made of every order of the trials."""
    curves = curves_of(tape, task)
    reference = reference_of(tape, task, curves)
    best = hypervolume([c.costs for c in curves], reference)
    front = {c.number for c, rank in zip(curves, front_indices(np.asarray([c.costs for c in curves])), strict=True) if rank == 0}
    shares = rung_shares(GRACE_PERIOD, REDUCTION_FACTOR)
    rules = {**RULES, FORESIGHT: foresight(curves)}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in rules}
    for seed in range(num_seeds):
        order = random.Random(seed).sample(curves, len(curves))
        finished = replay(order[: round(share * len(order))], none(task, seed), shares, num_workers)
        steps = finished.hypervolumes(reference)
        until, target, reached = max(at for at, _ in finished.completed), steps[-1][1], steps[-1][0]
        for name, rule in rules.items():
            np.random.seed(seed)  # Ray and Syne Tune deal brackets by it
            run = finished if name == "none" else replay(order, rule(task, seed), shares, num_workers)
            mine = run.hypervolumes(reference)
            found[name].append(
                {
                    "seed": seed,
                    "speed": reached / time_to(mine, target),
                    "speed_to_most": time_to(steps, MOST * target) / time_to(mine, MOST * target),
                    "regret": 1 - volume_at(mine, until) / best,
                    "mean_regret": mean_regret(mine, best, until) / best,
                    **account(run, front, until),
                }
            )
    return found


def account(run: Run, front: set[int], until: float) -> dict[str, Any]:
    """Return where the time went, and which members of the whole tape's front were stopped, and where."""
    seen = front & run.trained.keys()
    stopped_at = [share for number, share in run.stopped.items() if number in front]
    return {
        "completed": sum(at <= until for at, _ in run.completed),
        "trials": len(run.trained),
        "seconds_per_trial": statistics.fmean(run.trained.values()),
        "front_seen": len(seen),
        "front_stopped": {f"{share:.3g}": stopped_at.count(share) for share in sorted(set(stopped_at))},
    }


def interval(values: Sequence[Any], statistic: Callable[[Any], float], *, draws: int = 2000) -> dict[str, float]:
    """Return a statistic of the seeds with its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    known = np.asarray(values, dtype=float)
    found = [statistic(known[rng.integers(0, len(known), len(known))]) for _ in range(draws)]
    low, high = np.percentile(found, [2.5, 97.5])
    return {"value": float(statistic(known)), "low": float(low), "high": float(high)}


def summary(rows: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a rule's figures beside random search's on the same orders."""

    def ratio(key: str) -> dict[str, float] | None:
        pairs = [(mine[key], theirs[key]) for mine, theirs in zip(rows, baseline, strict=True)]
        if not any(theirs for _, theirs in pairs):
            return None  # random search has seen the whole tape
        return interval(pairs, lambda p: float(p[:, 0].mean() / p[:, 1].mean()))

    stopped = [sum(row["front_stopped"].values()) for row in rows]
    return {
        # A rule that never gets there within the tape counts as infinitely slow.
        "speed": interval([row["speed"] for row in rows], lambda v: float(np.median(v))),
        "speed_to_most": interval([row["speed_to_most"] for row in rows], lambda v: float(np.median(v))),
        "reaches": statistics.fmean(row["speed"] > 0 for row in rows),
        "regret": interval([row["regret"] for row in rows], lambda v: float(v.mean())),
        "regret_to_random": ratio("regret"),
        "mean_regret_to_random": ratio("mean_regret"),
        "completed": statistics.fmean(row["completed"] for row in rows),
        "seconds_per_trial": statistics.fmean(row["seconds_per_trial"] for row in rows),
        "front_stopped": sum(stopped) / sum(row["front_seen"] for row in rows),
    }


def experiment(tape: dict[str, Any], share: float, num_workers: int, num_seeds: int) -> dict[str, Any]:
    """Return all rules' figures on every task, and over the tasks together."""
    by_task = {task: measured(tape, task, share, num_workers, num_seeds) for task in QUALITY}
    names = [*RULES, FORESIGHT]
    together = {name: [row for found in by_task.values() for row in found[name]] for name in names}
    figures = {
        task: {name: summary(found[name], found["none"]) for name in names} for task, found in {**by_task, "all": together}.items()
    }
    return {"share": share, "workers": num_workers, "figures": figures}


def show(found: dict[str, Any]) -> None:
    print(f"\n{found['workers']} workers; random search finishes {found['share']:.0%} of the tape")
    for task, rules in found["figures"].items():
        print(f"  {task}")
        for name, one in rules.items():
            print(
                f"    {name:26} speed {shown(one['speed'])}, to {MOST:.0%} {shown(one['speed_to_most'])}, "
                f"reaches {one['reaches']:4.0%}, regret {shown(one['regret_to_random'])}, "
                f"over time {shown(one['mean_regret_to_random'])}, {one['completed']:.1f} completed, "
                f"{one['seconds_per_trial']:.2f} s a trial, front stopped {one['front_stopped']:.0%}"
            )


def shown(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tape", type=Path, default=ROOT / "benchmarks" / "results" / "learning_curves.json")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--results", type=Path, help="where the results are written as JSON")
    arguments = parser.parse_args()
    tape = json.loads(arguments.tape.read_text())
    found = []
    for share, num_workers in EXPERIMENTS:
        found.append(experiment(tape, share, num_workers, arguments.seeds))
        show(found[-1])
    if arguments.results:
        results = {
            **heading(
                "python benchmarks/early_stopping.py --results benchmarks/results/early_stopping.json",
                "the clock is simulated",
                ("ray", "syne-tune", "numpy"),
            ),
            "tape": {task: len(curves_of(tape, task)) for task in QUALITY},
            "seeds": arguments.seeds,
            "experiments": found,
        }
        arguments.results.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
