"""`paretune compare-methods` as a user runs it."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment, paretune
from tiny import SIZES, make_spec
from waiting import wait_for

from search.compare import LADDER
from search.ledger import Ledger
from spaces.presets import usual_rate

pytestmark = pytest.mark.slow


def test_a_comparison_goes_on_where_it_was_interrupted_is_confirmed_and_told_and_is_not_made_twice(tmp_path: Path) -> None:
    spec = str(make_spec(tmp_path, name=None, space={"global_batch_size": 8, "epochs": 2}))
    command = ("compare-methods", spec, "--methods", "none,lora:4:nf4", "--fractions", "0.5", "--seeds", "2")
    with (tmp_path / "log.txt").open("wb") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "search.cli", *command], cwd=tmp_path, env=environment(), stdout=log, stderr=log
        )
        begun = tmp_path / "runs/spec-methods/ledger.jsonl"
        wait_for(lambda: begun.exists() and b"trial_finished" in begun.read_bytes(), running)
        running.send_signal(signal.SIGINT)
        assert running.wait(120) == 130
    assert f"`paretune {shlex.join(command)}` goes on" in (tmp_path / "log.txt").read_text()
    first = paretune(*command, cwd=tmp_path)
    assert "of the rows: " in first.stdout
    assert "2 further seeds, on the test rows" in first.stdout
    report = tmp_path / "runs/spec-methods/report"
    assert len((report / "methods.csv").read_text().splitlines()) == 1 + 2
    assert (report / "methods.png").stat().st_size > 10_000
    assert "Which method is the best for how much data?" in (report / "report.html").read_text()
    assert {"methods.csv", "methods.png"} <= {path.name for path in (tmp_path / "runs/artifacts").rglob("report/*")}
    ledger = report.parent / "ledger.jsonl"
    events = [event["event"] for event in Ledger(ledger).events()]
    num_trained = events.count("trial_started")
    assert num_trained >= 2 * 3, "further rates where the best of three is an end"
    assert (num_trained > 2 * 3) == (events.count("search_finished") > 1)
    assert events.count("confirmed") == 2 * 2
    again = paretune(*command, "--json", cwd=tmp_path)
    assert [event["event"] for event in Ledger(ledger).events()] == events
    rows = json.loads(again.stdout)
    more = ("--methods", "bottleneck:4", "--fractions", "1", "--seeds", "2", "--json")
    grown = json.loads(paretune("compare-methods", spec, *more, cwd=tmp_path).stdout)
    assert [{**row, "verdict": None} for row in grown[: len(rows)]] == [{**row, "verdict": None} for row in rows]
    assert [(row["fraction"], row["method"], row["num_seeds"]) for row in grown[len(rows) :]] == [(1.0, "bottleneck 4", 2)]
    later = Ledger(ledger).events()[len(events) :]
    assert {event["params"]["adapter"] for event in later if event["event"] == "trial_started"} == {"bottleneck"}
    assert {event["number"] for event in later if event["event"] == "confirmed"} == {grown[-1]["trial"]}
    assert {row["method"] for row in rows} == {"full", "lora 4 nf4"}
    assert all(row["num_seeds"] == 2 and row["split"] == "test" for row in rows)
    assert sum(row["verdict"] == "best" for row in rows) == 1
    for row in rows:
        usual = usual_rate({"full": "none"}.get(row["method"], row["method"].split()[0]), SIZES["hidden_size"])
        assert not row["is_rate_at_edge"] or row["learning_rate"] / usual in (LADDER[0], LADDER[-1])


def test_what_is_no_method_starts_nothing(tmp_path: Path) -> None:
    refused = paretune("compare-methods", str(make_spec(tmp_path)), "--methods", "lorra", cwd=tmp_path, check=2)
    assert "'lorra' is no method" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()
