"""A worker group: one long-lived Ray Train run whose workers train job after job."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._common.network_utils import build_address  # type: ignore[attr-defined]
from ray.exceptions import OutOfMemoryError
from ray.train import ControllerError, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from trainables.report import NotPlaced, OutOfMemory

# A collective that a dead or stopped rank never joins ends after this long, and the group restarts.
COLLECTIVE_TIMEOUT_SECONDS = 600


def _work(config: dict[str, Any]) -> None:
    """Be one worker. What it imports takes seconds and hundreds of megabytes, of which whoever starts the group needs nothing."""
    from trainables.worker import work

    work(config)


class _Placed(WorkerGroupCallback):
    """Tells the dispatcher the placement group of the workers, every time that they are started."""

    def __init__(self, dispatcher: Any, group_id: str) -> None:
        self._dispatcher, self._group_id = dispatcher, group_id

    def after_worker_group_start(self, worker_group: Any) -> None:
        place = worker_group.get_worker_group_state().placement_group_handle.placement_group
        ray.get(self._dispatcher.placed.remote(self._group_id, place))


def _join(*, is_one_of_many_nodes: bool, **group: Any) -> None:
    """Import what a worker needs and join the process group of all; each of them runs it."""
    # A sixth of the time would go into the search for garbage among modules, which all stay. Nor is it searched for among them later:
    # that takes 0.2 s.
    gc.disable()
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    import trainables.worker  # noqa: F401

    gc.freeze()
    gc.enable()
    _set_torch_distributed_env_vars()
    if is_one_of_many_nodes and (name := _interface()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    _setup_torch_process_group(**group)


def _interface() -> str | None:
    """Return the network interface by which Ray knows this node; gloo would take that of the host's name, which may be a loopback."""
    address = ray.util.get_node_ip_address()
    return next((name for name, known in psutil.net_if_addrs().items() if address in {one.address for one in known}), None)


class _Torch(Backend):
    """Ray Train's backend for torch, but torch is imported by the workers alone: it takes a second of each process.

    Nothing is taken down: the workers' processes end with their group.
    """

    share_cuda_visible_devices = True

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        """Form the process group; who cannot join in time fails the start."""
        assert isinstance(backend_config, _TorchConfig)
        host, port = worker_group.execute_single(0, get_address_and_port)
        is_one_of_many_nodes = sum(node["Alive"] for node in ray.nodes()) > 1
        joining: Any = [
            worker_group.execute_single_async(
                rank,
                _join,
                is_one_of_many_nodes=is_one_of_many_nodes,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method=f"tcp://{build_address(host, port)}",
                timeout_s=COLLECTIVE_TIMEOUT_SECONDS,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(joining)


@dataclass(frozen=True, kw_only=True)
class _TorchConfig(BackendConfig):
    backend: str
    """Of `torch.distributed`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Torch


class _Placing(FixedScalingPolicy):
    """Gets its workers by their placement group alone: the dispatcher starts no more than the cluster holds."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Do not tell the actor that coordinates what several runs ask of an autoscaler."""

    def _maybe_send_resource_request(self) -> None:
        """Nor later."""


class _Trainer(DataParallelTrainer):
    """Starts no actor that a group has no use for: each is a process that takes more than a second of a core.

    There are no Ray Data sets here. What a killed controller leaves taken the dispatcher gives back, which learns of it at once;
    Ray's own cleaner asks the dashboard every second, which a laptop need not have.
    """

    def _initialize_and_run_controller(self, **controller: Any) -> Result:
        # These annotations are those of Train V1.
        scaling: Any = self.scaling_config
        return super()._initialize_and_run_controller(**{**controller, "scaling_policy": _Placing(scaling)})

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        callbacks = super()._create_default_callbacks()
        return [c for c in callbacks if not isinstance(c, DatasetsCallback | PlacementGroupCleanerCallback)]


def run_worker_group(
    *,
    dispatcher: Any,
    group_id: str,
    world_size: int,
    cpus_per_worker: int,
    gpus_per_worker: int,
    storage: Path,
) -> None:
    """Start the group and block until the dispatcher lets it go.

    Ray Train forms the group (placement, rendezvous) and restarts it when a worker dies; the dispatcher then hands the job in
    flight out again, so restarts are unlimited here and counted per job there.

    Raises:
        OutOfMemory: Ray's memory monitor killed a worker.
        NotPlaced: no node had room for its workers.
        ray.train.TrainingFailedError: the group could not be started or restarted.
    """
    resources: dict[str, float] = {"CPU": cpus_per_worker}
    if gpus_per_worker:
        resources["GPU"] = gpus_per_worker
    trainer = _Trainer(
        _work,
        train_loop_config={"dispatcher": dispatcher, "group_id": group_id, "threads": cpus_per_worker, "storage": str(storage)},
        backend_config=_TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(num_workers=world_size, use_gpu=bool(gpus_per_worker), resources_per_worker=resources),
        run_config=RunConfig(
            name=group_id,
            # Here too the annotations are those of Train V1.
            callbacks=[_Placed(dispatcher, group_id)],  # type: ignore[list-item]
            storage_path=str(storage),
            # The annotations are those of Train V1, which knows no limit for failed starts.
            failure_config=FailureConfig(max_failures=-1, controller_failure_limit=3),  # type: ignore[call-arg]
        ),
    )
    try:
        trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            raise NotPlaced(f"no room for {world_size} workers was found in time") from error
        # Letting go of a worker that the monitor killed raises this again in Ray 2.60, which then gives the group up.
        if not isinstance(error.controller_failure, OutOfMemoryError):
            raise
        message = str(error.controller_failure).splitlines()[0]
        raise OutOfMemory(f"Ray's memory monitor killed a worker: {message}") from error
