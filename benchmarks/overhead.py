"""What a trial costs beside its training: CPU and wall seconds, and what many trials leave behind.

Run `python benchmarks/overhead.py --results benchmarks/results/overhead.json` in the project's environment, on a machine that does
nothing else: CPU seconds are those of the whole machine. paretune runs whole searches (Optuna, ledger, MLflow in SQLite, report) at
world size 1 and 2, twice: around a loop that does nothing but ask whether to go on and report, three times a trial, and around
one that trains next to nothing: a BERT of 20 thousand parameters, LoRA, three optimizer steps, three evaluations of 24 rows and two
checkpoints. The other contender is one `TorchTrainer` inside every Tune trial, as Ray documents it
(https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html), around a loop that does nothing at all. All are
counted from one finished trial to a later one, so that starting up is in none.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")

from heading import heading  # noqa: E402
from tiny import make_rows, make_spec  # noqa: E402

from search.dispatch import Dispatcher  # noqa: E402

if TYPE_CHECKING:
    from spaces.config import TrialConfig
    from trainables.loop import Command
    from trainables.report import TrialReport

SETTLED = 10
EMPTY_STEPS = 3
NESTED_TRIALS = 4
# Who a process is, by what Ray calls it.
PARTS = {
    "Dispatcher": "dispatcher",
    "EmptyLoops": "dispatcher",
    "RayTrainWorker": "workers",
    "TrainController": "controllers of Ray Train",
    "ImplicitFunc": "Tune's relays",
    "relay": "Tune's relays",
    "raylet": "Ray's daemons",
    "gcs_server": "Ray's daemons",
    "dashboard": "Ray's daemons",
    "runtime_env_agent": "Ray's daemons",
}


@dataclass(kw_only=True)
class Snapshot:
    """The machine and the processes of a search at one moment."""

    wall_seconds: float
    machine_seconds: float
    """CPU seconds that all cores were busy since the machine started."""
    part_seconds: dict[str, float] = field(default_factory=dict)
    resident_bytes: int = 0
    num_processes: int = 0
    num_files: int = 0
    num_threads: int = 0
    num_placement_groups: int = 0


def snapshot() -> Snapshot:
    cpu = psutil.cpu_times()
    taken = Snapshot(wall_seconds=time.perf_counter(), machine_seconds=sum(cpu) - cpu.idle - cpu.iowait - cpu.guest)
    parts: dict[str, float] = defaultdict(float)
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times, title = process.cpu_times(), " ".join(process.cmdline())
            name = next((part for word, part in PARTS.items() if word in title), "other processes")
            parts["driver" if process == me else name] += times.user + times.system
            taken.resident_bytes += process.memory_info().rss
            taken.num_files += process.num_fds()
            taken.num_threads += process.num_threads()
            taken.num_processes += 1
    taken.part_seconds = dict(parts)
    return taken


def per_trial(begin: Snapshot, end: Snapshot, num_trials: int) -> dict[str, Any]:
    """Return the seconds of one trial between two moments."""
    parts = {p: (s - begin.part_seconds.get(p, 0.0)) / num_trials for p, s in sorted(end.part_seconds.items())}
    return {
        "num_trials": num_trials,
        "cpu_seconds": (end.machine_seconds - begin.machine_seconds) / num_trials,
        "wall_seconds": (end.wall_seconds - begin.wall_seconds) / num_trials,
        "cpu_seconds_by_part": parts,
    }


def empty_train(config: TrialConfig, *_: Any, control: Callable[[bool], Command], **__: Any) -> Iterator[TrialReport]:
    """Stand where `trainables.loop.train` does and report without training, with values that the sampler can learn from."""
    from spaces import metrics
    from trainables.loop import Command
    from trainables.report import TrialReport

    distance = abs(math.log(config.recipe.learning_rate / 3e-3))
    seconds = 0.01 * (config.recipe.adapter_rank or 1)
    for step in range(1, 1 + EMPTY_STEPS):
        if control(True) is Command.STOP:
            return
        yield TrialReport(
            step=step,
            num_steps=EMPTY_STEPS,
            fidelity=step / EMPTY_STEPS,
            metrics={
                **dict.fromkeys(metrics.METRICS, seconds),  # as many values for MLflow as a real trial has
                metrics.EVAL_LOSS: 1 + distance / step,
                metrics.ACCURACY: 1 / (1 + distance / step),
                metrics.TRAIN_SECONDS: seconds,
                metrics.DEVICE_SECONDS: seconds * config.layout.world_size,
            },
            final=step == EMPTY_STEPS,
        )


def work_without_training(config: dict[str, Any]) -> None:
    """Be one worker of a group, whose trials train nothing."""
    import trainables.worker

    trainables.worker.train = empty_train  # type: ignore[attr-defined]
    trainables.worker.work(config)


class EmptyLoops(Dispatcher):
    """The dispatcher, whose groups run `work_without_training`."""

    def __init__(self, *arguments: Any) -> None:
        import trainables.worker_group

        trainables.worker_group._work = work_without_training
        super().__init__(*arguments)


def run_search(directory: Path, world_size: int, num_trials: int, *, trains: bool) -> dict[str, Any]:
    """Run one whole search and return what a trial cost, and what grew from the tenth to the last."""
    import ray

    import search.jobs
    from search.session import start
    from spaces.loading import load_spec

    search.jobs.Dispatcher = Dispatcher if trains else EmptyLoops  # type: ignore[attr-defined,misc]

    space = {
        "adapter": "lora",
        "learning_rate": {"log_uniform": [1.0e-3, 1.0e-2]},
        "global_batch_size": 8,
        "lora_rank": {"choice": [2, 4]},
        "world_size": world_size,
    }
    data = {"train": str(make_rows(directory / "train.csv", num_rows=48)), "holdout": 0.5}
    spec = make_spec(directory, space=space, data=data, budget={"trials": num_trials}, resources={"workers": 2})
    taken: list[Snapshot] = []
    finished: list[float] = []

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "trial_finished":
            assert event["state"] == "COMPLETE", event
            finished.append(event["details"]["job_seconds"])
            if len(finished) in (SETTLED, num_trials):
                now = snapshot()
                groups = ray.util.placement_group_table().values()
                now.num_placement_groups = sum(group["state"] == "CREATED" for group in groups)
                taken.append(now)

    start(load_spec(spec), emit)
    settled, last = taken
    left = {
        name: {"after_the_tenth": getattr(settled, name), "after_the_last": getattr(last, name)}
        for name in ("resident_bytes", "num_processes", "num_files", "num_threads", "num_placement_groups")
    }
    inside = sum(finished[SETTLED:]) / len(finished[SETTLED:])
    cost = per_trial(settled, last, num_trials - SETTLED)
    return {"loop": "three steps" if trains else "empty", "world_size": world_size, **cost, "job_seconds": inside, "left": left}


def nested(directory: Path) -> dict[str, Any]:
    """Run one `TorchTrainer` in every trial."""
    import ray
    from ray import train, tune
    from ray.train.torch import TorchTrainer

    def train_fn(config: dict[str, Any]) -> None:
        train.report({"loss": config["learning_rate"]})

    def driver(config: dict[str, Any]) -> None:
        TorchTrainer(
            train_fn,
            train_loop_config=config,
            scaling_config=train.ScalingConfig(num_workers=1),
            run_config=train.RunConfig(storage_path=str(directory), name=tune.get_context().get_trial_id()),
        ).fit()
        tune.report({"loss": config["learning_rate"]})

    taken: list[Snapshot] = []

    class Watch(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            taken.append(snapshot())

    ray.init(num_cpus=2, log_to_driver=False)
    try:
        tune.Tuner(
            tune.with_resources(driver, {"cpu": 0.01}),
            param_space={"learning_rate": tune.loguniform(1e-4, 1e-2)},
            tune_config=tune.TuneConfig(num_samples=NESTED_TRIALS, max_concurrent_trials=1),
            run_config=tune.RunConfig(storage_path=str(directory), verbose=0, callbacks=[Watch()]),
        ).fit()
    finally:
        ray.shutdown()
    result = per_trial(taken[0], taken[-1], len(taken) - 1)
    del result["cpu_seconds_by_part"]  # its processes are gone by the end of their trial
    return {"world_size": 1, **result}


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="overhead-") as directory:
        yield Path(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200, help="trials of each search")
    parser.add_argument("--results", type=Path, help="where the results are written as JSON")
    arguments = parser.parse_args()
    searches = []
    for trains, world_size in itertools.product((False, True), (1, 2)):
        with workplace() as directory, contextlib.redirect_stdout(io.StringIO()):
            searches.append(run_search(directory, world_size, arguments.trials, trains=trains))
        print(json.dumps(searches[-1], indent=1), flush=True)
    with workplace() as directory:
        baseline = nested(directory)
    print(json.dumps(baseline, indent=1))
    result = {
        **heading(
            "python benchmarks/overhead.py --results benchmarks/results/overhead.json",
            f"{psutil.cpu_count()} cores, no GPU",
            ("ray", "torch", "optuna", "mlflow", "peft"),
        ),
        "paretune": searches,
        "one_torch_trainer_a_trial": baseline,
        "times_cheaper": [baseline["cpu_seconds"] / each["cpu_seconds"] for each in searches],
    }
    print("times cheaper than one TorchTrainer a trial:", [f"{ratio:.0f}" for ratio in result["times_cheaper"]])
    if arguments.results:
        arguments.results.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
