"""What becomes of a group that Ray Train gives up, without Ray: how it tells a worker that was killed for memory."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from trainables.report import NotPlaced, OutOfMemory
from trainables.worker_group import run_worker_group

KILLED = OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node was 15.3GB used / 16.0GB limit")


def run(monkeypatch: pytest.MonkeyPatch, directory: Path, error: Exception) -> None:
    def fit(_: Any) -> None:
        # As it comes from the process of Train's controller.
        raise pickle.loads(pickle.dumps(error))

    monkeypatch.setattr(DataParallelTrainer, "fit", fit)
    run_worker_group(dispatcher=None, group_id="g", world_size=1, cpus_per_worker=1, gpus_per_worker=0, storage=directory)


def test_a_group_whose_worker_the_memory_monitor_killed_is_out_of_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"memory monitor killed a worker: Task was killed .* low on memory\.$"):
        run(monkeypatch, tmp_path, ControllerError(KILLED))


def test_a_group_that_no_node_has_room_for_is_not_placed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(NotPlaced, match="no room for 1 workers"):
        run(monkeypatch, tmp_path, ControllerError(WorkerGroupStartupTimeoutError(1)))


def test_a_group_that_fails_otherwise_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ControllerError):
        run(monkeypatch, tmp_path, ControllerError(ActorDiedError()))
