"""MLflow, written by one process: a thread follows the ledger's events, so that an absent server delays nothing.

MLflow is imported where it is used: it costs seconds.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.ledger import SearchState
from search.record import TrialRecord, TrialState
from spaces.metrics import METRICS

if TYPE_CHECKING:
    from mlflow import MlflowClient

# As MLflow's own bridge to Optuna maps them.
STATUS = {TrialState.COMPLETE: "FINISHED", TrialState.PRUNED: "KILLED", TrialState.FAIL: "FAILED"}
MAX_TAG_CHARACTERS = 8000
MAX_PARAMS_PER_BATCH = 100
RETRY_SECONDS = (0.5, 1, 2, 5, 10)
FRONT_COLOUR, OTHER_COLOUR = "#d7191c", "#b8b8b8"
VIEW_KEY = "pareto-front"


class TrackingError(Exception):
    """The tracking server cannot be used; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSearch:
    """A search as MLflow knows it."""

    spec_yaml: str
    reference: dict[str, float] | None
    records: list[TrialRecord]


class Tracker:
    """Writes one search to MLflow: one parent run, one nested run per trial."""

    def __init__(self, uri: str, experiment: str, *, artifact_root: Path | None) -> None:
        self.uri = uri
        self._experiment = experiment
        self._artifact_root = artifact_root
        self._events: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        self._state = SearchState()
        self._runs: dict[int, str] = {}
        self._name = ""
        self._parent = ""
        self._experiment_id = ""
        self._thread: threading.Thread | None = None

    def connect(self, timeout_seconds: float) -> None:
        """Make sure that the server answers and the experiment exists.

        Raises:
            TrackingError: it does not, with the reason and the remedy.
        """
        with _clear_errors(self.uri, timeout_seconds):
            client = self._client()
            found = client.get_experiment_by_name(self._experiment)
            if found is None:
                local = self.uri.startswith("sqlite:") and self._artifact_root is not None
                location = self._artifact_root.as_uri() if local and self._artifact_root else None
                self._experiment_id = client.create_experiment(self._experiment, artifact_location=location)
            elif found.lifecycle_stage != "active":
                raise TrackingError(
                    f"tracking.experiment: '{self._experiment}' was deleted in {self.uri}; restore it, or name another"
                )
            else:
                self._experiment_id = found.experiment_id

    def start_search(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str], parent_run_id: str | None = None) -> str:
        """Open the search's run, or the one that a resumed search had, and start to follow events; return the run's id."""
        self._name = name
        client = self._client()
        if parent_run_id is None:
            run = client.create_run(self._experiment_id, run_name=name, tags={"kind": "search", "paretune.search": name, **tags})
            self._parent = run.info.run_id
            self._log_params(self._parent, params)
        else:
            self._parent = parent_run_id
            client.update_run(parent_run_id, status="RUNNING")
            for run in self._children():
                self._runs[int(run.data.tags["paretune.trial"])] = run.info.run_id
        self._thread = threading.Thread(target=self._follow, name="mlflow-writer", daemon=True)
        self._thread.start()
        return self._parent

    def submit(self, event: Mapping[str, Any]) -> None:
        """Hand an event over; returns at once."""
        self._events.put(event)

    def flush(self, timeout_seconds: float) -> int:
        """Wait until all events are written, at most this long; return how many are not."""
        end = time.monotonic() + timeout_seconds
        while self._events.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.05)
        return self._events.unfinished_tasks

    def url(self, base: str) -> str:
        """Return the link that opens the runs table with the front's charts, not MLflow's onboarding page."""
        view = f"viewStateShareKey={VIEW_KEY}-{self._name}&workflowType=machine_learning&compareRunsMode=CHART"
        return f"{base.rstrip('/')}/#/experiments/{self._experiment_id}/runs?{view}"

    def write_front(
        self,
        members: Sequence[TrialRecord],
        objectives: Sequence[str],
        knobs: Sequence[str],
        artifacts: Sequence[Path],
        *,
        note: str,
        metrics: Mapping[str, float],
        spec_path: Path,
    ) -> None:
        """Mark the front on the trials' runs, and give the parent the report, the table, the note and the saved view."""
        client = self._client()
        on_front = {record.number for record in members}
        for number, run_id in self._runs.items():
            record = self._state.records[number]
            client.set_tag(run_id, "pareto", str(number in on_front).lower())
            client.set_tag(run_id, "mlflow.runColor", FRONT_COLOUR if number in on_front else OTHER_COLOUR)
            self._tag_record(run_id, record)
        for path in artifacts:
            client.log_artifact(self._parent, str(path), "report")
        client.log_artifact(self._parent, str(spec_path))
        rows = [_table_row(record, record.number in on_front) for record in self._state.records.values()]
        columns = list(dict.fromkeys(k for row in rows for k in row))
        client.log_table(self._parent, {c: [row.get(c) for row in rows] for c in columns}, "report/trials.json")
        client.set_tag(self._parent, "mlflow.note.content", note)
        client.set_tag(self._parent, "paretune.reference", json.dumps(self._state.reference))
        for name, value in metrics.items():
            client.log_metric(self._parent, name, value)
        view = _saved_view(self._name, objectives, knobs)
        client.set_experiment_tag(self._experiment_id, f"mlflow.sharedViewState.{VIEW_KEY}-{self._name}", json.dumps(view))

    def finish(self) -> None:
        """Close the search's run and end the thread."""
        self._client().set_terminated(self._parent, "FINISHED")
        self._events.put(None)
        if self._thread is not None:
            self._thread.join(10)

    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def _children(self) -> list[Any]:
        query = f"tags.`mlflow.parentRunId` = '{self._parent}' and tags.kind = 'trial'"
        return list(self._client().search_runs([self._experiment_id], query, max_results=50_000))

    def _follow(self) -> None:
        """Write events in their order, each until it is written: the server may come back."""
        while (event := self._events.get()) is not None:
            self._state.apply(event)
            attempt = 0
            while True:
                try:
                    self._write(event)
                    break
                except Exception:  # whatever it was, the event is in the ledger, and a later attempt may succeed
                    time.sleep(RETRY_SECONDS[min(attempt, len(RETRY_SECONDS) - 1)])
                    attempt += 1
            self._events.task_done()

    def _write(self, event: Mapping[str, Any]) -> None:
        number = event.get("number")
        match event["event"]:
            case "trial_started" | "trial_infeasible":
                self._open(self._state.records[event["number"]])
                if event["event"] == "trial_infeasible":
                    self._close(self._state.records[event["number"]])
            case "trial_reported":
                self._log_metrics(self._runs[event["number"]], event["report"]["metrics"], event)
            case "trial_finished":
                self._close(self._state.records[event["number"]])
            case "test_scored" if number is not None:
                scores = {f"test_{name}": value for name, value in event["metrics"].items()}
                self._log_metrics(self._runs[number], scores, event)
                self._tag_record(self._runs[number], self._state.records[number])
            case "reference":
                scores = {f"untrained_{name}": value for name, value in event["metrics"].items()}
                self._log_metrics(self._parent, scores, event)

    def _open(self, record: TrialRecord) -> None:
        if record.number in self._runs:
            return  # a resumed search hands all its events over again
        from spaces.config import TrialConfig

        client = self._client()
        tags = {"kind": "trial", "paretune.trial": str(record.number), "paretune.search": self._name}
        run = client.create_run(
            self._experiment_id,
            start_time=int(1000 * (record.started_at or record.finished_at or time.time())),
            run_name=f"{self._name}-{record.number:04d}",
            tags={**tags, "mlflow.parentRunId": self._parent},
        )
        self._log_params(run.info.run_id, TrialConfig.from_dict(record.config or {}).flat())
        self._runs[record.number] = run.info.run_id

    def _close(self, record: TrialRecord) -> None:
        run_id, client = self._runs[record.number], self._client()
        client.set_tag(run_id, "state", record.state.value if record.feasible else "INFEASIBLE")
        if record.error:
            client.set_tag(run_id, "error", f"{record.error['kind']}: {record.error['message']}"[:MAX_TAG_CHARACTERS])
        self._tag_record(run_id, record)
        end = None if record.finished_at is None else int(1000 * record.finished_at)
        client.set_terminated(run_id, STATUS[record.state], end_time=end)

    def _tag_record(self, run_id: str, record: TrialRecord) -> None:
        """Keep the record with the run, so that MLflow alone can answer; what is too long loses its reports and details."""
        text = json.dumps(record.to_dict())
        if len(text) > MAX_TAG_CHARACTERS:
            text = json.dumps({**record.to_dict(), "reports": [], "details": {}})
        self._client().set_tag(run_id, "paretune.record", text)

    def _log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        items = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for start in range(0, len(items), MAX_PARAMS_PER_BATCH):
            self._client().log_batch(run_id, params=items[start : start + MAX_PARAMS_PER_BATCH])

    def _log_metrics(self, run_id: str, values: Mapping[str, float], event: Mapping[str, Any]) -> None:
        """Log under names with a section; a resumed search logs the same points again, which MLflow stores once."""
        from mlflow.entities import Metric

        step, at = event.get("report", {}).get("step", 0), int(1000 * event["time"])
        points = [Metric(_tracked(name), value, at, step) for name, value in values.items()]
        self._client().log_batch(run_id, metrics=points)


def load_search(uri: str, name: str) -> FoundSearch:
    """Read a search back from MLflow alone.

    Raises:
        TrackingError: the server does not answer, or does not know the search.
    """
    with _clear_errors(uri, 10):
        from mlflow import MlflowClient
        from mlflow.artifacts import load_text

        client = MlflowClient(tracking_uri=uri)
        ids = [e.experiment_id for e in client.search_experiments()]
        query = "tags.kind = 'search' and tags.`paretune.search` = '" + name.replace("'", "") + "'"
        parents = client.search_runs(ids, query, order_by=["attributes.start_time DESC"])
        if not parents:
            raise TrackingError(f"{uri}: no search named '{name}'")
        parent = parents[0]
        trials = client.search_runs(ids, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", max_results=50_000)
        tags = [run.data.tags for run in trials]
        return FoundSearch(
            spec_yaml=load_text(f"{parent.info.artifact_uri}/spec.yaml"),
            reference=json.loads(parent.data.tags.get("paretune.reference", "null")),
            records=sorted(
                (TrialRecord.from_dict(json.loads(t["paretune.record"])) for t in tags if "paretune.record" in t),
                key=lambda record: record.number,
            ),
        )


@contextmanager
def _clear_errors(uri: str, timeout_seconds: float) -> Iterator[None]:
    """Bound how long a server that is not there is asked, and say in one line what is wrong."""
    if uri.startswith(("file:", "./", "/")) or uri == "databricks":
        raise TrackingError(
            f"tracking.uri: '{uri}' is no server and no database: MLflow 3.13 and later refuse file stores; "
            "give http://..., or sqlite:///path/mlflow.db"
        )
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    bounds = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(int(timeout_seconds))}
    before = {key: os.environ.get(key) for key in bounds}
    os.environ.update(bounds)
    try:
        import mlflow.exceptions
        import sqlalchemy.exc

        try:
            yield
        except (mlflow.exceptions.MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
            reason = str(error).splitlines()[0][:200]
            raise TrackingError(f"tracking.uri: the MLflow server {uri} cannot be used: {reason}") from error
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _tracked(name: str) -> str:
    """Return a metric's name in MLflow, whose charts are grouped by what stands before the slash."""
    for prefix in ("test", "untrained"):
        if name.startswith(f"{prefix}_"):
            return f"{prefix}/{name.removeprefix(f'{prefix}_')}"
    return METRICS[name].tracked_name


def _table_row(record: TrialRecord, on_front: bool) -> dict[str, Any]:
    values = {_tracked(name): value for name, value in record.values.items()}
    return {"trial": record.number, "state": record.state.value, "pareto": on_front, **values, **record.params}


def _saved_view(name: str, objectives: Sequence[str], knobs: Sequence[str]) -> dict[str, Any]:
    """Return the named view of the runs table that shows this search's front.

    The format is that of MLflow 3's own share button: internal to its user interface, so it is written as a help and nothing
    depends on it.
    """
    quality, cost = _tracked(objectives[0]), _tracked(objectives[-1])
    common = {"deleted": False, "isGenerated": False}
    columns = ["tags.`pareto`", *(f"metrics.`{_tracked(m)}`" for m in objectives), "metrics.`perf/mfu`"]
    state = {
        "searchFilter": f"tags.kind = 'trial' and tags.`paretune.search` = '{name}'",
        "orderByKey": f"metrics.`{quality}`",
        "orderByAsc": False,
        "selectedColumns": [*columns, *(f"params.`{knob}`" for knob in knobs)],
        "compareRunSections": [
            {"uuid": "s", "name": "Pareto front", "display": True, "isReordered": True, **common},
        ],
        "compareRunCharts": [
            {
                "type": "SCATTER",
                "uuid": "c1",
                "metricSectionId": "s",
                "runsCountToCompare": 100,
                "xaxis": {"key": cost, "type": "METRIC"},
                "yaxis": {"key": quality, "type": "METRIC"},
                **common,
            },
            {
                "type": "PARALLEL",
                "uuid": "c2",
                "metricSectionId": "s",
                "showAllRuns": True,
                "selectedParams": list(knobs),
                "selectedMetrics": [quality, cost],
                **common,
            },
        ],
        "isAccordionReordered": True,
        "runsHiddenMode": "SHOW_ALL",
        "autoRefreshEnabled": True,
        "hideEmptyCharts": True,
        "groupBy": None,
    }
    now = int(1000 * time.time())
    return {"name": f"Pareto front of {name}", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}
