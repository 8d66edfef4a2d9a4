"""`paretune compare-methods` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import paretune
from tiny import make_spec

from search.ledger import Ledger

pytestmark = pytest.mark.slow


def test_a_comparison_is_searched_confirmed_and_told_and_is_not_made_twice(tmp_path: Path) -> None:
    spec = str(make_spec(tmp_path, name=None, space={"global_batch_size": 8, "epochs": 2}))
    command = ("compare-methods", spec, "--methods", "none,dora:4,lora:4:nf4", "--fractions", "0.3,1", "--seeds", "2")
    first = paretune(*command, cwd=tmp_path)
    assert "of the rows: " in first.stdout
    assert "2 further seeds, on the test rows" in first.stdout
    report = tmp_path / "runs/spec-methods/report"
    assert len((report / "methods.csv").read_text().splitlines()) == 1 + 3 * 2
    assert (report / "methods.png").stat().st_size > 10_000
    ledger = report.parent / "ledger.jsonl"
    events = [event["event"] for event in Ledger(ledger).events()]
    assert events.count("trial_started") == 3 * 2 * 3
    assert events.count("confirmed") == 3 * 2 * 2
    again = paretune(*command, "--json", cwd=tmp_path)
    assert [event["event"] for event in Ledger(ledger).events()] == events
    rows = json.loads(again.stdout)
    assert {row["method"] for row in rows} == {"full", "dora 4", "lora 4 nf4"}
    assert all(row["num_seeds"] == 2 and row["split"] == "test" for row in rows)
    assert sum(row["verdict"] == "best" for row in rows) == 2


def test_what_is_no_method_starts_nothing(tmp_path: Path) -> None:
    refused = paretune("compare-methods", str(make_spec(tmp_path)), "--methods", "lorra", cwd=tmp_path, check=2)
    assert "'lorra' is no method" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
