from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeRuns, mirrored
from scipy import stats
from synthetic import (
    DEVICE,
    HELD_MEMORY,
    OBJECTIVES,
    PREDICTED_MEMORY,
    confirmed_event,
    numbers_on_front,
    synthetic_events,
    without_mfu,
)

from search.ledger import replay
from search.mirror import MAX_TAG_CHARACTERS, Mirror, record_tag
from search.pareto import front
from search.record import TrialRecord, TrialState
from spaces.config import TrialConfig

EVENTS = synthetic_events(24)
STATE = replay(EVENTS)
RECORDS = list(STATE.records.values())


LOST = {"kind": "worker_lost", "message": "a worker was killed" * 100}
CONFIRMED = [
    confirmed_event(0, 1, accuracy=0.80, seconds=9.0, test=0.70),
    confirmed_event(0, 2, accuracy=0.84, seconds=9.4, test=0.74),
    confirmed_event(1, 1, accuracy=0.90, seconds=8.0, error=LOST),
]


def metrics_of(run: dict[str, Any], key: str) -> list[tuple[int, float]]:
    return sorted((step, value) for name, step, _, value in run["metrics"] if name == key)


def test_every_trial_is_a_run_with_its_knobs_curve_and_record() -> None:
    runs = mirrored(EVENTS).runs
    assert len(runs) == len(RECORDS) + 1
    for record in RECORDS:
        run = runs[f"trial-{record.number:04d}"]
        assert record.config is not None
        assert run["params"]["learning_rate"] == record.params["learning_rate"]
        assert run["params"]["adapter_rank"] == record.params["lora_rank"]
        assert run["params"]["micro_batch_tokens"] == record.config["layout"]["micro_batch_tokens"]
        expected = [(r["step"], r["metrics"]["accuracy"]) for r in record.reports]
        assert metrics_of(run, "eval/accuracy") == expected
        assert run["tags"]["mlflow.parentRunId"] == "parent"
        assert (run["tags"]["kind"], run["tags"]["paretune.search"]) == ("trial", "synthetic")
        assert TrialRecord.from_dict(json.loads(run["tags"]["paretune.record"])) == record


def test_a_trials_training_losses_are_a_curve_over_its_time() -> None:
    runs = mirrored(EVENTS).runs
    for record in (r for r in RECORDS if r.state is TrialState.COMPLETE):
        assert record.started_at is not None
        curve = sorted(
            (step, time_ms, value)
            for name, step, time_ms, value in runs[f"trial-{record.number:04d}"]["metrics"]
            if name == "train/loss"
        )
        assert [step for step, _, _ in curve] == list(range(4, 109, 4)), "each once, whatever number of reports tells of it"
        assert [value for _, _, value in curve] == pytest.approx([3.2 - 0.1 * n for n in range(1, 28)])
        times = [time_ms for _, time_ms, _ in curve]
        assert times == sorted(times)
        assert record.started_at * 1000 < times[0] < times[-1] <= (record.finished_at or 0) * 1000


def test_every_run_names_its_data() -> None:
    runs = mirrored(EVENTS).runs
    assert all(run["dataset"] == ("made/up.csv", "f00d", {"format": "made up", "rows": 9}) for run in runs.values())


def test_a_trial_says_what_is_needed_to_train_it_again() -> None:
    runs = mirrored(EVENTS)
    for record in RECORDS:
        if record.started_at is not None:
            tags = runs.runs[f"trial-{record.number:04d}"]["tags"]
            assert tags["paretune.command"] == f"train {record.number} again"
            assert tags["paretune.data_fingerprint"] == "f00d"
            assert tags["mlflow.source.git.commit"] == "c0ffee"
            assert json.loads(tags["paretune.versions"]) == {"torch": "2.11"}


def test_a_trial_says_what_each_rank_held_and_what_was_predicted() -> None:
    runs = mirrored(EVENTS)
    record = next(r for r in RECORDS if r.state is TrialState.COMPLETE and r.params["world_size"] == 2)
    run = runs.runs[f"trial-{record.number:04d}"]
    values = {key: value for key, _, _, value in run["metrics"]}
    for rank in range(2):
        assert {term: values[f"memory/rank{rank}/{term}"] for term in HELD_MEMORY} == HELD_MEMORY
    assert {term: values[f"predicted/{term}"] for term in PREDICTED_MEMORY} == PREDICTED_MEMORY
    assert values["predicted/train_seconds"] == 50.0
    assert run["tags"]["paretune.time_source"] == record.predicted["time_source"]
    assert json.loads(runs.runs["parent"]["tags"]["paretune.device"]) == DEVICE


def test_a_trial_says_what_its_mfu_stands_on_or_why_it_has_none() -> None:
    for events, reason in ((EVENTS, "measured_gemm"), (without_mfu(EVENTS, "unknown device X"), "unknown device X")):
        runs = mirrored(events).runs
        for record in (r for r in RECORDS if r.state is TrialState.COMPLETE):
            run = runs[f"trial-{record.number:04d}"]
            assert run["tags"]["paretune.peak_source"] == reason
            assert run["tags"]["paretune.mfu_convention"] == "as tests count"
            assert bool(metrics_of(run, "perf/mfu")) == (events is EVENTS)


def test_states_map_as_in_mlflows_own_bridge() -> None:
    runs = mirrored(EVENTS).runs
    seen = set()
    for record in RECORDS:
        run = runs[f"trial-{record.number:04d}"]
        wanted = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}[record.state]
        assert run["status"] == wanted
        assert ("paretune.infeasible" in run["tags"]) == (not record.feasible)
        assert ("paretune.error" in run["tags"]) == (record.error is not None)
        seen.add((record.state, record.feasible, record.feasible_before_launch))
    assert len(seen) >= 4, "the synthetic search has every kind of end"


def test_reference_and_test_scores_are_metrics() -> None:
    runs = mirrored(EVENTS).runs
    assert metrics_of(runs["parent"], "reference/accuracy") == [(0, 0.04)]
    assert json.loads(runs["parent"]["tags"]["paretune.reference"]) == {"accuracy": 0.04, "eval_loss": 3.2}
    assert metrics_of(runs["trial-0000"], "test/accuracy") == [(0, 0.71)]


@pytest.mark.parametrize("cut", range(0, len(EVENTS), 7))
def test_a_resume_tells_everything_again_and_nothing_is_there_twice(cut: int) -> None:
    once = mirrored(EVENTS).runs
    runs = mirrored(EVENTS[:cut])
    assert mirrored(EVENTS, runs).runs == once
    num_calls = runs.num_calls
    assert mirrored(EVENTS, runs).runs == once
    assert runs.num_calls - num_calls == 4, "of ended trials only test scores are told again, beside data, device and reference"


def test_a_lost_answer_is_asked_for_again_and_nothing_is_there_twice() -> None:
    """Every call fails once after the server has done it; the spool then delivers the same event again."""
    once = mirrored(EVENTS)
    for fails_at in range(1, once.num_calls + 1, 3):
        runs = FakeRuns()
        runs.fails_at = fails_at
        mirror = Mirror(runs, "synthetic", "parent")
        for event in EVENTS:
            try:
                mirror.deliver(event)
            except ConnectionError:
                mirror.deliver(event)
        assert runs.runs == once.runs


def test_what_a_trial_held_counts_once_however_often_its_report_was_sent() -> None:
    events = [{**event, "held_seconds": 600.0} if event["event"] == "trial_reported" else event for event in EVENTS]
    held = json.loads(mirrored(events).runs["trial-0000"]["tags"]["paretune.record"])["held_seconds"]
    runs = FakeRuns()
    mirror = Mirror(runs, "synthetic", "parent")
    for event in events:
        for _ in range(3 if event["event"] == "trial_reported" else 0):
            runs.fails_at = runs.num_calls + 1
            with suppress(ConnectionError):
                mirror.deliver(event)
        mirror.deliver(event)
    assert json.loads(runs.runs["trial-0000"]["tags"]["paretune.record"])["held_seconds"] == held > 0


def test_a_confirmation_is_a_run_below_its_trial_that_nothing_takes_for_one() -> None:
    runs = mirrored([*EVENTS, *CONFIRMED]).runs
    own = {name: run for name, run in runs.items() if name.startswith("confirm")}
    assert sorted(own) == ["confirm-0000-1", "confirm-0000-2", "confirm-0001-1"]
    first = own["confirm-0000-1"]
    assert (first["tags"]["mlflow.parentRunId"], first["tags"]["kind"]) == ("trial-0000", "confirmation")
    assert not {"paretune.trial", "paretune.record", "pareto"} & set(first["tags"])
    assert (first["params"]["seed"], runs["trial-0000"]["params"]["seed"]) == (1, 0)
    assert first["params"]["learning_rate"] == RECORDS[0].params["learning_rate"]
    assert metrics_of(first, "eval/accuracy") == [(0, 0.80)]
    assert metrics_of(first, "test/accuracy") == [(0, 0.70)]
    assert [own[name]["status"] for name in sorted(own)] == ["FINISHED", "FINISHED", "FAILED"]
    assert own["confirm-0001-1"]["tags"]["paretune.error"].startswith("worker_lost: a worker was killed")
    assert len(json.dumps(own["confirm-0001-1"]["tags"])) < MAX_TAG_CHARACTERS
    trial = {key: value for key, _, _, value in sorted(runs["trial-0000"]["metrics"])}
    assert trial["confirmed/test_accuracy"] == pytest.approx(0.72)
    assert trial["confirmed/test_accuracy_half_width"] == pytest.approx(stats.t.ppf(0.975, 1) * 0.02)
    assert trial["confirmed/train_seconds"] == pytest.approx(9.2)


def test_confirmations_told_again_change_nothing_but_the_seed_that_was_tried_again() -> None:
    again = confirmed_event(1, 1, accuracy=0.9, seconds=8.0, test=0.8)
    events = [*EVENTS, *CONFIRMED]
    once = mirrored(events)
    assert mirrored(events, mirrored(events)).runs == once.runs
    retried = mirrored([*events, again]).runs["confirm-0001-1"]
    assert (retried["status"], retried["tags"]["paretune.error"]) == ("FINISHED", "")
    for fails_at in range(mirrored(EVENTS).num_calls + 1, once.num_calls + 1):
        runs = FakeRuns()
        runs.fails_at = fails_at
        mirror = Mirror(runs, "synthetic", "parent")
        for event in events:
            try:
                mirror.deliver(event)
            except ConnectionError:
                mirror.deliver(event)
        assert runs.runs == once.runs


def test_the_front_in_mlflow_is_that_of_the_trials_alone() -> None:
    runs = FakeRuns()
    mirror = Mirror(runs, "synthetic", "parent")
    for event in [*EVENTS, *CONFIRMED]:
        mirror.deliver(event)
    mirror.write_front(front(RECORDS, OBJECTIVES), [], recommended=None, note="", metrics={})
    assert all("pareto" not in run["tags"] for name, run in runs.runs.items() if name.startswith("confirm"))
    table = json.loads(runs.runs["parent"]["files"]["trials.json"])
    column = table["columns"].index("confirmed/test_accuracy")
    assert [row[column] for row in table["data"]] == [pytest.approx(0.72), *[None] * (len(RECORDS) - 1)]


def test_a_trial_in_flight_waits_while_its_search_is_cut_short_and_runs_when_it_has_workers_again() -> None:
    own = [e for e in EVENTS if e.get("number") == 0]
    started, placed, *rest = own
    report, end = rest[0], next(e for e in rest if e["event"] == "trial_finished")
    cut = {"event": "search_cut_short", "time": report["time"] + 1, "reason": "interrupted", "held_seconds": {"0": 9.0}}
    again = {**placed, "time": cut["time"] + 100}
    runs = FakeRuns()
    seen = []
    for events in ([started, placed, report, cut], [started, placed, report, cut, again], [started, placed, report, cut, again, end]):
        mirrored(events, runs)  # a driver that goes on tells all from the beginning
        seen.append(runs.runs["trial-0000"]["status"])
    assert seen == ["SCHEDULED", "RUNNING", "FINISHED"]
    mirrored([started, placed, report, cut, again, end, {**cut, "time": end["time"] + 1, "held_seconds": {}}], runs)
    assert runs.runs["trial-0000"]["status"] == "FINISHED"


def test_steps_that_are_trained_again_give_no_second_point() -> None:
    events = [e for e in EVENTS if e.get("number") == 0]
    again = {**events[1], "time": events[2]["time"] + 1}
    runs = mirrored([*events[:3], again, *events[3:]]).runs
    assert [step for step, _ in metrics_of(runs["trial-0000"], "eval/accuracy")] == [12, 36, 108]


def test_the_front_is_tagged_painted_and_in_a_view_of_this_search(tmp_path: Path) -> None:
    runs = FakeRuns()
    mirror = Mirror(runs, "synthetic", "parent")
    for event in EVENTS:
        mirror.deliver(event)
    report = tmp_path / "report.html"
    report.write_text("<html>")
    for _ in range(2):
        members = front(RECORDS, OBJECTIVES)
        mirror.write_front(members, [report], recommended=1, note="take trial 1", metrics={"front/size": 3.0})
        mirror.save_view(["accuracy", "train_seconds"], ["learning_rate", "strategy", "adapter_rank"])
    painted = {r.number for r in RECORDS if runs.runs[f"trial-{r.number:04d}"]["tags"]["pareto"] == "true"}
    assert painted == numbers_on_front(RECORDS)
    assert [r.number for r in RECORDS if runs.runs[f"trial-{r.number:04d}"]["tags"]["recommended"] == "true"] == [1]
    assert len({run["tags"]["mlflow.runColor"] for name, run in runs.runs.items() if name != "parent"}) == 2
    parent = runs.runs["parent"]
    assert parent["tags"]["mlflow.note.content"] == "take trial 1"
    assert parent["files"]["report/report.html"] == b"<html>"
    assert ("front/size", 3.0) in {(key, value) for key, _, _, value in parent["metrics"]}
    table = json.loads(parent["files"]["trials.json"])
    assert len(table["data"]) == len(RECORDS)
    assert all(len(row) == len(table["columns"]) for row in table["data"])
    ((key, value),) = runs.experiment_tags.items()
    assert key == "mlflow.sharedViewState.pareto-synthetic"
    assert len(value) < 5000
    state = json.loads(json.loads(value)["state"])
    assert state["searchFilter"] == "tags.kind = 'trial' and tags.`paretune.search` = 'synthetic'"
    scatter, parallel = state["compareRunCharts"]
    assert (scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == ("perf/train_seconds", "eval/accuracy")
    assert parallel["selectedParams"] == ["learning_rate", "strategy", "adapter_rank"]
    assert "params.`strategy`" in state["selectedColumns"]


def test_a_record_that_is_too_long_for_a_tag_loses_its_bulk_first() -> None:
    report: dict[str, Any] = {"step": 1, "metrics": {"accuracy": 0.5}, "details": {}}
    known: dict[str, Any] = {"state": TrialState.FAIL, "params": {"learning_rate": 1e-3}, "values": {"accuracy": 0.5}}
    details = {"train_losses": [0.1] * 3000, "threads": 1}
    on_many_ranks = {**details, "process_map": [{"rank": rank, "node": "n" * 40} for rank in range(256)]}

    def kept(**fields: Any) -> TrialRecord:
        text = record_tag(TrialRecord(number=1, **known, **fields))
        assert len(text) <= MAX_TAG_CHARACTERS
        return TrialRecord.from_dict(json.loads(text))

    assert kept(reports=(report,)) == TrialRecord(number=1, **known, reports=(report,))
    assert kept(reports=(report,), details=details) == TrialRecord(number=1, **known, reports=(report,), details={"threads": 1})
    told = {**report, "details": {"train_losses": [0.1] * 3000, "steps_per_loss": 1}}
    assert kept(reports=(told,), details=details) == TrialRecord(number=1, **known, reports=(report,), details={"threads": 1})
    assert kept(reports=(report,), details=on_many_ranks).details == {"threads": 1}, "what is short is kept"
    assert kept(reports=(report,) * 500, details=details) == TrialRecord(number=1, **known, details={"threads": 1})
    long_error = {"kind": "error", "message": "m" * 9000}
    assert kept(error=long_error).error == {"kind": "error", "message": "m" * 500}


def test_a_knob_that_some_trials_lack_is_a_column_and_no_axis() -> None:
    runs = FakeRuns()
    mirror = Mirror(runs, "synthetic", "parent")
    without = TrialConfig.from_params({**RECORDS[0].params, "adapter": "none"}).to_dict()
    for event in EVENTS:
        mirror.deliver({**event, "config": without} if event["event"] == "trial_started" and event["number"] == 0 else event)
    mirror.save_view(["accuracy", "train_seconds"], ["learning_rate", "adapter_rank"])
    ((_, value),) = runs.experiment_tags.items()
    _, parallel = json.loads(json.loads(value)["state"])["compareRunCharts"]
    assert parallel["selectedParams"] == ["learning_rate"]
    assert "adapter_rank" in value
