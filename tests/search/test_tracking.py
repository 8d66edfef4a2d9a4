from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest
from synthetic import OBJECTIVES, confirmed_event, synthetic_events
from waiting import wait_for

from search.endpoint import problem_with
from search.ledger import replay
from search.pareto import front
from search.tracked import load_search
from search.tracking import Tracker, TrackingError
from search.ui import ENVIRONMENT

EVENTS = [
    *synthetic_events(8),
    *(confirmed_event(0, seed, accuracy=0.8, seconds=9.0 + seed, test=0.7) for seed in (1, 2)),
    confirmed_event(2, 1, accuracy=0.8, seconds=9.0, error={"kind": "error", "message": "it broke"}),
]
STATE = replay(EVENTS)
RECORDS = list(STATE.records.values())
SPEC = "model: {}\n"
# Longer than a tag may be.
LONGER_SPEC = SPEC + "".join(f"# line {n}\n" for n in range(2000))
PARAMS = {"model.name": "tiny", **{f"space.knob_{n}": n for n in range(120)}}


@dataclass(frozen=True)
class Tracked:
    uri: str
    root: Path
    run_id: str
    tracker: Tracker


def track(uri: str, root: Path, run_id: str | None = None, *, events: int | None = None) -> Tracked:
    tracker = Tracker(uri, "our experiment/1", artifact_root=root / "artifacts")
    tracker.connect(timeout_seconds=5)
    if run_id is None:
        (root / "spec.yaml").write_text(SPEC)
        tags = {"paretune.directory": "runs"}
        run_id = tracker.start_search("synthetic", params=PARAMS, tags=tags, spec_path=root / "spec.yaml")
    else:
        (root / "spec.yaml").write_text(LONGER_SPEC)
        tracker.reopen_search("synthetic", run_id, spec_path=root / "spec.yaml")
    for event in EVENTS[:events]:
        tracker.submit(event)
    assert tracker.flush(60) == 0
    return Tracked(uri=uri, root=root, run_id=run_id, tracker=tracker)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """A search that was cut off in the middle, resumed, and finished. Making the database takes MLflow seconds."""
    root = tmp_path_factory.mktemp("tracking")
    uri = f"sqlite:///{root}/runs/mlflow.db"
    cut_off = track(uri, root, events=len(EVENTS) // 2)
    resumed = track(uri, root, cut_off.run_id)
    report = root / "report.html"
    report.write_text("<html>")
    members = front(RECORDS, OBJECTIVES)
    resumed.tracker.write_front(
        members,
        [o.metric for o in OBJECTIVES],
        ["learning_rate", "world_size"],
        [report],
        recommended=1,
        note="take trial 1",
        metrics={"front/size": float(len(members))},
    )
    resumed.tracker.finish()
    assert resumed.run_id == cut_off.run_id
    return resumed


def test_mlflow_holds_one_parent_and_one_run_per_trial(tracked: Tracked) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracked.uri)
    experiment = client.get_experiment_by_name("our experiment/1")
    assert experiment is not None
    assert "mlflow.sharedViewState.pareto-synthetic" in experiment.tags
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = {run.info.run_name: run for run in runs if run.data.tags["kind"] == "trial"}
    assert len(runs) == 1 + len(trials) + 3, "beside the search and its trials the confirmations"
    assert sorted(trials) == [f"trial-{n:04d}" for n in sorted(STATE.records)]
    assert parent.info.status == "FINISHED"
    assert len(parent.data.params) == len(PARAMS)
    assert parent.data.metrics["reference/accuracy"] == 0.04
    for record in RECORDS:
        run = trials[f"trial-{record.number:04d}"]
        assert run.info.status == {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}[record.state]
        history = client.get_metric_history(run.info.run_id, "eval/accuracy")
        assert [point.step for point in history] == [report["step"] for report in record.reports]
        curve = client.get_metric_history(run.info.run_id, "train/loss")
        losses = record.reports[-1]["details"]["train_losses"] if record.reports else []
        assert sorted((point.step, point.value) for point in curve) == [(4 * n, loss) for n, loss in enumerate(losses, start=1)]
    for run in (parent, *trials.values()):
        (told,) = run.inputs.dataset_inputs
        assert (told.dataset.name, told.dataset.digest) == ("made/up.csv", "f00d")
    placed = next(event["time"] for event in EVENTS if event["event"] == "trial_placed")
    info = trials["trial-0000"].info
    assert (info.end_time - info.start_time) / 1000 == pytest.approx(STATE.records[0].finished_at - placed, abs=0.01)


def test_artifacts_lie_where_the_search_is(tracked: Tracked) -> None:
    assert [p.name for p in tracked.root.glob("artifacts/our-experiment-1/*/artifacts/report/*")] == ["report.html"]
    assert len(list(tracked.root.glob("artifacts/our-experiment-1/*/artifacts/trials.json"))) == 1


@pytest.mark.parametrize("by", ["name", "run id"])
def test_mlflow_alone_knows_the_search(tracked: Tracked, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.tracked.RUNS_PER_REQUEST", 3)
    found = load_search(tracked.uri, "synthetic" if by == "name" else tracked.run_id)
    assert list(found.records) == sorted(RECORDS, key=lambda record: record.number)
    assert found.reference == STATE.reference
    assert (found.name, found.run_id, found.spec_yaml) == ("synthetic", tracked.run_id, LONGER_SPEC)


def test_an_unknown_search_or_store_is_one_line(tracked: Tracked) -> None:
    with pytest.raises(TrackingError, match=r"no search named 'other' in .*; there are: synthetic$"):
        load_search(tracked.uri, "other")
    with pytest.raises(TrackingError, match=r"nowhere\.db does not exist"):
        load_search(f"sqlite:///{tracked.root}/nowhere.db", "synthetic")
    tracker = Tracker(tracked.uri, "our experiment/1", artifact_root=None)
    with pytest.raises(TrackingError, match="no-such-run"):
        tracker.reopen_search("synthetic", "no-such-run", spec_path=tracked.root / "spec.yaml")


def test_a_deleted_experiment_is_not_written_to(tracked: Tracked) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracked.uri)
    client.delete_experiment(client.create_experiment("gone"))
    tracker = Tracker(tracked.uri, "gone", artifact_root=None)
    with pytest.raises(TrackingError, match="'gone' is deleted in"):
        tracker.start_search("synthetic", params={}, tags={}, spec_path=tracked.root / "spec.yaml")


def test_the_printed_link_opens_the_view_and_not_the_onboarding_page(tracked: Tracked) -> None:
    link = tracked.tracker.url("https://mlflow.example/")
    assert link.startswith("https://mlflow.example/#/experiments/1/runs?")
    assert "viewStateShareKey=pareto-synthetic" in link
    assert "workflowType=machine_learning" in link


def test_nothing_is_asked_of_a_tracker_that_was_not_started(tmp_path: Path) -> None:
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "paretune", artifact_root=None)
    with pytest.raises(RuntimeError, match="start_search"):
        tracker.submit({"event": "resumed", "time": 1.0})
    tracker.connect(timeout_seconds=1)
    assert not (tmp_path / "mlflow.db").exists()


class _Forbidden(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"Invalid Host header\n - possible DNS rebinding attack detected"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def forbidding_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Forbidden) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_refuses_is_one_line_with_its_answer(forbidding_server: str) -> None:
    with pytest.raises(TrackingError, match=r"403.*Invalid Host header - possible DNS") as raised:
        Tracker(forbidding_server, "paretune", artifact_root=None).connect(timeout_seconds=5)
    assert "\n" not in str(raised.value)


def test_a_server_that_is_away_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(TrackingError, match=rf"tracking.uri: http://127.0.0.1:{port} is not reachable"):
        Tracker(f"http://127.0.0.1:{port}", "paretune", artifact_root=None).connect(timeout_seconds=5)


def test_a_search_that_still_runs_or_was_cut_short_is_known_to_mlflow_alone(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    half = len(EVENTS) // 2
    running = track(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, events=half)
    ended = [e["number"] for e in EVENTS[:half] if e["event"] in ("trial_finished", "trial_infeasible")]
    assert ended, "the half must hold an ended trial for this test to say anything"
    assert sorted(r.number for r in load_search(running.uri, "synthetic").records) == sorted(ended)
    running.tracker.leave("KILLED", timeout_seconds=60)
    client = MlflowClient(running.uri)
    assert client.get_run(running.run_id).info.status == "KILLED"
    resumed = track(running.uri, tmp_path, running.run_id)
    assert client.get_run(running.run_id).info.status == "RUNNING"
    resumed.tracker.finish()
    assert client.get_run(running.run_id).info.status == "FINISHED"


class _Server:
    """A real MLflow server on a port of its own, which can be killed and started again."""

    def __init__(self, root: Path) -> None:
        self._root = root
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        stores = ["--backend-store-uri", f"sqlite:///{self._root}/server.db", "--artifacts-destination", f"{self._root}/files"]
        where = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *stores, *where],
            cwd=self._root,
            env={**os.environ, **ENVIRONMENT},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: problem_with(self.uri, 1) is None, self._process)

    def kill(self) -> None:
        parts = psutil.Process(self._process.pid).children(recursive=True)
        for part in (*parts, self._process):
            part.kill()
        psutil.wait_procs(parts, timeout=20)
        self._process.wait()


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back_gets_everything_once_and_nobody_waits(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    server = _Server(tmp_path)
    server.start()
    half = len(EVENTS) // 2
    try:
        tracked = track(server.uri, tmp_path, events=half)
        server.kill()
        for event in EVENTS[half:]:
            tracked.tracker.submit(event)
        # All but what comes before the first event that needs an answer.
        assert tracked.tracker.flush(0.5) >= len(EVENTS) - half - 2, "the server was not away"
        server.start()
        assert tracked.tracker.flush(60) == 0
        tracked.tracker.finish()
        found = load_search(server.uri, "synthetic")
        assert list(found.records) == sorted(RECORDS, key=lambda record: record.number)
        client = MlflowClient(server.uri)
        experiment = client.get_experiment_by_name("our experiment/1")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id], "tags.kind = 'trial'")
        assert sorted(run.data.tags["paretune.trial"] for run in runs) == sorted(str(n) for n in STATE.records)
        for run in runs:
            reports = STATE.records[int(run.data.tags["paretune.trial"])].reports
            points = client.get_metric_history(run.info.run_id, "eval/accuracy")
            assert [point.step for point in points] == [report["step"] for report in reports]
    finally:
        server.kill()


def test_records_that_another_version_wrote_are_one_line(tracked: Tracked, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: object) -> None:
        raise TypeError("unexpected field 'x'")

    monkeypatch.setattr("search.tracked.TrialRecord.from_dict", unknown)
    with pytest.raises(TrackingError, match=r"^'synthetic' in .* was written by another version of paretune: unexpected field 'x'$"):
        load_search(tracked.uri, "synthetic")
