"""Builds and runs `ray.tune.Tuner`: every Tune trial leases a worker group through the dispatcher and relays its reports."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune

from search import cluster
from search.engine import Engine
from search.relay import relay
from search.rungs import Rungs
from search.scheduler import RungScheduler
from search.searcher import EngineSearcher

# Ray counts resources in parts of this size.
SMALLEST_SHARE = 1e-4
TUNE_ENVIRONMENT = {
    # Results live in the ledger; Tune's loggers would write every one of them three times more.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The search has a view of its own; Tune's would print a second one, and warn that the results are not in its files.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Signals are the session's: Tune's handler would end the search as if it were complete.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # Tune's snapshots are not read, so they need not be written every ten seconds.
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
}


def relay_resources(num_relays: int) -> tune.PlacementGroupFactory:
    """Return what a relay holds; on a cluster of our own, so that no more than these fit at once.

    Tune keeps the actor of a trial that ends for the next one only if that one is waiting for resources; else every other trial
    starts a process. So one trial more is handed out than relays fit. A cluster that was there before has nothing to count relays by.
    """
    if cluster.RELAY_RESOURCE not in ray.cluster_resources():
        return tune.PlacementGroupFactory([cluster.ON_HEAD])
    share = max(1, int(1 / SMALLEST_SHARE / num_relays)) * SMALLEST_SHARE
    return tune.PlacementGroupFactory([{**cluster.ON_HEAD, cluster.RELAY_RESOURCE: round(share, 4)}])


class _Leave(tune.Stopper):
    """Ends Tune's loop from outside; Tune asks many times a second."""

    def __init__(self, is_asked: Callable[[], bool]) -> None:
        self._is_asked = is_asked

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._is_asked()

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles what it was given, and reads none of it.
        return {}


def run(
    engine: Engine,
    dispatcher: Any,
    *,
    rungs: Rungs,
    max_concurrent: int,
    storage: Path,
    interrupted: Callable[[], bool],
) -> None:
    """Run trials until the budget of the engine is used up; trials still running when time or money are over are stopped.

    Args:
        engine: proposes the trials and records what becomes of them.
        dispatcher: handle of the dispatcher actor.
        rungs: decides which trials are stopped early.
        max_concurrent: trials that are handed out at once: all that can run, and at least one to go on with.
        storage: directory for Tune's own files, which are removed at the end.
        interrupted: asked all the time; once it is true, nothing more is started and what runs stays in flight.

    Raises:
        search.engine.SearchExhausted: hardly anything in the space is feasible.
    """
    os.environ.update(TUNE_ENVIRONMENT)
    # Else Tune asks for a second trial once the first one's relay is there, two seconds later; how many there are the searcher says.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max_concurrent)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    searcher = EngineSearcher(
        engine,
        max_concurrent=max_concurrent,
        submit_job=dispatcher.submit.remote,
        stop_job=dispatcher.stop.remote,
        interrupted=interrupted,
    )
    num_relays = max_concurrent - 1
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(relay, dispatcher=dispatcher, num_relays=num_relays), relay_resources(num_relays)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=RungScheduler(engine, rungs),
            num_samples=-1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(storage),
            verbose=0,
            stop=_Leave(lambda: interrupted() or bool(engine.reached)),
            # The relay may be lost with the head's memory; the job itself goes on in its group and is found again.
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    try:
        tuner.fit()
        searcher.stop_rest()
    finally:
        shutil.rmtree(storage / "tune", ignore_errors=True)
