"""The dispatcher: one actor that owns the worker groups, their queue and what they report.

The searcher or a Tune trial submits a job, and the trial polls for its events; the ranks of a group take jobs from here and report to
here. `placement` decides which groups exist. Nothing here knows what a job trains.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from search.placement import Assign, Group, GroupState, Start, Stop, Waiting, decide
from search.roster import GroupLife, GroupResources, JobState
from trainables.job import Ask, Job, Task
from trainables.report import NotPlaced, OutOfMemory

logger = logging.getLogger(__name__)

# A job whose group died this often is given up: three deaths in one job are the job's fault, not the machine's.
MAX_ATTEMPTS = 3
# Groups that end before their workers ask for work: a broken environment, which further starts do not mend.
MAX_FAILED_STARTS = 3
# What the first trials' ends wait for at most, for the processes that relay them: a start takes two seconds.
MUSTER_SECONDS = 10.0


class Dispatcher:
    """Runs as a Ray actor; every method is a coroutine on one event loop, so state needs no locks."""

    def __init__(self, task: Task, resources: GroupResources) -> None:
        self._task = task
        self._resources = resources
        self._capacity = resources.capacity
        self._jobs: dict[str, JobState] = {}
        self._groups: dict[str, GroupLife] = {}
        self._changed = asyncio.Condition()
        self._names = itertools.count(1)
        self._places = itertools.count()
        self._threads = ThreadPoolExecutor(max_workers=max(1, resources.capacity))
        self._running: dict[str, asyncio.Task[None]] = {}
        self._failed_starts: Counter[int] = Counter()
        """In a row, of groups of each world size."""
        self._relays: set[str] = set()
        self._is_closing = False
        self._handle: Any = None

    # -- the driver's and the Tune trials' side ------------------------------------------------------------------------

    async def ready(self, handle: Any) -> None:
        """Take the actor's own handle, which the groups need."""
        self._handle = handle

    async def submit(self, job: Job) -> None:
        """Queue a job; submitting one again that is still known changes nothing, so a restarted Tune trial picks it up."""
        known = self._jobs.get(job.job_id)
        if known is None or (known.ended and not known.events):
            self._jobs.pop(job.job_id, None)  # one that comes again stands at the end of the line
            self._jobs[job.job_id] = JobState(job=job, place=next(self._places))
            if job.world_size > self._capacity:
                self._give_up_too_large()
            await self._place()

    async def expect(self, world_size: int, num_jobs: float) -> None:
        """Start groups on the free workers for jobs that are about to come: a start takes seconds, most of them imports.

        Args:
            world_size: of all of these jobs.
            num_jobs: with those that the groups which are there will take; infinite for as many as fit.
        """
        sizes = [group.world_size for group in self._groups.values()]
        num_fit = (self._capacity - sum(sizes)) // world_size
        for _ in range(int(min(num_fit, num_jobs - sizes.count(world_size)))):
            self._start(world_size)

    async def poll(self, job_id: str) -> list[dict[str, Any]]:
        """Wait for news of a job and take them: `{"event": "started" | "report" | "ended", ...}`, oldest first."""
        state = self._jobs[job_id]
        async with self._changed:
            await self._changed.wait_for(lambda: state.events or state.ended)
            events, state.events = state.events, []
        if state.ended:
            self._jobs.pop(job_id, None)
            await self._notify()
        return events

    async def muster(self, relay: str, num_relays: int) -> None:
        """Take note of a process that relays, and wait until all of them are there: so many, or one for each job if these are fewer.

        Where a trial ends while Tune starts a process for the next one, Tune gives that one the process that is free, ends the new
        one, and starts another for the trial after: one after the other, for as long as trials are shorter than such a start.
        """
        self._relays.add(relay)
        await self._notify()
        with suppress(TimeoutError):
            async with asyncio.timeout(MUSTER_SECONDS), self._changed:
                await self._changed.wait_for(lambda: len(self._relays) >= min(num_relays, len(self._jobs)))

    async def stop(self, job_id: str) -> None:
        """Ask a job to leave at its next step, or take it out of the queue; unknown and ended jobs are left alone.

        Its Tune trial is over: nobody polls for it any more, and once it ends it is forgotten.
        """
        state = self._jobs.get(job_id)
        if state is None or state.ended:
            return
        state.asked = Ask.STOP
        if not any(group.job_id == job_id for group in self._groups.values()):
            self._end(state, {"state": "stopped"})
        await self._notify()

    async def shutdown(self) -> None:
        """Have the jobs in flight saved, let every group go and wait until all are gone that have workers.

        What waits in the queue is left there, and so are groups that no node had room for yet: they end with this actor.
        """
        self._is_closing = True
        for state in self._jobs.values():
            state.asked = state.asked or Ask.SUSPEND
        for group in self._groups.values():
            self._release(group)
        await self._notify()
        there = [name for name, group in self._groups.items() if group.ever_joined or group.placement_group is not None]
        await asyncio.gather(*(self._running[name] for name in there), return_exceptions=True)

    async def groups(self) -> list[dict[str, Any]]:
        """Return `{"group_id", "world_size", "state", "job_id"}` of every group, for the live table and for tests."""
        return [
            {"group_id": name, "world_size": g.world_size, "state": g.state.value, "job_id": g.job_id}
            for name, g in self._groups.items()
        ]

    # -- the workers' side -------------------------------------------------------------------------------------------------

    async def task(self) -> Task:
        """Return what all jobs share."""
        return self._task

    async def placed(self, group_id: str, placement_group: Any) -> None:
        """Take note of the placement group that Ray Train holds for a group's workers."""
        self._groups[group_id].placement_group = placement_group

    async def join(self, group_id: str, rank: int) -> int:
        """Wait until all ranks of the group are here; return its generation, which fences off the ranks before a restart."""
        group = self._groups[group_id]
        if rank in group.joined:
            group.joined.clear()
        if not group.joined:
            group.generation += 1
        generation = group.generation
        group.joined.add(rank)
        if len(group.joined) == group.world_size:
            await self._assembled(group_id, group)
        async with self._changed:
            await self._changed.wait_for(lambda: group.generation != generation or len(group.joined) == group.world_size)
        return group.generation

    async def lost(self, group_id: str, generation: int, reason: str) -> bool:
        """Take note of why a worker cannot begin; return whether its group is to end, and not to be restarted."""
        group = self._groups[group_id]
        group.lost[generation] = reason
        if len(group.lost) >= MAX_ATTEMPTS:
            self._release(group)
        return group.leaving

    async def next(self, group_id: str, generation: int, sequence: int) -> tuple[int, Job] | None:
        """Wait for a job later than `sequence`; None when the group is to end, or was restarted without this rank."""
        group = self._groups[group_id]
        self._failed_starts[group.world_size] = 0

        def answerable() -> bool:
            stale = group.generation != generation
            return stale or group.leaving or (group.job_id is not None and group.sequence > sequence)

        async with self._changed:
            await self._changed.wait_for(answerable)
        if group.generation != generation or group.job_id is None or group.sequence <= sequence:
            return None
        return group.sequence, self._jobs[group.job_id].job

    async def asked(self, group_id: str, generation: int, sequence: int) -> Ask | None:
        """Wait until the job is asked to leave, or is over (None)."""
        group = self._groups[group_id]

        def over() -> bool:
            return group.generation != generation or group.sequence != sequence or group.job_id is None

        async with self._changed:
            await self._changed.wait_for(lambda: over() or self._jobs[str(group.job_id)].asked)
            return None if over() else self._jobs[str(group.job_id)].asked

    async def report(self, group_id: str, generation: int, sequence: int, report: dict[str, Any]) -> None:
        """Take a report of the running job; one from before a restart is dropped, since the step is trained again."""
        state = self._current(group_id, generation, sequence)
        if state is not None:
            state.events.append({"event": "report", "report": report})
            await self._notify()

    async def finish(self, group_id: str, generation: int, sequence: int, outcome: dict[str, Any]) -> None:
        """Take the end of the running job, from the first rank that tells it, and free the group."""
        state = self._current(group_id, generation, sequence)
        if state is None:
            return
        group = self._groups[group_id]
        group.job_id = None
        # A rank that failed alone leaves the others in a collective: Ray Train is about to restart the group.
        free = GroupState.STARTING if outcome.get("group_restarts") else GroupState.IDLE
        group.state = GroupState.STOPPING if group.leaving else free
        self._end(state, outcome)
        await self._place()

    # -- inside ------------------------------------------------------------------------------------------------------------

    def _current(self, group_id: str, generation: int, sequence: int) -> JobState | None:
        group = self._groups.get(group_id)
        if group is None or group.job_id is None or (group.generation, group.sequence) != (generation, sequence):
            return None
        return self._jobs.get(group.job_id)

    def _end(self, state: JobState, outcome: dict[str, Any]) -> None:
        state.ended = True
        state.events.append({"event": "ended", "attempts": state.attempts, "at": time.time(), **outcome})
        if state.asked is Ask.STOP:
            self._jobs.pop(state.job.job_id, None)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _assembled(self, group_id: str, group: GroupLife) -> None:
        """All ranks are here: take work, or go on with the job that was in flight when a worker died."""
        group.ever_joined = True
        if group.leaving:
            pass
        elif group.job_id is None:
            group.state = GroupState.IDLE
        else:
            self._deliver(group_id, group, self._jobs[group.job_id])
        await self._place()

    def _deliver(self, group_id: str, group: GroupLife, state: JobState) -> None:
        """Hand the job to the group, unless it has killed its workers too often or was stopped meanwhile."""
        state.attempts += 1
        if state.asked or state.attempts > MAX_ATTEMPTS:
            state.attempts -= 1
            group.job_id = None
            group.state = GroupState.IDLE
            why = group.lost.get(group.generation - 1, "")
            message = f"its workers died in {state.attempts} attempts" + (f": {why}" if why else "")
            lost = {"state": "failed", "kind": "worker_lost", "message": message}
            self._end(state, {"state": "stopped"} if state.asked else lost)
            return
        group.sequence += 1
        group.job_id = state.job.job_id
        seconds = state.job.predicted_seconds
        group.job_ends = None if seconds is None else time.monotonic() + seconds
        group.state = GroupState.BUSY
        state.events.append({"event": "started", "group_id": group_id, "attempt": state.attempts, "at": time.time()})

    def _give_up(self, message: str, is_hopeless: Callable[[int], bool]) -> None:
        """End the jobs that wait for workers of a world size that will not come."""
        if self._is_closing:
            return
        held = {group.job_id for group in self._groups.values()}
        for name, state in list(self._jobs.items()):
            if not state.ended and name not in held and is_hopeless(state.job.world_size):
                self._end(state, {"state": "failed", "kind": "no_workers", "message": message})

    def _give_up_too_large(self) -> None:
        self._give_up(f"the cluster has room for {self._capacity} workers, and it needs more", lambda size: size > self._capacity)

    def _release(self, group: GroupLife) -> None:
        group.leaving = True
        if group.state is not GroupState.BUSY:
            group.state = GroupState.STOPPING

    async def _place(self) -> None:
        """Let `placement` decide and carry it out."""
        if self._is_closing:
            await self._notify()
            return
        held = {group.job_id for group in self._groups.values()}
        # A generator, since `decide` reads few of the hundreds that may wait; jobs stand in the order in which they came.
        waiting = (
            Waiting(job_id=name, world_size=state.job.world_size, place=state.place, seconds=state.job.predicted_seconds)
            for name, state in self._jobs.items()
            if not state.ended and name not in held
        )
        now = time.monotonic()
        groups = [
            Group(group_id=n, world_size=g.world_size, state=g.state, seconds_left=None if g.job_ends is None else g.job_ends - now)
            for n, g in self._groups.items()
        ]
        for action in decide(capacity=self._capacity, groups=groups, waiting=waiting):
            match action:
                case Assign(job_id=job_id, group_id=group_id):
                    self._deliver(group_id, self._groups[group_id], self._jobs[job_id])
                case Stop(group_id=group_id):
                    self._release(self._groups[group_id])
                case Start(world_size=world_size):
                    self._start(world_size)
        await self._notify()

    def _start(self, world_size: int) -> None:
        group_id = f"group-{next(self._names):04d}-ws{world_size}"
        self._groups[group_id] = GroupLife(world_size=world_size)
        self._running[group_id] = asyncio.create_task(self._run(group_id, world_size))

    async def _run(self, group_id: str, world_size: int) -> None:
        """Hold one Ray Train run from its start to its end, then give its workers and its job back."""
        error: Exception | None = None
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._run_group, group_id, world_size)
        except Exception as failure:
            error = failure
            logger.warning("worker group %s ended: %s", group_id, failure)
            # Its controller may have been killed, and then nobody else gives the workers' place back.
            left = self._groups[group_id].placement_group
            await asyncio.get_running_loop().run_in_executor(self._threads, self._vacate, left)
        group = self._groups.pop(group_id)
        del self._running[group_id]
        why = group.lost.get(group.generation, "")
        if isinstance(error, NotPlaced):
            # Nodes were lost, or are none: the groups that are there and this one are more than there is room for.
            self._capacity = min(self._capacity, sum(other.world_size for other in self._groups.values()) + world_size - 1)
        elif len(group.lost) >= MAX_ATTEMPTS or not (group.ever_joined or group.leaving):
            self._failed_starts[world_size] += 1
        if group.job_id is not None:
            # Ray Train gave the group up: another one goes on. The memory monitor kills the youngest worker of a node, not the
            # largest: only of a job that trains alone is it clear that it is the one that takes too much.
            state = self._jobs[group.job_id]
            if state.asked and not state.ended:
                self._end(state, {"state": "stopped"})
            is_alone = not any(other.job_id for other in self._groups.values())
            is_over_memory = isinstance(error, OutOfMemory) and is_alone
            if not state.ended and (state.attempts >= MAX_ATTEMPTS or is_over_memory):
                kind = OutOfMemory.kind if is_over_memory else "worker_lost"
                self._end(state, {"state": "failed", "kind": kind, "message": str(error) if is_over_memory else why or str(error)})
        if self._failed_starts[world_size] >= MAX_FAILED_STARTS:
            message = f"no group of {world_size} workers could be started: {why or ' '.join(str(error).split())}"
            self._give_up(message, lambda size: size == world_size)
        self._give_up_too_large()
        await self._place()

    def _vacate(self, placement_group: Any) -> None:
        import ray

        try:
            if placement_group is not None:
                ray.util.remove_placement_group(placement_group)
        except Exception as error:
            logger.warning("the place of a worker group could not be given back: %s", error)

    def _run_group(self, group_id: str, world_size: int) -> None:
        # Here, in the thread: the import takes seconds, and the event loop must go on answering.
        from trainables.worker_group import run_worker_group

        run_worker_group(
            dispatcher=self._handle,
            group_id=group_id,
            world_size=world_size,
            cpus_per_worker=self._resources.cpus_per_worker,
            gpus_per_worker=self._resources.gpus_per_worker,
            storage=Path(self._resources.storage),
        )
