"""Waiting on a condition, never on a length of time."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, seconds: float = 300) -> None:
    """Returns once `condition` holds; fails when `process`, which should bring it about, ends or `seconds` have gone by."""
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"the process ended with {process.returncode}"
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
