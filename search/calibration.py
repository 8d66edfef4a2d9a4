"""Predicted against measured: how far the seconds and the bytes that were said before each trial were off."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from search.record import TrialRecord, TrialState
from spaces.metrics import TRAIN_SECONDS

# What there is to know of a source, behind it.
HOW = {"estimate": " (an assumption: `paretune profile` measures it)", "corrected estimate": " (by the trials before)"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """One predicted number of one trial, and what it was."""

    number: int
    what: Literal["train_seconds", "tensor_bytes"]
    source: str
    """`profile`, `estimate` or `corrected estimate` of a time, `formula` of memory."""
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1


def calibrate(records: Sequence[TrialRecord]) -> list[Calibration]:
    """Return every number that was predicted and measured, of the complete trials in their order."""
    rows = []
    for record in records:
        if record.state is not TrialState.COMPLETE:
            continue
        seconds, measured = record.predicted.get(TRAIN_SECONDS), record.values.get(TRAIN_SECONDS)
        if seconds and measured:
            source = str(record.predicted["time_source"])
            rows.append(Calibration(number=record.number, what="train_seconds", source=source, predicted=seconds, measured=measured))
        terms, held = record.predicted.get("memory"), tensor_bytes(record)
        if terms and held:
            predicted = float(sum(terms.values()))
            rows.append(Calibration(number=record.number, what="tensor_bytes", source="formula", predicted=predicted, measured=held))
    return rows


def calibration_as_json(records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Return every number that was predicted and measured, ready for JSON."""
    return [{**asdict(row), "error": row.error} for row in calibrate(records)]


def tensor_bytes(record: TrialRecord) -> float | None:
    """Return the tensors' peak on the rank that held most, or None where it was not measured."""
    ranks = [rank for rank in record.details.get("memory_by_rank", ()) if rank]
    return max((float(r["weights_bytes"] + r["optimizer_bytes"] + r["working_bytes"]) for r in ranks), default=None)


def kind(what: str, source: str) -> str:
    """Return what was predicted and from what, in words."""
    return f"{what.replace('_', ' ')} from {'an' if source == 'estimate' else 'a'} {source}"


def summary_lines(rows: Sequence[Calibration]) -> list[str]:
    """Return one line for each kind of prediction: how many there were, and their median and largest error."""
    lines = []
    for what, source in dict.fromkeys((row.what, row.source) for row in rows):
        errors = [abs(row.error) for row in rows if (row.what, row.source) == (what, source)]
        spread = f"median error {statistics.median(errors):.1%}, largest {max(errors):.1%}"
        lines.append(f"{kind(what, source)}{HOW.get(source, '')}: {len(errors)} trial{'s' * (len(errors) > 1)}, {spread}")
    return lines
