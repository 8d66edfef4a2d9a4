"""What is known of one trial, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class TrialState(StrEnum):
    """Optuna's states, and their meaning."""

    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    """Stopped early, or infeasible before it was launched."""
    FAIL = "FAIL"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One trial of a search."""

    number: int
    state: TrialState
    params: Mapping[str, Any]
    """The user's knobs, flat."""
    config: Mapping[str, Any] | None = None
    """`TrialConfig.to_dict()`"""
    values: Mapping[str, float] = field(default_factory=dict)
    """Final metrics, by the names of `spaces.metrics`."""
    reports: tuple[Mapping[str, Any], ...] = ()
    """`TrialReport.to_dict()` without details, oldest first."""
    constraints: Mapping[str, float] = field(default_factory=dict)
    """Feasible when all are <= 0."""
    error: Mapping[str, str] | None = None
    """`{"kind", "message"}` of a trial that failed."""
    attempts: int = 0
    started_at: float | None = None
    """Unix seconds."""
    finished_at: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    """Process map, memory by rank, MFU convention, versions."""
    test: Mapping[str, float] = field(default_factory=dict)
    """Metrics on the test file; members of the front only."""
    launched: bool = True
    """False for a proposal that was infeasible before launch and cost nothing."""

    @property
    def feasible(self) -> bool:
        return all(value <= 0 for value in self.constraints.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialRecord:
        """Read back what `to_dict` wrote."""
        return cls(**{**data, "state": TrialState(data["state"]), "reports": tuple(data["reports"])})
