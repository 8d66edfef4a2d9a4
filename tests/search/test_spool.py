from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from search.spool import Spool


class Refused(Exception):
    pass


class Server:
    """Takes events while it is up; refuses the numbers in `refused`."""

    def __init__(self, *, up: bool = True, refused: frozenset[int] = frozenset()) -> None:
        self.up = up
        self.refused = refused
        self.taken: list[int] = []
        self.num_calls = 0

    def __call__(self, event: Mapping[str, Any]) -> None:
        self.num_calls += 1
        if not self.up:
            raise ConnectionError("down")
        if event["number"] in self.refused:
            raise Refused("bad value")
        self.taken.append(event["number"])


def spool_to(server: Server) -> Spool:
    return Spool(server, is_refusal=lambda e: isinstance(e, Refused), first_pause_seconds=0.001)


def submit(spool: Spool, *numbers: int) -> None:
    for number in numbers:
        spool.submit({"event": "trial_started", "number": number})


def test_events_arrive_in_order() -> None:
    server = Server()
    spool = spool_to(server)
    submit(spool, *range(100))
    assert spool.flush(10) == 0
    assert server.taken == list(range(100))


def test_a_server_that_hangs_does_not_hold_up_the_search() -> None:
    answers = threading.Event()

    def hang(_: Mapping[str, Any]) -> None:
        answers.wait()

    spool = Spool(hang, is_refusal=lambda _: False)
    submit(spool, *range(50))  # would not return if it waited for the server
    assert not answers.is_set()
    answers.set()
    assert spool.flush(10) == 0


def test_a_server_that_is_away_loses_nothing() -> None:
    server = Server(up=False)
    spool = spool_to(server)
    submit(spool, *range(50))
    assert spool.flush(0.05) == 50
    assert server.num_calls > 1
    server.up = True
    assert spool.flush(10) == 0
    assert server.taken == list(range(50))


def test_a_refused_event_does_not_hold_up_the_others(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(refused=frozenset({1}))
    spool = spool_to(server)
    with caplog.at_level(logging.WARNING):
        submit(spool, 0, 1, 2)
        assert spool.flush(10) == 0
    assert server.taken == [0, 2]
    assert "refused trial_started 1: bad value" in caplog.text


def test_close_ends_the_thread_even_if_the_server_is_away() -> None:
    before = threading.active_count()
    spool = spool_to(Server(up=False))
    submit(spool, 1)
    spool.close()
    assert threading.active_count() == before
    assert spool.flush(0.01) == 1


def test_a_slow_server_is_waited_for() -> None:
    server = Server()

    def slowly(event: Mapping[str, Any]) -> None:
        time.sleep(0.02)
        server(event)

    spool = Spool(slowly, is_refusal=lambda _: False)
    submit(spool, 0, 1, 2)
    assert spool.flush(10) == 0
    assert server.taken == [0, 1, 2]
