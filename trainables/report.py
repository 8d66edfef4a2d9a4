"""What a trial says about itself: plain values, importable without torch and without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# Points of a curve of losses: what a chart can show, and a ledger of ten thousand trials can hold.
MAX_LOSSES = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialReport:
    """One report of one trial, at an evaluation point or at its end."""

    step: int
    """Optimizer steps done."""
    num_steps: int
    """Optimizer steps of the whole trial."""
    fidelity: float
    """Share of its own token budget that the trial has trained, in [0, 1]."""
    metrics: Mapping[str, float]
    """Values by the names of `spaces.metrics`; a metric that cannot be measured is absent, never guessed."""
    final: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    """`train_losses` with `steps_per_loss`, of the whole trial so far; in the final report also process map, peak memory by rank, MFU
    convention, peak and its source, versions."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)


def thinned(losses: Sequence[float], num_steps: int) -> dict[str, Any]:
    """Return the details that tell a trial's losses: means over as many steps each, fewer at the end of a trial.

    Args:
        losses: of every step so far.
        num_steps: of the whole trial.
    """
    span = -(-num_steps // MAX_LOSSES)
    end = num_steps if len(losses) == num_steps else len(losses) - len(losses) % span
    spans = [losses[start : min(start + span, end)] for start in range(0, end, span)]
    return {"train_losses": [sum(part) / len(part) for part in spans], "steps_per_loss": span}


class TrialError(Exception):
    """A trial cannot give a result. `kind` says why, and decides whether it is tried again."""

    kind = "error"


class NotPlaced(Exception):
    """The cluster gave a worker group no workers in time."""


class Diverged(TrialError):
    """The loss or the gradient norm is not finite; the same recipe would diverge again."""

    kind = "diverged"


class DiskFull(TrialError):
    """Weights could not be written."""

    kind = "disk_full"


class OutOfMemory(TrialError):
    """The device has not enough memory for this layout; told to the sampler as a violated constraint."""

    kind = "out_of_memory"
