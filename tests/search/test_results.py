"""What `paretune front` prints and gives as JSON."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic import confirmed_event, synthetic_events, without_mfu

from search.advice import knee, recommended
from search.budget import used
from search.calibration import calibrate
from search.errors import UserError
from search.rendering import render_front
from search.results import Results, front_as_json, load_results, pick_as_json, pick_one
from search.store import Store
from search.tables import write_tables
from spaces.loading import load_spec
from spaces.metrics import CUSTOM, EXACT_MATCH


def searched(directory: Path, events: list[dict]) -> Results:
    directory.mkdir(exist_ok=True)
    path = directory / "spec.yaml"
    path.write_text(
        f"name: mine\nmodel: {{name: m, task: sequence-classification}}\ndata: {{train: t.csv}}\ndirectory: {directory}\n"
    )
    store = Store.create(load_spec(path))
    store.ledger_path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return load_results("mine", directory)


def test_the_front_as_json_has_what_was_predicted_beside_what_was_measured(tmp_path: Path) -> None:
    results = searched(tmp_path, synthetic_events(9))
    rows = json.loads(json.dumps(front_as_json(results)))["calibration"]
    expected = calibrate(list(results.state.records.values()))
    assert len(rows) == len(expected) > 0
    for row, known in zip(rows, expected, strict=True):
        assert (row["number"], row["what"], row["source"]) == (known.number, known.what, known.source)
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1)


def test_the_front_says_what_it_was_held_against_and_what_it_took(tmp_path: Path) -> None:
    events = synthetic_events(9)
    seeds = [confirmed_event(0, seed, accuracy=0.8, seconds=9.0) for seed in (1, 2)]
    results = searched(tmp_path / "a", [*events, *seeds])
    lines = render_front(results).splitlines()
    assert "untrained model: accuracy 0.04" in lines
    (spent,) = [line for line in lines if line.startswith("used: ")]
    assert spent == f"used: {used(results.spec, results.state).text()}; by further seeds: 0.01111 device hours", "20 s on two ranks"
    (alone,) = [line for line in render_front(searched(tmp_path / "b", events)).splitlines() if line.startswith("used: ")]
    assert "further seeds" not in alone
    found = front_as_json(results)
    assert found["used"] == used(results.spec, results.state).as_dict()
    assert found["used"]["trials"] > 0
    members, objectives = results.members, results.objectives
    assert [found["knee"], found["recommended"]] == [f(members, objectives).number for f in (knee, recommended)]  # type: ignore[union-attr]


def test_rows_say_whether_a_trial_was_timed_alone_and_is_noisy(tmp_path: Path) -> None:
    results = searched(tmp_path, synthetic_events(9))
    first, *rest = results.members
    noisy = replace(first, source=7, values={**first.values, "time_drift": 0.5})
    row = pick_as_json(results, noisy)
    assert (row["source"], row["noise"]) == (7, noisy.noise)
    assert row["noise"]
    write_tables(replace(results, report_path=tmp_path, state=replace(results.state, records={first.number: noisy})), [])
    with (tmp_path / "trials.csv").open() as file:
        (told,) = csv.DictReader(file)
    assert (told["source"], told["noise"]) == ("7", noisy.noise)
    assert [pick_as_json(results, record)["source"] for record in rest] == [None] * len(rest)


def test_the_front_says_once_why_there_is_no_mfu(tmp_path: Path) -> None:
    lines = render_front(searched(tmp_path, without_mfu(synthetic_events(9), "unknown device X"))).splitlines()
    (line,) = [line for line in lines if "no MFU" in line]
    assert line.endswith(": unknown device X")


@pytest.mark.parametrize("metric", [EXACT_MATCH, CUSTOM])
def test_scores_of_completions_stand_in_the_front_where_they_are_no_objective_too(tmp_path: Path, metric: str) -> None:
    text = json.dumps(synthetic_events(9))
    heading = metric.replace("_", " ")
    assert heading not in render_front(searched(tmp_path / "without", json.loads(text))).splitlines()[0]
    events = json.loads(text.replace('"mfu": 0.31', f'"{metric}": 0.25, "mfu": 0.31'))
    first, *rows = render_front(searched(tmp_path / "with", events)).splitlines()
    assert heading in first
    place = first.index(heading) + len(heading)
    assert rows[0][:place].endswith(" 0.25")


def test_where_nothing_is_within_the_limits_it_is_told_what_they_were_held_against(tmp_path: Path) -> None:
    events = synthetic_events(9)
    results = searched(tmp_path / "searched", events)
    members = results.members
    low, high = (f(r.values["accuracy"] for r in members) for f in (min, max))
    with pytest.raises(UserError, match=f"the front has accuracy from {low:.4g} to {high:.4g}"):
        pick_one(results, {"accuracy": (">=", 0.99)}, at_knee=False)
    events += [confirmed_event(r.number, seed, accuracy=0.5, seconds=9.0) for r in members for seed in (1, 2)]
    with pytest.raises(UserError, match=r"the front has accuracy from 0\.5 to 0\.5"):
        pick_one(searched(tmp_path / "confirmed", events), {"accuracy": (">=", 0.99)}, at_knee=False)


def test_a_front_of_a_search_that_is_not_at_its_end_says_so(tmp_path: Path) -> None:
    events = synthetic_events(9)
    cut = [event for event in events if event["event"] != "search_finished"]
    line = f"not at its end: 0 trials are in flight; `paretune resume mine --directory {tmp_path}/cut` goes on"
    assert line in render_front(searched(tmp_path / "cut", cut))
    assert "not at its end" not in render_front(searched(tmp_path / "ended", events))
