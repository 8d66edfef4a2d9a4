"""Builds and runs `ray.tune.Tuner`: every Tune trial leases a worker group through the dispatcher and relays its reports."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import ray
from ray import tune

from search.engine import Engine
from search.searcher import MESSAGE, EngineSearcher

# The trial only waits and relays: it takes no CPU from the workers, and stays on the head node, which is never a spot node.
TRIAL_RESOURCES = tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])


def relay(config: dict[str, Any], dispatcher: Any) -> None:
    """Be one Tune trial: hand the job in and pass on what its worker group reports."""
    job = config["job"]
    ray.get(dispatcher.submit.remote(job))
    while True:
        for event in ray.get(dispatcher.poll.remote(job.job_id)):
            if event["event"] != "started":
                tune.report({MESSAGE: json.dumps(event)})
            if event["event"] == "ended":
                return


def run(engine: Engine, dispatcher: Any, *, max_concurrent: int, storage: Path, seconds_left: float | None) -> None:
    """Run trials until the budget of the engine is used up or the time is over; trials still running then are stopped.

    Raises:
        search.engine.SearchExhausted: hardly anything in the space is feasible.
    """
    # Results live in the ledger; Tune's loggers would write every one of them three times more.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # The search has a view of its own; Tune's would print a second one, and warn that the results are not in its files.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    # Tune's snapshots are not read, so they need not be written every ten seconds.
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "86400"
    searcher = EngineSearcher(engine, max_concurrent=max_concurrent, stop_job=dispatcher.stop.remote)
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(relay, dispatcher=dispatcher), TRIAL_RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            reuse_actors=True,
            time_budget_s=seconds_left,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            verbose=0,
            # The relay may be lost with the head's memory; the job itself goes on in its group and is found again.
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    tuner.fit()
    shutil.rmtree(storage / "tune", ignore_errors=True)
