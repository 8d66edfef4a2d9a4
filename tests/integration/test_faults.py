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
    make_rows(directory / "train.csv", num_rows=1200)
    return path


def test_a_search_that_is_interrupted_and_then_killed_loses_and_repeats_no_trial(tmp_path: Path) -> None:
    spec = long_spec(tmp_path)
    ledger = tmp_path / "runs/tiny/ledger.jsonl"
    driver = start("search", str(spec), cwd=tmp_path)
    wait_for(lambda: any(e["event"] == "trial_reported" for e in events(ledger)), driver)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(120) == 130
    log = (tmp_path / "driver.log").read_text()
    assert "`paretune resume tiny --directory runs` goes on" in log
    interrupted = events(ledger)
    assert interrupted[-1]["event"] == "search_cut_short"
    assert any(seconds > 0 for seconds in interrupted[-1]["held_seconds"].values())
    in_flight = {e["number"] for e in interrupted if e["event"] == "trial_started"}
    in_flight -= {e["number"] for e in interrupted if e["event"] == "trial_finished"}
    saved = {n: max(_saved_steps(tmp_path / f"runs/tiny/trials/{n:04d}"), default=0) for n in in_flight}
    rungs = {e["report"]["step"] for e in interrupted if e["event"] == "trial_reported"}
    assert set(saved.values()) - rungs - {0}, f"nothing was saved at the signal: {saved}, rungs {rungs}"
    assert _parent(tmp_path).info.status == "KILLED"

    driver = start("resume", "tiny", "--directory", "runs", cwd=tmp_path)
    wait_for(lambda: sum(e["event"] == "trial_finished" for e in events(ledger)) >= 1, driver)
    wait_for(lambda: events(ledger)[-1]["event"] == "trial_reported", driver)
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    psutil.wait_procs(children, timeout=60)
    killed = events(ledger)
    assert killed[: len(interrupted)] == interrupted
    again = [e for e in killed[len(interrupted) :] if e["event"] == "trial_reported" and e["number"] in saved]
    assert again
    # What was saved at a rung is reported there once more: the report may not have come through.
    assert all(e["report"]["step"] >= saved[e["number"]] for e in again), "a trial began again"

    resumed = start("resume", "tiny", "--directory", "runs", cwd=tmp_path)
    assert resumed.wait(400) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    after = events(ledger)
    assert after[: len(killed)] == killed
    finished = [e["number"] for e in after if e["event"] == "trial_finished"]
    assert len(finished) == len(set(finished)) == 3
    assert [e["state"] for e in after if e["event"] == "trial_finished"] == ["COMPLETE"] * 3
    started = [e["number"] for e in after if e["event"] == "trial_started"]
    assert sorted(started) == sorted(finished), "a trial was lost or proposed twice"
    assert _parent(tmp_path).info.status == "FINISHED"
    assert sorted(run.info.status for run in _runs(tmp_path, "tags.kind = 'trial'")) == ["FINISHED"] * 3


def _saved_steps(trial: Path) -> list[int]:
    return [int(path.name.rsplit("-", 1)[-1]) for path in trial.glob("step-*")]


def _parent(directory: Path) -> Any:
    (parent,) = (run for run in _runs(directory, "") if "mlflow.parentRunId" not in run.data.tags)
    return parent


def _runs(directory: Path, filter_string: str) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{directory}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("paretune")
    return list(client.search_runs([experiment.experiment_id], filter_string))


@pytest.mark.parametrize(("strategy", "victims"), [("ddp", ["RayTrainWorker", "TrainController"]), ("fsdp", ["RayTrainWorker"])])
def test_a_killed_process_costs_only_steps_and_the_weights_are_those_of_an_undisturbed_trial(
    tmp_path: Path, strategy: str, victims: list[str]
) -> None:
    """Trials of one recipe one after the other, for each takes both workers; of all but the first a process is killed.

    What they learn and cost is the same, so that the front has all of them, and the weights of all are kept.
    """
    spec = long_spec(tmp_path, adapter="lora", learning_rate=3.0e-3, world_size=2, strategy=strategy, epochs=2)
    same = ["reuse=false", "objectives=[{metric: eval_loss}, {metric: flops_per_step}]", f"budget.trials={1 + len(victims)}"]
    driver = start("search", str(spec), *(part for setting in same for part in ("--set", setting)), cwd=tmp_path)
    trials = tmp_path / "runs/tiny/trials"
    for number, name in enumerate(victims, start=1):
        wait_for(lambda number=number: any((trials / f"{number:04d}").glob("step-*")), driver)
        _actors(driver.pid, name)[-1].send_signal(signal.SIGKILL)
    assert driver.wait(400) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    ends = [e for e in events(tmp_path / "runs/tiny/ledger.jsonl") if e["event"] == "trial_finished"]
    # A killed controller gives its workers back: without them no later attempt could have trained.
    assert [(e["number"], e["state"], e["attempts"]) for e in ends] == [
        (0, "COMPLETE", 1),
        *((number, "COMPLETE", 2) for number in range(1, len(ends))),
    ]
    assert len(ends) == 1 + len(victims)
    assert len({e["values"]["eval_loss"] for e in ends}) == 1
    weights = [(trials / f"{e['number']:04d}/final/weights.safetensors").read_bytes() for e in ends]
    assert all(each == weights[0] for each in weights)


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
