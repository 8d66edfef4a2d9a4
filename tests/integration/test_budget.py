"""A budget that is used up while trials train."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import paretune
from tiny import make_spec

from search.budget import used
from search.ledger import Ledger, replay
from search.record import TrialState
from spaces.loading import load_spec

pytestmark = pytest.mark.slow


def test_what_trains_when_the_device_hours_are_used_up_is_stopped_and_said(tmp_path: Path) -> None:
    space = {
        "learning_rate": 1.0e-3,
        "global_batch_size": 8,
        "dataset_fraction": 1.0,
        "epochs": 1000,
        "lora_rank": {"choice": [2, 4]},
    }
    spec = make_spec(tmp_path, space=space, resources={"workers": 2, "price_per_device_hour": 3600.0})
    done = paretune("search", str(spec), "--budget", "1usd", cwd=tmp_path, check=4)
    state = replay(Ledger(tmp_path / "runs/tiny/ledger.jsonl").events())
    assert {record.state for record in state.records.values()} == {TrialState.PRUNED}
    assert "search ended (1.00 dollars used up)" in done.stderr
    assert state.finished
    assert used(load_spec(tmp_path / "runs/tiny/spec.yaml").spec, state).as_dict()["dollars"] >= 1.0
