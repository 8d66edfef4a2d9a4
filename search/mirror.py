"""What a search looks like as MLflow runs: one per trial below one for the search; told twice, nothing changes.

MLflow itself stays behind `Runs`, which `tracking` implements.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from search.ledger import SearchState
from search.record import TrialRecord, TrialState
from search.saved_view import FRONT_COLOR, OTHER_COLOR, saved_view
from search.spool import Event
from search.tracked_values import confirmed_metrics, loss_curve, memory_metrics, metric_name, predicted_metrics, tracked_name
from spaces.config import TrialConfig
from spaces.metrics import MFU, PEAK_MEMORY_BYTES, TOKENS_PER_SECOND, metric_of

SEARCH_TAG, TRIAL_TAG, RECORD_TAG = "paretune.search", "paretune.trial", "paretune.record"
# Of a run that confirms a trial: its seed, and the event of the ledger.
SEED_TAG, CONFIRMED_TAG = "paretune.seed", "paretune.confirmed"
REFERENCE_TAG, SPEC_TAG, NOTE_TAG = "paretune.reference", "paretune.spec", "mlflow.note.content"
# The curve of the training loss, of whose latest part `train/train_loss` is the mean.
LOSS_CURVE = "train/loss"
DATA_TAG, DEVICE_TAG = "paretune.data_fingerprint", "paretune.device"
# MLflow cuts what is longer.
MAX_TAG_CHARACTERS = 8000
# As MLflow's own bridge to Optuna maps them.
STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}


def spec_tags(text: str) -> dict[str, str]:
    """Return the tags of a spec, in pieces that MLflow keeps whole."""
    starts = range(0, len(text), MAX_TAG_CHARACTERS)
    return {f"{SPEC_TAG}.{n}" if n else SPEC_TAG: text[i : i + MAX_TAG_CHARACTERS] for n, i in enumerate(starts)}


def spec_of(tags: Mapping[str, str]) -> str:
    """Return the spec that `spec_tags` has written.

    Raises:
        KeyError: there is none.
    """
    further = itertools.takewhile(tags.__contains__, (f"{SPEC_TAG}.{n}" for n in itertools.count(1)))
    return tags[SPEC_TAG] + "".join(tags[name] for name in further)


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundRun:
    """A trial's run that is there already."""

    run_id: str
    is_ended: bool


class Runs(Protocol):
    """The little of MLflow that a search writes with; a call that repeats an earlier one must change nothing."""

    def find(self, parent_run_id: str, tag: str, number: int) -> FoundRun | None:
        """Return the run below another one that carries this number: a trial's, or one that confirms it."""

    def create(self, name: str, tags: Mapping[str, str], *, time_ms: int) -> str:
        """Open a run and return its id."""

    def log(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        time_ms: int = 0,
        step: int = 0,
    ) -> None:
        """Write metrics and tags in one request."""

    def log_curve(self, run_id: str, name: str, points: Sequence[tuple[int, float, int]]) -> None:
        """Write steps, values and times in milliseconds of one metric."""

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Write params, which never change."""

    def log_dataset(self, run_id: str, name: str, digest: str, summary: Mapping[str, Any]) -> None:
        """Say what data a run trained on."""

    def end(self, run_id: str, status: str, *, time_ms: int | None = None) -> None:
        """Close a run; without a time, now."""

    def set_status(self, run_id: str, status: str) -> None:
        """Say of a run that has not ended, or goes on, whether it waits (`SCHEDULED`) or runs."""

    def log_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Upload a file, over one of the same name."""

    def tag_experiment(self, key: str, value: str) -> None:
        """Write a tag of the experiment."""


class Mirror:
    """Turns events into runs."""

    def __init__(self, runs: Runs, search: str, parent_run_id: str) -> None:
        self.search = search
        self._runs = runs
        self._parent = parent_run_id
        self._state = SearchState()
        self._applied: Event | None = None
        self._origins: dict[int, dict[str, str]] = {}
        self._run_ids: dict[int, str] = {}
        self._ended: set[int] = set()
        # Of a search that was cut short, until workers have them again.
        self._waiting: set[int] = set()
        self._last_step: dict[int, int] = {}

    def deliver(self, event: Event) -> None:
        """Write one event; one that could not be written the last time comes again."""
        if event is not self._applied:
            self._state.apply(event)
            self._applied = event
        number = event.get("number")
        record = self._state.records.get(number) if number is not None else None
        time_ms = int(event["time"] * 1000)
        match event["event"]:
            case "search_started":
                self._say_data(self._parent)
            case "reference":
                metrics = {f"reference/{name}": value for name, value in event["metrics"].items()}
                tags = {REFERENCE_TAG: json.dumps(event["metrics"])}
                self._runs.log(self._parent, metrics=metrics, tags=tags, time_ms=time_ms)
            case "device_examined":
                self._runs.log(self._parent, tags={DEVICE_TAG: json.dumps(event["device"])})
            case "trial_started" if record:
                self._origins[record.number] = self._origin(event)
            case "trial_placed" if record:
                self._place(record, time_ms)
            case "trial_reported" if record:
                self._report(record, event["report"], time_ms)
            case "trial_infeasible" | "trial_finished" if record:
                self._end(record, time_ms)
            case "search_cut_short":
                self._set_waiting()
            case "confirmed" if record:
                self._confirm(record, event)
            case "harness_scored":
                where = ("" if record else "reference/") + "harness/" + ("" if event["limit"] is None else f"{event['limit']} rows/")
                metrics = {where + metric_name(name): score["value"] for name, score in event["scores"].items()}
                run_id, tags = (self._run_id(record), {RECORD_TAG: record_tag(record)}) if record else (self._parent, {})
                self._runs.log(run_id, metrics=metrics, tags=tags, time_ms=time_ms)
            case "test_scored" if record:
                metrics = {f"test/{name}": value for name, value in event["metrics"].items()}
                tags = {RECORD_TAG: record_tag(record)}
                self._runs.log(self._run_id(record), metrics=metrics, tags=tags, time_ms=time_ms)

    def write_front(
        self,
        members: Sequence[TrialRecord],
        artifacts: Sequence[Path],
        *,
        recommended: int | None,
        note: str,
        metrics: Mapping[str, float],
    ) -> None:
        """Tag and paint every trial; give the parent run the report, the table of all trials and the note."""
        numbers = {record.number for record in members}
        records = list(self._state.records.values())
        for record in records:
            on_front = record.number in numbers
            tags = {"pareto": str(on_front).lower(), "mlflow.runColor": FRONT_COLOR if on_front else OTHER_COLOR}
            tags["recommended"] = str(record.number == recommended).lower()
            self._runs.log(self._run_id(record), tags=tags)
        for path in artifacts:
            self._runs.log_file(self._parent, path, "report")
        with TemporaryDirectory() as folder:
            # As `MlflowClient.log_table` writes it, which would append to an earlier table.
            path = Path(folder) / "trials.json"
            path.write_text(json.dumps(_table(records, numbers)))
            self._runs.log_file(self._parent, path)
        tags = {
            "mlflow.loggedArtifacts": json.dumps([{"path": "trials.json", "type": "table"}]),
            NOTE_TAG: note[:MAX_TAG_CHARACTERS],
        }
        self._runs.log(self._parent, metrics=metrics, tags=tags, time_ms=int(time.time() * 1000))

    def save_view(self, objectives: Sequence[str], knobs: Sequence[str]) -> None:
        """Make the front a named view of the experiment's runs table."""
        records = list(self._state.records.values())
        measured = {m for record in records for m in record.values}
        others = [m for m in (TOKENS_PER_SECOND, MFU, PEAK_MEMORY_BYTES) if m in measured and m not in objectives]
        rows = [_knobs(record) for record in records]
        key, value = saved_view(
            search=self.search,
            metrics=[tracked_name(m) for m in objectives],
            other_metrics=[tracked_name(m) for m in others],
            knobs=knobs,
            # MLflow leaves a run out of the parallel coordinates that lacks one, such as the rank where there is no adapter.
            common_knobs=[k for k in knobs if all(row.get(k) is not None for row in rows)],
            is_ascending=metric_of(objectives[0]).direction == "minimize",
            time_ms=int(time.time() * 1000),
        )
        self._runs.tag_experiment(key, value)

    def _run_id(self, record: TrialRecord) -> str:
        """Return the trial's run: known, or there from before a resume or a lost answer, or new, with the last event's time."""
        number = record.number
        if number not in self._run_ids:
            found = self._runs.find(self._parent, TRIAL_TAG, number)
            run_id = self._create(record) if found is None else found.run_id
            if found is not None and found.is_ended:
                self._ended.add(number)
            else:
                # Of a run from before, these are the same values: they come from the ledger.
                self._runs.log_params(run_id, _knobs(record))
                self._say_data(run_id)
                self._waiting |= set() if found is None else {number}
            self._run_ids[number] = run_id
        return self._run_ids[number]

    def _create(self, record: TrialRecord) -> str:
        tags = {
            **self._origins.get(record.number, {}),
            "mlflow.parentRunId": self._parent,
            "kind": "trial",
            SEARCH_TAG: self.search,
            TRIAL_TAG: str(record.number),
        }
        begun = self._state.last_at
        return self._runs.create(f"trial-{record.number:04d}", tags, time_ms=int((begun or time.time()) * 1000))

    def _say_data(self, run_id: str) -> None:
        started = self._state.started or {}
        if "data_name" in started:  # not in a ledger of before
            self._runs.log_dataset(run_id, started["data_name"], started["data_fingerprint"], started["data"])

    def _origin(self, event: Event) -> dict[str, str]:
        """Return what is needed to train the trial again, beside its params; its device is in the record."""
        started = self._state.started or {}
        commit, versions = started.get("git_commit"), started.get("versions")
        return {
            "paretune.command": event.get("command", "")[:MAX_TAG_CHARACTERS],
            DATA_TAG: str(started.get("data_fingerprint", "")),
            **({"mlflow.source.git.commit": commit} if commit else {}),
            **({"paretune.versions": json.dumps(versions)} if versions else {}),
        }

    def _place(self, record: TrialRecord, time_ms: int) -> None:
        """Open the run of a trial that has workers, or open it again, with what was said of it before."""
        run_id = self._run_id(record)
        if record.number in self._waiting:
            self._runs.set_status(run_id, "RUNNING")
            self._waiting.discard(record.number)
        if record.predicted and record.number not in self._ended:
            source = {"paretune.time_source": record.predicted["time_source"]} if "time_source" in record.predicted else {}
            self._runs.log(run_id, metrics=predicted_metrics(record), tags=source, time_ms=time_ms)

    def _set_waiting(self) -> None:
        """Say of what is in flight that it waits: nothing of a search that is cut short runs."""
        for number in sorted((self._state.in_flight & self._run_ids.keys()) - self._ended):
            self._runs.set_status(self._run_ids[number], "SCHEDULED")
            self._waiting.add(number)

    def _report(self, record: TrialRecord, report: Mapping[str, Any], time_ms: int) -> None:
        run_id = self._run_id(record)
        # Steps that were trained again after lost workers: a second point at one step would only blur the chart.
        is_repeated = report["step"] <= self._last_step.get(record.number, -1) and not report["final"]
        if record.number in self._ended or is_repeated:
            return
        metrics = {tracked_name(name): value for name, value in report["metrics"].items()}
        self._runs.log(run_id, metrics=metrics, time_ms=time_ms, step=report["step"])
        if curve := list(loss_curve(record, report, time_ms)):
            self._runs.log_curve(run_id, LOSS_CURVE, curve)
        self._last_step[record.number] = report["step"]

    def _end(self, record: TrialRecord, time_ms: int) -> None:
        """Write what is known of an ended trial; its status comes last and says that nothing is missing."""
        run_id = self._run_id(record)
        if record.number in self._ended:
            return
        tags = {RECORD_TAG: record_tag(record), "paretune.state": record.state.value}
        if record.error is not None:
            tags["paretune.error"] = f"{record.error['kind']}: {record.error['message']}"[:500]
        if record.why_stopped:
            tags["paretune.stopped"] = record.why_stopped
        if record.noise:
            tags["paretune.noisy"] = record.noise
        if record.source is not None:
            tags["paretune.not_trained"] = record.why_not_trained
        if not record.feasible:
            tags["paretune.infeasible"] = ", ".join(name for name, value in record.constraints.items() if value > 0)
        tags |= {f"paretune.{name}": record.details[name] for name in ("peak_source", "mfu_convention") if name in record.details}
        if "process_map" in record.details:
            tags["paretune.process_map"] = json.dumps(record.details["process_map"])[:MAX_TAG_CHARACTERS]
        self._runs.log(run_id, metrics=memory_metrics(record), tags=tags, time_ms=time_ms)
        self._runs.end(run_id, STATUS[record.state], time_ms=time_ms)
        self._ended.add(record.number)

    def _confirm(self, record: TrialRecord, event: Event) -> None:
        """Write a confirmation as a run below its trial's, of a kind of its own, so that nothing takes it for a trial."""
        run_id, seed = self._run_id(record), event["seed"]
        found = self._runs.find(run_id, SEED_TAG, seed)
        begun, ended = int(event["started_at"] * 1000), int(event["time"] * 1000)
        tags = {"mlflow.parentRunId": run_id, "kind": "confirmation", SEARCH_TAG: self.search, SEED_TAG: str(seed)}
        name = f"confirm-{record.number:04d}-{seed}"
        own = self._runs.create(name, tags, time_ms=begun) if found is None else found.run_id
        self._runs.log_params(own, {**_knobs(record), "seed": seed})
        metrics = {tracked_name(m): value for m, value in event["values"].items()}
        metrics |= {f"test/{m}": value for m, value in event["test"].items()}
        # Always there: what failed once may have been tried again.
        error = f"{event['error']['kind']}: {event['error']['message']}"[:500] if event["error"] else ""
        # What `load_search` reads: the event, whose message alone is of any length.
        told = {**event, "error": event["error"] and {**event["error"], "message": event["error"]["message"][:500]}}
        tags = {CONFIRMED_TAG: json.dumps(told), "paretune.state": event["state"], "paretune.error": error}
        self._runs.log(own, metrics=metrics, tags=tags, time_ms=ended)
        self._runs.end(own, STATUS[TrialState(event["state"])], time_ms=ended)
        self._runs.log(run_id, metrics=confirmed_metrics(record), time_ms=ended)


def _without_losses(details: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in details.items() if name not in ("train_losses", "steps_per_loss")}


def record_tag(record: TrialRecord) -> str:
    """Return the record as JSON that a tag can hold, if it must be without its bulky parts and with its message cut."""
    # Every confirmation has a run, and a tag, of its own.
    data = {**record.to_dict(), "confirmations": []}
    error = None if record.error is None else {**record.error, "message": record.error["message"][:500]}
    brief, *reports = map(_without_losses, (record.details, *(report["details"] for report in record.reports)))
    lean = [{**report, "details": details} for report, details in zip(record.reports, reports, strict=True)]
    scalars = {name: value for name, value in brief.items() if isinstance(value, str | int | float)}
    shorter_details: tuple[dict[str, Any], ...] = ({}, {"details": brief, "reports": lean}, {"details": scalars})
    cuts = (*shorter_details, {"reports": []}, {"error": error}, {"harness": []})
    for shorter in cuts:
        data.update(shorter)
        text = json.dumps(data)
        if len(text) <= MAX_TAG_CHARACTERS:
            break
    return text


def _knobs(record: TrialRecord) -> dict[str, Any]:
    return dict(record.params) if record.config is None else TrialConfig.from_dict(record.config).flat()


def _table(records: Sequence[TrialRecord], on_front: set[int]) -> dict[str, list[Any]]:
    knobs = list(dict.fromkeys(k for r in records for k in _knobs(r)))
    metrics = list(dict.fromkeys(m for r in records for m in r.values))
    sure = {r.number: confirmed_metrics(r) for r in records}
    means = list(dict.fromkeys(m for known in sure.values() for m in known))

    def row(record: TrialRecord) -> list[Any]:
        known = _knobs(record)
        values = [v if v is None or math.isfinite(v) else None for v in (record.values.get(m) for m in metrics)]
        return [
            record.number,
            record.state.value,
            record.number in on_front,
            *(known.get(k) for k in knobs),
            *values,
            *(sure[record.number].get(m) for m in means),
        ]

    return {"columns": ["trial", "state", "pareto", *knobs, *metrics, *means], "data": [row(r) for r in records]}
