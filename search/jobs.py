"""The dispatcher for the time of a search, and the jobs that are no trials."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, cast

from search import cluster
from search.dispatch import Dispatcher
from search.interruption import Interruption
from search.roster import GroupResources
from search.store import Store
from spaces.spec import SearchSpec
from trainables.job import HERE, Job, Task

if TYPE_CHECKING:
    from trainables.data import TaskData


class JobFailed(Exception):
    """A job that the search cannot do without failed; the message is one line for the user."""


class DispatcherSession:
    """The dispatcher actor for the time of a block; its groups are gone before the block ends."""

    def __init__(self, store: Store, spec: SearchSpec, data: TaskData, capacity: int) -> None:
        self._store, self._spec, self._data, self._capacity = store, spec, data, capacity

    def __enter__(self) -> Any:
        import ray

        spec = self._spec
        task = Task(
            model_name=spec.model.name,
            model_revision=spec.model.revision,
            task=spec.model.task,
            exact_match_rows=spec.data.exact_match_rows,
            precisions=tuple(spec.space.precision.ends()),
            data=[ray.put(self._data)],
        )
        self._store.groups_path.mkdir(parents=True, exist_ok=True)
        (self._store.groups_path / HERE).touch()
        resources = GroupResources(
            capacity=self._capacity,
            cpus_per_worker=spec.resources.cpus_per_worker,
            gpus_per_worker=spec.resources.gpus_per_worker,
            storage=str(self._store.groups_path),
        )
        self._actor = (
            ray.remote(cast(Any, Dispatcher))
            .options(
                num_cpus=0,
                resources=cluster.ON_HEAD,
                max_concurrency=100_000,
                runtime_env={"env_vars": cluster.group_environment()},
            )
            .remote(task, resources)
        )
        ray.get(self._actor.ready.remote(self._actor))
        return self._actor

    def __exit__(self, *_: object) -> None:
        import ray

        ray.get(self._actor.shutdown.remote())
        ray.kill(self._actor)
        # Ray Train's own bookkeeping of the groups; nothing of it outlives them.
        shutil.rmtree(self._store.groups_path, ignore_errors=True)


def run_to_end(dispatcher: Any, job: Job, interruption: Interruption) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run one job that is no trial; return how it ended, whatever that is, and its reports.

    Raises:
        search.interruption.Interrupted: the search was asked to leave.
    """
    import ray

    ray.get(dispatcher.submit.remote(job))
    reports: list[dict[str, Any]] = []
    while True:
        news = dispatcher.poll.remote(job.job_id)
        while not ray.wait([news], timeout=1)[0]:
            interruption.check()
        for event in ray.get(news):
            if event["event"] == "report":
                reports.append(event["report"])
            elif event["event"] == "ended":
                return dict(event), reports


def run_job(dispatcher: Any, job: Job, interruption: Interruption) -> dict[str, Any]:
    """Run one job that is no trial.

    Raises:
        JobFailed: it failed.
        search.interruption.Interrupted: the search was asked to leave.
    """
    ended, _ = run_to_end(dispatcher, job, interruption)
    if ended["state"] != "complete":
        raise JobFailed(f"{job.kind} of {job.job_id} failed: {ended.get('message', ended['state'])}")
    return ended
