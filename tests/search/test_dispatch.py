"""The dispatcher against fake worker groups on its own event loop: no Ray, so every interleaving can be forced."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from search import dispatch
from search.dispatch import MAX_ATTEMPTS, MAX_FAILED_STARTS, Dispatcher
from search.placement import OVERTAKEN_PER_WORKER
from search.roster import GroupResources
from trainables.job import Ask, Job, Task
from trainables.report import NotPlaced, OutOfMemory

TASK = Task(model_name="m", model_revision=None, task="causal-lm", exact_match_rows=0, precisions=("fp32",), data=[])


def job(name: str, world_size: int = 1, seconds: float | None = None) -> Job:
    config = {"layout": {"world_size": world_size}}
    return Job(job_id=name, kind="train", config=config, directory="d", predicted_seconds=seconds)


class Groups(Dispatcher):
    """A dispatcher whose groups live until their thread's event is set; the test plays the ranks."""

    def __init__(self, capacity: int) -> None:
        super().__init__(TASK, GroupResources(capacity=capacity, cpus_per_worker=1, gpus_per_worker=0, storage="s"))
        self.ends: dict[str, threading.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.vacated: list[Any] = []

    def end_of(self, group_id: str) -> threading.Event:
        """Return what ends a group; its thread may not have begun yet."""
        return self.ends.setdefault(group_id, threading.Event())

    def _vacate(self, place: Any) -> None:
        self.vacated.append(place)

    def _run_group(self, group_id: str, world_size: int) -> None:
        assert self.end_of(group_id).wait(20)
        if group_id in self.errors:
            raise self.errors[group_id]


def scenario(capacity: int) -> Callable[[Callable[[Groups], Awaitable[None]]], Callable[[], None]]:
    def wrap(play: Callable[[Groups], Awaitable[None]]) -> Callable[[], None]:
        def test() -> None:
            async def main() -> None:
                dispatcher = Groups(capacity)
                try:
                    await asyncio.wait_for(play(dispatcher), 10)
                finally:
                    for end in dispatcher.ends.values():
                        end.set()

            asyncio.run(main())

        return test

    return wrap


async def ranks_join(dispatcher: Groups, group_id: str, world_size: int) -> int:
    generations = await asyncio.gather(*(dispatcher.join(group_id, rank) for rank in range(world_size)))
    assert len(set(generations)) == 1
    return generations[0]


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [e["event"] for e in events]


@scenario(2)
async def test_every_rank_gets_the_same_job_and_its_reports_reach_the_poller(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a", 2))
    (group,) = await dispatcher.groups()
    generation = await ranks_join(dispatcher, group["group_id"], 2)
    answers = await asyncio.gather(*(dispatcher.next(group["group_id"], generation, 0) for _ in range(2)))
    assert [a and a[1].job_id for a in answers] == ["a", "a"]
    await dispatcher.report(group["group_id"], generation, 1, {"step": 3})
    await dispatcher.finish(group["group_id"], generation, 1, {"state": "complete"})
    events = await dispatcher.poll("a")
    assert kinds(events) == ["started", "report", "ended"]
    assert events[-1]["state"] == "complete"


@scenario(1)
async def test_a_stop_reaches_the_running_job_and_takes_a_waiting_one_out_of_the_queue(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    await dispatcher.submit(job("b"))
    (group,) = await dispatcher.groups()
    generation = await ranks_join(dispatcher, group["group_id"], 1)
    signal = asyncio.create_task(dispatcher.asked(group["group_id"], generation, 1))
    await asyncio.sleep(0)
    assert not signal.done()
    news = asyncio.create_task(dispatcher.poll("b"))
    await asyncio.sleep(0)
    await dispatcher.stop("b")
    assert kinds(await news) == ["ended"]
    await dispatcher.stop("a")
    assert await signal is Ask.STOP


@scenario(1)
async def test_a_stopped_job_is_forgotten_once_its_workers_have_left_it_and_they_take_the_next(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    await dispatcher.submit(job("b"))
    (group,) = await dispatcher.groups()
    generation = await ranks_join(dispatcher, group["group_id"], 1)
    await dispatcher.next(group["group_id"], generation, 0)
    await dispatcher.report(group["group_id"], generation, 1, {"step": 1})
    assert kinds(await dispatcher.poll("a")) == ["started", "report"]
    await dispatcher.stop("a")
    # Nobody polls for it any more, so its end must not wait to be taken.
    await dispatcher.finish(group["group_id"], generation, 1, {"state": "stopped"})
    assert set(dispatcher._jobs) == {"b"}
    answer = await dispatcher.next(group["group_id"], generation, 1)
    assert answer is not None
    assert answer[1].job_id == "b"


@scenario(1)
async def test_a_job_goes_on_after_its_worker_died_and_reports_from_before_are_dropped(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    (group,) = await dispatcher.groups()
    old = await ranks_join(dispatcher, group["group_id"], 1)
    assert await dispatcher.next(group["group_id"], old, 0)
    new = await ranks_join(dispatcher, group["group_id"], 1)  # Ray Train restarted the group
    assert new != old
    await dispatcher.report(group["group_id"], old, 1, {"step": 1})
    answer = await dispatcher.next(group["group_id"], new, 0)
    assert answer is not None
    assert answer[1].job_id == "a"
    assert await dispatcher.next(group["group_id"], old, 1) is None  # the ranks from before must go
    await dispatcher.finish(group["group_id"], new, answer[0], {"state": "complete"})
    events = await dispatcher.poll("a")
    assert kinds(events) == ["started", "started", "ended"]
    assert events[-1]["attempts"] == 2


@scenario(1)
async def test_a_job_that_kills_its_workers_every_time_fails_and_the_group_serves_the_next(dispatcher: Groups) -> None:
    await dispatcher.submit(job("killer"))
    await dispatcher.submit(job("innocent"))
    (group,) = await dispatcher.groups()
    for _ in range(MAX_ATTEMPTS + 1):
        generation = await ranks_join(dispatcher, group["group_id"], 1)
    events = await dispatcher.poll("killer")
    assert events[-1]["kind"] == "worker_lost"
    answer = await dispatcher.next(group["group_id"], generation, 0)
    assert answer is not None
    assert answer[1].job_id == "innocent"


@scenario(1)
async def test_a_job_moves_to_another_group_when_ray_train_gives_its_group_up(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    (group,) = await dispatcher.groups()
    await dispatcher.placed(group["group_id"], "its place")
    await ranks_join(dispatcher, group["group_id"], 1)
    dispatcher.errors[group["group_id"]] = RuntimeError("controller died")
    dispatcher.end_of(group["group_id"]).set()
    while [g["group_id"] for g in await dispatcher.groups()] in ([group["group_id"]], []):
        await asyncio.sleep(0.01)
    assert dispatcher.vacated == ["its place"], "before another group wants it"
    (other,) = await dispatcher.groups()
    generation = await ranks_join(dispatcher, other["group_id"], 1)
    answer = await dispatcher.next(other["group_id"], generation, 0)
    assert answer is not None
    assert answer[1].job_id == "a"


async def lose(dispatcher: Groups, job_id: str, error: Exception) -> None:
    """Have the group of a job given up, and wait until it is gone."""
    (name,) = [g["group_id"] for g in await dispatcher.groups() if g["job_id"] == job_id]
    await lose_group(dispatcher, name, error)


async def lose_group(dispatcher: Groups, name: str, error: Exception) -> None:
    dispatcher.errors[name] = error
    dispatcher.end_of(name).set()
    while name in {g["group_id"] for g in await dispatcher.groups()}:
        await asyncio.sleep(0.01)


async def begin(dispatcher: Groups, job_id: str) -> None:
    """Have the ranks of the groups that are starting join, of which one gets the job."""
    for group in await dispatcher.groups():
        if group["state"] == "starting":
            await ranks_join(dispatcher, group["group_id"], group["world_size"])
    assert job_id in {g["job_id"] for g in await dispatcher.groups()}


@scenario(2)
async def test_a_job_that_trains_alone_and_is_killed_for_memory_is_out_of_memory_at_once(dispatcher: Groups) -> None:
    await dispatcher.submit(job("large"))
    await begin(dispatcher, "large")
    await lose(dispatcher, "large", OutOfMemory("killed"))
    (ended,) = [e for e in await dispatcher.poll("large") if e["event"] == "ended"]
    assert (ended["kind"], ended["message"], ended["attempts"]) == ("out_of_memory", "killed", 1)


@scenario(2)
async def test_of_jobs_that_share_a_node_the_killed_one_is_tried_again_until_that_is_in_vain(dispatcher: Groups) -> None:
    await dispatcher.submit(job("older"))
    await begin(dispatcher, "older")
    await dispatcher.submit(job("killed"))
    for _ in range(MAX_ATTEMPTS):
        await begin(dispatcher, "killed")
        assert not any(e["event"] == "ended" for e in await dispatcher.poll("killed"))
        await lose(dispatcher, "killed", OutOfMemory("killed"))
    (ended,) = await dispatcher.poll("killed")
    # Which of the two takes too much nobody knows, and the limit of the search must not hang on it.
    assert (ended["kind"], ended["attempts"]) == ("worker_lost", MAX_ATTEMPTS)
    assert "older" in {g["job_id"] for g in await dispatcher.groups()}


@scenario(1)
async def test_a_job_whose_groups_are_given_up_for_another_reason_has_lost_its_workers(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    for _ in range(MAX_ATTEMPTS):
        await begin(dispatcher, "a")
        await lose(dispatcher, "a", RuntimeError("controller died"))
    assert (await dispatcher.poll("a"))[-1]["kind"] == "worker_lost"


@scenario(1)
async def test_groups_that_never_start_fail_every_job_instead_of_waiting_for_ever(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    poll = asyncio.create_task(dispatcher.poll("a"))
    while not poll.done():
        for name, end in dispatcher.ends.items():
            dispatcher.errors[name] = RuntimeError("No module named torch")
            end.set()
        await asyncio.sleep(0.01)
    assert poll.result()[-1]["kind"] == "no_workers"


@scenario(3)
async def test_groups_of_one_size_that_never_start_fail_the_jobs_that_wait_for_them_and_no_others(dispatcher: Groups) -> None:
    await dispatcher.submit(job("small"))
    (healthy,) = await dispatcher.groups()
    generation = await ranks_join(dispatcher, healthy["group_id"], 1)
    await dispatcher.submit(job("large", 2))
    poll = asyncio.create_task(dispatcher.poll("large"))
    while not poll.done():
        for group in await dispatcher.groups():
            if group["world_size"] == 2:
                dispatcher.end_of(group["group_id"]).set()
        await asyncio.sleep(0.001)
    assert poll.result()[-1]["kind"] == "no_workers"
    await dispatcher.finish(healthy["group_id"], generation, 1, {"state": "complete"})
    started, ended = await dispatcher.poll("small")
    assert (started["event"], ended["event"], ended["state"]) == ("started", "ended", "complete")
    assert {(g["group_id"], g["state"]) for g in await dispatcher.groups() if g["world_size"] == 1} == {(healthy["group_id"], "idle")}


@scenario(4)
async def test_a_job_that_the_cluster_cannot_hold_fails_and_the_others_go_on(dispatcher: Groups) -> None:
    """As a trial in flight does that is resumed on a smaller cluster."""
    await dispatcher.submit(job("large", 8))
    await dispatcher.submit(job("small"))
    (ended,) = await dispatcher.poll("large")
    assert (ended["kind"], ended["message"]) == ("no_workers", "the cluster has room for 4 workers, and it needs more")
    await begin(dispatcher, "small")


@scenario(8)
async def test_where_nodes_are_lost_what_needs_them_fails_and_the_rest_goes_on_with_what_is_placed(dispatcher: Groups) -> None:
    for name in ("a", "b", "c"):
        await dispatcher.submit(job(name, 2))
    for name in ("a", "b", "c"):
        await begin(dispatcher, name)
    await dispatcher.submit(job("whole", 8))
    await dispatcher.submit(job("d", 2))
    await lose(dispatcher, "c", NotPlaced("no room"))
    assert (await dispatcher.poll("whole"))[-1]["kind"] == "no_workers"
    (*_, starting) = await dispatcher.groups()  # for `d`, where `c` had been placed before
    await lose_group(dispatcher, starting["group_id"], NotPlaced("no room"))
    assert [(g["world_size"], g["job_id"]) for g in await dispatcher.groups()] == [(2, "a"), (2, "b")]
    first = (await dispatcher.groups())[0]["group_id"]
    await dispatcher.finish(first, 1, 1, {"state": "complete"})
    assert (await dispatcher.groups())[0]["job_id"] == "c", "it goes on where there is room"
    await dispatcher.finish(first, 1, 2, {"state": "complete"})
    assert (await dispatcher.groups())[0]["job_id"] == "d"


@scenario(8)
async def test_where_no_node_has_room_for_the_largest_the_others_go_on(dispatcher: Groups) -> None:
    """All groups had been let go to make room for it."""
    await dispatcher.submit(job("whole", 8))
    await dispatcher.submit(job("small"))
    (starting,) = await dispatcher.groups()
    await lose_group(dispatcher, starting["group_id"], NotPlaced("no room"))
    assert (await dispatcher.poll("whole"))[-1]["kind"] == "no_workers"
    await begin(dispatcher, "small")
    await dispatcher.submit(job("half", 4))
    await begin(dispatcher, "half")


@scenario(1)
async def test_why_workers_cannot_begin_is_told_with_the_job_that_they_were_for_and_their_group_ends(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    (group,) = await dispatcher.groups()
    for attempt in range(MAX_ATTEMPTS):
        generation = await ranks_join(dispatcher, group["group_id"], 1)
        is_to_end = await dispatcher.lost(group["group_id"], generation, "ModelError: no such directory: /home/me/model")
        assert is_to_end == (attempt == MAX_ATTEMPTS - 1)
    dispatcher.end_of(group["group_id"]).set()
    (*_, ended) = await dispatcher.poll("a")
    if ended["event"] != "ended":
        (ended,) = await dispatcher.poll("a")
    assert (ended["kind"], ended["message"]) == ("worker_lost", "ModelError: no such directory: /home/me/model")
    assert await dispatcher.groups() == []


@scenario(1)
async def test_where_no_group_of_a_size_can_begin_what_waits_for_that_size_fails_too(dispatcher: Groups) -> None:
    for name in ("a", "b", "c", "d", "e"):
        await dispatcher.submit(job(name))
    poll = asyncio.create_task(dispatcher.poll("e"))
    for _ in range(MAX_FAILED_STARTS):
        (group,) = await dispatcher.groups()
        for _ in range(MAX_ATTEMPTS):
            generation = await ranks_join(dispatcher, group["group_id"], 1)
            await dispatcher.lost(group["group_id"], generation, "OSError: no model")
        dispatcher.end_of(group["group_id"]).set()
        while group["group_id"] in {g["group_id"] for g in await dispatcher.groups()}:
            await asyncio.sleep(0.01)
    (ended,) = await poll
    assert (ended["kind"], ended["message"]) == ("no_workers", "no group of 1 workers could be started: OSError: no model")
    assert await dispatcher.groups() == []


@scenario(1)
async def test_a_worker_that_cannot_begin_ends_where_its_group_is_let_go(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    (group,) = await dispatcher.groups()
    generation = await ranks_join(dispatcher, group["group_id"], 1)
    ending = asyncio.create_task(dispatcher.shutdown())
    await asyncio.sleep(0)
    assert await dispatcher.lost(group["group_id"], generation, "OSError: no model")
    dispatcher.end_of(group["group_id"]).set()
    await ending


@scenario(1)
async def test_what_kept_workers_from_beginning_once_is_not_why_they_die_later(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    (group,) = await dispatcher.groups()
    generation = await ranks_join(dispatcher, group["group_id"], 1)
    assert not await dispatcher.lost(group["group_id"], generation, "HTTPError: try again")
    for _ in range(MAX_ATTEMPTS):
        await ranks_join(dispatcher, group["group_id"], 1)
    (*_, ended) = await dispatcher.poll("a")
    assert ended["message"] == f"its workers died in {MAX_ATTEMPTS} attempts"


@scenario(4)
async def test_shutdown_waits_for_no_group_that_no_node_has_room_for(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a", 4))
    await dispatcher.shutdown()
    (waiting,) = await dispatcher.groups()
    assert waiting["job_id"] is None


@scenario(1)
async def test_a_job_that_was_asked_to_leave_is_not_begun_again_where_its_group_is_given_up(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    await begin(dispatcher, "a")
    await dispatcher.submit(job("b"))
    await dispatcher.stop("a")
    await lose(dispatcher, "a", RuntimeError("controller died"))
    assert "a" not in dispatcher._jobs
    await begin(dispatcher, "b")


@scenario(5)
async def test_groups_of_expected_jobs_start_on_free_workers_and_take_the_jobs_when_they_come(dispatcher: Groups) -> None:
    await dispatcher.submit(job("first"))
    await dispatcher.expect(2, num_jobs=9)
    names = [g["group_id"] for g in await dispatcher.groups()]
    assert [g["world_size"] for g in await dispatcher.groups()] == [1, 2, 2]
    await ranks_join(dispatcher, names[1], 2)
    await dispatcher.submit(job("a", 2))
    assert [g["job_id"] for g in await dispatcher.groups()] == [None, "a", None]


@scenario(4)
async def test_no_more_groups_start_than_jobs_are_expected(dispatcher: Groups) -> None:
    await dispatcher.submit(job("first"))
    await dispatcher.expect(1, num_jobs=3)
    assert len(await dispatcher.groups()) == 3
    await dispatcher.expect(1, num_jobs=0)
    assert len(await dispatcher.groups()) == 3


@scenario(5)
async def test_as_many_groups_start_as_fit_where_nobody_knows_how_many_jobs_come(dispatcher: Groups) -> None:
    await dispatcher.expect(2, num_jobs=math.inf)
    assert [g["world_size"] for g in await dispatcher.groups()] == [2, 2]


@scenario(2)
async def test_a_job_that_is_predicted_to_end_in_time_is_begun_while_a_large_one_waits(dispatcher: Groups) -> None:
    smalls = [job(f"small-{i}") for i in range(OVERTAKEN_PER_WORKER * 2)]
    late = [job("too-long", seconds=2000.0), job("unknown"), job("short", seconds=10.0)]
    for submitted in (job("long", seconds=1000.0), job("first"), job("large", 2), *smalls, *late):
        await dispatcher.submit(submitted)
    names = [g["group_id"] for g in await dispatcher.groups()]
    (_, generation) = [await ranks_join(dispatcher, name, 1) for name in names]
    begun = []
    while (running := (await dispatcher.groups())[1]["job_id"]) is not None:
        begun.append(running)
        await dispatcher.finish(names[1], generation, len(begun), {"state": "complete"})
    assert begun == ["first", *(small.job_id for small in smalls), "short"]


@scenario(1)
async def test_shutdown_lets_idle_groups_go_and_waits_for_them(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    (group,) = await dispatcher.groups()
    generation = await ranks_join(dispatcher, group["group_id"], 1)
    await dispatcher.finish(group["group_id"], generation, 1, {"state": "complete"})
    busy, waiting = job("busy"), job("waiting")
    await dispatcher.submit(busy)
    await dispatcher.submit(waiting)
    ending = asyncio.create_task(dispatcher.shutdown())
    assert await dispatcher.asked(group["group_id"], generation, 2) is Ask.SUSPEND
    await dispatcher.finish(group["group_id"], generation, 2, {"state": "stopped"})
    assert await dispatcher.next(group["group_id"], generation, 2) is None
    assert not ending.done()
    dispatcher.end_of(group["group_id"]).set()
    await ending
    assert await dispatcher.groups() == [], "nothing was started for what waits"


@pytest.mark.parametrize("restarts", [True, False])
def test_after_a_failure_of_one_rank_the_group_takes_no_job_before_it_restarted(restarts: bool) -> None:
    @scenario(2)
    async def play(dispatcher: Groups) -> None:
        await dispatcher.submit(job("a", 2))
        await dispatcher.submit(job("b", 2))
        (group,) = await dispatcher.groups()
        generation = await ranks_join(dispatcher, group["group_id"], 2)
        failure = {"state": "failed", "kind": "error", "message": "x", "group_restarts": restarts}
        await dispatcher.finish(group["group_id"], generation, 1, failure)
        (state,) = await dispatcher.groups()
        assert state["job_id"] == (None if restarts else "b")
        if restarts:
            await ranks_join(dispatcher, group["group_id"], 2)
            (state,) = await dispatcher.groups()
            assert state["job_id"] == "b"

    play()


@scenario(2)
async def test_the_first_ends_wait_until_every_relay_is_there_and_later_ones_for_nothing(dispatcher: Groups) -> None:
    for name in "abc":
        await dispatcher.submit(job(name))
    first = asyncio.create_task(dispatcher.muster("one", 2))
    await asyncio.sleep(0)
    assert not first.done()
    await dispatcher.muster("two", 2)
    await first
    await dispatcher.muster("one", 2)


@scenario(2)
async def test_what_was_told_to_the_end_is_waited_for_no_more(dispatcher: Groups) -> None:
    for name in "ab":
        await dispatcher.submit(job(name))
    first = asyncio.create_task(dispatcher.muster("one", 2))
    group_id = (await dispatcher.groups())[0]["group_id"]
    generation = await ranks_join(dispatcher, group_id, 1)
    await dispatcher.finish(group_id, generation, 1, {"state": "complete"})
    await asyncio.sleep(0.01)  # it looks, and goes on waiting
    assert not first.done()
    assert kinds(await dispatcher.poll("a")) == ["started", "ended"]
    await asyncio.wait_for(first, 1)


@scenario(2)
async def test_relays_that_have_no_jobs_are_not_waited_for(dispatcher: Groups) -> None:
    await dispatcher.submit(job("a"))
    await dispatcher.muster("one", 2)


async def _mustered_alone() -> bool:
    dispatcher = Groups(2)
    for name in "ab":
        await dispatcher.submit(job(name))
    await dispatcher.muster("one", 2)
    for end in dispatcher.ends.values():
        end.set()
    return True


def test_a_relay_that_never_comes_is_waited_for_no_longer_than_a_start_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "MUSTER_SECONDS", 0.01)
    assert asyncio.run(asyncio.wait_for(_mustered_alone(), 5))
