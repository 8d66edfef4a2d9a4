from __future__ import annotations

import json

import pytest

from search.record import TrialRecord, TrialState


def record(**fields: object) -> TrialRecord:
    return TrialRecord(**{"number": 3, "state": TrialState.COMPLETE, "params": {"learning_rate": 1e-3}, **fields})


def test_a_record_survives_json() -> None:
    before = record(
        config={"recipe": {"epochs": 1.0}, "layout": {"world_size": 2}},
        values={"accuracy": 0.8},
        reports=({"step": 1, "metrics": {"accuracy": 0.5}},),
        constraints={"memory": -1.0},
        error={"kind": "diverged", "message": "loss is nan"},
        attempts=2,
        started_at=1.5,
        finished_at=2.5,
        details={"peak_source": "gemm"},
        test={"accuracy": 0.79},
    )
    assert TrialRecord.from_dict(json.loads(json.dumps(before.to_dict()))) == before


def test_a_record_without_reports_and_details_can_be_read() -> None:
    data = record(values={"accuracy": 0.8}).to_dict()
    del data["reports"], data["details"]
    assert TrialRecord.from_dict(data) == record(values={"accuracy": 0.8})


@pytest.mark.parametrize("data", [{}, {"number": 1, "state": "LOST", "params": {}}, {"number": 1, "state": "FAIL"}])
def test_other_data_are_refused(data: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        TrialRecord.from_dict(data)


def test_zero_is_feasible_and_launched_trials_stay_launched() -> None:
    assert record(constraints={"memory": 0.0}).feasible
    never_launched = record(constraints={"memory": -1.0, "world_size_within_cluster": 1.0})
    assert not never_launched.feasible
    assert not never_launched.feasible_before_launch
    out_of_memory = record(constraints={"memory": 1.0}, started_at=5.0)
    assert not out_of_memory.feasible
    assert out_of_memory.feasible_before_launch


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, ""),
        ({"time_drift": 0.1, "rank_spread": 0.2}, ""),
        ({"time_drift": 0.4}, "its pace changed by 40% while it trained"),
        (
            {"time_drift": 0.4, "rank_spread": 1.5},
            "its pace changed by 40% while it trained and its slowest rank was 150% behind the fastest",
        ),
    ],
)
def test_a_noisy_trial_says_why(values: dict[str, float], words: str) -> None:
    assert record(values=values).noise == words


def test_a_trial_that_took_longer_than_its_profile_says_is_noisy() -> None:
    measured = {"train_seconds": 15.0}
    late = record(values=measured, predicted={"train_seconds": 10.0, "time_source": "profile"})
    assert late.noise == "it took 50% longer than its step profile says"
    assert not record(values=measured, predicted={"train_seconds": 10.0, "time_source": "estimate"}).noise, "assumed"
    assert not record(values=measured, predicted={"train_seconds": 14.0, "time_source": "profile"}).noise
    assert not record(predicted={"train_seconds": 14.0, "time_source": "profile"}).noise
