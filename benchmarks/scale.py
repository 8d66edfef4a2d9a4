"""What a large search costs its driver, and what placement makes of a cluster, without Ray and without workers.

Run `python benchmarks/scale.py --results benchmarks/results/scale.json` in the project's environment. The clock of the workers is
simulated (`tests/simulation.py`): a group takes 15 s to start and 2 s to end. Three parts:

- placement: trials of seconds to an hour on 1 to 1,024 workers; which share of the worker-time is trained in as long as a trial
  waits, and how many groups are started, if all trials wait and if as many are handed out at once as in a search, whose seconds are
  predicted within a fifth or not at all;
- proposals: what a search finds with so many trials in flight, and what a suggestion costs by the number of trials that TPE sees;
- driver: engine, Optuna study, ledger (with its fsync) and placement through all trials, whose results come from a closed form;
  seconds and bytes per trial as the search grows. Resident memory is that of the whole process, after a garbage collection. Times
  are of the wall and of the CPU, which differ where the ledger waits for the disk or the machine has other work.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import yaml
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import simulation  # noqa: E402
from engines import Profiles  # noqa: E402
from heading import heading  # noqa: E402
from simulation import Outcome, SimulatedTrial, Simulation, mixed_trials, packing_bound  # noqa: E402

import search.study  # noqa: E402
from search.engine import Assignment, Engine  # noqa: E402
from search.hypervolume import hypervolume  # noqa: E402
from search.ledger import Ledger  # noqa: E402
from search.placement import num_handed_out  # noqa: E402
from search.proposals import Proposal  # noqa: E402
from search.store import Store  # noqa: E402
from search.study import MAX_REMEMBERED, Study  # noqa: E402
from spaces.constraints import Limits  # noqa: E402
from spaces.loading import LoadedSpec, load_spec  # noqa: E402

Seconds = NDArray[np.float64]
"""Wall and CPU."""

NUM_WORKERS = 1024
WORLD_SIZES = (1, 2, 4, 8)
CHECKPOINTS = (1000, 2000, 5000, 10_000)
SPEC: dict[str, Any] = {
    "name": "scale",
    "model": {"name": "m", "task": "sequence-classification"},
    "data": {"train": "t.csv"},
    # About a third of the proposals are infeasible: the batch does not divide.
    "space": {
        "world_size": {"choice": list(WORLD_SIZES)},
        "micro_batch_size": {"choice": [2, 4, 8]},
        "epochs": {"choice": [1, 2, 4]},
    },
    "objectives": [
        {"metric": "accuracy", "direction": "maximize", "reference": 0.0},
        {"metric": "train_seconds", "direction": "minimize", "reference": 3600.0},
    ],
}


def result(params: Mapping[str, Any]) -> tuple[float, float]:
    """Return accuracy and seconds of a trial: a power law of the rows, a best rate by batch size, and workers that scale badly."""
    rows = 10_000 * params["dataset_fraction"] * params["epochs"]
    best_rate = 2e-3 * math.sqrt(params["global_batch_size"] / 32)
    off = 0.1 * math.log10(params["learning_rate"] / best_rate) ** 2
    accuracy = 0.95 - 0.35 * (rows / 1000) ** -0.5 - off - 0.05 / math.sqrt(params["lora_rank"])
    work = (
        rows * 0.03 * (1 + params["lora_rank"] / 64) * (1 + 4 / params["global_batch_size"]) * (1 + 0.5 / params["micro_batch_size"])
    )
    return accuracy, work / params["world_size"] ** 0.85


def is_feasible(params: Mapping[str, Any]) -> bool:
    return params["global_batch_size"] % (params["world_size"] * params["micro_batch_size"]) == 0


def placement_rows(num_trials: int) -> list[dict[str, Any]]:
    """Simulate clusters of all sizes; the largest trial takes up to eight workers, or the whole cluster."""
    rows = []
    for exponent in range(11):
        capacity = 2**exponent
        mixes = {min(exponent, 3), exponent} - ({0} if exponent else set())
        for sizes in ([2**i for i in range(most + 1)] for most in sorted(mixes)):
            few = num_handed_out(capacity, sizes, math.inf)
            for window, error in ((few, 0.2), (few, None), (num_trials, None)):
                outcomes = []
                for seed in range(3):
                    trials = mixed_trials(num_trials, sizes, seed=seed, error=error)
                    outcomes.append((trials, Simulation(capacity, trials, window=window).run()))
                case = {"workers": capacity, "largest": sizes[-1], "handed_out": window, "error_of_predicted_seconds": error}
                rows.append({**case, **placed(capacity, outcomes)})
                print(" ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    return rows


def placed(capacity: int, outcomes: Sequence[tuple[list[SimulatedTrial], Outcome]]) -> dict[str, Any]:
    """Return the lowest, the middle and the highest share that was trained in, and what else is told of a cluster."""
    shares = sorted(o.worker_seconds["busy"] / (o.worker_seconds.total() - o.worker_seconds["drained"]) for _, o in outcomes)
    middle = statistics.median
    return {
        "busy_while_waiting": [round(share, 4) for share in shares],
        "bound_over_makespan": round(middle(packing_bound(capacity, trials) / o.seconds for trials, o in outcomes), 4),
        "starts_per_trial": round(middle(o.num_starts / len(trials) for trials, o in outcomes), 4),
        "most_overtaken": max(o.most_overtaken for _, o in outcomes),
        "decide_microseconds": round(middle(1e6 * o.decide_seconds / o.num_decisions for _, o in outcomes), 1),
    }


def new_study(loaded: LoadedSpec, *, sampler: search.study.SamplerName = "tpe", seed: int = 0) -> Study:
    spec = loaded.spec
    return Study(space=spec.space, objectives=spec.resolved_objectives(), sampler=sampler, seed=seed, startup_trials=10)


def ask_feasible(study: Study) -> Proposal:
    while not is_feasible((proposal := study.ask()).params):
        study.tell_infeasible(proposal.number, {"global_batch_divisible": 1.0})
    return proposal


def in_flight_rows(loaded: LoadedSpec, *, num_trials: int = 100, num_seeds: int = 20) -> list[dict[str, Any]]:
    """Run small searches with more and more trials in flight, which end in any order; the hypervolume is over log seconds."""
    rows = []
    for in_flight in (1, 3, 7, 13, 21, 33):
        volumes = []
        for seed in range(num_seeds):
            study, rng = new_study(loaded, seed=seed), random.Random(seed)
            live: list[Proposal] = []
            points = []
            for number in range(num_trials + in_flight - 1):
                if number < num_trials:
                    live.append(ask_feasible(study))
                if number + 1 >= in_flight:
                    proposal = live.pop(rng.randrange(len(live)))
                    accuracy, seconds = result(proposal.params)
                    study.tell_complete(proposal.number, {"accuracy": accuracy, "train_seconds": seconds}, {})
                    points.append((-accuracy, math.log(seconds)))
            volumes.append(hypervolume(points, (0.0, math.log(3600))))
        error = statistics.stdev(volumes) / math.sqrt(num_seeds)
        rows.append({"in_flight": in_flight, "hypervolume": round(statistics.mean(volumes), 4), "standard_error": round(error, 4)})
        print(f"{in_flight} in flight: hypervolume {rows[-1]['hypervolume']} +- {rows[-1]['standard_error']}", flush=True)
    return rows


def remembered_rows(loaded: LoadedSpec, num_trials: int) -> list[dict[str, Any]]:
    """Time a suggestion after so many random trials, 300 of which run, by the number of ended trials that the sampler sees."""
    rows = []
    for remembered in (MAX_REMEMBERED, 1000, 3000, num_trials):
        search.study.MAX_REMEMBERED = remembered
        study = new_study(loaded, sampler="random")
        proposals = [study.ask() for _ in range(num_trials + 300)]
        for proposal in proposals[:num_trials]:
            accuracy, seconds = result(proposal.params)
            study.tell_complete(proposal.number, {"accuracy": accuracy, "train_seconds": seconds}, {})
        study._method = "tpe"
        study._reseed()
        took = [timed_seconds(study.ask) for _ in range(7)]
        rows.append({"remembered": remembered, "suggest_seconds": [round(s, 4) for s in sorted(took)]})
        print(f"{remembered} remembered: {statistics.median(took):.3f} s a suggestion", flush=True)
    search.study.MAX_REMEMBERED = MAX_REMEMBERED
    return rows


def timed_seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def wall_and_cpu() -> Seconds:
    return np.array([time.perf_counter(), time.process_time()])


class Parts:
    """Wall and CPU seconds by part, each without those inside it that are another part's."""

    def __init__(self) -> None:
        self.seconds: dict[str, Seconds] = defaultdict(lambda: np.zeros(2))
        self.suggestions: list[Seconds] = []
        self._inner = [np.zeros(2)]

    def watch(self, owner: Any, part: str, *methods: str) -> None:
        """Count what these methods of an object take."""
        for method in methods:
            setattr(owner, method, self._watched(getattr(owner, method), part))

    def _watched(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(np.zeros(2))
            began = wall_and_cpu()
            try:
                return call(*args, **kwargs)
            finally:
                took = wall_and_cpu() - began
                self.seconds[part] += took - self._inner.pop()
                self._inner[-1] += took
                if part == "suggest":
                    self.suggestions.append(took)

        return watched


class Driver:
    """A search of simulated trials."""

    def __init__(self, loaded: LoadedSpec, root: Path) -> None:
        self._loaded = loaded
        self._store = Store(root=root / "runs" / "scale")
        self._store.root.mkdir(parents=True)
        self._parts = Parts()
        self._assignments: dict[int, Assignment] = {}
        self._num_ended = 0
        self._rng = random.Random(0)
        self._parts.watch(simulation, "placement", "decide")
        self._engine = self._open()
        self._simulation = Simulation(
            NUM_WORKERS, self._trials(), window=num_handed_out(NUM_WORKERS, WORLD_SIZES, math.inf), on_end=self._end
        )
        self._last: dict[str, Any] = {"trials": 0, "resident_bytes": resident_bytes()}
        self.rows: list[dict[str, Any]] = []
        self.resume_seconds = 0.0

    def run(self) -> None:
        """Train all trials, then open the search again."""
        self._simulation.run()
        self.resume_seconds = round(timed_seconds(self._open), 2)

    def _open(self) -> Engine:
        ledger, study = Ledger(self._store.ledger_path), new_study(self._loaded)
        self._parts.watch(study, "suggest", "ask")
        self._parts.watch(study, "tell", "tell_complete", "tell_infeasible")
        self._parts.watch(ledger, "ledger", "append")
        engine = Engine(
            store=self._store,
            spec=self._loaded.spec,
            ledger=ledger,
            study=study,
            limits=Limits(num_workers=NUM_WORKERS, hidden_size=384),
            outlook=Profiles(),
            on_event=lambda _: None,
        )
        self._parts.watch(engine, "engine", "next", "job", "reported", "ended")
        return engine

    def _trials(self) -> Iterator[SimulatedTrial]:
        while (assignment := self._engine.next()) is not None:
            self._engine.job(assignment)
            self._assignments[len(self._simulation.outcome.submitted)] = assignment
            yield SimulatedTrial(world_size=assignment.config.layout.world_size, seconds=result(self._params(assignment))[1])

    def _params(self, assignment: Assignment) -> Mapping[str, Any]:
        return self._engine.state.records[assignment.number].params

    def _end(self, line: int) -> None:
        """Report three times, as a trial does, and end."""
        assignment = self._assignments.pop(line)
        accuracy, seconds = result(self._params(assignment))
        accuracy += self._rng.gauss(0, 0.01)
        for step in (100, 300, 900):
            metrics = {"accuracy": accuracy, "train_seconds": seconds, **{f"perf/metric_{i}": 0.1 * i for i in range(20)}}
            details = {f"detail_{i}": [i, i + 1] for i in range(20)} if step == 900 else {}
            report = {"step": step, "num_steps": 900, "fidelity": step / 900, "metrics": metrics, "final": step == 900}
            self._engine.reported(assignment.number, {**report, "details": details})
        self._engine.ended(assignment.number, {"state": "complete", "attempts": 1, "job_seconds": seconds})
        self._num_ended += 1
        if self._num_ended in CHECKPOINTS:
            self._checkpoint()

    def _checkpoint(self) -> None:
        parts = {part: seconds.copy() for part, seconds in self._parts.seconds.items()}
        now: dict[str, Any] = {"trials": self._num_ended, "resident_bytes": resident_bytes(), **parts}
        since = now["trials"] - self._last["trials"]
        recent = np.array(self._parts.suggestions[-500:]).T
        self.rows.append(
            {
                "trials": self._num_ended,
                "in_flight": len(self._engine.state.in_flight),
                "front": len(self._engine.front()),
                "suggestion_seconds": {
                    clock: {"median": round(np.median(row), 4), "p95": round(np.quantile(row, 0.95), 4), "max": round(row.max(), 4)}
                    for clock, row in zip(("wall", "cpu"), recent, strict=True)
                },
                "seconds_per_trial": {
                    part: dict(zip(("wall", "cpu"), np.round((parts[part] - self._last.get(part, 0.0)) / since, 5), strict=True))
                    for part in parts
                },
                "resident_mebibytes": round(now["resident_bytes"] / 2**20, 1),
                "resident_bytes_per_trial": round((now["resident_bytes"] - self._last["resident_bytes"]) / since),
                "ledger_bytes_per_trial": round(self._store.ledger_path.stat().st_size / self._num_ended),
            }
        )
        self._last = now
        print(json.dumps(self.rows[-1]), flush=True)


def resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=CHECKPOINTS[-1], help="trials of the search and of each cluster")
    parser.add_argument("--results", type=Path, help="where the results are written as JSON")
    arguments = parser.parse_args()
    with TemporaryDirectory() as directory:
        path = Path(directory) / "spec.yaml"
        path.write_text(yaml.safe_dump({**SPEC, "budget": {"trials": arguments.trials}, "directory": directory}))
        loaded = load_spec(path)
        driver = Driver(loaded, Path(directory))
        driver.run()
        print(f"resumed in {driver.resume_seconds} s")
        measured = {
            "driver": driver.rows,
            "resume_seconds": driver.resume_seconds,
            "remembered": remembered_rows(loaded, arguments.trials),
            "in_flight": in_flight_rows(loaded),
            "placement": placement_rows(arguments.trials),
        }
    head = heading("python benchmarks/scale.py --results benchmarks/results/scale.json", "one core", ("optuna", "numpy"))
    if arguments.results:
        arguments.results.write_text(json.dumps(head | measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
