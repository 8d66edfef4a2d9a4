"""`paretune confirm` as a user runs it: further seeds, an interruption, and what the front then says."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment, paretune
from tiny import make_spec
from waiting import wait_for

from search.ledger import Ledger, replay

pytestmark = pytest.mark.slow

SPACE = {
    "adapter": "none",
    "learning_rate": {"log_uniform": [1.0e-3, 1.0e-2]},
    "global_batch_size": 8,
    "dataset_fraction": {"uniform": [0.2, 1.0]},
    "world_size": {"choice": [1, 2]},
    "epochs": 4,
    "strategy": "ddp",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("confirm")
    paretune("search", str(make_spec(directory, space=SPACE, budget={"trials": 3})), cwd=directory)
    return directory


def confirmations(directory: Path) -> list[tuple[int, int]]:
    events = Ledger(directory / "runs/tiny/ledger.jsonl").events()
    return [(e["number"], e["seed"]) for e in events if e["event"] == "confirmed"]


def test_what_cannot_be_confirmed_starts_nothing(finished: Path) -> None:
    before = (finished / "runs/tiny/ledger.jsonl").read_bytes()
    for options, line in (
        (["--seeds", "0"], "--seeds 0: at least one further seed"),
        (["--trials", "17"], "; the front: "),
    ):
        refused = paretune("confirm", "tiny", "--directory", "runs", *options, cwd=finished, check=2)
        assert line in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    refused = paretune("confirm", "tini", "--directory", "runs", cwd=finished, check=2)
    assert "no search named 'tini'" in refused.stderr
    assert "there are: tiny" in refused.stderr
    assert (finished / "runs/tiny/ledger.jsonl").read_bytes() == before


def test_an_interrupted_confirmation_goes_on_and_the_front_names_its_uncertainty(finished: Path) -> None:
    members = [
        m["number"] for m in json.loads(paretune("front", "tiny", "--directory", "runs", "--json", cwd=finished).stdout)["front"]
    ]
    num_seeds = 3
    command = [sys.executable, "-m", "search.cli", "confirm", "tiny", "--directory", "runs", "--seeds", str(num_seeds)]
    with (finished / "confirm.log").open("wb") as log:
        running = subprocess.Popen(command, cwd=finished, env=environment(), stdout=log, stderr=log)
        wait_for(lambda: bool(confirmations(finished)), running)
        running.send_signal(signal.SIGINT)
        assert running.wait(120) == 130
    log_text = (finished / "confirm.log").read_text()
    assert "scored on the 30 test rows" in log_text
    assert f"`paretune confirm tiny --seeds {num_seeds} --directory runs` goes on" in log_text
    done_before = len(confirmations(finished))
    assert done_before < len(members) * num_seeds
    done = paretune("confirm", "tiny", "--directory", "runs", "--seeds", str(num_seeds), "--json", cwd=finished)
    told = confirmations(finished)
    assert sorted(told) == [(number, seed) for number in sorted(members) for seed in range(1, num_seeds + 1)], "each once"
    again = paretune("confirm", "tiny", "--directory", "runs", "--seeds", str(num_seeds), "--json", cwd=finished)
    assert "confirmed already" in again.stderr
    assert confirmations(finished) == told

    here = json.loads(done.stdout)
    assert [m["number"] for m in here["front"]] == members
    state = replay(Ledger(finished / "runs/tiny/ledger.jsonl").events())
    for member in here["front"]:
        record = state.records[member["number"]]
        known = member["confirmed"]["accuracy"]
        assert (known["split"], known["num_seeds"]) == ("test", num_seeds)
        assert known["mean"] == pytest.approx(sum(c.test["accuracy"] for c in record.confirmations) / num_seeds)
        assert member["confirmed"]["train_seconds"]["mean"] > 0
        assert member["metrics"] == record.values
    assert list((finished / "runs/tiny/confirmations").iterdir()) == []
    uri = f"sqlite:///{finished}/runs/mlflow.db"
    there = json.loads(paretune("front", "tiny", "--tracking-uri", uri, "--json", cwd=finished).stdout)
    assert [m["confirmed"] for m in there["front"]] == [m["confirmed"] for m in here["front"]]
    picked = paretune("pick", "tiny", "--directory", "runs", cwd=finished).stdout
    assert "confirmed with further seeds" in picked
    assert f"(test, {num_seeds} seeds)" in picked
