"""A Tune trial: it hands a job in and passes on what is reported of it.

In a module that imports little: each relay is a process, which imports this one as it starts, and the search waits for the first.
"""

from __future__ import annotations

import json
from typing import Any

import ray
from ray import tune

# A Tune result is flattened on its way to the driver, so reports travel as one JSON string under this key.
MESSAGE = "message"
# Keys of a Tune trial's config: the job that it hands in, and the number of the trial that the job trains.
JOB, NUMBER = "job", "number"


def relay(config: dict[str, Any], dispatcher: Any, num_relays: int) -> None:
    """Be one Tune trial, in one of so many processes: pass on what the job's worker group reports."""
    job = config[JOB]
    # The searcher has handed it in; where Tune starts a lost relay again, it may have been forgotten since.
    ray.get(dispatcher.submit.remote(job))
    all_there = dispatcher.muster.remote(ray.get_runtime_context().get_actor_id(), num_relays)
    while True:
        for event in ray.get(dispatcher.poll.remote(job.job_id)):
            if event["event"] == "ended":
                ray.get(all_there)
            tune.report({MESSAGE: json.dumps(event)})
            if event["event"] == "ended":
                return
