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

    @classmethod
    def alone(cls) -> World:
        """Return the world of a single process on the CPU."""
        return cls(rank=0, world_size=1, device=torch.device("cpu"), control_group=None)

    def mesh(self, num_shards: int) -> DeviceMesh:
        """Return the device mesh over which FSDP2 shards: of all ranks, or of copies that as many neighbours hold together."""
        if num_shards == self.world_size:
            return init_device_mesh(self.device.type, (self.world_size,), mesh_dim_names=(AXES["fsdp"],))
        return _hybrid_mesh(self.device.type, self.world_size // num_shards, num_shards, dist.group.WORLD)

    def data_parallel(self, layout: Layout) -> World:
        """Return the ranks that rows are dealt to; where they share the blocks' matrices, each sees all rows as if it were alone."""
        return self if layout.tensor_parallel_size == 1 else replace(self, rank=0, world_size=1)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over the ranks, on all of them."""
        if self.world_size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def place(self, layout: Layout) -> dict[str, Any]:
        """Return where this rank runs and its coordinates in the device mesh, for the process map."""
        mesh = {AXES[layout.strategy] if self.world_size > 1 else AXES["ddp"]: self.rank}
        if layout.shard_size is not None:
            copy, shard = divmod(self.rank, layout.shard_size)
            mesh = {AXES["ddp"]: copy, AXES["fsdp"]: shard}
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


@cache
def _hybrid_mesh(device_type: str, num_copies: int, num_shards: int, world: Any) -> DeviceMesh:
    """Return the mesh of copies and shards of a process group, whose own groups all trials share."""
    return init_device_mesh(device_type, (num_copies, num_shards), mesh_dim_names=(AXES["ddp"], AXES["fsdp"]))
