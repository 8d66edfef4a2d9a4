"""MLflow, the view of a search; the ledger is the truth, and everything here can be told again.

This is the only module that imports MLflow, and it does so inside functions, since the import takes seconds.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.endpoint import SQLITE, absolute_uri, is_http, problem_with, redacted
from search.errors import UserError
from search.mirror import SEARCH_TAG, FoundRun, Mirror, spec_tags
from search.record import TrialRecord
from search.saved_view import runs_url
from search.spool import Event, Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger(__name__)

# MLflow refuses more in one request, and cuts off what is longer.
MAX_PARAMS_PER_REQUEST, MAX_PARAM_LENGTH = 100, 6000
MAX_METRICS_PER_REQUEST, MAX_DATASET_NAME, MAX_DIGEST = 1000, 500, 36
_ENDED = frozenset({"FINISHED", "FAILED", "KILLED"})
_OUR_TAGS = {"mlflow.source.name": "paretune", "mlflow.source.type": "LOCAL"}
# What a server says of a call that it does not know.
_UNKNOWN_CALLS = frozenset({"ENDPOINT_NOT_FOUND", "NOT_FOUND", "NOT_IMPLEMENTED"})
# Answers that stay the same however often one asks; anything else may be a server that is slow, locked or away.
_REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS"})
_ENVIRONMENT = {
    # The spool tries again by itself, and a check must fail in seconds.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # A search tells nobody but its tracking server.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class TrackingError(UserError):
    """MLflow cannot be used, or does not know the search."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Opened:
    """What a tracker has once its search is open."""

    runs: _MlflowRuns
    parent_run_id: str
    mirror: Mirror
    spool: Spool


class Tracker:
    """Mirrors one search into MLflow; `submit` never waits, all else does."""

    def __init__(self, uri: str, experiment: str, artifact_root: Path | None) -> None:
        """Remember where to write; nothing is opened yet.

        Args:
            uri: MLflow's tracking URI.
            experiment: name of the MLflow experiment, which is made if there is none.
            artifact_root: where artifacts go if this process opens the store itself; a server has its own place.
        """
        self.uri = absolute_uri(uri)
        self._experiment = experiment
        self._artifact_root = artifact_root
        self._opened: _Opened | None = None

    def connect(self, timeout_seconds: float) -> None:
        """Check that the tracking store can be used, without writing to it.

        Raises:
            TrackingError: it cannot.
        """
        problem = problem_with(self.uri, timeout_seconds)
        if problem is not None:
            raise TrackingError(problem)
        if is_http(self.uri):
            with in_words(self.uri):
                client_of(self.uri).search_experiments(max_results=1)

    def start_search(self, name: str, *, params: Mapping[str, Any], tags: Mapping[str, str], spec_path: Path) -> str:
        """Open the parent run and begin to deliver events.

        Args:
            name: name of the search.
            params: the spec, flat; written once, since MLflow's params never change.
            tags: further tags of the parent run.
            spec_path: the resolved spec; `load_search` reads it back, and a reader downloads it.

        Returns:
            The parent run's id, which a resume needs.

        Raises:
            TrackingError: MLflow cannot be used.
        """
        if self.uri.startswith(SQLITE):
            Path(self.uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
        with in_words(self.uri):
            client = client_of(self.uri)
            runs = _MlflowRuns(client, self._experiment_id(client))
            run_id = runs.create(name, {"kind": "search", SEARCH_TAG: name, **spec_tags(spec_path.read_text()), **tags})
            runs.log_params(run_id, params)
            runs.log_file(run_id, spec_path)
        self._begin(runs, name, run_id)
        return run_id

    def reopen_search(self, name: str, run_id: str, *, spec_path: Path) -> None:
        """Open the parent run of a search that is resumed, and begin to deliver events.

        Args:
            name: name of the search.
            run_id: what `start_search` returned.
            spec_path: the resolved spec, which may have been lengthened since.

        Raises:
            TrackingError: MLflow cannot be used, or has no such run.
        """
        with in_words(self.uri):
            client = client_of(self.uri)
            runs = _MlflowRuns(client, client.get_run(run_id).info.experiment_id)
            runs.set_status(run_id, "RUNNING")
            runs.log(run_id, tags=spec_tags(spec_path.read_text()))
            runs.log_file(run_id, spec_path)
        self._begin(runs, name, run_id)

    def _begin(self, runs: _MlflowRuns, name: str, run_id: str) -> None:
        mirror = Mirror(runs, name, run_id)
        spool = Spool(mirror.deliver, is_refusal=_is_refusal)
        self._opened = _Opened(runs=runs, parent_run_id=run_id, mirror=mirror, spool=spool)

    @property
    def is_open(self) -> bool:
        """Whether the search has a run."""
        return self._opened is not None

    def submit(self, event: Event) -> None:
        """Queue one event of the ledger; returns at once, whatever the server does."""
        self._open.spool.submit(event)

    def flush(self, timeout_seconds: float) -> int:
        """Wait until the server has everything or the time is over; return how many events it has not."""
        return self._open.spool.flush(timeout_seconds)

    def write_front(
        self,
        members: Sequence[TrialRecord],
        objectives: Sequence[str],
        knobs: Sequence[str],
        artifacts: Sequence[Path],
        *,
        recommended: int | None,
        note: str,
        metrics: Mapping[str, float],
    ) -> None:
        """Mark the front, and put its view, report, table and note where a reader of MLflow finds them.

        Args:
            members: the trials on the front.
            objectives: the metrics that the front is about; the first one is the y axis.
            knobs: the params that the view shows, by their names in `TrialConfig.flat`.
            artifacts: files for the folder `report` of the parent run.
            recommended: the trial to take, by its number.
            note: Markdown that MLflow shows on top of the parent run.
            metrics: numbers of the search as a whole, for the parent run.

        Raises:
            TrackingError: MLflow did not take it.
        """
        mirror = self._open.mirror
        with in_words(self.uri):
            mirror.write_front(members, [*artifacts], recommended=recommended, note=note, metrics=metrics)
        try:
            mirror.save_view(objectives, knobs)
        except Exception as error:
            # The view rests on the user interface's own format: nothing may fail with it.
            logger.warning("MLflow did not take the saved view: %s", error)

    def url(self, base: str) -> str:
        """Return the address that opens the front's view in the MLflow whose pages are at `base`."""
        return runs_url(base, self._open.runs.experiment_id, self._open.mirror.search)

    def finish(self) -> None:
        """End the parent run and stop delivering.

        Raises:
            TrackingError: MLflow did not take it.
        """
        self._open.spool.close()
        with in_words(self.uri):
            self._open.runs.end(self._open.parent_run_id, "FINISHED")

    def leave(self, status: str, timeout_seconds: float) -> None:
        """End the parent run of a search that is cut short, if the server takes it in time; a resume opens it again."""
        undelivered = self.flush(timeout_seconds)
        if undelivered:
            logger.warning("the tracking server has %d events less than the ledger; going on with it delivers them", undelivered)
        self._open.spool.close()
        try:
            with in_words(self.uri):
                self._open.runs.end(self._open.parent_run_id, status)
        except TrackingError as error:
            logger.warning("%s", error)

    @property
    def _open(self) -> _Opened:
        if self._opened is None:
            raise RuntimeError("start_search comes first")
        return self._opened

    def _experiment_id(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            location = None
            if self._artifact_root is not None and not is_http(self.uri):
                location = (self._artifact_root.absolute() / re.sub(r"[^A-Za-z0-9._-]", "-", self._experiment)).as_uri()
            return str(
                client.create_experiment(
                    self._experiment,
                    artifact_location=location,
                    # Otherwise the UI shows the experiment as one of a chat application.
                    tags={"mlflow.experimentKind": "custom_model_development"},
                )
            )
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"tracking.experiment: '{self._experiment}' is deleted in {redacted(self.uri)}; restore it in MLflow "
                "or choose another name"
            )
        return str(experiment.experiment_id)


class _MlflowRuns:
    """`mirror.Runs` on one experiment of MLflow."""

    def __init__(self, client: MlflowClient, experiment_id: str) -> None:
        self._client = client
        self.experiment_id = experiment_id

    def find(self, parent_run_id: str, tag: str, number: int) -> FoundRun | None:
        mine = f"tags.`mlflow.parentRunId` = '{parent_run_id}' and tags.`{tag}` = '{number}'"
        for run in self._client.search_runs([self.experiment_id], mine, max_results=1):
            return FoundRun(run_id=run.info.run_id, is_ended=run.info.status in _ENDED)
        return None

    def create(self, name: str, tags: Mapping[str, str], *, time_ms: int | None = None) -> str:
        run = self._client.create_run(self.experiment_id, start_time=time_ms, tags={**_OUR_TAGS, **tags}, run_name=name)
        return str(run.info.run_id)

    def log(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        time_ms: int = 0,
        step: int = 0,
    ) -> None:
        from mlflow.entities import Metric, RunTag

        self._client.log_batch(
            run_id,
            # MLflow stores infinity as 1.8e308. A metric that is repeated with its own time is one metric to it.
            metrics=[Metric(k, float(v), time_ms, step) for k, v in (metrics or {}).items() if math.isfinite(v)],
            tags=[RunTag(key, value) for key, value in (tags or {}).items()],
        )

    def log_curve(self, run_id: str, name: str, points: Sequence[tuple[int, float, int]]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(name, value, time_ms, step) for step, value, time_ms in points]
        for start in range(0, len(metrics), MAX_METRICS_PER_REQUEST):
            self._client.log_batch(run_id, metrics=metrics[start : start + MAX_METRICS_PER_REQUEST])

    def log_dataset(self, run_id: str, name: str, digest: str, summary: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": name})
        kind = "hugging_face" if name.startswith("hf:") else "local"
        profile = json.dumps(summary)
        dataset = Dataset(name=name[:MAX_DATASET_NAME], digest=digest[:MAX_DIGEST], source_type=kind, source=source, profile=profile)
        try:
            self._client.log_inputs(run_id, [DatasetInput(dataset=dataset, tags=[InputTag("mlflow.data.context", "training")])])
        except _errors() as error:
            # Nothing else of a trial may be lost with it, such as to a server that knows no datasets.
            if getattr(error, "error_code", "") not in _REFUSALS | _UNKNOWN_CALLS:
                raise
            logger.warning("MLflow did not take the dataset: %s", error)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        # Without a warning: the whole spec is a file of the run.
        rows = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in params.items()]
        for start in range(0, len(rows), MAX_PARAMS_PER_REQUEST):
            self._client.log_batch(run_id, params=rows[start : start + MAX_PARAMS_PER_REQUEST])

    def end(self, run_id: str, status: str, *, time_ms: int | None = None) -> None:
        self._client.set_terminated(run_id, status=status, end_time=time_ms)

    def set_status(self, run_id: str, status: str) -> None:
        self._client.update_run(run_id, status=status)

    def log_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        try:
            self._client.log_artifact(run_id, str(path), artifact_path=folder)
        except _errors():
            raise
        except Exception as error:  # the clients of S3 and other stores have classes of their own
            line = " ".join(str(error).split())[:400]
            raise TrackingError(f"MLflow's artifact store: {type(error).__name__}: {line}") from error

    def tag_experiment(self, key: str, value: str) -> None:
        self._client.set_experiment_tag(self.experiment_id, key, value)


def client_of(uri: str) -> MlflowClient:
    """Return MLflow's client of a store."""
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _is_refusal(error: Exception) -> bool:
    if hasattr(error, "error_code"):
        return error.error_code in _REFUSALS
    return not isinstance(error, _errors())


def _errors() -> tuple[type[Exception], ...]:
    """Import MLflow quietly, and return what it raises when the store is slow, locked, damaged or away."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    # A line per database migration says nothing to the user of a search.
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


@contextmanager
def in_words(uri: str) -> Iterator[None]:
    """Turn MLflow's exceptions into one line for the user."""
    errors = _errors()
    try:
        yield
    except errors as error:
        line = " ".join(str(error).split())[:400]
        raise TrackingError(f"tracking.uri: MLflow at {redacted(uri)}: {line}") from error
