"""Run a function on several gloo processes of this machine, each with a `World` of its own."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Every rank would take seconds to import these.
PRELOADED = ["trainables.loop"]


def run(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `function(world, *args)` returns on every rank, in the order of ranks.

    Processes come from a server that has imported what they need; results travel through files, so that no queue can block on a
    dead process.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as directory:
        given = (world_size, directory, function, args)
        context = mp.start_processes(_enter, given, nprocs=world_size, join=False, start_method="forkserver")
        try:
            while not context.join(timeout=240):
                pass
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _enter(rank: int, world_size: int, directory: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from trainables.mesh import World

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    try:
        world = World(
            rank=rank,
            world_size=world_size,
            device=torch.device("cpu"),
            control_group=dist.new_group(backend="gloo"),
        )
        torch.save(function(world, *args), f"{directory}/{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
