"""A real search that stops a trial: what becomes of it, of its files, and of the workers that trained it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import paretune
from tiny import make_spec

# Rates and ranks such that the verdicts hang on no clock: trial 1 learns next to nothing and computes most, trial 2 computes least.
POINTS = [
    {"learning_rate": 1.0e-2, "lora_rank": 4},
    {"learning_rate": 1.0e-7, "lora_rank": 8},
    {"learning_rate": 1.0e-2, "lora_rank": 2},
]


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("early-stopping")
    spec = make_spec(
        directory,
        space={
            "adapter": "lora",
            "learning_rate": {"log_uniform": [1.0e-7, 1.0e-1]},
            "lora_rank": {"choice": [2, 4, 8]},
            "global_batch_size": 8,
            "dataset_fraction": 1.0,
            "epochs": 4,
        },
        objectives=[{"metric": "flops_per_step", "reference": 1.0e12}, {"metric": "accuracy"}],
        sampler={"points_to_evaluate": POINTS},
        scheduler={"grace_period": 0.25, "reduction_factor": 2},
        budget={"trials": 3},
        resources={"workers": 1},
    )
    done = paretune("search", str(spec), "--json", cwd=directory)
    (directory / "front.json").write_text(done.stdout)
    (directory / "stderr.txt").write_text(done.stderr)
    return directory


def test_a_dominated_trial_is_stopped_at_its_rung_and_the_workers_go_on_with_the_next(search: Path) -> None:
    from search.ledger import Ledger, replay

    events = Ledger(search / "runs/tiny/ledger.jsonl").events()
    records = replay(events).records
    assert [r.state.value for r in records.values()] == ["COMPLETE", "PRUNED", "COMPLETE"], (search / "stderr.txt").read_text()
    assert records[1].stopped is not None
    assert (records[1].stopped["share"], records[1].stopped["front"]) == (0.25, 2)
    assert len(records[1].reports) == 1
    for number, num_reports in ((0, 3), (2, 3)):
        assert [r["step"] / r["num_steps"] for r in records[number].reports] == [0.25, 0.5, 1.0][:num_reports]
        assert records[number].attempts == 1, "its workers had to be started again"
    ended = [e["number"] for e in events if e["event"] == "trial_finished"]
    assert ended == [0, 1, 2]


def test_what_was_stopped_is_said_and_never_on_the_front(search: Path) -> None:
    front = json.loads((search / "front.json").read_text())
    assert front["trials"] == {"RUNNING": 0, "COMPLETE": 2, "PRUNED": 1, "FAIL": 0}
    assert 1 not in [m["number"] for m in front["front"]]
    assert "trial 0001 PRUNED    stopped at 25% of its steps, place 2 of 2 where 1 may go on" in (search / "stderr.txt").read_text()
    report = (search / "runs/tiny/report/report.html").read_text()
    assert "1 at 25% of their steps" in report

    import mlflow
    import optuna

    client = mlflow.MlflowClient(f"sqlite:///{search}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("paretune")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`paretune.trial` = '1'")
    assert run.info.status == "KILLED"
    assert run.data.tags["paretune.stopped"].startswith("stopped at 25%")
    trials = optuna.load_study(storage=f"sqlite:///{search}/runs/tiny/study.db", study_name="tiny").trials
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "COMPLETE"]


def test_it_leaves_no_file_and_neither_process_nor_warning(search: Path) -> None:
    left = {p.parent.name for p in (search / "runs/tiny/trials").glob("*/*")}
    assert "0001" not in left
    assert "Traceback" not in (search / "stderr.txt").read_text()
