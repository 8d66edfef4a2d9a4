"""What a running search shows: a live table on a terminal, elsewhere one line per state change and one while nothing changes."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from search.budget import counts, num_ended, used
from search.figures import outcome
from search.formatting import number_text, short_text
from search.ledger import TOLD, SearchState, objectives_of, replay
from search.pareto import front
from search.record import TrialRecord, TrialState
from search.tables import complete_text
from search.warm_start import warm_start_text
from spaces.hardware import why_no_peak
from spaces.spec import SearchSpec

MAX_ROWS = 20
# A log that is silent for longer looks like one of a search that hangs.
HEARTBEAT_SECONDS = 30.0
# Of evaluation or test rows: with fewer that are trained too, scores hardly change.
LEAKED_SHARE = 0.05


class SearchView:
    """Follows the ledger's events; enter it for the time of the search."""

    def __init__(self, spec: SearchSpec, *, quiet: bool = False, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self._spec = spec
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False)
        self._state: SearchState = replay([])
        self._knobs = spec.space.names_searched()
        self._stack = ExitStack()
        self._live: Live | None = None
        self._seen: set[tuple[float, str, int | None]] = set()
        self._ended_at: list[float] = []
        self._heartbeat_seconds = heartbeat_seconds
        self._entered_at = self._spoke_at = time.monotonic()
        self._closed = threading.Event()
        # The heartbeat reads from a thread of its own what the events change.
        self._lock = threading.Lock()

    def __enter__(self) -> SearchView:
        if self._console.is_terminal and not self._quiet:
            self._live = self._stack.enter_context(Live(self._table(), console=self._console, refresh_per_second=2))
        elif not self._quiet:
            heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            heart.start()
            self._stack.callback(heart.join)
            self._stack.callback(self._closed.set)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take one event of the ledger; one of before the search went on (`search.ledger.TOLD`), or seen already, says nothing."""
        known = (event["time"], event["event"], event.get("number"))
        with self._lock:
            if known in self._seen:
                return
            self._seen.add(known)
            if event["event"] == "lengthened":
                budget = self._spec.budget.model_copy(update={"trials": event["num_trials"]})
                self._spec = self._spec.model_copy(update={"budget": budget})
            self._state.apply(dict(event))
            is_new = not event.get(TOLD)
            if event["event"] == "trial_finished" and is_new:
                self._ended_at.append(event["time"])
            if self._live is not None:
                self._live.update(self._table())
            elif is_new and not self._quiet:
                self._say(self._line(event))

    def _say(self, line: str | None) -> None:
        if line is not None:
            print(line, file=sys.stderr, flush=True)
            self._spoke_at = time.monotonic()

    def _beat(self) -> None:
        while not self._closed.wait(max(0.0, self._spoke_at + self._heartbeat_seconds - time.monotonic())):
            with self._lock:
                if time.monotonic() - self._spoke_at >= self._heartbeat_seconds:
                    self._say(self._pulse())

    def _pulse(self) -> str:
        """Say what goes on while nothing changes."""
        minutes = (time.monotonic() - self._entered_at) / 60
        if self._state.started is None:
            return f"after {minutes:.1f} min: preparing the model, the data and the workers"
        running = [self._state.records[number] for number in sorted(self._state.placed)]
        shares = ", ".join(f"trial {r.number:04d} " + (f"past {_share(r)}" if r.reports else "under way") for r in running)
        if not shares and (num_waiting := len(self._state.in_flight)):
            shares = f"{num_waiting} trial{'' if num_waiting == 1 else 's'} waiting for workers"
        elif not shares:
            shares = "writing down the front" if self._trials_left() == 0 else "no trial is running"
        return f"after {minutes:.1f} min: {shares} | {self._summary()}"

    def _line(self, event: Mapping[str, Any]) -> str | None:
        number = event.get("number")
        record = self._state.records.get(number) if number is not None else None
        match event["event"]:
            case "search_started":
                workers = "1 worker" if event["num_workers"] == 1 else f"{event['num_workers']} workers"
                data = event["data"]
                return "\n".join([f"search {event['name']}: {event['machine']}; {workers}; data: {_brief(data)}", *_leaks(data)])
            case "device_examined":
                other = f"; it was {event['before']}, with whose times and bytes these do not compare" if "before" in event else ""
                return device_text(event["device"], self._spec.space.precision.ends()) + other
            case "warm_started":
                return warm_start_text(event)
            case "reference":
                return f"untrained model: {self._metrics(event['metrics'])}"
            case "trial_placed" if record:
                known = "" if record.source is None else f" | trained in trial {record.source:04d}"
                begins = f"RUNNING   {self._knob_text(record)}{known}"
                again = f"goes on after its workers were lost, attempt {event['attempt']}"
                return f"trial {number:04d} {begins if event['attempt'] == 1 else again}"
            case "trial_reported" if record and not event["report"]["final"]:
                report = event["report"]
                verdict = event.get("verdict")
                place = f" | place {verdict['place']} of {verdict['num_entries']}" if verdict else ""
                values = f"{self._metrics(report['metrics'])} | seconds are of its whole training at this pace"
                return f"trial {number:04d} {report['fidelity']:8.0%}   {values}{place}"
            case "trial_finished" if record:
                why = f" {record.error['kind']}: {record.error['message']}" if record.error else ""
                why += record.why_stopped
                why += f" NOISY: {record.noise}" if record.noise else ""
                state = "CUT OFF" if record.was_cut_off else record.state.value
                return f"trial {number:04d} {state:9} {self._metrics(record.values)}{why} | {self._summary()}"
            case "trial_infeasible" if record:
                # Searches begun before have no words for it.
                broken = event.get("why") or [name for name, value in record.constraints.items() if value > 0]
                return f"trial {number:04d} INFEASIBLE {self._knob_text(record)}: {'; '.join(broken)}"
            case "test_scored":
                return f"trial {number:04d} on the test file: {self._metrics(event['metrics'])}"
            case "lengthened" | "resumed":
                return _goes_on(event, self._summary())
            case "search_cut_short":
                return f"search cut short ({event['reason']}): {self._summary()}; {len(self._state.in_flight)} in flight"
            case "search_finished":
                spent = used(self._spec, self._state).text()
                return f"search ended ({event['reason']}): {self._summary()}; used {spent}"
        return None

    def _summary(self) -> str:
        records = self._state.records.values()
        members = front(list(records), objectives_of(self._spec, self._state))
        text = complete_text(list(records))
        others = Counter(outcome(r) for r in records if r.feasible_before_launch and r.state in (TrialState.PRUNED, TrialState.FAIL))
        text += "".join(f", {number} {what}" for what, number in others.items())
        most = self._spec.budget.max_trials
        text += f"{'' if most is None else f', {most} planned'}; front of {len(members)}"
        eta = self._eta_seconds()
        return text + ("" if eta is None else f"; about {eta / 60:.0f} min left" if eta >= 60 else "; less than a minute left")

    def _eta_seconds(self) -> float | None:
        """Extrapolate from the pace at which trials ended in this session, with those that are timed beside each that is trained."""
        left = self._trials_left()
        if self._state.finished or len(self._ended_at) < 2 or left is None:
            return None
        ended = [r for r in self._state.records.values() if r.feasible_before_launch and r.state is not TrialState.RUNNING]
        beside = len(ended) / max(1, sum(map(counts, ended)))
        pace = (self._ended_at[-1] - self._ended_at[0]) / (len(self._ended_at) - 1)
        return max(left * beside, len(self._state.in_flight)) * pace or None

    def _trials_left(self) -> int | None:
        most = self._spec.budget.max_trials
        return None if most is None else max(0, most - num_ended(self._state.records.values()))

    def _table(self) -> Table:
        table = Table(title=f"{self._spec.name or 'search'}: {self._summary()}", expand=True)
        for column in ("trial", "state", *self._knobs, "done", *self._columns()):
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        members = {r.number for r in front(list(self._state.records.values()), objectives_of(self._spec, self._state))}
        shown = [r for r in self._state.records.values() if r.feasible_before_launch][-MAX_ROWS:]
        for record in shown:
            values = record.values or (record.reports[-1]["metrics"] if record.reports else {})
            is_waiting = record.state is TrialState.RUNNING and record.number not in self._state.placed
            state = "waiting" if is_waiting else record.state.value.lower()
            table.add_row(
                f"{record.number}",
                f"[bold green]{state} *[/]" if record.number in members else state,
                *(short_text(record.params.get(k)) for k in self._knobs),
                _share(record),
                *(number_text(m, values.get(m)) for m in self._columns()),
            )
        return table

    def _columns(self) -> list[str]:
        objectives = [o.metric for o in self._spec.resolved_objectives()]
        return objectives + [m for m in ("tokens_per_second", "mfu") if m not in objectives]

    def _metrics(self, metrics: Mapping[str, float]) -> str:
        wanted = list(dict.fromkeys([*self._columns(), "eval_loss"]))
        return " ".join(f"{m}={number_text(m, metrics[m])}" for m in wanted if m in metrics)

    def _knob_text(self, record: TrialRecord) -> str:
        return " ".join(f"{k}={short_text(record.params[k])}" for k in self._knobs if k in record.params)


def _goes_on(event: Mapping[str, Any], summary: str) -> str:
    if event["event"] == "resumed":
        return f"resumed with {summary}; trials in flight go on first: {event['in_flight'] or 'none'}"
    further = "1 further trial" if event["num_further"] == 1 else f"{event['num_further']} further trials"
    return f"{further}: {event['why']}" if event["num_further"] else f"it goes on: {event['why']}"


def _leaks(data: Mapping[str, Any]) -> list[str]:
    """Return a warning for each role of which many rows are training rows too."""
    found = {role: (data.get(f"{role}_rows_also_in_train", 0), data.get(f"{role}_rows", 0)) for role in ("evaluation", "test")}
    return [
        f"warning: {number:,} of {total:,} {role} rows are training rows too: scores on them tell what was learned by heart"
        for role, (number, total) in found.items()
        if number > LEAKED_SHARE * total
    ]


def _brief(data: Mapping[str, Any]) -> str:
    return ", ".join([str(data["format"]), *(f"{v} {k.replace('_', ' ')}" for k, v in data.items() if isinstance(v, int))])


def device_text(device: Mapping[str, Any], precisions: Sequence[str]) -> str:
    """Return what was found of a worker's device, and why trials at some of these precisions will have no MFU."""
    what = device["name"]
    if device["type"] != "cuda":
        what = f"{device['threads']} thread{'' if device['threads'] == 1 else 's'} of {what}"
    text = f"device of a worker: {what}; its tensors may take {device['usable_bytes'] / 2**30:.1f} GiB"
    reasons = dict.fromkeys(why_no_peak(device["name"], p) for p in precisions if p not in device["peak_flops_per_second"])
    return "; no MFU: ".join([text, *reasons])


def _share(record: TrialRecord) -> str:
    """Return how much of its tokens a trial had trained when it reported last."""
    return f"{record.reports[-1]['fidelity']:.0%}" if record.reports else "-"
