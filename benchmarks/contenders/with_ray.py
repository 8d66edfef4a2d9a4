"""(b) Ray Tune with `OptunaSearch` and one nested `TorchTrainer` per trial.

As https://docs.ray.io/en/latest/train/user-guides/hyperparameter-optimization.html shows it; two trials at once, one worker and one
core each.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ray
import ray.train
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search.optuna import OptunaSearch

from benchmarks.contenders.task import Run, Task, suggest

RUN = "run"


def train_fn(config: dict[str, Any]) -> None:
    """Be the one worker of a trial."""
    run, params = Run(**config[RUN]), {name: value for name, value in config.items() if name != RUN}
    point = Task(run.data).finish(params)
    run.finished(params, point.accuracy, point.train_seconds)
    ray.train.report({"accuracy": point.accuracy, "train_seconds": point.train_seconds})


def driver(config: dict[str, Any]) -> None:
    """Be a Tune trial."""
    trainer = TorchTrainer(
        train_fn,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(
            name=f"train-{tune.get_context().get_trial_id()}",
            storage_path=f"{config[RUN]['scratch']}/train",
            callbacks=[TuneReportCallback()],
        ),
    )
    trainer.fit()


def space(run: dict[str, Any], trial: Any) -> dict[str, Any]:
    """Propose params, and hand on what does not vary."""
    suggest(trial)
    return {RUN: run}


def main() -> None:
    run = Run.from_command_line()
    # A driver that held a share of a core would leave too little of it for the second worker.
    ray.init(num_cpus=2, resources={"drivers": 2}, include_dashboard=False, log_to_driver=False)

    tuner = tune.Tuner(
        tune.with_resources(driver, tune.PlacementGroupFactory([{"drivers": 1}])),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(
                partial(space, run.to_dict()), metric=["accuracy", "train_seconds"], mode=["max", "min"], seed=run.seed
            ),
            num_samples=-1,
            max_concurrent_trials=2,
            time_budget_s=run.seconds_left,
        ),
        run_config=tune.RunConfig(storage_path=f"{run.scratch}/tune", verbose=0),
    )
    tuner.fit()


if __name__ == "__main__":
    main()
