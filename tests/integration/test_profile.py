"""`paretune profile` as a user runs it, and the search that then knows how long its trials take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import paretune
from tiny import make_spec


@pytest.mark.slow
def test_a_space_is_profiled_and_a_search_predicts_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from search.ledger import Ledger, replay

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    space = {
        "adapter": "lora",
        "learning_rate": {"log_uniform": [1.0e-3, 1.0e-2]},
        "global_batch_size": 16,
        "lora_rank": {"choice": [2, 4]},
        # Of less there are three batches, and the first, whose memory is not measured, can be much the largest.
        "dataset_fraction": {"uniform": [0.5, 1.0]},
        "strategy": "ddp",
    }
    spec = str(make_spec(tmp_path, space=space, budget={"trials": 2}))
    rows = json.loads(paretune("profile", spec, "--json", cwd=tmp_path).stdout)
    assert [row["adapter_rank"] for row in rows] == [2, 4]
    assert all(row["is_new"] and row["tokens_per_second"] > 0 for row in rows)
    files = list((tmp_path / "cache/paretune/step_profiles").iterdir())
    assert len(files) == 2
    done = paretune("search", spec, cwd=tmp_path)
    records = replay(Ledger(tmp_path / "runs/tiny/ledger.jsonl").events()).records.values()
    assert {record.predicted["time_source"] for record in records} == {"profile"}, "another process did not find what was kept"
    assert "train seconds from a profile: 2 trials, median error" in done.stdout
    assert "tensor bytes from a formula: 2 trials, median error" in done.stdout
    errors = [sum(r.predicted["memory"].values()) / tensors(r.details["memory_by_rank"]) - 1 for r in records]
    assert max(map(abs, errors)) < 0.12


def tensors(ranks: list[dict[str, int]]) -> int:
    return max(rank["weights_bytes"] + rank["optimizer_bytes"] + rank["working_bytes"] for rank in ranks)
