"""A queue between the search and a server that may be slow or away: the search never waits, and nothing is dropped."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger(__name__)

Event = Mapping[str, Any]

FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 5.0


class Spool:
    """Delivers events one after the other from a thread of its own, each until it is taken or refused."""

    def __init__(
        self,
        deliver: Callable[[Event], None],
        *,
        is_refusal: Callable[[Exception], bool],
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        """Start the thread.

        Args:
            deliver: hands one event over; must stand being called again with an event that it has handed over already.
            is_refusal: whether an exception of `deliver` is an answer, so that trying again would change nothing.
            first_pause_seconds: pause after the first failure; it doubles up to `LONGEST_PAUSE_SECONDS`.
        """
        self._deliver = deliver
        self._is_refusal = is_refusal
        self._first_pause = first_pause_seconds
        self._waiting: deque[Event] = deque()
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: a server that is away must not keep the process from ending. The ledger still has the events.
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    def submit(self, event: Event) -> None:
        """Queue an event; returns at once."""
        with self._changed:
            self._waiting.append(event)
            self._changed.notify_all()

    def flush(self, timeout_seconds: float) -> int:
        """Wait until everything is delivered or the time is over; return how many events are left."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout_seconds)
            return len(self._waiting)

    def close(self) -> None:
        """End the thread after the event that it is delivering; what still waits stays undelivered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                event = self._waiting[0]
            failures = 0 if self._is_done_with(event, failures) else failures + 1
            with self._changed:
                if failures:
                    self._pause(failures)
                else:
                    self._waiting.popleft()
                    self._changed.notify_all()

    def _is_done_with(self, event: Event, failures: int) -> bool:
        try:
            self._deliver(event)
        except Exception as error:
            if self._is_refusal(error):
                logger.warning("the tracking server refused %s %s: %s", event["event"], event.get("number", ""), error)
                return True
            if failures == 0:
                logger.warning("the tracking server does not answer, trying again until it does: %s", error)
            return False
        return True

    def _pause(self, failures: int) -> None:
        seconds = min(self._first_pause * 2.0 ** (failures - 1), LONGEST_PAUSE_SECONDS)
        self._changed.wait_for(lambda: self._closed, seconds)
