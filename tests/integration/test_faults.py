"""Killed drivers and workers: nothing acknowledged is lost, nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import paretune
from tiny import make_rows, make_spec
from waiting import wait_for

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def start(*args: str, cwd: Path) -> subprocess.Popen[bytes]:
    log = (cwd / "driver.log").open("ab")
    return subprocess.Popen([sys.executable, "-m", "search.cli", *args], cwd=cwd, env=ENVIRONMENT, stdout=log, stderr=log)


def events(ledger: Path) -> list[dict]:
    if not ledger.exists():
        return []
    lines = ledger.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def long_spec(directory: Path, **space: object) -> Path:
    """Trials of some seconds, so that a kill lands inside one."""
    base = {
        "learning_rate": {"log_uniform": [1.0e-3, 1.0e-2]},
        "global_batch_size": 4,
        "dataset_fraction": 1.0,
        "epochs": 4,
        "lora_rank": 2,
        "world_size": 1,
    }
    path = make_spec(directory, space={**base, **space}, budget={"trials": 3}, resources={"workers": 2})
    make_rows(directory / "train.csv", num_rows=1500)
    return path


def test_resume_after_kill_9_of_the_driver_loses_and_repeats_no_trial(tmp_path: Path) -> None:
    spec = long_spec(tmp_path)
    ledger = tmp_path / "runs/tiny/ledger.jsonl"
    driver = start("search", str(spec), cwd=tmp_path)
    wait_for(lambda: sum(e["event"] == "trial_finished" for e in events(ledger)) >= 1, driver)
    wait_for(lambda: events(ledger)[-1]["event"] == "trial_reported", driver)
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    psutil.wait_procs(children, timeout=60)
    before = events(ledger)

    resumed = start("resume", "tiny", "--directory", "runs", cwd=tmp_path)
    assert resumed.wait(400) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    after = events(ledger)
    assert after[: len(before)] == before
    finished = [e["number"] for e in after if e["event"] == "trial_finished"]
    assert len(finished) == len(set(finished)) == 3
    started = [e["number"] for e in after if e["event"] == "trial_started"]
    assert sorted(started) == sorted(finished), "a trial was lost or proposed twice"

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("paretune")
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    trials = [r for r in runs if r.data.tags.get("kind") == "trial"]
    assert [p.info.status for p in parents] == ["FINISHED"]
    assert sorted(t.info.status for t in trials) == ["FINISHED"] * 3


def test_an_interrupted_search_saves_what_is_in_flight_and_goes_on_from_there(tmp_path: Path) -> None:
    spec = long_spec(tmp_path)
    ledger = tmp_path / "runs/tiny/ledger.jsonl"
    driver = start("search", str(spec), cwd=tmp_path)
    wait_for(lambda: any(e["event"] == "trial_reported" for e in events(ledger)), driver)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(120) == 130
    log = (tmp_path / "driver.log").read_text()
    assert "`paretune resume tiny --directory runs` goes on" in log
    before = events(ledger)
    assert before[-1]["event"] == "search_cut_short"
    assert any(seconds > 0 for seconds in before[-1]["held_seconds"].values())
    in_flight = {e["number"] for e in before if e["event"] == "trial_started"}
    in_flight -= {e["number"] for e in before if e["event"] == "trial_finished"}
    saved = {n: max(_saved_steps(tmp_path / f"runs/tiny/trials/{n:04d}"), default=0) for n in in_flight}
    rungs = {e["report"]["step"] for e in before if e["event"] == "trial_reported"}
    assert set(saved.values()) - rungs - {0}, f"nothing was saved at the signal: {saved}, rungs {rungs}"
    assert _parent(tmp_path).info.status == "KILLED"

    resumed = start("resume", "tiny", "--directory", "runs", cwd=tmp_path)
    assert resumed.wait(400) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    after = events(ledger)
    assert after[: len(before)] == before
    again = [e for e in after[len(before) :] if e["event"] == "trial_reported" and e["number"] in saved]
    assert all(e["report"]["step"] > saved[e["number"]] for e in again), "a trial began again"
    assert [e["state"] for e in after if e["event"] == "trial_finished"] == ["COMPLETE"] * 3
    assert _parent(tmp_path).info.status == "FINISHED"


def _saved_steps(trial: Path) -> list[int]:
    return [int(path.name.rsplit("-", 1)[-1]) for path in trial.glob("step-*")]


def _parent(directory: Path) -> Any:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{directory}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("paretune")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.kind = 'search'")
    return parent


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_worker_costs_only_steps_and_the_weights_are_those_of_an_undisturbed_run(tmp_path: Path, strategy: str) -> None:
    weights = {}
    for name in ("undisturbed", "killed"):
        directory = tmp_path / name
        spec = long_spec(directory, learning_rate=3.0e-3, world_size=2, strategy=strategy, epochs=2)
        ledger = directory / "runs/tiny/ledger.jsonl"
        driver = start("search", str(spec), "--set", "budget.trials=1", cwd=directory)
        if name == "killed":
            trials = directory / "runs/tiny/trials"
            wait_for(lambda trials=trials: any(trials.glob("*/step-*")), driver)
            victim = _actors(driver.pid, "RayTrainWorker")[-1]
            victim.send_signal(signal.SIGKILL)
        assert driver.wait(400) == 0, (directory / "driver.log").read_text()[-3000:]
        (finish,) = [e for e in events(ledger) if e["event"] == "trial_finished"]
        assert finish["state"] == "COMPLETE"
        assert finish["attempts"] == (2 if name == "killed" else 1)
        (file,) = (directory / "runs/tiny/trials").glob("*/final/weights.safetensors")
        weights[name] = file.read_bytes()
    assert weights["killed"] == weights["undisturbed"]


def test_a_killed_controller_gives_its_workers_back(tmp_path: Path) -> None:
    spec = long_spec(tmp_path, world_size=2, epochs=2)
    ledger = tmp_path / "runs/tiny/ledger.jsonl"
    driver = start("search", str(spec), "--set", "budget.trials=1", cwd=tmp_path)
    wait_for(lambda: any(e["event"] == "trial_reported" for e in events(ledger)), driver)
    (victim,) = _actors(driver.pid, "TrainController")
    victim.send_signal(signal.SIGKILL)
    assert driver.wait(400) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    (finish,) = [e for e in events(ledger) if e["event"] == "trial_finished"]
    # Both workers of the machine were taken: nothing could have gone on without them.
    assert (finish["state"], finish["attempts"]) == ("COMPLETE", 2)


def _actors(driver: int, name: str) -> list[psutil.Process]:
    """The actors of a class below a driver, by the title that Ray gives their processes."""
    children = psutil.Process(driver).children(recursive=True)
    return [c for c in children if any(name in part for part in c.cmdline())]


def test_why_no_worker_can_begin_is_told_and_the_search_ends(tmp_path: Path) -> None:
    """The driver reads the model's configuration alone; a file that was not copied whole shows where workers load it."""
    spec = make_spec(tmp_path)
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    refused = paretune("search", str(spec), cwd=tmp_path, check=4, timeout=200)
    assert "error: the workers' device cannot be examined: device of tiny/device failed: SafetensorError: " in refused.stderr
    assert "Traceback" not in refused.stderr
