"""Which worker groups exist, and which waiting job gets which: one pure function, tested by simulation.

All workers are alike, so capacity is a number of workers. A group holds its workers from the moment it is started until it is
gone; starting one takes seconds (imports, process group), and every change of world size leaves workers idle until the last group in
the way has ended. So a job goes to an idle group of its own world size where there is one, younger jobs may overtake one that does
not fit, and a group is ended only when nobody who may have it wants it and a job fits into the room. While workers are kept for a
large job, short ones fill the time that is left until the last group in its way is predicted to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum

# Ageing: no job is begun before one that came more than this many jobs per worker of the cluster earlier, unless it fills time that
# would be lost. So at most that many delay it, whatever comes later, and all of them end: it waits a bounded time. Counted in jobs
# and not in seconds, the rule means the same for trials of seconds and of hours. Where every fourth trial takes all of eight workers,
# 92 % of their time is trained in with four, 96 % with eight and 97 % with sixteen (tests/simulation.py, all trials waiting): each
# change of size costs, and there are fewer.
OVERTAKEN_PER_WORKER = 8
# The same for those that are predicted to end before the older one fits anyway: they delay it only by what is wrong in that. Of the
# time of four and of eight workers 95 % is trained in instead of 94 %, with the trials that a search hands out.
FILLING_PER_WORKER = 12
# Jobs that wait for each further world size: with too few, workers go idle because all who wait are of a size that does not fit;
# with many, they are proposed before the search knows what it could know. With four, 93 % of the time of four workers is trained in.
# `benchmarks/scale.py` shows both sides.
WAITING_PER_SIZE = 7
# What waits is at most this share of a budget of trials: of twenty, seven that nobody learned from before would be a third.
WAITING_SHARE = 0.2


class GroupState(Enum):
    """Where a worker group stands."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    STOPPING = "stopping"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """A worker group as placement sees it."""

    group_id: str
    world_size: int
    state: GroupState
    seconds_left: float | None = None
    """Until its job is predicted to end, negative if that is overdue; None without a job or a prediction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A job without a group."""

    job_id: str
    world_size: int
    place: int
    """In the line of all jobs that ever came: one that came later has a larger one."""
    seconds: float | None = None
    """That it is predicted to take; None where nothing is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Assign:
    """Give the job to the idle group."""

    job_id: str
    group_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """Start a group of this world size; its workers are free."""

    world_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """End the idle group, to free its workers."""

    group_id: str


Action = Assign | Start | Stop


def decide(*, capacity: int, groups: Iterable[Group], waiting: Iterable[Waiting]) -> list[Action]:
    """Return what to do now; call it again whenever a group or a job changes.

    Args:
        capacity: workers that the cluster can hold at once.
        groups: every group that still holds workers.
        waiting: jobs without a group, the oldest first; read only as far as there are workers to give. Each must fit the capacity.

    Raises:
        ValueError: a job needs more workers than the cluster can hold.
    """
    plan = _Plan(capacity, groups)
    oldest: Waiting | None = None
    seconds = 0.0
    blocked: list[int] = []
    short: list[Waiting] = []
    for job in waiting:
        if job.world_size > capacity:
            raise ValueError(f"job {job.job_id} needs {job.world_size} workers, the cluster holds {capacity}")
        later = 0 if oldest is None else job.place - oldest.place
        if plan.is_used_up or later > FILLING_PER_WORKER * capacity:
            break
        if later > OVERTAKEN_PER_WORKER * capacity:
            if seconds <= 0:
                break
            if job.seconds is not None and job.seconds <= seconds:
                short.append(job)
            continue
        if plan.assign(job):
            continue
        if not plan.expect(job.world_size):
            blocked.append(job.world_size)
        if oldest is None:
            # The oldest one that is left: it may be overtaken by those who came soon after it, and by those it does not wait for.
            oldest, seconds = job, plan.seconds_until_room(job.world_size) if blocked else 0.0
    for world_size in blocked:
        if not plan.has_idle:
            break
        plan.make_room(world_size)
    for job in short:
        plan.assign(job)
    return plan.actions


def num_handed_out(capacity: int, world_sizes: Collection[int], num_trials: float) -> int:
    """Return how many trials to hand out at once: as many as can run, one to go on with, and some to choose from.

    Args:
        capacity: workers that the cluster can hold at once.
        world_sizes: those of the space.
        num_trials: the budget; infinite where only other limits end the search.
    """
    sizes = {size for size in world_sizes if size <= capacity}
    num_waiting = min(WAITING_PER_SIZE * (len(sizes) - 1), WAITING_SHARE * num_trials)
    return capacity // min(sizes) + 1 + int(num_waiting)


class _Plan:
    """The actions so far and the workers that they leave."""

    def __init__(self, capacity: int, groups: Iterable[Group]) -> None:
        self.actions: list[Action] = []
        self._idle: dict[int, list[Group]] = {}
        self._starting: Counter[int] = Counter()
        self._num_starting = 0
        self._free = capacity
        self._stopping = 0
        self._ends: list[tuple[float, int]] = []
        for group in groups:
            self._free -= group.world_size
            if group.state is GroupState.IDLE:
                self._idle.setdefault(group.world_size, []).append(group)
            elif group.state is GroupState.STARTING:
                self._starting[group.world_size] += 1
                self._num_starting += 1
            elif group.state is GroupState.STOPPING:
                self._stopping += group.world_size
            elif group.seconds_left is not None:
                self._ends.append((group.seconds_left, group.world_size))

    @property
    def has_idle(self) -> bool:
        """Whether idle groups are left."""
        return bool(self._idle)

    @property
    def is_used_up(self) -> bool:
        """Whether no worker is left that any job could get."""
        return self._free <= 0 and not self._idle and not self._num_starting

    def assign(self, job: Waiting) -> bool:
        """Give the job an idle group of its size, if there is one."""
        groups = self._idle.get(job.world_size)
        if groups is None:
            return False
        self.actions.append(Assign(job_id=job.job_id, group_id=self._take(job.world_size).group_id))
        return True

    def expect(self, world_size: int) -> bool:
        """Count a job on a group that is starting, or start one if there is room."""
        if self._starting.get(world_size):
            self._starting[world_size] -= 1
            self._num_starting -= 1
            return True
        if self._free >= world_size:
            self._free -= world_size
            self.actions.append(Start(world_size=world_size))
            return True
        return False

    def seconds_until_room(self, world_size: int) -> float:
        """Return when a job fits if no other one begins, as far as groups are predicted to end; 0 if that is not known, or now."""
        missing = world_size - self._free - self._stopping - self._num_idle_workers
        if missing <= 0 or not self._idle:
            return 0.0
        for seconds, size in sorted(self._ends):
            missing -= size
            if missing <= 0:
                return seconds
        return 0.0

    def make_room(self, world_size: int) -> None:
        """End idle groups, as few as will do, if that makes room for a job; keep the room that is on its way for it."""
        missing = world_size - self._free - self._stopping
        if missing > self._num_idle_workers:
            return
        while missing > 0:
            size = min((s for s in self._idle if s >= missing), default=max(self._idle))
            self.actions.append(Stop(group_id=self._take(size).group_id))
            self._stopping += size
            missing -= size
        self._stopping -= world_size - self._free
        self._free = 0

    @property
    def _num_idle_workers(self) -> int:
        return sum(size * len(groups) for size, groups in self._idle.items())

    def _take(self, size: int) -> Group:
        groups = self._idle[size]
        group = groups.pop(0)
        if not groups:
            del self._idle[size]
        return group
