"""What a study proposes, and what it is shown of an earlier search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """One trial of the study: its number and a value for every knob."""

    number: int
    params: dict[str, Any]
    again: int | None = None
    """The trial whose params these were, where that ran out of memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PastTrial:
    """A complete trial of an earlier search."""

    params: Mapping[str, Any]
    values: Mapping[str, float]
    constraints: Mapping[str, float]
