"""Which worker groups exist, and which waiting job gets which: one pure function, tested by simulation.

All workers are alike, so capacity is a number of workers. A group holds its workers from the moment it is started until it is
gone; starting one takes seconds (imports, process group), and every change of world size leaves workers idle until the last group in
the way has ended. So a job goes to an idle group of its own world size where there is one, younger jobs may overtake one that does
not fit, and a group is ended only when nobody who may have it wants it and a job fits into the room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum

# Ageing: no job is begun before one that came more than this many jobs per worker of the cluster earlier. So at most that many
# overtake it, whatever comes later, and all of them end: it waits a bounded time. Counted in jobs and not in seconds, the rule
# means the same for trials of seconds and of hours. Where every fourth trial takes all of eight workers, 92 % of their time is
# trained in with four, 96 % with eight and 97 % with sixteen (tests/simulation.py, all trials waiting): each change of size costs,
# and there are fewer.
OVERTAKEN_PER_WORKER = 8
# Jobs that wait for each further world size: with too few, workers go idle because all who wait are of a size that does not fit;
# with many, they are proposed before the search knows what it could know. `benchmarks/scale.py` shows both sides.
WAITING_PER_SIZE = 4


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """A job without a group."""

    job_id: str
    world_size: int
    place: int
    """In the line of all jobs that ever came: one that came later has a larger one."""


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
    last = None
    blocked: list[int] = []
    for job in waiting:
        if job.world_size > capacity:
            raise ValueError(f"job {job.job_id} needs {job.world_size} workers, the cluster holds {capacity}")
        if plan.is_used_up or (last is not None and job.place > last):
            break
        if plan.assign(job):
            continue
        if not plan.expect(job.world_size):
            blocked.append(job.world_size)
        # The oldest one that is left: it may be overtaken by those who came soon after it.
        last = job.place + OVERTAKEN_PER_WORKER * capacity if last is None else last
    for world_size in blocked:
        if not plan.has_idle:
            break
        plan.make_room(world_size)
    return plan.actions


def num_handed_out(capacity: int, world_sizes: Collection[int]) -> int:
    """Return how many trials to hand out at once: as many as can run, one to go on with, and some to choose from."""
    sizes = {size for size in world_sizes if size <= capacity}
    return capacity // min(sizes) + 1 + WAITING_PER_SIZE * (len(sizes) - 1)


class _Plan:
    """The actions so far and the workers that they leave."""

    def __init__(self, capacity: int, groups: Iterable[Group]) -> None:
        self.actions: list[Action] = []
        self._idle: dict[int, list[Group]] = {}
        self._starting: Counter[int] = Counter()
        self._num_starting = 0
        self._free = capacity
        self._stopping = 0
        for group in groups:
            self._free -= group.world_size
            if group.state is GroupState.IDLE:
                self._idle.setdefault(group.world_size, []).append(group)
            elif group.state is GroupState.STARTING:
                self._starting[group.world_size] += 1
                self._num_starting += 1
            elif group.state is GroupState.STOPPING:
                self._stopping += group.world_size

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

    def make_room(self, world_size: int) -> None:
        """End idle groups, as few as will do, if that makes room for a job; keep the room that is on its way for it."""
        missing = world_size - self._free - self._stopping
        if missing > sum(size * len(groups) for size, groups in self._idle.items()):
            return
        while missing > 0:
            size = min((s for s in self._idle if s >= missing), default=max(self._idle))
            self.actions.append(Stop(group_id=self._take(size).group_id))
            self._stopping += size
            missing -= size
        self._stopping -= world_size - self._free
        self._free = 0

    def _take(self, size: int) -> Group:
        groups = self._idle[size]
        group = groups.pop(0)
        if not groups:
            del self._idle[size]
        return group
