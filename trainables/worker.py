"""What every Ray Train worker of a group does: take the next job, train it, report, take the next."""

from __future__ import annotations

import gc
import logging
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from spaces.config import TrialConfig
from trainables.checkpoint import CheckpointStore
from trainables.data import TaskData
from trainables.device import examine
from trainables.hub import resolve_model
from trainables.job import HERE, Ask, Job, Task
from trainables.loop import Command, affordable_rungs, evaluate_saved, evaluate_untrained, train
from trainables.mesh import World
from trainables.model import BaseModel
from trainables.report import DiskFull, OutOfMemory, TrialError, TrialReport
from trainables.step_profile import measure_step

logger = logging.getLogger(__name__)

# Work that a killed worker may lose, or more where writing a checkpoint would else take more than this share of the time. One is
# written at evaluation points too, unless that would: of a short trial in full the optimizer's state takes longer to write than the
# steps to train.
CHECKPOINT_SECONDS, CHECKPOINT_SHARE = 60.0, 0.1


class Inbox:
    """A worker's side of the dispatcher: which job is next, and whether it shall stop."""

    def __init__(self, dispatcher: Any, group_id: str, rank: int) -> None:
        self._dispatcher = dispatcher
        self._group_id = group_id
        self._generation = ray.get(dispatcher.join.remote(group_id, rank))
        self._sequence = 0

    def lost(self, error: Exception) -> bool:
        """Say why this worker cannot begin, which whoever restarts it does not tell; return whether its group is to end."""
        message = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {message[0]}"
        return bool(ray.get(self._dispatcher.lost.remote(self._group_id, self._generation, reason)))

    def next(self) -> Job | None:
        """Wait for the next job; every rank of the group gets the same one. None: the group is no longer needed."""
        answer = ray.get(self._dispatcher.next.remote(self._group_id, self._generation, self._sequence))
        if answer is None:
            return None
        self._sequence, job = answer
        return job

    def watch(self) -> Callable[[], Ask | None]:
        """Return a function that says at once whether the job that was taken last is asked to leave, and how."""
        answer = self._dispatcher.asked.remote(self._group_id, self._generation, self._sequence)

        def asked() -> Ask | None:
            there = bool(ray.wait([answer], timeout=0)[0])
            return cast("Ask | None", ray.get(answer)) if there else None

        return asked

    def report(self, report: TrialReport) -> None:
        ray.get(self._dispatcher.report.remote(self._group_id, self._generation, self._sequence, report.to_dict()))

    def finish(self, outcome: dict[str, Any]) -> None:
        ray.get(self._dispatcher.finish.remote(self._group_id, self._generation, self._sequence, outcome))


def work(config: dict[str, Any]) -> None:
    """Train jobs until the dispatcher has no more for this group; Ray Train calls it once on every rank."""
    context = ray.train.get_context()
    torch.set_num_threads(config["threads"])
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world_size = context.get_world_size()
    world = World(
        rank=context.get_world_rank(),
        world_size=world_size,
        device=device,
        control_group=dist.new_group(backend="gloo") if world_size > 1 else None,
        node_id=ray.get_runtime_context().get_node_id(),
    )
    inbox = Inbox(config["dispatcher"], config["group_id"], world.rank)
    try:
        check_shared(Path(config["storage"]))
        task: Task = ray.get(config["dispatcher"].task.remote())
        data: TaskData = ray.get(task.data[0])
        name = resolve_model(task.model_name)
        base = BaseModel.load(name, task.model_revision, task.task, data.label_names, data.pad_token_id)
    except Exception as error:
        if inbox.lost(error):
            return
        raise
    while (job := inbox.next()) is not None:
        _run_job(job, task=task, data=data, base=base, world=world, inbox=inbox)


def check_shared(directory: Path) -> None:
    """Check that this node sees what the driver writes: else weights and checkpoints would lie where nobody looks for them.

    Raises:
        FileNotFoundError: it does not.
    """
    if not (directory / HERE).exists():
        raise FileNotFoundError(
            f"{directory.parent} is not on node {socket.gethostname()}: `directory` must name one that all nodes share"
        )


def _run_job(job: Job, *, task: Task, data: TaskData, base: BaseModel, world: World, inbox: Inbox) -> None:
    """Run one job and tell how it ended; a failure that may have left other ranks behind restarts the group."""
    started = time.perf_counter()
    try:
        outcome = _execute(job, task=task, data=data, base=base, world=world, inbox=inbox)
    except Exception as error:
        # Another rank died or failed, and this one only lost its partner in a collective: the rank that knows why tells it,
        # and if it was killed nobody does, so that the job is handed out again after the restart.
        if world.world_size > 1 and _lost_partner(error):
            raise
        # A trial's own error is raised on all ranks at the same step, unless memory or disk ran out on this rank alone. Whatever
        # else fails may have left the other ranks in a collective: only a restart of the group brings them back.
        together = isinstance(error, TrialError) and not isinstance(error, OutOfMemory | DiskFull)
        restarts = world.world_size > 1 and not together
        inbox.finish(_failure(error, restarts))
        if restarts:
            raise
        return
    finally:
        # What FSDP2 makes of a model refers to itself, and so does what torch compiles: its weights would be there beside the next's.
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
            # What was left to the host, and batches; torch 2.13 has it.
            getattr(torch.accelerator, "empty_host_cache", lambda: None)()
    if world.rank == 0:
        inbox.finish({**outcome, "job_seconds": time.perf_counter() - started})


def _execute(job: Job, *, task: Task, data: TaskData, base: BaseModel, world: World, inbox: Inbox) -> dict[str, Any]:
    config = TrialConfig.from_dict(job.config)
    directory = Path(job.directory)
    if job.kind == "device":
        return {"state": "complete", "device": examine(world, task.precisions)}
    if job.kind == "profile":
        return {"state": "complete", "profile": measure_step(config, data, base, world)}
    if job.kind == "reference":
        return {"state": "complete", "metrics": evaluate_untrained(config, data, base, world, task.exact_match_rows)}
    if job.kind == "test":
        return {"state": "complete", "metrics": evaluate_saved(config, data, base, world, directory / "final", task.exact_match_rows)}
    checkpoints = CheckpointStore(directory)
    control = _Control(inbox.watch() if world.rank == 0 else None, world, checkpoints)
    reports = train(
        config,
        data,
        base,
        world,
        control=control,
        checkpoints=checkpoints,
        exact_match_rows=task.exact_match_rows,
        rungs=job.rungs if job.is_judged else affordable_rungs(job.rungs, config, data),
    )
    finished = False
    for report in reports:
        finished = report.final
        if world.rank == 0:
            inbox.report(report)
    if control.last is Command.STOP and world.rank == 0:
        # Who stopped it cannot know when the last file is written.
        checkpoints.clear()
    return {"state": "complete" if finished else "stopped"}


class _Control:
    """Rank 0 decides after every step whether to go on, save or leave; all ranks get the same answer."""

    def __init__(self, asked: Callable[[], Ask | None] | None, world: World, checkpoints: CheckpointStore) -> None:
        self._asked = asked
        self._world = world
        self._checkpoints = checkpoints
        self._saved_at = time.monotonic()
        self.last = Command.CONTINUE

    def __call__(self, is_rung: bool) -> Command:
        command = Command.CONTINUE
        if self._asked is not None:
            ask = self._asked()
            if ask is not None:
                command = Command.STOP if ask is Ask.STOP else Command.SUSPEND
            elif self._is_due(is_rung):
                command = Command.SAVE
                self._saved_at = time.monotonic()
        if self._world.world_size > 1:
            message = torch.tensor([command.value])
            dist.broadcast(message, src=0, group=self._world.control_group)
            command = Command(int(message.item()))
        self.last = command
        return command

    def _is_due(self, is_rung: bool) -> bool:
        # From the begin of the last one on.
        unsaved, least = time.monotonic() - self._saved_at, self._checkpoints.save_seconds / CHECKPOINT_SHARE
        return unsaved > max(CHECKPOINT_SECONDS, least) or (is_rung and unsaved >= least)


def _lost_partner(error: Exception) -> bool:
    """Gloo raises plain RuntimeErrors that name only its source file; NCCL and the store have classes of their own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _failure(error: Exception, restarts: bool) -> dict[str, Any]:
    known = isinstance(error, TrialError)
    kind = error.kind if isinstance(error, TrialError) else "error"
    message = str(error) if known else f"{type(error).__name__}: {error}"
    # In words: who keeps what is logged would keep the error, and with it all that the trial held.
    logger.warning("job failed: %s: %s", kind, message, exc_info=not known)
    return {
        "state": "failed",
        "kind": kind,
        "message": message,
        "traceback": "" if known else traceback.format_exc(limit=-8),
        "group_restarts": restarts,
    }
