"""The lines of a search without a terminal."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from synthetic import synthetic_events
from tiny import make_spec

from search.console import SearchView, device_text
from search.ledger import TOLD, replay
from spaces.budget import BudgetSpec
from spaces.loading import load_spec
from spaces.spec import SearchSpec

EVENTS = synthetic_events(8)


@pytest.fixture
def spec(tmp_path: Path) -> SearchSpec:
    return load_spec(make_spec(tmp_path)).spec


def test_a_silent_search_says_that_it_goes_on(spec: SearchSpec, capsys: pytest.CaptureFixture[str]) -> None:
    with SearchView(spec, heartbeat_seconds=0.02) as view:
        end = time.monotonic() + 10
        lines = ""
        while "preparing" not in lines and time.monotonic() < end:
            lines += capsys.readouterr().err
        view(EVENTS[0])
        for event, words in (("trial_started", "1 trial waiting for workers"), ("trial_placed", "trial 0000 under way")):
            view(next(e for e in EVENTS if e["event"] == event))
            capsys.readouterr()
            lines = ""
            while words not in lines and time.monotonic() < end:
                lines += capsys.readouterr().err
            assert words in lines
    capsys.readouterr()
    assert capsys.readouterr().err == "", "the heartbeat goes on after the search"


def test_a_search_that_speaks_has_no_heartbeat_and_a_quiet_one_neither(spec: SearchSpec, capsys: pytest.CaptureFixture[str]) -> None:
    with SearchView(spec) as view:
        for event in EVENTS:
            view(event)
    assert "after" not in capsys.readouterr().err
    with SearchView(spec, quiet=True, heartbeat_seconds=0.001) as view:
        time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_a_search_that_goes_on_with_more_trials_does_not_tell_what_was_told(
    spec: SearchSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    view, end = SearchView(spec), EVENTS[-1]["time"]
    for event in EVENTS:
        view(event)
    assert "4 planned" in capsys.readouterr().err
    longer = [
        {"event": "lengthened", "time": end + 1, "num_trials": 99, "num_further": 95, "why": "there is more to find"},
        {"event": "resumed", "time": end + 2, "in_flight": []},
        {**EVENTS[-1], "time": end + 3},
    ]
    for event in [*EVENTS, *longer]:
        view(event)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "95 further trials: there is more to find"
    assert second.startswith("resumed with ")
    assert "99 planned" in third


def test_a_trial_runs_when_it_has_workers_and_goes_on_when_it_has_others(
    spec: SearchSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    view = SearchView(spec)
    started, placed = (next(e for e in EVENTS if e["event"] == f"trial_{what}") for what in ("started", "placed"))
    view(started)
    assert capsys.readouterr().err == ""
    assert [cell for column in view._table().columns[1:2] for cell in column.cells] == ["waiting"]
    view(placed)
    assert capsys.readouterr().err.startswith("trial 0000 RUNNING   ")
    assert [cell for column in view._table().columns[1:2] for cell in column.cells] == ["running"]
    view({**placed, "time": placed["time"] + 1, "attempt": 2})
    assert capsys.readouterr().err == "trial 0000 goes on after its workers were lost, attempt 2\n"
    view({"event": "resumed", "time": placed["time"] + 2, "in_flight": [0]})
    assert view._state.placed == set()
    view({**placed, "time": placed["time"] + 3})
    view({**next(e for e in EVENTS if e["event"] == "trial_finished"), "time": placed["time"] + 4})
    assert view._state.placed == set()


def test_what_was_before_a_search_went_on_is_summed_up(spec: SearchSpec, capsys: pytest.CaptureFixture[str]) -> None:
    view, told = SearchView(spec), EVENTS[: len(EVENTS) // 2]
    for event in told:
        view({**event, TOLD: True})
    assert capsys.readouterr().err == ""
    num_complete = sum(record.state == "COMPLETE" for record in replay(told).records.values())
    view({"event": "resumed", "time": told[-1]["time"] + 1, "in_flight": [3]})
    assert capsys.readouterr().err.startswith(f"resumed with {num_complete} complete, ")


@pytest.mark.parametrize(
    ("name", "peaks", "precisions", "words"),
    [
        ("NVIDIA New", {}, ["fp32", "bf16"], "; no MFU: unknown device NVIDIA New"),
        ("Tesla T4", {"fp32": 8.1e12}, ["fp32", "bf16"], "; no MFU: no bf16 peak known for Tesla T4"),
        ("Tesla T4", {"fp32": 8.1e12}, ["fp32"], ""),
        ("NVIDIA H200", {"fp32": 67e12, "bf16": 1e15}, ["bf16"], ""),
    ],
)
def test_a_device_without_a_peak_says_why_there_is_no_mfu(name: str, peaks: dict, precisions: list[str], words: str) -> None:
    device = {"type": "cuda", "name": name, "usable_bytes": 2**34, "peak_flops_per_second": peaks}
    assert device_text(device, precisions).endswith(f"16.0 GiB{words}")


def test_a_search_says_at_its_begin_that_its_precision_has_no_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = {"type": "cuda", "name": "Tesla T4", "usable_bytes": 2**34, "peak_flops_per_second": {"fp32": 8.1e12}}
    for precision, is_said in (("bf16", True), ("fp32", False)):
        view = SearchView(load_spec(make_spec(tmp_path, space={"precision": precision})).spec)
        view({"event": "device_examined", "time": 0.0, "device": device})
        assert ("no bf16 peak known for Tesla T4" in capsys.readouterr().err) == is_said


@pytest.mark.parametrize("is_from_before", [False, True])
def test_an_infeasible_trial_says_why_and_one_from_before_by_its_constraint(
    spec: SearchSpec, capsys: pytest.CaptureFixture[str], is_from_before: bool
) -> None:
    events = synthetic_events(40)
    event = next(dict(e) for e in events if e["event"] == "trial_infeasible")
    if is_from_before:
        del event["why"]
    with SearchView(spec, heartbeat_seconds=1e6) as view:
        view(event)
    words = "world_size_within_cluster" if is_from_before else "needs 4 workers, and there are 2"
    assert capsys.readouterr().err.strip().endswith(words)


@pytest.mark.parametrize(("number", "is_told"), [(5, False), (6, True)])
def test_scores_on_rows_that_are_trained_are_warned_of(
    spec: SearchSpec, capsys: pytest.CaptureFixture[str], number: int, is_told: bool
) -> None:
    started = next(e for e in EVENTS if e["event"] == "search_started")
    data = {"format": "f", "evaluation_rows": 100, "test_rows": 100, "test_rows_also_in_train": number}
    SearchView(spec)({**started, "data": data})
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:] == ["warning: 6 of 100 test rows are training rows too: scores on them tell what was learned by heart"] * is_told


def test_a_search_that_goes_on_elsewhere_says_that_its_times_do_not_compare(
    spec: SearchSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    event = next(e for e in EVENTS if e["event"] == "device_examined")
    SearchView(spec)({**event, "before": "NVIDIA A100"})
    assert "; it was NVIDIA A100, with whose times and bytes these do not compare" in capsys.readouterr().err
    SearchView(spec)(event)
    assert "it was" not in capsys.readouterr().err


def test_what_is_left_counts_the_layouts_that_are_timed_beside_each_trial(spec: SearchSpec) -> None:
    """Ten trials of a minute, each with two that are timed in a minute: with two trained, 8 x 3 minutes are left."""
    view = SearchView(spec.model_copy(update={"budget": BudgetSpec(trials=10)}))
    started = next(e for e in EVENTS if e["event"] == "trial_started")
    ended = next(e for e in EVENTS if e["event"] == "trial_finished" and e["state"] == "COMPLETE")
    view({"event": "search_started", "time": 0.0, "name": "s", "data": {"format": "f"}, "machine": "m", "num_workers": 1})
    for number in range(6):
        source = None if number % 3 == 0 else number - number % 3
        view({**started, "time": 60.0 * number, "number": number, "source": source})
        view({**ended, "time": 60.0 * (number + 1), "number": number})
    assert view._eta_seconds() == pytest.approx(8 * 3 * 60)
