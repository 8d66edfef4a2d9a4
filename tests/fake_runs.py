"""The runs that a search writes, without MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from search.mirror import FoundRun, Mirror
from search.record import TrialRecord


class FakeRuns:
    """Runs as MLflow keeps them: params never change, and one metric is one (key, step, time, value)."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {"parent": self._empty({}, 0)}
        self.experiment_tags: dict[str, str] = {}
        self.num_calls = 0
        self.fails_at: int | None = None

    @staticmethod
    def _empty(tags: Mapping[str, str], time_ms: int) -> dict[str, Any]:
        return {"tags": dict(tags), "params": {}, "metrics": set(), "status": "RUNNING", "start": time_ms, "files": {}}

    def _called(self) -> None:
        self.num_calls += 1
        if self.num_calls == self.fails_at:
            raise ConnectionError("the answer was lost")

    def find(self, parent_run_id: str, tag: str, number: int) -> FoundRun | None:
        for run_id, run in self.runs.items():
            if run["tags"].get(tag) == str(number) and run["tags"]["mlflow.parentRunId"] == parent_run_id:
                return FoundRun(run_id=run_id, is_ended=run["status"] not in ("RUNNING", "SCHEDULED"))
        return None

    def create(self, name: str, tags: Mapping[str, str], *, time_ms: int) -> str:
        assert name not in self.runs, "a trial has one run"
        self.runs[name] = self._empty(tags, time_ms)
        self._called()
        return name

    def log(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
        time_ms: int = 0,
        step: int = 0,
    ) -> None:
        run = self.runs[run_id]
        run["metrics"] |= {(key, step, time_ms, value) for key, value in (metrics or {}).items()}
        run["tags"].update(tags or {})
        self._called()

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        known = self.runs[run_id]["params"]
        assert all(known.get(key, value) == value for key, value in params.items()), "params never change"
        known.update(params)
        self._called()

    def log_curve(self, run_id: str, name: str, points: Sequence[tuple[int, float, int]]) -> None:
        self.runs[run_id]["metrics"] |= {(name, step, time_ms, value) for step, value, time_ms in points}
        self._called()

    def log_dataset(self, run_id: str, name: str, digest: str, summary: Mapping[str, Any]) -> None:
        self.runs[run_id]["dataset"] = (name, digest, dict(summary))
        self._called()

    def end(self, run_id: str, status: str, *, time_ms: int | None = None) -> None:
        self.runs[run_id].update(status=status, end=time_ms)
        self._called()

    def set_status(self, run_id: str, status: str) -> None:
        self.runs[run_id]["status"] = status
        self._called()

    def log_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        self.runs[run_id]["files"][f"{folder}/{path.name}" if folder else path.name] = path.read_bytes()

    def tag_experiment(self, key: str, value: str) -> None:
        self.experiment_tags[key] = value


def mirrored(events: list[dict[str, Any]], runs: FakeRuns | None = None) -> FakeRuns:
    runs = runs or FakeRuns()
    mirror = Mirror(runs, "synthetic", "parent")
    for event in events:
        mirror.deliver(event)
    return runs


class FakeTracker:
    """Remembers what it is given; `undelivered` events never arrive."""

    def __init__(self, undelivered: int = 0) -> None:
        self.undelivered, self.calls, self.events = undelivered, [], []

    def reopen_search(self, name: str, run_id: str, *, spec_path: Path) -> None:
        assert spec_path.exists()
        self.calls.append(f"reopen {name} {run_id}")

    def submit(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def flush(self, timeout_seconds: float) -> int:
        return self.undelivered

    def write_front(self, members: list[TrialRecord], *_: Any, **__: Any) -> None:
        self.calls.append(f"front of {len(members)}, confirmed {sum(len(r.confirmations) for r in members)} times")

    def finish(self) -> None:
        self.calls.append("finish")

    def leave(self, status: str, timeout_seconds: float) -> None:
        self.calls.append(f"leave {status}")
