"""The commands that a user is given, as the user's shell would read them."""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic import synthetic_events

from search import session
from search.errors import UserError
from search.provenance import command_in, reproduce_command, versions
from search.rendering import render_front, render_pick
from search.results import load_results
from search.store import Store
from search.study import Study
from spaces.config import TrialConfig
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
    with pytest.raises(UserError, match=f"`paretune resume mine{option}`"):
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


def test_a_trial_of_a_list_of_points_is_trained_again_as_one_proposal(tmp_path: Path) -> None:
    """As those of a comparison are: without its list, nothing else would be proposed."""
    path = tmp_path / "spec.yaml"
    points = [{"learning_rate": 1e-3, "lora_rank": rank} for rank in (4, 8)]
    space = {
        "learning_rate": {"choice": [1e-3, 1e-2]},
        "global_batch_size": 8,
        "dataset_fraction": 1.0,
        "lora_rank": {"choice": [4, 8]},
    }
    spec = {
        "name": "n" * 60,
        "model": {"name": "m", "task": "sequence-classification"},
        "data": {"train": "t.csv"},
        "space": space,
        "sampler": {"method": "points", "points_to_evaluate": points},
    }
    path.write_text(json.dumps(spec))
    loaded = load_spec(path).spec
    params = {**loaded.space.first(), "lora_rank": 8}
    words = shlex.split(reproduce_command(loaded, str(path), str(loaded.name), 7, params))
    again = load_spec(path, [pin for option, pin in pairwise(words) if option == "--set"]).spec
    study = Study(
        space=again.space,
        objectives=again.resolved_objectives(),
        sampler=again.sampler.method,
        seed=0,
        startup_trials=again.sampler.startup_trials,
        points_to_evaluate=again.sampler.points_to_evaluate or (),
    )
    assert not study.is_over
    assert TrialConfig.from_params(study.ask().params) == TrialConfig.from_params(params)
    assert again.budget.max_trials == 1
