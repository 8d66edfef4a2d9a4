"""The append-only record of a search that nothing may lose: one JSON event a line, on the disk before all else.

Every line has `event` and `time` (Unix seconds). The events are `search_started`, `resumed`, `lengthened`, `compared`,
`device_examined`, `warm_started`, `reference`, `search_cut_short`, `search_finished`, and with the `number` of a trial
`trial_started` (it is to run, and waits for workers), `trial_placed` (a group of workers has it), `trial_infeasible`,
`trial_reported`, `trial_finished`, `test_scored`, `confirmed`, `harness_scored` (of the untrained model without a number). A report
at a rung carries the rung's `verdict`: a trial that it stops ends as PRUNED, even if a
crash comes between. `held_seconds` of a report and of an end are those for which the trial held its worker group since its event
before; of `search_cut_short`, those of every trial in flight, by its number.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from search.errors import UserError
from search.record import Confirmation, HarnessRun, TrialRecord, TrialState, with_run
from spaces.spec import Objective, SearchSpec

logger = logging.getLogger(__name__)

# Marks an event of before for those who follow a search that goes on.
TOLD = "told"
# What lies before these is no time of the search: it was away, or its front was being confirmed.
OUTSIDE = ("resumed", "lengthened", "compared", "confirmed", "harness_scored")


class Ledger:
    """One file of JSON lines, written by one driver; others may read it meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_whole = False

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Write one event and return it as a reader will see it; when this returns, the event is on the disk.

        Raises:
            UserError: the disk is full or gone; the ledger is then as it was before.
            TypeError: a field is no plain value; nothing was written.
        """
        line = json.dumps({"event": event, "time": time.time(), **fields}, separators=(",", ":"))
        try:
            if not self._is_whole:
                self._make_whole()
            self._write(line.encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self._path}: cannot write the ledger: {error.strerror}") from error
        return _read(line)

    def events(self) -> list[dict[str, Any]]:
        """Return all events, oldest first; a line that a crash left half written at the end is left out.

        Raises:
            UserError: a line that is not the last one is damaged.
        """
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        events, end = self._parse(data)
        if end < len(data):
            logger.warning("%s: left out a half-written last line of %d bytes", self._path, len(data) - end)
        return events

    def _make_whole(self) -> None:
        """Trim the torn line that a crash left: it was never acknowledged, and the next line must stand alone.

        Only the writer trims: to a reader of a running search, a line that is being written looks torn too.
        """
        if self._path.exists():
            data = self._path.read_bytes()
            _, end = self._parse(data)
            if end < len(data):
                logger.warning("%s: trimmed a half-written last line of %d bytes", self._path, len(data) - end)
                os.truncate(self._path, end)
        else:
            self._path.touch()
            _sync(self._path.parent)
        self._is_whole = True

    def _write(self, data: bytes) -> None:
        """Write all of it or nothing."""
        with self._path.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise

    def _parse(self, data: bytes) -> tuple[list[dict[str, Any]], int]:
        """Return the events and the number of bytes that hold them."""
        events: list[dict[str, Any]] = []
        end = 0
        lines = data.split(b"\n")
        # What stands behind the last line break is a line that was never finished, even if it parses.
        for number, line in enumerate(lines[:-1], start=1):
            try:
                event = _read(line)
                if not isinstance(event, dict) or not isinstance(event.get("event"), str) or "time" not in event:
                    raise ValueError("no event with a time")
            except ValueError as error:
                if number == len(lines) - 1 and not lines[-1]:
                    break
                raise UserError(f"{self._path}:{number}: damaged line ({error}); restore the file from a copy") from error
            events.append(event)
            end += len(line) + 1
        return events, end


@dataclass(kw_only=True, slots=True)
class SearchState:
    """Everything that the events say, up to the last one that was applied."""

    records: dict[int, TrialRecord] = field(default_factory=dict)
    """By trial number, in the order of the proposals."""
    reference: dict[str, float] | None = None
    """The untrained model's metrics."""
    harness: tuple[HarnessRun, ...] = ()
    """The untrained model on tasks of lm-evaluation-harness."""
    device: dict[str, Any] | None = None
    """What a worker's device can do, as `trainables.device.examine` found it."""
    started: dict[str, Any] | None = None
    """The `search_started` event."""
    warm_start: dict[str, Any] | None = None
    """The `warm_started` event: what the sampler learned from an earlier search."""
    finished: bool = False
    is_comparison: bool = False
    """Whether its trials are there to compare methods (`search.compare`)."""
    active_seconds: float = 0.0
    """Wall seconds from the first event to the last, without those from an interruption to the resume, and without confirmations."""
    last_at: float | None = None
    """Unix seconds of the last event."""
    placed: set[int] = field(default_factory=set)
    """Numbers of the trials that hold workers; the others in flight wait for theirs."""
    away: list[tuple[float, float]] = field(default_factory=list)
    """Unix seconds from when to when nothing of the search ran."""

    def seconds_until(self, now: float) -> float:
        """Return the active seconds, with those since the last event."""
        return self.active_seconds + (0.0 if self.last_at is None else max(0.0, now - self.last_at))

    def active_until(self, at: float, begin: float) -> float:
        """Return the seconds from one moment to a later one in which the search ran."""
        return at - begin - sum(max(0.0, min(at, end) - max(begin, start)) for start, end in self.away)

    @property
    def in_flight(self) -> set[int]:
        """Numbers of the trials that were started and have not ended."""
        return {n for n, record in self.records.items() if record.state is TrialState.RUNNING}

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take one event; one that repeats what is known already changes nothing.

        Raises:
            UserError: the event is about a trial that was never proposed.
        """
        self._pass_time(event)
        match event["event"]:
            case "search_started":
                self.started = dict(event)
            case "resumed" | "lengthened" | "search_finished":
                self.finished = event["event"] == "search_finished"
                self.placed.clear()
            case "compared":
                self.is_comparison = True
            case "search_cut_short":
                for number, seconds in event.get("held_seconds", {}).items():
                    record = self._record(int(number), event)
                    self.records[record.number] = replace(record, held_seconds=record.held_seconds + seconds)
            case "warm_started":
                self.warm_start = dict(event)
            case "device_examined":
                self.device = dict(event["device"])
            case "reference":
                self.reference = dict(event["metrics"])
            case "harness_scored" if event["number"] is None:
                self.harness = with_run(self.harness, _harness_run(event))
            case "trial_started" | "trial_infeasible":
                self.records.setdefault(event["number"], _proposed(event))
            case "trial_placed":
                self.placed.add(self._record(event["number"], event).number)
            case "trial_reported" | "trial_finished" | "test_scored" | "confirmed" | "harness_scored":
                self._update(event)

    def _pass_time(self, event: Mapping[str, Any]) -> None:
        if event["event"] not in OUTSIDE:
            self.active_seconds = self.seconds_until(event["time"])
        elif self.last_at is not None:
            self.away.append((self.last_at, event["time"]))
        self.last_at = event["time"]

    def _update(self, event: Mapping[str, Any]) -> None:
        number = event["number"]
        record = self._record(number, event)
        if event["event"] == "test_scored":
            self.records[number] = replace(record, test=dict(event["metrics"]))
        elif event["event"] == "confirmed":
            self.records[number] = record.confirmed_by(_confirmation(event))
        elif event["event"] == "harness_scored":
            self.records[number] = replace(record, harness=with_run(record.harness, _harness_run(event)))
        elif record.state is not TrialState.RUNNING:
            return  # The first end counts; whatever a resumed driver hears later is about work done twice.
        elif event["event"] == "trial_reported":
            # After lost workers steps are trained again from the last checkpoint, and reported again.
            earlier = [r for r in record.reports if r["step"] < event["report"]["step"]]
            verdict = event.get("verdict")
            stopped = verdict if verdict and not verdict["goes_on"] else None
            held = record.held_seconds + event.get("held_seconds", 0.0)
            self.records[number] = replace(record, reports=(*earlier, dict(event["report"])), stopped=stopped, held_seconds=held)
        else:
            self.placed.discard(number)
            self.records[number] = _finished(record, event)

    def _record(self, number: int, event: Mapping[str, Any]) -> TrialRecord:
        if number not in self.records:
            raise UserError(f"{event['event']} of trial {number}, which was never started")
        return self.records[number]


def replay(events: Iterable[Mapping[str, Any]]) -> SearchState:
    """Return the state after all events.

    Raises:
        UserError: an event is about a trial that was never proposed.
    """
    state = SearchState()
    for event in events:
        state.apply(event)
    return state


def _read(line: str | bytes) -> Any:
    """Return what a line holds; names are shared by all lines, or they would be most of what a long search holds in memory."""
    return json.loads(line, object_pairs_hook=lambda pairs: {sys.intern(name): value for name, value in pairs})


def _sync(directory: Path) -> None:
    """Make a new file's name survive a power cut, which syncing the file alone does not."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _proposed(event: Mapping[str, Any]) -> TrialRecord:
    launched = event["event"] == "trial_started"
    return TrialRecord(
        number=event["number"],
        state=TrialState.RUNNING if launched else TrialState.PRUNED,
        params=dict(event["params"]),
        config=event.get("config"),
        predicted=dict(event.get("predicted", {})),
        source=event.get("source"),
        was_proposed=event.get("was_proposed", True),
        again=event.get("again"),
        constraints=dict(event.get("constraints", {})),
        started_at=event["time"] if launched else None,
        finished_at=None if launched else event["time"],
    )


def _confirmation(event: Mapping[str, Any]) -> Confirmation:
    return Confirmation(
        seed=event["seed"],
        state=TrialState(event["state"]),
        values=dict(event["values"]),
        test=dict(event["test"]),
        error=event["error"],
        started_at=event["started_at"],
        finished_at=event["time"],
    )


def _finished(record: TrialRecord, event: Mapping[str, Any]) -> TrialRecord:
    return replace(
        record,
        state=TrialState(event["state"]),
        values=dict(event.get("values", {})),
        error=event.get("error"),
        constraints={**record.constraints, **event.get("constraints", {})},
        attempts=event.get("attempts", 0),
        details=dict(event.get("details", {})),
        held_seconds=record.held_seconds + event.get("held_seconds", 0.0),
        finished_at=event["time"],
    )


def _harness_run(event: Mapping[str, Any]) -> HarnessRun:
    return HarnessRun(task=event["task"], limit=event["limit"], scores=dict(event["scores"]))


def objectives_of(spec: SearchSpec, state: SearchState) -> tuple[Objective, ...]:
    """Return the objectives; a reference that the spec leaves open is the untrained model's score, where that is known."""
    known = state.reference or {}
    return tuple(
        o if o.reference is not None else Objective(metric=o.metric, direction=o.direction, reference=known.get(o.metric))
        for o in spec.resolved_objectives()
    )
