"""A real search that stops a trial: what becomes of it, of its files, and of the workers that trained it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import paretune
from tiny import make_spec

from search.ledger import Ledger, replay

# Fair, hopeless, good: all compute the same, so that the verdicts hang on what was learned and on no clock.
POINTS = [{"learning_rate": 1.0e-3}, {"learning_rate": 1.0e-7}, {"learning_rate": 3.0e-3}]


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("early-stopping")
    spec = make_spec(
        directory,
        space={
            "adapter": "none",
            "learning_rate": {"log_uniform": [1.0e-7, 1.0e-1]},
            "global_batch_size": 8,
            "dataset_fraction": 1.0,
            "epochs": 4,
        },
        objectives=[{"metric": "eval_loss"}, {"metric": "flops_per_step", "reference": 1.0e12}],
        sampler={"points_to_evaluate": POINTS},
        scheduler={"method": "asha", "grace_period": 0.25, "reduction_factor": 2},
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
    fair, hopeless, good = replay(events).records.values()
    assert [r.state.value for r in (fair, hopeless, good)] == ["COMPLETE", "PRUNED", "COMPLETE"], (search / "stderr.txt").read_text()
    assert hopeless.stopped is not None
    assert (hopeless.stopped["share"], hopeless.stopped["front"], hopeless.stopped["num_fronts"]) == (0.25, 2, 2)
    assert len(hopeless.reports) == 1
    assert [e["verdict"]["place"] for e in events if e["event"] == "trial_reported" and "verdict" in e and e["number"] == 2] == [1, 1]
    for record in (fair, good):
        assert [(r["step"], r["num_steps"]) for r in record.reports] == [(27, 108), (54, 108), (108, 108)]
        assert record.attempts == 1, "its workers had to be started again"
    assert [e["number"] for e in events if e["event"] == "trial_finished"] == [0, 1, 2]


def test_what_was_stopped_is_said_and_never_on_the_front(search: Path) -> None:
    front = json.loads((search / "front.json").read_text())
    assert front["trials"] == {"RUNNING": 0, "COMPLETE": 2, "PRUNED": 1, "FAIL": 0}
    assert [m["number"] for m in front["front"]] == [2]
    assert "trial 0001 PRUNED    stopped at 25% of its steps, place 2 of 2 where 1 may go on" in (search / "stderr.txt").read_text()
    report = (search / "runs/tiny/report/report.html").read_text()
    assert "1 at 25% of their steps" in report

    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{search}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("paretune")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`paretune.trial` = '1'")
    assert run.info.status == "KILLED"
    assert run.data.tags["paretune.stopped"].startswith("stopped at 25%")
    states = [record.state.name for record in replay(Ledger(search / "runs/tiny/ledger.jsonl").events()).records.values()]
    assert states == ["COMPLETE", "PRUNED", "COMPLETE"]


def test_it_leaves_neither_a_file_nor_a_traceback(search: Path) -> None:
    left = [str(p.relative_to(search / "runs/tiny/trials")) for p in (search / "runs/tiny/trials").glob("*/*")]
    assert left == ["0002/final"]
    assert "Traceback" not in (search / "stderr.txt").read_text()
