"""The command as a user runs it, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def environment() -> dict[str, str]:
    """Return this process's environment, with the checkout on the path and Ray's sockets at a short one."""
    return {**os.environ, "RAY_TMPDIR": "/tmp", "PYTHONPATH": str(Path(__file__).parents[1])}


def paretune(*args: str, cwd: Path, check: int = 0, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Run the command and return what it printed; another exit code than `check` fails the test."""
    command = [sys.executable, "-m", "search.cli", *args]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
