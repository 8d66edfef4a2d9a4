"""SIGINT and SIGTERM during a search: the first asks it to save and leave, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM)
HINT = b"\ninterrupted: the trials in flight are being saved; once more leaves at once\n"

# Ray's own processes of a node, which a search starts where it has no cluster; without them nothing runs and nothing is saved.
RAY_PROCESSES = ("gcs_server", "raylet")
LOOK_SECONDS = 0.5


class Interrupted(Exception):
    """The user or the machine asked the search to leave; it can be resumed."""

    def __init__(self, signum: int, command: str) -> None:
        self.why = f"interrupted by {signal.Signals(signum).name}"
        super().__init__(f"{self.why}; `{command}` goes on")
        self.signum, self.exit_code = signum, 128 + signum


class Interruption:
    """Notes the first signal instead of raising inside whatever runs; enter it while leaving must be orderly.

    Only the main thread of a process can take signals; in another one it notes none.
    """

    def __init__(self, command: str) -> None:
        """Take the command that goes on later."""
        self._command = command
        self._signum: int | None = None
        self._ray: list[psutil.Process] = []
        self._left = threading.Event()

    @contextmanager
    def following_ray(self) -> Iterator[None]:
        """Enter it once Ray is there, for as long as it must be."""
        self._ray = [child for child in psutil.Process().children() if child.name() in RAY_PROCESSES]
        try:
            yield
        finally:
            self._ray = []

    def __enter__(self) -> Interruption:
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._in_main_thread:
            self._previous = {signum: signal.signal(signum, self._take) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._in_main_thread:
            for signum, handler in self._previous.items():
                signal.signal(signum, handler)

    @property
    def is_asked(self) -> bool:
        """Whether a signal came."""
        return self._signum is not None

    def check(self) -> None:
        """Raise if a signal came.

        Raises:
            Interrupted: one did.
        """
        if self._signum is not None:
            raise Interrupted(self._signum, self._command)

    def _take(self, signum: int, _: FrameType | None) -> None:
        if self.is_asked:
            # As after a kill -9: the ledger has all that was acknowledged, and Ray's processes notice that the driver is gone.
            os._exit(128 + signum)
        self._signum = signum
        # Not print: the signal may have come in the middle of one.
        os.write(2, HINT)
        threading.Thread(target=self._leave_without_ray, args=(signum,), daemon=True).start()

    def _leave_without_ray(self, signum: int) -> None:
        """End the process once Ray's are gone: a signal to the whole group takes them too, and Ray would wait a minute for them."""
        while not self._left.wait(LOOK_SECONDS):
            if any(not ray.is_running() or ray.status() == psutil.STATUS_ZOMBIE for ray in self._ray):
                os.write(2, f"error: the signal ended Ray too, so that nothing more was saved; `{self._command}` goes on\n".encode())
                os._exit(128 + signum)
