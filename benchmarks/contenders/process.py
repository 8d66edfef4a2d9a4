"""A contender's process, with the CPU seconds of all that descends from it."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.5
# What a contender is given after the limit to end by itself, and to leave when it is asked to.
GRACE_SECONDS, LEAVE_SECONDS = 20.0, 20.0


def watched(
    command: Sequence[str], environment: Mapping[str, str], directory: str, log: Path, limit_seconds: float
) -> tuple[int, list[tuple[float, float]]]:
    """Run a command to its end, or somewhat longer than the limit; nothing of it is left afterwards.

    Returns:
        Its exit code, and (seconds since its start, CPU seconds until then).
    """
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=directory, env=dict(environment), stdout=output, stderr=subprocess.STDOUT)
        clock = CpuClock(process.pid)
        clock.start()
        try:
            code = _wait(process, limit_seconds)
        finally:
            clock.stop()
    return code, clock.curve


class CpuClock(threading.Thread):
    """Follows the CPU seconds of a process and all that descends from it."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self._known: dict[psutil.Process, float] = {}
        self._over = threading.Event()
        self._since = time.time()
        self.curve: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            with contextlib.suppress(psutil.Error):
                for process in [self._root, *self._root.children(recursive=True)]:
                    self._known.setdefault(process, 0.0)
            for process in self._known:
                # What is no child any more, because its parent died, is followed all the same.
                with contextlib.suppress(psutil.Error):
                    times = process.cpu_times()
                    self._known[process] = times.user + times.system
            self.curve.append((round(time.time() - self._since, 2), round(sum(self._known.values()), 2)))

    def stop(self) -> None:
        """Stop, and end what is left."""
        self._over.set()
        self.join()
        for process in self._known:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _wait(process: subprocess.Popen[bytes], limit: float) -> int:
    """Let a contender end by itself for a while, then ask it to leave, then make it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(limit + GRACE_SECONDS)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(LEAVE_SECONDS)
    process.kill()
    return process.wait()
