"""What stands above the numbers of every benchmark."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any


def heading(command: str, machine: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """Return how the numbers came to be.

    Args:
        command: what makes them again.
        machine: in words, and what else ran on it.
        packages: those whose versions matter.
    """
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{machine}, {platform.system()} {platform.machine()}",
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
    }
