"""The Ray cluster: join the one this process was submitted to, or start one on this machine, and say what it holds."""

from __future__ import annotations

import glob
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from search.errors import UserError
from spaces.estimate import usable_bytes
from spaces.spec import ResourcesSpec

# Trials exchange small messages and one tokenised data set; Ray's own default would take 30 % of the memory.
LOCAL_OBJECT_STORE_BYTES = 512 * 1024**2

# What the workers of a group wait for until they have a place: an autoscaler's nodes boot, and pull their image. Ray Train tries four
# times.
NODE_START_SECONDS = 600

# What the relays of the trials share on a cluster of our own.
RELAY_RESOURCE = "paretune_relays"

# For what only waits: it takes no CPU from the workers, and stays on the head node, which is never a spot node.
ON_HEAD = {"node:__internal_head__": 0.001}

GROUP_ENVIRONMENT = {
    # Ray Train's controller drains its workers once per poll; the default of 2 s delays the end of a group by as much.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Preemption notices are not read (a lost node is a lost worker), and the watcher is one more process a group.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Relative paths of the user's file mean the working directory of the job, in workers too.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # The dispatcher holds each run in a thread of its own; Ray warns as if that thread were the event loop.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


def is_submitted() -> bool:
    """Return whether a cluster is given: `ray job submit` sets RAY_ADDRESS for what it starts."""
    return bool(os.environ.get("RAY_ADDRESS"))


def check_reachable(timeout_seconds: float = 5.0) -> None:
    """Check that something listens where RAY_ADDRESS points: Ray itself would try for minutes, and say so in its own log lines.

    Raises:
        UserError: nothing does.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return  # "auto" and the like, which Ray looks up itself
    try:
        socket.create_connection((host, int(port)), timeout=timeout_seconds).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({error.strerror or error}); unset it to use this machine"
        ) from error


def local_capacity(resources: ResourcesSpec) -> int:
    """Return how many workers this machine holds at once, without starting Ray."""
    if resources.gpus_per_worker:
        held = len(glob.glob("/dev/nvidia[0-9]*")) // resources.gpus_per_worker
    else:
        held = (psutil.cpu_count() or 1) // resources.cpus_per_worker
    return min(held, resources.workers) if resources.workers else held


def why_too_small(resources: ResourcesSpec, capacity: int, sizes: Sequence[int]) -> str:
    """Return in words, with their key, why a cluster of so many workers trains nothing of these world sizes."""
    if capacity:
        given = f"space.world_size: every allowed value ({', '.join(map(str, sizes))}) needs more workers than the cluster holds"
        return f"{given} ({capacity}); allowed: 1 to {capacity}, or change `resources`"
    gpus, cpus = resources.gpus_per_worker, resources.cpus_per_worker
    scaled = "; where an autoscaler starts nodes, resources.workers says for how many workers" if is_submitted() else ""
    if gpus:
        return (
            f"resources.gpus_per_worker: no worker fits: each takes {gpus} GPU and {cpus} CPU, and no node has them; 0 trains on CPUs"
            + scaled
        )
    return f"resources.cpus_per_worker: no worker fits: each takes {cpus} CPU, and no node has as many{scaled}"


@contextmanager
def connected(resources: ResourcesSpec) -> Iterator[int]:
    """Connect to Ray for the time of the block and yield how many workers the cluster holds at once.

    A local cluster is private to this process and gone afterwards; one that was there before is left as it was.

    Raises:
        UserError: the cluster that RAY_ADDRESS names does not let this process in.
    """
    import ray

    if is_submitted():
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING)
        except ConnectionError as error:
            why = f"{error}; where it asks for a token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH must give it here"
            raise UserError(f"RAY_ADDRESS: the Ray cluster at {os.environ['RAY_ADDRESS']} lets nobody in: {why}") from error
    else:
        # Usage statistics would be sent to the internet; a tuning tool has no business doing that by default.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray lets its workers give way to everything else (15); whatever runs beside a search would then be in its times.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Of Ray's warnings the first would be that a private cluster has a token, which is as it should be.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        try:
            ray.init(
                address="local",
                num_cpus=max(1, local_capacity(resources) * resources.cpus_per_worker),
                resources={RELAY_RESOURCE: 1.0},
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        except Exception as error:  # Ray raises that class itself
            if "timed out during startup" not in str(error):
                raise
            load = f" (load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores)"
            raise UserError(f"Ray did not start on this machine in time{load}: try again when it is less busy") from error
    try:
        num_gpus = ray.cluster_resources().get("GPU")
        if num_gpus and not resources.gpus_per_worker:
            print(f"note: {num_gpus:.0f} GPU idle: resources.gpus_per_worker is 0, and so trials train on CPUs", file=sys.stderr)
        yield _capacity(resources)
    finally:
        ray.shutdown()


def _capacity(resources: ResourcesSpec) -> int:
    """Return how many workers the cluster holds at once, each of them on one node.

    Of a cluster that was there before, as many as the user says: an autoscaler starts nodes for what waits for them alone, and does
    not tell how many it may start.
    """
    there = sum(held for _, held in _nodes(resources))
    if resources.workers is None:
        return there
    if is_submitted() and there < resources.workers:
        wanted = f"resources.workers asks for {resources.workers}"
        print(
            f"note: the cluster has room for {there} workers now, {wanted}: an autoscaler must start nodes for them", file=sys.stderr
        )
        return resources.workers
    return min(there, resources.workers)


def share_of_worker(resources: ResourcesSpec, device: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a worker's tensors may take of its device and of its host, on the node with the least, and who else is on a node.

    A worker has a share of the memory that Ray found on its node, of which its process holds some.

    Args:
        resources: of a worker.
        device: as `trainables.device.examine` found it.
    """
    nodes = _nodes(resources)
    share = int(min((has.get("memory", 0) / held for has, held in nodes), default=0))
    capacity = device.get("memory_bytes", share)
    workers_per_node = sorted((held for _, held in nodes), reverse=True)
    return {
        "workers_per_node": _padded(workers_per_node, resources.workers or 0) if is_submitted() else workers_per_node,
        "capacity_bytes": capacity,
        "usable_bytes": usable_bytes(device, capacity),
        "host_bytes": max(0, share - device["process_bytes"]),
    }


def _nodes(resources: ResourcesSpec) -> list[tuple[dict[str, float], int]]:
    """Return what each node has of the resources and how many workers it holds; none without any."""
    import ray

    nodes = [(node["Resources"], _held(resources, node["Resources"])) for node in ray.nodes() if node["Alive"]]
    return [(has, held) for has, held in nodes if held]


def _held(resources: ResourcesSpec, node: Mapping[str, float]) -> int:
    held = int(node.get("CPU", 0) // resources.cpus_per_worker) if resources.cpus_per_worker else 10**6
    if resources.gpus_per_worker:
        held = min(held, int(node.get("GPU", 0) // resources.gpus_per_worker))
    return min(held, resources.workers) if resources.workers else held


def _padded(workers_per_node: list[int], num_workers: int) -> list[int]:
    """Return how many workers the nodes hold, with those that an autoscaler is yet to start: as large as the largest."""
    missing = num_workers - sum(workers_per_node)
    return workers_per_node + workers_per_node[:1] * -(-missing // workers_per_node[0]) if workers_per_node else []


def group_environment() -> dict[str, str]:
    """Return the environment of the dispatcher and of all that it starts."""
    import ray

    # With a second Ray instance on the machine, Train's clean-up would not know which one to ask.
    environment = {**GROUP_ENVIRONMENT, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    if is_submitted():
        environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(NODE_START_SECONDS)
    return environment
