"""The steps of a session that are told apart without Ray: what is asked of the dispatcher, and when."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engines import make, report
from tiny import make_spec

from search import session
from search.errors import UserError
from search.ledger import Ledger
from spaces.constraints import Limits
from spaces.loading import SpecError, load_spec


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        ({"trials": 3, "world_size": 2}, (2, 3)),
        ({"trials": None, "world_size": 2}, (2, 20)),
        ({"trials": None, "world_size": 2, "budget": {"minutes": 30}}, (2, math.inf)),
        # What comes first is one job; the trials may want another size.
        ({"trials": 3, "world_size": {"choice": [2, 1]}}, (1, 1)),
        # Where they are measured, recipes are trained at the smallest.
        ({"trials": 3, "world_size": {"profile": [2, 1]}}, (1, 3)),
    ],
)
def test_groups_start_for_the_trials_of_any_budget(tmp_path: Path, search: dict[str, Any], expected: tuple[int, float]) -> None:
    engine, _, _ = make(tmp_path, **search)
    spec = load_spec(tmp_path / "spec.yaml").spec
    assert session._first_jobs(spec, Limits(num_workers=4, hidden_size=None), engine.state) == expected


def test_a_resume_starts_groups_for_what_is_left_alone(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=3, world_size=2)
    first, in_flight = engine.next(), engine.next()
    assert first is not None
    assert in_flight is not None
    engine.reported(first.number, report(0.5, 3.0))
    engine.ended(first.number, {"state": "complete"})
    spec = load_spec(tmp_path / "spec.yaml").spec
    assert session._first_jobs(spec, Limits(num_workers=4, hidden_size=None), engine.state) == (2, 2)


def test_a_resume_with_other_data_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, store = make(tmp_path, trials=3)
    shutil.copy(tmp_path / "spec.yaml", store.spec_path)
    Ledger(store.ledger_path).append("search_started", data_fingerprint="0123456789abcdef")
    data = SimpleNamespace(fingerprint="fedcba9876543210")
    monkeypatch.setattr(session, "prepare", lambda loaded: SimpleNamespace(loaded=loaded, data=data))
    monkeypatch.setattr(session, "_drive", lambda *_: pytest.fail("it started"))
    with pytest.raises(UserError, match=r"spec\.yaml: data\.train: the data changed .* fedcba987654, then 0123456789ab"):
        session.resume(store, lambda _: None)


def prepared_with(directory: Path, resources: dict[str, int]) -> Any:
    """Return what `check_fit` reads of a search whose workers take these resources."""
    path = directory / "spec.yaml"
    ((key, value),) = resources.items()
    path.write_text(f"model: {{name: m, task: causal-lm}}\ndata: {{train: t.csv}}\nresources:\n  {key}: {value}\n")
    loaded = load_spec(path)
    table = SimpleNamespace(lengths=np.array([8]), num_targets=np.array([8]))
    data, shape = SimpleNamespace(train=table, evaluation=table), SimpleNamespace(hidden_size=8)
    return SimpleNamespace(loaded=loaded, spec=loaded.spec, shape=shape, plan=None, data=data)


@pytest.mark.parametrize(
    ("resources", "why"),
    [
        (
            {"gpus_per_worker": 1},
            "spec.yaml:4: resources.gpus_per_worker: no worker fits: each takes 1 GPU and 1 CPU, and no node has them; ",
        ),
        (
            {"cpus_per_worker": 64},
            "spec.yaml:4: resources.cpus_per_worker: no worker fits: each takes 64 CPU, and no node has as many",
        ),
    ],
)
def test_a_cluster_that_holds_no_worker_is_said_to(tmp_path: Path, resources: dict[str, int], why: str) -> None:
    with pytest.raises(UserError) as found:
        session.check_fit(prepared_with(tmp_path, resources), 0)
    assert why in str(found.value)


@pytest.mark.parametrize("uri", ["https://me:secret@mlflow.example.com", "postgresql://me:secret@db/mlflow"])
def test_a_new_search_takes_no_credentials_in_its_file_and_does_not_repeat_them(tmp_path: Path, uri: str) -> None:
    loaded = load_spec(make_spec(tmp_path, tracking={"uri": uri}))
    with pytest.raises(SpecError, match=r"tracking\.uri: credentials, which would be written") as refused:
        session.start(loaded, lambda _: None)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_memory_is_predicted_for_what_the_workers_take(tmp_path: Path, num_gpus: int) -> None:
    assert session.check_fit(prepared_with(tmp_path, {"gpus_per_worker": num_gpus}), 1).is_on_gpu == (num_gpus > 0)


def test_an_earlier_search_is_read_once_and_before_this_one_of_the_same_name_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepared_with(tmp_path, {"workers": 1})
    spec = f"name: s\ndirectory: {tmp_path}/runs\nsampler: {{warm_start: s}}\n"
    (tmp_path / "spec.yaml").write_text((tmp_path / "spec.yaml").read_text() + spec)
    prepared.loaded = load_spec(tmp_path / "spec.yaml")
    prepared.data.fingerprint = "abc"
    seen: list[Any] = []
    monkeypatch.setattr(session, "check_local_data", lambda _: None)
    monkeypatch.setattr(session, "prepare", lambda _: prepared)
    monkeypatch.setattr(session, "earlier_trials", lambda *_: seen.append((tmp_path / "runs").exists()) or {"trials": ["one"]})
    monkeypatch.setattr(session, "_drive", lambda store, prepared, emit, past, command: seen.append(past) or store)
    store = session.start(prepared.loaded, lambda _: None)
    assert store.name == "s"
    assert seen == [False, {"trials": ["one"]}]
