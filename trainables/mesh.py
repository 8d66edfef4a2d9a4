"""A worker's place among the workers that train a trial together."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from spaces.config import Layout, Strategy

# The axis of the device mesh that the ranks of a strategy are on.
AXES: dict[Strategy, str] = {"ddp": "dp_replicate", "fsdp": "dp_shard", "tp": "tp"}


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """The ranks of one trial, and which of them this is."""

    rank: int
    world_size: int
    device: torch.device
    control_group: Any
    """A gloo process group for small messages, which then never wait for the GPU; None at world size 1."""
    node_id: str = "local"
    """Ray's name of the node; one machine may hold several."""
    group: Any = None
    """The process group of these ranks' tensors; None: all processes are in it."""

    @classmethod
    def alone(cls) -> World:
        """Return the world of a single process on the CPU."""
        return cls(rank=0, world_size=1, device=torch.device("cpu"), control_group=None)

    def sharding(self, layout: Layout) -> DeviceMesh:
        """Return the device mesh over which FSDP2 shards: of all ranks, of copies that neighbours hold together, or of those that
        hold the same pieces."""
        if layout.tp_size is not None:
            return self._grid(layout)[AXES["fsdp"]]
        if layout.shard_size is not None:
            return self._grid(layout)
        return _mesh(self.device.type, (self.world_size,), (AXES["fsdp"],), dist.group.WORLD)

    def data_parallel(self, layout: Layout) -> World:
        """Return the ranks that rows are dealt to; those that share the blocks' matrices see the same rows."""
        if layout.tensor_parallel_size == 1:
            return self
        return self._along(AXES["fsdp"], layout) if layout.tp_size is not None else replace(self, rank=0, world_size=1)

    def tensor_parallel(self, layout: Layout) -> World:
        """Return the ranks that share the blocks' matrices with this one."""
        return self if layout.tp_size is None else self._along(AXES["tp"], layout)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the ranks, on all of them."""
        if self.world_size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks; of all processes."""
        assert self.group is None  # only all of them have a group for small messages
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def place(self, layout: Layout) -> dict[str, Any]:
        """Return where this rank runs and its coordinates in the device mesh, for the process map."""
        mesh = {AXES[layout.strategy] if self.world_size > 1 or layout.is_sharded else AXES["ddp"]: self.rank}
        if layout.shard_size is not None or layout.tp_size is not None:
            outer, inner, size = _axes(layout)
            mesh = {outer: self.rank // size, inner: self.rank % size}
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        return {
            "rank": self.rank,
            "mesh": mesh,
            "node_id": self.node_id,
            "host": platform.node(),
            "device": str(self.device),
            "device_name": name,
            "pid": os.getpid(),
        }

    def _grid(self, layout: Layout) -> DeviceMesh:
        outer, inner, size = _axes(layout)
        return _mesh(self.device.type, (self.world_size // size, size), (outer, inner), dist.group.WORLD)

    def _along(self, axis: str, layout: Layout) -> World:
        """Return the ranks that differ from this one along an axis alone."""
        mesh = self._grid(layout)[axis]
        return replace(self, rank=mesh.get_local_rank(), world_size=mesh.size(), group=mesh.get_group())


def _axes(layout: Layout) -> tuple[str, str, int]:
    """Return the axes of a mesh of groups, the one between them and the one inside them, and the size of one: of neighbours."""
    if layout.tp_size is not None:
        return AXES["fsdp"], AXES["tp"], layout.tp_size
    assert layout.shard_size is not None  # else all ranks are one group
    return AXES["ddp"], AXES["fsdp"], layout.shard_size


@cache
def _mesh(device_type: str, sizes: tuple[int, ...], names: tuple[str, ...], world: Any) -> DeviceMesh:
    """Return the mesh of a process group, whose own groups all trials share."""
    return init_device_mesh(device_type, sizes, mesh_dim_names=names)
