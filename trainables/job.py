"""What the driver asks of a worker group: plain values, importable without torch and without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from spaces.config import Precision
from spaces.fidelity import rung_shares

# In the directory of the groups' own files; the driver writes it, and every worker looks for it.
HERE = "here"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What all jobs of one search share; the dispatcher hands it to every worker once."""

    model_name: str
    model_revision: str | None
    task: str
    exact_match_rows: int
    precisions: tuple[Precision, ...]
    """Those of the space."""
    data: list[Any]
    """A list of one: the object reference of the `TaskData`, which Ray would resolve too early if it stood bare."""


class Ask(StrEnum):
    """How a job is asked to leave before its end."""

    STOP = "stop"
    """At its next step; nobody goes on with it."""
    SUSPEND = "suspend"
    """At its next step, after a checkpoint: a resume goes on with it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One unit of work for a group."""

    job_id: str
    kind: str
    """`train`, `device` (say what the device can do), `reference` (score the untrained model), `profile` (time some steps) or `test`
    (score saved weights on the test file)."""
    config: dict[str, Any]
    """`TrialConfig.to_dict()`."""
    directory: str
    """Where the trial's checkpoints and weights are."""
    rungs: tuple[float, ...] = rung_shares()
    """Shares of its own steps at which a trial reports before its end."""
    is_judged: bool = True
    """Whether these reports decide about it; others are left out where they would cost too much."""
    predicted_seconds: float | None = None
    """Of all its steps; None where nothing is predicted."""

    @property
    def world_size(self) -> int:
        return int(self.config["layout"]["world_size"])
