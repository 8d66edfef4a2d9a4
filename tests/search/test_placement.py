"""Placement by simulation: no deadlock, no starvation, no over-subscription, few rebuilds, and next to no worker-time lost."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import START_SECONDS, STOP_SECONDS, Outcome, SimulatedTrial, Simulation, mixed_trials, packing_bound

from search.placement import (
    FILLING_PER_WORKER,
    OVERTAKEN_PER_WORKER,
    Assign,
    Group,
    GroupState,
    Start,
    Stop,
    Waiting,
    decide,
    num_handed_out,
)


def run(capacity: int, trials: list[SimulatedTrial], window: int | None = None) -> Outcome:
    return Simulation(capacity, trials, window=window or len(trials)).run()


def trials_of(*rows: tuple[float, int, float]) -> list[SimulatedTrial]:
    return [SimulatedTrial(arrives=arrives, world_size=size, seconds=seconds) for arrives, size, seconds in rows]


def busy_share(outcome: Outcome) -> float:
    """Return what of the worker-time was trained in, as long as anything waited."""
    spent = outcome.worker_seconds
    return spent["busy"] / (spent.total() - spent["drained"])


def test_jobs_of_one_size_share_one_group_per_worker() -> None:
    assert run(2, trials_of(*[(0.0, 1, 10.0)] * 20)).num_starts == 2


def test_small_jobs_run_side_by_side_while_a_large_one_waits() -> None:
    """Served by age alone, the large ones in between would leave a worker idle at every turn."""
    outcome = run(2, trials_of(*[(float(i), size, 100.0) for i, size in enumerate([1, 2, 1, 2, 1, 1])]))
    assert max(outcome.started[i] for i in (0, 2, 4, 5)) < 100.0 + START_SECONDS + 10, "two and two, each pair side by side"
    assert outcome.num_starts == 3


def test_a_group_of_two_is_rebuilt_only_when_nothing_else_is_left_to_do() -> None:
    outcome = run(2, trials_of((0.0, 2, 10.0), (0.0, 1, 10.0), (0.0, 2, 10.0), (0.0, 1, 10.0)))
    assert outcome.num_starts == 3  # one of two, then two of one


def test_a_large_job_is_not_starved_by_a_stream_of_small_ones() -> None:
    """Four workers train four of them in 30 s, and one comes every 5 s: there is always one that fits."""
    stream = [(float(t), 1, 30.0) for t in range(0, 3000, 5)]
    trials = sorted([*stream, (101.0, 4, 30.0)])
    large = trials.index((101.0, 4, 30.0))
    outcome = run(4, trials_of(*trials))
    # Those who came by then and those who may overtake it, four at a time, then one stop and one start.
    ahead = large + OVERTAKEN_PER_WORKER * 4
    assert outcome.started[large] <= START_SECONDS + (ahead / 4 + 1) * 30.0 + STOP_SECONDS + START_SECONDS
    assert outcome.most_overtaken == OVERTAKEN_PER_WORKER * 4


def test_short_jobs_fill_the_time_until_a_large_one_fits_and_do_not_delay_it() -> None:
    stream = [(float(t), 1, 5.0 if t % 15 == 0 else 50.0) for t in range(0, 3000, 5)]
    trials = trials_of(*sorted([*stream, (101.0, 4, 30.0)]))
    large = next(number for number, trial in enumerate(trials) if trial.world_size == 4)
    unknown, known = run(4, trials), run(4, [replace(trial, predicted=trial.seconds) for trial in trials])
    assert known.started[large] == unknown.started[large]
    before, without = (sum(began < o.started[large] for began in o.started.values()) for o in (known, unknown))
    assert before > without
    assert OVERTAKEN_PER_WORKER * 4 == unknown.most_overtaken < known.most_overtaken <= FILLING_PER_WORKER * 4


LATE, TOO_LATE = OVERTAKEN_PER_WORKER * 4 + 1, FILLING_PER_WORKER * 4 + 1


@pytest.mark.parametrize(
    ("needs", "busy", "place", "seconds", "fills"),
    [
        (4, [(3, 60.0)], LATE, 60.0, True),
        (4, [(3, 60.0)], LATE, 61.0, False),
        (4, [(3, 60.0)], TOO_LATE, 60.0, False),
        (4, [(3, 60.0)], LATE, None, False),
        (4, [(3, None)], LATE, 1.0, False),
        (4, [(3, -1.0)], LATE, 1.0, False),  # overdue: it may end at once
        (4, [(1, 60.0), (2, 90.0)], LATE, 90.0, True),
        (4, [(1, 60.0), (2, 90.0)], LATE, 91.0, False),
        (3, [(1, 90.0), (2, 60.0)], LATE, 61.0, False),  # the second makes room enough
        (3, [(1, 90.0), (2, None)], LATE, 1.0, False),
    ],
)
def test_a_late_job_takes_an_idle_group_only_if_it_is_known_to_end_before_the_oldest_fits(
    needs: int, busy: list[tuple[int, float | None]], place: int, seconds: float | None, fills: bool
) -> None:
    groups = [
        Group(group_id=f"busy-{i}", world_size=size, state=GroupState.BUSY, seconds_left=left) for i, (size, left) in enumerate(busy)
    ]
    line = [Waiting(job_id="oldest", world_size=needs, place=0), Waiting(job_id="late", world_size=1, place=place, seconds=seconds)]
    actions = decide(capacity=4, groups=[*groups, *idle(1)], waiting=line)
    assert actions == ([Assign(job_id="late", group_id="0")] if fills else [])


def test_a_job_larger_than_the_cluster_is_refused() -> None:
    with pytest.raises(ValueError, match="needs 3 workers, the cluster holds 2"):
        decide(capacity=2, groups=[], waiting=[Waiting(job_id="a", world_size=3, place=0)])


def test_a_waiting_job_takes_free_workers_at_once() -> None:
    assert decide(capacity=4, groups=[], waiting=[Waiting(job_id="a", world_size=2, place=0)]) == [Start(world_size=2)]


def test_a_job_for_which_room_is_made_is_not_made_room_for_again() -> None:
    groups = [
        Group(group_id="a", world_size=2, state=GroupState.STOPPING),
        Group(group_id="b", world_size=1, state=GroupState.IDLE),
    ]
    waiting = [Waiting(job_id="x", world_size=2, place=0), Waiting(job_id="y", world_size=3, place=1)]
    assert decide(capacity=3, groups=groups, waiting=waiting) == []


def idle(*sizes: int) -> list[Group]:
    return [Group(group_id=f"{i}", world_size=size, state=GroupState.IDLE) for i, size in enumerate(sizes)]


def waiting(*sizes: int) -> list[Waiting]:
    return [Waiting(job_id=str(i), world_size=size, place=i) for i, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("free", "groups", "jobs", "ended"),
    [
        (0, (1, 2, 5), (4,), ["2"]),
        (0, (1, 1, 2, 2), (4,), ["2", "3"]),
        (1, (1, 1), (2,), ["0"]),
        (1, (1, 1), (2, 2), ["0"]),  # for the second job there is not enough, and a group ended for it is lost
        (0, (1, 1, 1, 1), (2, 2), ["0", "1", "2", "3"]),
        (0, (4,), (2, 2), ["0"]),
        (0, (1, 1), (3, 2), ["0", "1"]),
    ],
)
def test_idle_groups_are_ended_when_that_makes_room_and_as_few_as_will_do(
    free: int, groups: tuple[int, ...], jobs: tuple[int, ...], ended: list[str]
) -> None:
    busy = Group(group_id="busy", world_size=8, state=GroupState.BUSY)
    actions = decide(capacity=8 + free + sum(groups), groups=[busy, *idle(*groups)], waiting=waiting(*jobs))
    assert actions == [Stop(group_id=name) for name in ended]


SECONDS = st.none() | st.floats(-10, 100)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[int, list[Group], list[Waiting]]:
    """Any state that a cluster can be in, reachable or not."""
    capacity = draw(st.integers(1, 24))
    groups, left = [], capacity
    while left and draw(st.booleans()):
        size, state = draw(st.integers(1, left)), draw(st.sampled_from(GroupState))
        seconds = draw(SECONDS) if state is GroupState.BUSY else None
        groups.append(Group(group_id=str(len(groups)), world_size=size, state=state, seconds_left=seconds))
        left -= size
    sizes = draw(st.lists(st.integers(1, capacity), max_size=20))
    places = sorted(draw(st.sets(st.integers(0, 400), min_size=len(sizes), max_size=len(sizes))))
    return (
        capacity,
        groups,
        [
            Waiting(job_id=f"job-{place}", world_size=size, place=place, seconds=draw(SECONDS))
            for place, size in zip(places, sizes, strict=True)
        ],
    )


@st.composite
def drains(draw: st.DrawFn) -> tuple[int, list[Group], list[Waiting]]:
    """Some groups of one or two workers are idle, others still train, and the oldest job needs most of them."""
    sizes = draw(st.lists(st.sampled_from([1, 2]), min_size=2, max_size=8))
    num_idle, capacity = draw(st.integers(1, len(sizes) - 1)), sum(sizes)
    groups = [
        Group(group_id=str(i), world_size=size, state=GroupState.BUSY, seconds_left=draw(SECONDS))
        for i, size in enumerate(sizes[num_idle:], start=num_idle)
    ]
    line = [Waiting(job_id="oldest", world_size=draw(st.integers(max(2, capacity - 2), capacity)), place=0)]
    for place in sorted(
        draw(st.sets(st.integers(OVERTAKEN_PER_WORKER * capacity - 2, (FILLING_PER_WORKER + 4) * capacity), max_size=8))
    ):
        size = draw(st.sampled_from([1, 2]))
        line.append(Waiting(job_id=f"job-{place}", world_size=size, place=place, seconds=draw(SECONDS)))
    return capacity, [*idle(*sizes[:num_idle]), *groups], line


def seconds_until_room(world_size: int, capacity: int, groups: list[Group]) -> float:
    """Return when so many workers are known to be free if nothing more begins; the wait for a start or a stop is none."""
    ends = sorted(g.seconds_left for g in groups if g.seconds_left is not None)
    working = [g for g in groups if g.state in (GroupState.BUSY, GroupState.STARTING)]

    def free_at(moment: float) -> int:
        return capacity - sum(g.world_size for g in working if g.seconds_left is None or g.seconds_left > moment)

    return next((moment for moment in (0.0, *ends) if free_at(moment) >= world_size), 0.0)


@settings(max_examples=600)
@given(clusters() | drains())
def test_every_decision_is_allowed_fair_and_leaves_nothing_lying_about(cluster: tuple[int, list[Group], list[Waiting]]) -> None:
    capacity, groups, waiting = cluster
    actions = decide(capacity=capacity, groups=groups, waiting=waiting)
    assert actions == decide(capacity=capacity, groups=iter(groups), waiting=iter(waiting))
    idle = {g.group_id: g.world_size for g in groups if g.state is GroupState.IDLE}
    jobs = {job.job_id: job for job in waiting}
    started = [a.world_size for a in actions if isinstance(a, Start)]
    ended = [idle.pop(a.group_id) for a in actions if isinstance(a, Stop)]
    for action in actions:
        if isinstance(action, Assign):
            assert idle.pop(action.group_id) == jobs.pop(action.job_id).world_size
    free = capacity - sum(g.world_size for g in groups) - sum(started)
    assert free >= 0
    if not jobs:
        assert not ended
        return
    oldest = min(jobs.values(), key=lambda job: job.place)
    limit = oldest.place + OVERTAKEN_PER_WORKER * capacity
    for job in waiting:
        if job.job_id not in jobs and job.place > limit:
            assert job.place <= oldest.place + FILLING_PER_WORKER * capacity, "overtaken by one that came too late"
            assert job.seconds is not None
            assert job.seconds <= seconds_until_room(oldest.world_size, capacity, groups), "overtaken by one that delays it"
    # Those who count on a group that starts have workers; of the others, none may fit into what lies about.
    starting = Counter(started) + Counter(g.world_size for g in groups if g.state is GroupState.STARTING)
    without = []
    for job in sorted(jobs.values(), key=lambda job: job.place):
        if job.place <= limit and not starting[job.world_size]:
            without.append(job.world_size)
            assert job.world_size not in idle.values()
        starting[job.world_size] = max(0, starting[job.world_size] - 1)
    coming = sum(ended) + sum(g.world_size for g in groups if g.state is GroupState.STOPPING)
    if without:
        assert without[0] <= free + coming or sum(idle.values()) + free + coming < without[0], "its room could be made"
    assert not ended or without


LENGTHS = st.sampled_from([1.0, 20.0, 120.0, 2000.0])


@pytest.mark.parametrize(
    ("predicted", "delayed_by"),
    [([None], OVERTAKEN_PER_WORKER), ([None, 1.0], OVERTAKEN_PER_WORKER), ([None, 0.01, 1.0, 100.0], FILLING_PER_WORKER)],
)
@settings(max_examples=100)
@given(st.data(), st.integers(1, 16), st.integers(1, 40))
def test_every_job_is_served_in_bounded_time_on_any_cluster(
    predicted: list[float | None], delayed_by: int, data: st.DataObject, capacity: int, window: int
) -> None:
    """Seconds that are predicted are known as a multiple of what they are."""
    jobs = st.tuples(st.floats(0, 500), st.integers(1, capacity), LENGTHS)
    rows = sorted(data.draw(st.lists(jobs, min_size=1, max_size=60)))
    known = data.draw(st.lists(st.sampled_from(predicted), min_size=len(rows), max_size=len(rows)))
    trials = [replace(t, predicted=None if k is None else k * t.seconds) for t, k in zip(trials_of(*rows), known, strict=True)]
    outcome, again = (run(capacity, trials, window + capacity) for _ in range(2))
    assert sorted(outcome.started) == list(range(len(rows)))
    assert outcome.most_overtaken <= (OVERTAKEN_PER_WORKER if set(known) == {None} else FILLING_PER_WORKER) * capacity
    assert list(outcome.started.items()) == list(again.started.items()), "not deterministic"
    # However badly they fit, all that comes before it in the line or may delay it can only train one after the other.
    for number, began in outcome.started.items():
        ahead = rows[: number + delayed_by * capacity + 1]
        bound = sum(seconds + START_SECONDS + STOP_SECONDS for _, _, seconds in ahead)
        assert began - max(arrives for arrives, _, _ in rows[: number + 1]) <= bound


@pytest.mark.parametrize(
    ("capacity", "share"), [(1, 0.99), (2, 0.94), (4, 0.93), (8, 0.94), (16, 0.96), (32, 0.97), (128, 0.98), (1024, 0.98)]
)
def test_nearly_all_worker_time_is_training_and_groups_are_seldom_rebuilt(capacity: int, share: float) -> None:
    """Trials of seconds to an hour, all of them waiting, the largest of which take up to eight workers or the whole cluster."""
    trials = mixed_trials(max(4000, 4 * capacity), [s for s in (1, 2, 4, 8) if s <= capacity], seed=capacity)
    outcome = run(capacity, trials)
    assert busy_share(outcome) >= share
    # Nobody knows which trial is long: at the end, one may have just begun.
    assert outcome.seconds <= packing_bound(capacity, trials) / share + max(t.seconds for t in trials)
    assert outcome.num_starts <= 0.12 * len(trials)


@pytest.mark.parametrize(
    ("capacity", "largest", "unknown", "predicted"),
    [
        (2, 2, 0.93, 0.95),
        (4, 4, 0.93, 0.95),
        (8, 8, 0.93, 0.95),
        (16, 16, 0.93, 0.95),
        (32, 32, 0.94, 0.95),
        (64, 64, 0.94, 0.955),
        (64, 8, 0.98, 0.98),
    ],
)
def test_few_trials_that_wait_are_enough_to_choose_from(capacity: int, largest: int, unknown: float, predicted: float) -> None:
    """A search proposes few trials ahead; having few to choose from costs where the largest trial takes the whole cluster."""
    sizes = [2**i for i in range(largest.bit_length())]
    for error, share in ((None, unknown), (0.2, predicted)):
        outcomes = [
            run(capacity, mixed_trials(4000, sizes, seed=seed, error=error), num_handed_out(capacity, sizes, math.inf))
            for seed in range(3)
        ]
        assert statistics.median(busy_share(outcome) for outcome in outcomes) >= share
        assert all(outcome.num_starts <= 0.19 * 4000 for outcome in outcomes)


def test_a_search_over_one_world_size_hands_out_what_runs_and_one_more() -> None:
    assert num_handed_out(8, [1], math.inf) == 9
    assert num_handed_out(8, [4, 4], math.inf) == 3
    assert num_handed_out(8, [8, 16], math.inf) == 2, "the one that fits nowhere is not counted"


def test_of_few_trials_few_wait_so_that_most_are_proposed_with_what_the_others_taught() -> None:
    assert [num_handed_out(2, [1, 2], num_trials) - 3 for num_trials in (0, 4, 12, 35, 1000, math.inf)] == [0, 0, 2, 7, 7, 7]


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), pytest.param(tuple(2**i for i in range(11)), marks=pytest.mark.slow)])
def test_ten_thousand_trials_on_a_thousand_workers(sizes: tuple[int, ...]) -> None:
    trials = mixed_trials(10_000, sizes, seed=0, error=0.2)
    outcome = run(1024, trials, num_handed_out(1024, sizes, math.inf))
    assert len(outcome.started) == 10_000
    assert outcome.most_overtaken <= FILLING_PER_WORKER * 1024
    assert busy_share(outcome) >= 0.95
    assert outcome.num_starts <= 0.15 * 10_000
