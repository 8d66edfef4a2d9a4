"""What `paretune profile` makes of its measurements: their mean, whether it is noisy, and where it is kept."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny import make_spec

from search import cluster, profiling
from search.profiling import mean_profile, profile_space, render_profiles, timed_configs
from spaces.constraints import Limits
from spaces.loading import load_spec
from spaces.space import SpaceSpec
from spaces.spec import ResourcesSpec
from trainables.job import Job

DEVICE = {
    "type": "cpu",
    "name": "a processor",
    "threads": 1,
    "versions": {},
    "peak_flops_per_second": {},
    "usable_bytes": 2**40,
    "host_bytes": 2**40,
    "workers_per_node": [1, 1],
}


def measured(**changes: Any) -> dict[str, Any]:
    return {
        "compile_seconds": 0.0,
        "fixed_seconds": 0.5,
        "seconds_per_token": 0.01,
        "step_seconds": 1.0,
        "tokens_per_second": 50.0,
        "num_steps": 26,
        "part_seconds": {"forward": 1.0},
        "peak_memory_bytes": 100,
        "time_drift": 0.05,
        "num_nodes": 1,
        **changes,
    }


def test_a_profile_changed_as_much_as_any_of_its_rounds_or_from_one_to_the_other() -> None:
    assert mean_profile([measured(), measured(time_drift=0.1)])["time_drift"] == 0.1
    changed = mean_profile([measured(step_seconds=1.0), measured(step_seconds=1.5)])
    assert changed["time_drift"] == pytest.approx(0.5 / 1.25)
    assert "rank_spread" not in changed
    assert mean_profile([measured(rank_spread=0.2), measured(rank_spread=0.3)])["rank_spread"] == 0.3
    assert mean_profile([measured(), {"error": "no memory"}]) == {"error": "no memory"}


class Workers:
    """Stands for a cluster of two nodes with a worker each; what it measures is set from outside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_jobs = 0
        self.answer: dict[str, Any] = {}
        monkeypatch.setattr(cluster, "connected", lambda resources: nullcontext(2))
        monkeypatch.setattr(profiling, "DispatcherSession", lambda *_: nullcontext())
        monkeypatch.setattr(profiling.Interruption, "following_ray", lambda _: nullcontext())
        monkeypatch.setattr(profiling, "examine", lambda *_: DEVICE)
        monkeypatch.setattr(profiling, "run_job", self.run)

    def run(self, dispatcher: object, job: Job, interruption: object) -> dict[str, Any]:
        self.num_jobs += 1
        return {"profile": self.answer}


def test_a_step_is_timed_with_its_blocks_compiled_too_and_with_both_ends_of_a_range() -> None:
    space = SpaceSpec.model_validate(
        {"compile": {"profile": ["none", "blocks"]}, "lora_rank": {"int": [4, 16]}, "global_batch_size": 16, "world_size": 1}
    )
    configs = list(timed_configs(space, Limits(num_workers=1, hidden_size=64)))
    kinds = [(config.recipe.adapter_rank, config.layout.compile) for config in configs]
    assert sorted(kinds) == [(4, "blocks"), (4, "none"), (16, "blocks"), (16, "none")]


def test_a_noisy_profile_is_named_and_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    space = {"adapter": "lora", "learning_rate": 1.0e-3, "global_batch_size": 8, "lora_rank": 2, "world_size": 2}
    loaded, workers = load_spec(make_spec(tmp_path, space=space)), Workers(monkeypatch)

    def profile(**changes: Any) -> dict[str, Any]:
        workers.num_jobs, workers.answer = 0, measured(**changes)
        (row,) = profile_space(loaded, lambda _: None)
        return row

    noisy = profile(num_nodes=2, rank_spread=0.5)
    assert noisy["noise"] == "its slowest rank was 50% behind the fastest"
    assert "now, NOISY: its slowest rank was 50% behind the fastest" in render_profiles([noisy])
    quiet = profile(num_nodes=2)
    assert (quiet["is_new"], quiet["noise"], workers.num_jobs) == (True, "", 2)
    again = profile(num_nodes=2)
    assert (again["is_new"], workers.num_jobs) == (False, 0)
    table = render_profiles([quiet, again])
    assert "NOISY" not in table
    assert (table.count(" now"), table.count(" before")) == (1, 1)


def test_a_profile_is_kept_for_the_nodes_that_its_ranks_were_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    space = {"adapter": "lora", "learning_rate": 1.0e-3, "global_batch_size": 8, "lora_rank": 2, "world_size": 2}
    loaded, workers = load_spec(make_spec(tmp_path, space=space)), Workers(monkeypatch)
    workers.answer = measured(num_nodes=2)
    monkeypatch.setitem(DEVICE, "workers_per_node", [2, 2])
    for _ in range(2):
        assert profile_space(loaded, lambda _: None)[0]["is_new"], "one node would have held both"
    monkeypatch.setitem(DEVICE, "workers_per_node", [1, 1])
    assert not profile_space(loaded, lambda _: None)[0]["is_new"]


def test_what_a_node_holds_is_counted_by_what_its_workers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "memory": 800.0}},
        {"Alive": True, "Resources": {"CPU": 9.0, "memory": 800.0}},
        {"Alive": True, "Resources": {"CPU": 1.0, "memory": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    resources = ResourcesSpec(gpus_per_worker=0, cpus_per_worker=2)
    known = {"workers_per_node": [4, 2], "host_bytes": 150}
    on_host = cluster.share_of_worker(resources, {"type": "cpu", "process_bytes": 50})
    assert on_host == {**known, "capacity_bytes": 200, "usable_bytes": 150}
    monkeypatch.setattr(cluster, "is_submitted", lambda: True)
    grown = cluster.share_of_worker(resources.model_copy(update={"workers": 15}), {"type": "cpu", "process_bytes": 50})
    assert grown["workers_per_node"] == [4, 2, 4, 4, 4], "an autoscaler's nodes are as the largest"
    on_gpu = cluster.share_of_worker(resources, {"type": "cuda", "memory_bytes": 1000, "process_bytes": 50})
    assert on_gpu == {**known, "capacity_bytes": 1000, "usable_bytes": 920}
