"""Where a result comes from: the machine in words, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version


def machine() -> str:
    """Return the machine in words, without its name."""
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {memory} GiB memory"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("paretune", "torch", "transformers", "peft", "ray", "optuna", "mlflow-skinny", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def git_commit() -> str | None:
    """Return the commit of the user's working directory, if it is a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
