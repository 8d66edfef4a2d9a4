"""What a search leaves behind in Ray and in the driver, counted while both still live."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import make_rows, make_spec
from waiting import wait_for

from search import cluster
from search.interruption import Interruption
from search.jobs import DispatcherSession, run_job
from search.session import start
from search.store import Store
from spaces.config import TrialConfig
from spaces.loading import load_spec
from trainables.data import TaskData
from trainables.job import Job
from trainables.preparation import prepare

pytestmark = pytest.mark.slow

# Ray's own processes; the coordinator is an actor, one a cluster, which Ray keeps for whoever comes next.
RAYS_OWN = {"IDLE", "DashboardAgent", "RuntimeEnvAgent", "_AutoscalingCoordinatorActor"}


@pytest.fixture
def ray_here() -> Iterator[Any]:
    import ray

    yield ray
    ray.shutdown()


def test_after_the_jobs_no_actor_no_placement_group_and_no_file_is_left(tmp_path: Path, ray_here: Any) -> None:
    loaded = load_spec(make_spec(tmp_path), ["resources.workers=2"])
    data = prepare(loaded.spec.model, loaded.spec.data)
    store = Store.create(loaded)
    driver = psutil.Process()
    with cluster.connected(loaded.spec.resources) as capacity:
        held = []
        for turn in range(3):
            with DispatcherSession(store, loaded.spec, data, capacity) as dispatcher:
                _train_both_world_sizes(dispatcher, store, data, turn)
                assert any(state == "CREATED" for state in _placement_groups(ray_here)), "nothing was there that could be left"
            assert set(_placement_groups(ray_here)) <= {"REMOVED"}
            # Ray ends an actor without a name some time after the last handle to it is gone, as those inside a run of Ray Train.
            wait_for(lambda: _actors(driver) <= RAYS_OWN, seconds=180)
            assert not store.groups_path.exists()
            # The first turn opens what Ray's client keeps for good; its other connections come and go, which what leaks does not.
            if turn < 2:
                held.append((driver.num_fds(), driver.num_threads()))
        most_files, most_threads = (max(counts) for counts in zip(*held, strict=True))
        wait_for(lambda: driver.num_fds() <= most_files and driver.num_threads() <= most_threads, seconds=60)


def test_trials_that_are_shorter_than_the_start_of_a_process_share_as_many_relays_as_run_at_once(tmp_path: Path) -> None:
    space = {"adapter": "lora", "learning_rate": {"log_uniform": [1.0e-3, 1.0e-2]}, "global_batch_size": 8, "world_size": 1}
    data = {"train": str(make_rows(tmp_path / "train.csv", num_rows=48)), "holdout": 0.5}
    spec = make_spec(tmp_path, space=space, data=data, budget={"trials": 24}, resources={"workers": 2})
    relays: set[int] = set()

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "trial_reported":
            relays.update(p.pid for p in psutil.Process().children(recursive=True) if _title(p).startswith("ray::ImplicitFunc"))

    start(load_spec(spec), emit)
    assert len(relays) == 2


def _actors(driver: psutil.Process) -> set[str]:
    """Return the classes of the actors below a driver, which Ray makes the titles of their processes."""
    classes = set()
    for process in driver.children(recursive=True):
        title = _title(process)
        if title.startswith("ray::"):
            classes.add(title.removeprefix("ray::").partition(".")[0])
    return classes


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return next(iter(process.cmdline()), "")
    return ""


def _placement_groups(ray: Any) -> list[str]:
    return [group["state"] for group in ray.util.placement_group_table().values()]


def _train_both_world_sizes(dispatcher: Any, store: Store, data: TaskData, turn: int) -> None:
    spec = store.load_spec().spec
    for world_size in (1, 2):
        params = {**spec.space.first(), "world_size": world_size, "dataset_fraction": 0.2}
        config = TrialConfig.from_params(params)
        job = Job(
            job_id=f"{turn}-{world_size}",
            kind="train",
            config=config.to_dict(),
            directory=str(store.trial_path(10 * turn + world_size)),
        )
        assert run_job(dispatcher, job, Interruption("leftovers"))["state"] == "complete"
