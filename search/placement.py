"""Which worker groups exist, and which waiting job gets which: one pure function, tested by simulation.

All workers are alike, so capacity is a number of workers. A group holds its workers from the moment it is started until it is
gone; starting one takes seconds (imports, process group), so a waiting job goes to an idle group of its own world size where
there is one, and groups are rebuilt only for a job that fits nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

# A job that has waited this long without a place gets the next workers that come free, whoever else waits: longer than a trial and
# many group starts, since every change of world size leaves workers idle until the group before has ended; younger jobs fill the gaps
# until then, and can starve nobody.
PATIENCE_SECONDS = 300.0


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
    """A job without a group; `since` is its arrival in seconds of any one clock."""

    job_id: str
    world_size: int
    since: float


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


def decide(
    *,
    capacity: int,
    groups: Sequence[Group],
    waiting: Sequence[Waiting],
    now: float,
    patience: float = PATIENCE_SECONDS,
) -> list[Action]:
    """Return what to do now; call it again whenever a group or a job changes.

    Args:
        capacity: workers that the cluster can hold at once.
        groups: every group that still holds workers.
        waiting: jobs without a group, in any order; each must fit the capacity.
        now: seconds of the clock of `Waiting.since`.
        patience: seconds after which a job that has no place is served before all younger ones.

    Raises:
        ValueError: a job needs more workers than the cluster can hold.
    """
    plan = _Plan(capacity, groups)
    blocked: list[Waiting] = []
    for job in sorted(waiting, key=lambda w: (w.since, w.job_id)):
        if job.world_size > capacity:
            raise ValueError(f"job {job.job_id} needs {job.world_size} workers, the cluster holds {capacity}")
        if plan.place(job):
            continue
        blocked.append(job)
        if now - job.since >= patience:
            plan.reserve(job.world_size)
    # Only the oldest job without a place may take idle groups that nobody asks for, and only if that is enough:
    # ending a warm group early gains nothing while the rest of the workers are busy.
    if blocked and not plan.reserving:
        plan.reclaim(blocked[0].world_size)
    return plan.actions


class _Plan:
    """The actions so far and the workers that they leave."""

    def __init__(self, capacity: int, groups: Sequence[Group]) -> None:
        self.actions: list[Action] = []
        self.reserving = False
        self._idle = [g for g in groups if g.state is GroupState.IDLE]
        self._starting = [g.world_size for g in groups if g.state is GroupState.STARTING]
        self._free = capacity - sum(g.world_size for g in groups)
        self._stopping = sum(g.world_size for g in groups if g.state is GroupState.STOPPING)

    def place(self, job: Waiting) -> bool:
        """Assign the job, or count it on a group that is starting or can be started."""
        for group in self._idle:
            if group.world_size == job.world_size:
                self._idle.remove(group)
                self.actions.append(Assign(job_id=job.job_id, group_id=group.group_id))
                return True
        if job.world_size in self._starting:
            self._starting.remove(job.world_size)
            return True
        if self._free >= job.world_size:
            self._free -= job.world_size
            self.actions.append(Start(world_size=job.world_size))
            return True
        return False

    def reserve(self, world_size: int) -> None:
        """Keep free and idle workers back for an overdue job, as many as it needs and as there are."""
        self.reserving = True
        missing = world_size - self._free - self._stopping
        self._stopping = max(0, self._stopping - max(0, world_size - self._free))
        self._free = max(0, self._free - world_size)
        for group in list(self._idle):
            if missing <= 0:
                return
            missing -= group.world_size
            self._idle.remove(group)
            self.actions.append(Stop(group_id=group.group_id))

    def reclaim(self, world_size: int) -> None:
        """End idle groups, the largest first, if that makes room for the job."""
        missing = world_size - self._free - self._stopping
        if missing <= 0 or missing > sum(g.world_size for g in self._idle):
            return
        for group in sorted(self._idle, key=lambda g: -g.world_size):
            if missing <= 0:
                return
            missing -= group.world_size
            self.actions.append(Stop(group_id=group.group_id))
