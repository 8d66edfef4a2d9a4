"""The append-only record of a search: one JSON line per fact, on disk before anything else happens."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from search.record import TrialRecord, TrialState

logger = logging.getLogger(__name__)

Event = dict[str, Any]


class LedgerError(Exception):
    """The ledger cannot be read; the message is one line for the user."""


class Ledger:
    """A file of events. A line that a crash tore off is trimmed when the file is opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._events = _read(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, event: str, **fields: Any) -> Event:
        """Write a fact, wait until it is on disk, and return it."""
        line: Event = {"event": event, "time": time.time(), **fields}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._events.append(line)
        return line

    def events(self) -> list[Event]:
        """Return all facts, oldest first."""
        return list(self._events)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(slots=True)
class SearchState:
    """What the facts so far add up to."""

    records: dict[int, TrialRecord] = field(default_factory=dict)
    reference: dict[str, float] | None = None
    """Scores of the untrained model."""
    started: Event | None = None
    """The first event: machine, versions, data, MLflow run."""
    finished: bool = False
    finished_at: float | None = None

    @property
    def in_flight(self) -> list[int]:
        """Numbers of the trials that were started and have not ended."""
        return [n for n, r in self.records.items() if r.state is TrialState.RUNNING]

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take one fact into account; facts of a kind that is not known are left alone."""
        match event["event"]:
            case "search_started":
                self.started = dict(event)
            case "reference":
                self.reference = dict(event["metrics"])
            case "search_finished":
                self.finished, self.finished_at = True, event["time"]
            case "resumed":
                self.finished = False
            case "trial_started" | "trial_infeasible":
                self.records[event["number"]] = _new_record(event)
            case "trial_reported" | "trial_finished" | "test_scored":
                number = event["number"]
                self.records[number] = _updated(self.records[number], event)


def replay(events: Iterable[Mapping[str, Any]]) -> SearchState:
    """Return what a ledger's events add up to."""
    state = SearchState()
    for event in events:
        state.apply(event)
    return state


def _new_record(event: Mapping[str, Any]) -> TrialRecord:
    launched = event["event"] == "trial_started"
    return TrialRecord(
        number=event["number"],
        state=TrialState.RUNNING if launched else TrialState.PRUNED,
        params=event["params"],
        config=event["config"],
        constraints=event.get("constraints", {}),
        started_at=event["time"],
        finished_at=None if launched else event["time"],
        launched=launched,
    )


def _updated(record: TrialRecord, event: Mapping[str, Any]) -> TrialRecord:
    match event["event"]:
        case "trial_reported":
            report = {k: v for k, v in event["report"].items() if k != "details"}
            # A trial that goes on from a checkpoint trains some steps again and reports them again.
            kept = tuple(r for r in record.reports if r["step"] < report["step"])
            return replace(record, reports=(*kept, report), details=event["report"].get("details") or record.details)
        case "test_scored":
            return replace(record, test=event["metrics"])
    if record.state is not TrialState.RUNNING:
        return record  # the first end is the one that was acted on
    return replace(
        record,
        state=TrialState(event["state"]),
        values=event["values"],
        error=event["error"],
        constraints={**record.constraints, **event["constraints"]},
        attempts=event["attempts"],
        finished_at=event["time"],
    )


def _read(path: Path) -> list[Event]:
    if not path.exists():
        return []
    raw = path.read_bytes()
    whole, newline, torn = raw.rpartition(b"\n")
    events: list[Event] = []
    end = 0
    lines = whole.split(b"\n") if newline else []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "event" not in event:
                raise ValueError("no event")
        except ValueError as error:
            if number < len(lines):
                raise LedgerError(f"{path}:{number}: not a line that this program wrote; restore the file from a copy") from error
            torn = line
            break
        events.append(event)
        end += len(line) + 1
    if torn or end < len(raw):
        logger.warning("%s: the last line was torn off by a crash and is trimmed", path)
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())
    return events
