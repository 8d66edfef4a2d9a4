"""How many workers a cluster holds."""

from __future__ import annotations

import pytest

from search import cluster
from spaces.spec import ResourcesSpec

NODES = [
    {"Alive": True, "Resources": {"CPU": 8.0}},  # a head without GPUs
    {"Alive": True, "Resources": {"CPU": 60.0, "GPU": 8.0}},
    {"Alive": True, "Resources": {"CPU": 11.0, "GPU": 8.0}},
    {"Alive": False, "Resources": {"CPU": 60.0, "GPU": 8.0}},
]


@pytest.mark.parametrize("workers", [None, 7])
@pytest.mark.parametrize("is_submitted", [False, True])
def test_a_worker_has_all_that_it_takes_on_one_node(monkeypatch: pytest.MonkeyPatch, is_submitted: bool, workers: int | None) -> None:
    monkeypatch.setattr("ray.nodes", lambda: NODES)
    monkeypatch.setattr(cluster, "is_submitted", lambda: is_submitted)
    resources = ResourcesSpec(gpus_per_worker=1, cpus_per_worker=8, workers=workers)
    assert cluster._capacity(resources) == (workers or 7 + 1), "9 by the sums of the CPUs and GPUs"


@pytest.mark.parametrize(("nodes", "there"), [([], 0), (NODES, 8)])
def test_what_the_user_says_counts_where_an_autoscaler_may_start_nodes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], nodes: list[dict[str, object]], there: int
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    resources = ResourcesSpec(gpus_per_worker=1, cpus_per_worker=8, workers=16)
    assert cluster._capacity(resources) == there, "a machine of one's own does not grow"
    monkeypatch.setattr(cluster, "is_submitted", lambda: True)
    assert cluster._capacity(resources) == 16
    assert f"room for {there} workers now, resources.workers asks for 16" in capsys.readouterr().err
