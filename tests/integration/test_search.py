"""The whole of it on a tiny model: `paretune search` as a user runs it, and what it leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from command import environment, paretune
from tiny import make_spec
from waiting import wait_for

BIN = Path(sys.executable).parent


def shows_mlflow(url: str) -> bool:
    try:
        return b"MLflow" in urlopen(url, timeout=5).read()
    except OSError:
        return False


# What every process of this module's search has in its environment, and none of another one's.
MARK = "PARETUNE_TESTED_AS"


def marked_processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                found.append(process)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of four trials over both world sizes and both strategies, run to its end."""
    directory = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(MARK, str(directory))
        done = paretune("search", str(make_spec(directory)), "--json", cwd=directory)
    (directory / "front.json").write_text(done.stdout)
    (directory / "stderr.txt").write_text(done.stderr)
    # Ray's agents end some seconds after the process that they served.
    _, left = psutil.wait_procs(marked_processes(str(directory)), timeout=30)
    assert not left, f"processes left behind: {left}"
    return directory


def test_the_search_finds_a_front_and_says_how_to_reproduce_it(finished: Path) -> None:
    front = json.loads((finished / "front.json").read_text())
    assert front["trials"]["COMPLETE"] == 4
    assert front["front"]
    assert front["hypervolume"] > 0
    for member in front["front"]:
        assert 0 <= member["metrics"]["accuracy"] <= 1
        assert member["metrics"]["train_seconds"] > 0
        assert 0 < member["metrics"]["mfu"] < 1
        assert "accuracy" in member["test"]
        assert member["command"].startswith("paretune search ")


def test_every_trial_says_what_it_measured_and_where_it_ran(finished: Path) -> None:
    from search.ledger import Ledger, replay

    state = replay(Ledger(finished / "runs/tiny/ledger.jsonl").events())
    assert state.finished
    assert state.reference
    assert 0 <= state.reference["accuracy"] <= 1
    for record in state.records.values():
        assert record.config is not None
        assert [r["fidelity"] for r in record.reports] == sorted(r["fidelity"] for r in record.reports)
        assert record.reports[-1]["final"]
        assert len(record.details["process_map"]) == record.config["layout"]["world_size"]
        assert {"peak_source", "mfu_convention"} <= set(record.details)
        share = record.details["distinct_rows"] / record.details["train_rows"]
        assert share == pytest.approx(record.config["recipe"]["dataset_fraction"], abs=0.02)


def test_the_same_front_comes_from_the_ledger_and_from_mlflow_alone(finished: Path) -> None:
    here = json.loads(paretune("front", "tiny", "--directory", "runs", "--json", cwd=finished).stdout)
    uri = f"sqlite:///{finished}/runs/mlflow.db"
    there = json.loads(paretune("front", "tiny", "--tracking-uri", uri, "--json", cwd=finished).stdout)
    command = there["front"][0]["command"]
    fetch, _, again = command.partition(" && ")
    subprocess.run(fetch, shell=True, check=True, cwd=finished, env={**environment(), "PATH": f"{BIN}:{os.environ['PATH']}"})
    paretune("validate", *shlex.split(again)[2:], cwd=finished)
    report = (finished / "runs/tiny/report/report.html").read_bytes()
    paretune("report", "tiny", "--tracking-uri", uri, cwd=finished)
    assert (finished / "tiny-report/report.html").exists()
    assert (finished / "runs/tiny/report/report.html").read_bytes() == report
    assert [m["number"] for m in here["front"]] == [m["number"] for m in there["front"]]
    assert here["hypervolume"] == pytest.approx(there["hypervolume"])
    assert here["scaling"] == there["scaling"] != []


def test_pick_obeys_its_limits_and_says_so_when_nothing_does(finished: Path) -> None:
    members = json.loads((finished / "front.json").read_text())["front"]
    fastest = min(m["metrics"]["train_seconds"] for m in members)
    picked = paretune("pick", "tiny", "--directory", "runs", "--max-time", str(fastest), "--json", cwd=finished)
    assert json.loads(picked.stdout)["metrics"]["train_seconds"] == fastest
    paretune("pick", "tiny", "--directory", "runs", "--knee", cwd=finished)
    nothing = paretune("pick", "tiny", "--directory", "runs", "--max-time", "0", cwd=finished, check=2)
    assert "train_seconds <= 0" in nothing.stderr
    assert "the front has train_seconds from" in nothing.stderr
    paretune("pick", "tiny", "--directory", "runs", "--min-accuracy", "45", cwd=finished, check=2)


def test_the_report_is_one_file_that_works_offline(finished: Path) -> None:
    paretune("report", "tiny", "--directory", "runs", cwd=finished)
    html = next((finished / "runs/tiny/report").glob("*.html")).read_text()
    assert "<table" in html
    assert 'src="http' not in html


def test_a_search_of_the_same_name_is_refused_and_loses_nothing(finished: Path) -> None:
    before = (finished / "runs/tiny/ledger.jsonl").read_bytes()
    refused = paretune("search", str(finished / "spec.yaml"), cwd=finished, check=2)
    assert "paretune resume tiny" in refused.stderr
    assert (finished / "runs/tiny/ledger.jsonl").read_bytes() == before


def test_the_interface_opens_on_the_searches_and_ends_with_all_that_it_started(finished: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "search.cli", "ui", "--directory", "runs", "--port", str(port)]
    env = environment()
    log = (finished / "ui.log").open("wb")
    server = subprocess.Popen(command, cwd=finished, env=env, stdout=log, stderr=log)
    try:
        wait_for(lambda: shows_mlflow(f"http://127.0.0.1:{port}/"), server)
        busy = paretune("ui", "--directory", "runs", "--port", str(port), cwd=finished, check=2)
        assert f"--port {port}: Address already in use" in busy.stderr
        started = psutil.Process(server.pid).children(recursive=True)
        assert started
    finally:
        server.terminate()
    assert server.wait(30) == 0
    _, left = psutil.wait_procs(started, timeout=20)
    assert not left
    none = paretune("ui", "--directory", "nowhere", cwd=finished, check=2)
    assert "there is no tracking database" in none.stderr
