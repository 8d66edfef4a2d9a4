"""What a relay of a trial holds of the cluster."""

from __future__ import annotations

import pickle
import threading

import pytest

from search import tuner
from search.cluster import RELAY_RESOURCE

HEAD = "node:__internal_head__"


@pytest.mark.parametrize("num_relays", [1, 2, 3, 7, 11, 64, 99])
def test_on_our_own_cluster_as_many_relays_fit_as_are_to_run_and_the_head_is_left_to_ray_train(
    num_relays: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train starts something on the head for every worker group: with the head taken by relays, no group could end."""
    monkeypatch.setattr(tuner.ray, "cluster_resources", lambda: {HEAD: 1.0, RELAY_RESOURCE: 1.0})
    (bundle,) = tuner.relay_resources(num_relays).bundles
    assert num_relays * bundle[RELAY_RESOURCE] <= 1 < (num_relays + 1) * bundle[RELAY_RESOURCE]
    assert (num_relays + 1) * bundle[HEAD] <= 0.101


def test_on_a_cluster_that_was_there_before_nothing_is_asked_that_it_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner.ray, "cluster_resources", lambda: {HEAD: 1.0, "CPU": 8.0})
    assert tuner.relay_resources(5).bundles == [{HEAD: 0.001}]


def test_tune_may_pickle_what_ends_its_loop_whatever_that_asks() -> None:
    lock = threading.Lock()
    leave = tuner._Leave(lock.locked)
    pickle.dumps(leave)
    assert not leave.stop_all()
    lock.acquire()
    assert leave.stop_all()
