"""What the dispatcher keeps of jobs and worker groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from search.placement import GroupState
from trainables.job import Ask, Job


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupResources:
    """What the groups run on."""

    capacity: int
    """Workers that the cluster holds at once."""
    cpus_per_worker: int
    gpus_per_worker: int
    storage: str
    """Directory for Ray Train's own files; every node must see it."""


@dataclass(slots=True)
class JobState:
    """A job from when it was handed in until its end was taken."""

    job: Job
    place: int
    attempts: int = 0
    asked: Ask | None = None
    ended: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)


@dataclass(slots=True)
class GroupLife:
    """A worker group from its start to its end."""

    world_size: int
    state: GroupState = GroupState.STARTING
    generation: int = 0
    joined: set[int] = field(default_factory=set)
    sequence: int = 0
    job_id: str | None = None
    job_ends: float | None = None
    """When its job is predicted to end, by the monotonic clock; one that goes on from a checkpoint may end sooner."""
    leaving: bool = False
    ever_joined: bool = False
    placement_group: Any = None
    lost: dict[int, str] = field(default_factory=dict)
    """Why its workers could not begin, by generation."""
