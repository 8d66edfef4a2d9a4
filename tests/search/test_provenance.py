"""The commands that a user is given, as the user's shell would read them."""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic import synthetic_events

from search import session
from search.provenance import command_in, versions
from search.results import load_results, render_front, render_pick
from search.store import Store, StoreError
from spaces.loading import load_spec
from trainables.device import package_versions


@pytest.mark.parametrize(
    ("directory", "options"),
    [
        ("paretune-runs", []),
        ("./paretune-runs", []),
        ("{here}/paretune-runs", []),
        ("runs", ["--directory", "runs"]),
        ("{here}/my runs", ["--directory", "my runs"]),
        ("../runs", ["--directory", "../runs"]),
        (".", ["--directory", "."]),
        ("/mnt/shared", ["--directory", "/mnt/shared"]),
    ],
)
def test_a_command_names_the_directory_where_it_is_not_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, directory: str, options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = command_in(Path(directory.format(here=tmp_path)), "resume", "mine")
    assert shlex.split(command) == ["paretune", "resume", "mine", *options]


def test_the_versions_of_a_search_are_those_of_its_trials_and_of_what_searches() -> None:
    ours = versions()
    assert package_versions().items() <= ours.items()
    assert {"paretune", "ray", "optuna", "mlflow", "numpy"} <= ours.keys()


def searched(directory: Path, runs: str) -> Store:
    path = directory / "spec.yaml"
    path.write_text(f"name: mine\nmodel: {{name: m, task: sequence-classification}}\ndata: {{train: t.csv}}\ndirectory: {runs}\n")
    store = Store.create(load_spec(path))
    store.ledger_path.write_text("".join(json.dumps(event) + "\n" for event in synthetic_events(9)))
    return store


def test_a_picked_trial_says_what_speaks_against_its_times(tmp_path: Path) -> None:
    store = searched(tmp_path, str(tmp_path / "runs"))
    results = load_results(store.name, tmp_path / "runs")
    record = results.members[0]
    assert "is noisy" not in render_pick(results, record)
    noisy = replace(record, values={**record.values, "time_drift": 0.5})
    assert f"trial {record.number} is noisy: its pace changed by 50%" in render_pick(results, noisy)


@pytest.mark.parametrize("runs", ["paretune-runs", "runs"])
def test_every_hint_finds_its_search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: str) -> None:
    monkeypatch.chdir(tmp_path)
    store = searched(tmp_path, runs)
    option = "" if runs == "paretune-runs" else f" --directory {runs}"
    results = load_results("mine", Path(runs))
    assert f"`paretune confirm mine{option}` trains" in render_front(results)
    record = results.members[0]
    assert f"`paretune confirm mine --trials {record.number}{option}` trains" in render_pick(results, record)
    with pytest.raises(StoreError, match=f"`paretune resume mine{option}`"):
        Store.create(load_spec(tmp_path / "spec.yaml"))

    class Told(Exception):
        pass

    def told(command: str) -> Any:
        raise Told(f"<{command}>")

    monkeypatch.setattr(session, "Interruption", told)
    monkeypatch.setattr(session.cluster, "connected", lambda _: nullcontext(2))
    prepared: Any = SimpleNamespace(spec=results.spec)
    with pytest.raises(Told, match=f"<paretune resume mine{option}>"):
        session._drive(store, prepared, print, None, None)
