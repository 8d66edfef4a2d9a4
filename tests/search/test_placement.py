"""Placement by simulation: no deadlock, no starvation, no over-subscription, no needless rebuild."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.placement import PATIENCE_SECONDS, Assign, Group, GroupState, Start, Stop, Waiting, decide

START_SECONDS, STOP_SECONDS = 12.0, 2.0


class Simulation:
    """Worker groups on a simulated clock; every rule that the real ones obey is asserted."""

    def __init__(self, capacity: int, jobs: list[tuple[float, int, float]]) -> None:
        self.capacity = capacity
        self.arrivals = [(at, f"job-{i}", size, length) for i, (at, size, length) in enumerate(jobs)]
        self.waiting: dict[str, Waiting] = {}
        self.lengths = {job_id: length for _, job_id, _, length in self.arrivals}
        self.groups: dict[str, Group] = {}
        self.timers: list[tuple[float, str, str]] = []
        self.started_at: dict[str, float] = {}
        self.num_starts = 0
        self.now = 0.0

    def run(self) -> None:
        pending = sorted(self.arrivals)
        while pending or self.waiting or any(kind == "done" for _, kind, _ in self.timers):
            next_arrival = pending[0][0] if pending else float("inf")
            next_timer = min((t for t, _, _ in self.timers), default=float("inf"))
            # The dispatcher looks again every five seconds, because patience runs out without an event.
            self.now = min(next_arrival, next_timer, self.now + 5.0)
            assert self.now < 1e6, f"deadlock: {self.waiting} {self.groups}"
            while pending and pending[0][0] <= self.now:
                at, job_id, size, _ = pending.pop(0)
                self.waiting[job_id] = Waiting(job_id=job_id, world_size=size, since=at)
            for timer in sorted(t for t in self.timers if t[0] <= self.now):
                self.timers.remove(timer)
                self._fire(*timer[1:])
            self._act()

    def _fire(self, kind: str, group_id: str) -> None:
        if kind == "gone":
            del self.groups[group_id]
        else:
            self._set(group_id, GroupState.IDLE)

    def _set(self, group_id: str, state: GroupState) -> None:
        self.groups[group_id] = Group(group_id=group_id, world_size=self.groups[group_id].world_size, state=state)

    def _act(self) -> None:
        actions = decide(capacity=self.capacity, groups=list(self.groups.values()), waiting=list(self.waiting.values()), now=self.now)
        for action in actions:
            match action:
                case Assign(job_id=job_id, group_id=group_id):
                    job = self.waiting.pop(job_id)
                    assert self.groups[group_id].state is GroupState.IDLE
                    assert self.groups[group_id].world_size == job.world_size
                    self.started_at[job_id] = self.now
                    self._set(group_id, GroupState.BUSY)
                    self.timers.append((self.now + self.lengths[job_id], "done", group_id))
                case Start(world_size=size):
                    self.num_starts += 1
                    name = f"group-{self.num_starts}"
                    self.groups[name] = Group(group_id=name, world_size=size, state=GroupState.STARTING)
                    self.timers.append((self.now + START_SECONDS, "ready", name))
                case Stop(group_id=group_id):
                    assert self.groups[group_id].state is GroupState.IDLE
                    self._set(group_id, GroupState.STOPPING)
                    self.timers.append((self.now + STOP_SECONDS, "gone", group_id))
        assert sum(g.world_size for g in self.groups.values()) <= self.capacity


def test_jobs_of_one_size_share_one_group_per_worker() -> None:
    simulation = Simulation(2, [(0.0, 1, 10.0)] * 20)
    simulation.run()
    assert simulation.num_starts == 2


def test_small_jobs_run_side_by_side_while_a_large_one_waits() -> None:
    """Trials of minutes: served by age alone, the large ones in between would leave a worker idle at every turn."""
    jobs = [(float(i), size, 100.0) for i, size in enumerate([1, 2, 1, 2, 1, 1])]
    simulation = Simulation(2, jobs)
    simulation.run()
    starts = [simulation.started_at[f"job-{i}"] for i in (0, 2, 4, 5)]
    assert max(starts) < 100.0 + START_SECONDS + 10, "two and two, each pair side by side"
    assert simulation.num_starts == 3


def test_a_group_of_two_is_rebuilt_only_when_nothing_else_is_left_to_do() -> None:
    simulation = Simulation(2, [(0.0, 2, 10.0), (0.0, 1, 10.0), (0.0, 2, 10.0), (0.0, 1, 10.0)])
    simulation.run()
    assert simulation.num_starts == 3  # one of two, then two of one


def test_a_large_job_is_not_starved_by_a_stream_of_small_ones() -> None:
    stream = [(float(t), 1, 30.0) for t in range(0, 3000, 10)]
    simulation = Simulation(4, [*stream, (100.0, 4, 30.0)])
    simulation.run()
    # Patience, the longest job that runs by then, and one stop and one start: nothing younger comes in between.
    assert simulation.started_at[f"job-{len(stream)}"] - 100.0 <= PATIENCE_SECONDS + 30 + START_SECONDS + STOP_SECONDS + 10


def test_a_job_larger_than_the_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 3 workers, the cluster holds 2"):
        decide(capacity=2, groups=[], waiting=[Waiting(job_id="a", world_size=3, since=0)], now=0)


def test_a_waiting_job_takes_free_workers_at_once() -> None:
    actions = decide(capacity=4, groups=[], waiting=[Waiting(job_id="a", world_size=2, since=0)], now=0)
    assert actions == [Start(world_size=2)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_every_job_is_served_on_any_cluster(capacity: int, seed: int, num_jobs: int) -> None:
    rng = random.Random(seed)
    sizes = [s for s in (1, 2, 4, 8) if s <= capacity]
    jobs = [(rng.uniform(0, 200), rng.choice(sizes), rng.choice([1.0, 20.0, 120.0])) for _ in range(num_jobs)]
    simulation = Simulation(capacity, jobs)
    simulation.run()
    assert len(simulation.started_at) == num_jobs
