"""A search over adapter, quantised base and strategy together, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import paretune
from synthetic import numbers_on_front
from tiny import make_spec

from search.ledger import Ledger, replay

pytestmark = pytest.mark.slow

POINTS = [
    {"adapter": "none", "world_size": 2, "strategy": "fsdp"},
    {"adapter": "lora", "quantization": "none", "world_size": 1, "strategy": "ddp"},
    {"adapter": "lora", "quantization": "nf4", "world_size": 2, "strategy": "ddp"},
    {"adapter": "dora", "quantization": "nf4", "world_size": 1, "strategy": "ddp"},
    {"adapter": "dora", "quantization": "none", "world_size": 2, "strategy": "fsdp"},
    {"adapter": "bottleneck", "quantization": "int8", "world_size": 1, "strategy": "ddp"},
]


def test_adapter_quantisation_and_strategy_are_knobs_of_one_search(tmp_path: Path) -> None:
    spec = make_spec(
        tmp_path,
        space={
            "adapter": {"choice": ["none", "lora", "dora", "bottleneck"]},
            "quantization": {"choice": ["none", "nf4", "int8"]},
            "strategy": {"choice": ["ddp", "fsdp"]},
            "world_size": {"choice": [1, 2]},
            "global_batch_size": 8,
            "dataset_fraction": 1.0,
            "lora_rank": 4,
        },
        sampler={"points_to_evaluate": POINTS},
        budget={"trials": len(POINTS) + 2},
    )
    done = paretune("search", str(spec), cwd=tmp_path)
    records = list(replay(Ledger(tmp_path / "runs/tiny/ledger.jsonl").events()).records.values())
    ran = [record for record in records if record.feasible_before_launch]
    assert [record.state.value for record in ran] == ["COMPLETE"] * (len(POINTS) + 2)
    trained = {}
    for point, record in zip(POINTS, ran, strict=False):
        recipe, layout = record.trial_config.recipe, record.trial_config.layout
        found = {"adapter": recipe.adapter, "quantization": recipe.quantization}
        found |= {"world_size": layout.world_size, "strategy": layout.strategy}
        assert {name: found[name] for name in point} == point
        trained[recipe.adapter, recipe.quantization] = record
    held = {kind: record.details["memory_by_rank"][0]["weights_bytes"] for kind, record in trained.items()}
    assert held["lora", "nf4"] < held["lora", "none"], "a tiny model is mostly its embedding, which stays"
    (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == ["nf4"])
    assert "MiB" in line
    page = (tmp_path / "runs/tiny/report/report.html").read_text()
    assert "What does a quantised base save, and cost?" in page
    front = json.loads(paretune("front", "tiny", "--directory", "runs", "--json", cwd=tmp_path).stdout)["front"]
    assert {member["number"] for member in front} == numbers_on_front(records)
