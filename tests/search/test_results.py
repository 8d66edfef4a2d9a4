"""What `paretune front` prints and gives as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic import synthetic_events, without_mfu

from search.calibration import calibrate
from search.results import Results, front_as_json, load_results, render_front
from search.store import Store
from spaces.loading import load_spec


def searched(directory: Path, events: list[dict]) -> Results:
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


def test_the_front_says_once_why_there_is_no_mfu(tmp_path: Path) -> None:
    lines = render_front(searched(tmp_path, without_mfu(synthetic_events(9), "unknown device X"))).splitlines()
    (line,) = [line for line in lines if "no MFU" in line]
    assert line.endswith(": unknown device X")
