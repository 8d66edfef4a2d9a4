from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines import make, report
from fake_runs import FakeTracker
from synthetic import OBJECTIVES, confirmed_event, numbers_on_front, synthetic_events
from typer.testing import CliRunner

import search.confirm as module
from search.confirm import Training, announcement, chosen_trials, confirm, further_seeds, outstanding, progress_text, split_lines
from search.errors import UserError
from search.ledger import Ledger, replay
from search.record import TrialRecord, TrialState
from search.store import Store
from spaces.config import TrialConfig

EVENTS = synthetic_events(12)
RECORDS = list(replay(EVENTS).records.values())
DIVERGED = {"kind": "diverged", "message": "the loss is nan"}
LOST = {"kind": "worker_lost", "message": "a worker was killed"}


def choose(trials: str | None) -> list[int]:
    return [r.number for r in chosen_trials(RECORDS, OBJECTIVES, trials, "made-up")]


def test_the_front_is_confirmed_unless_trials_are_named() -> None:
    assert set(choose(None)) == numbers_on_front(RECORDS)
    assert choose("4, 0001,4") == [4, 1]


@pytest.mark.parametrize(
    ("trials", "line"),
    [
        ("99", r"--trials 99: no such trial; the front: 0, 9, 1, 4"),
        ("3", r"--trials 3: trial 3 is PRUNED, and only complete trials can be taken; the front: 0, 9, 1, 4"),
        ("1,best", r"--trials: 'best' is not the number of a trial; allowed: numbers with commas"),
        ("", r"--trials: '' is not the number of a trial"),
    ],
)
def test_what_cannot_be_confirmed_is_one_line(trials: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        choose(trials)


@pytest.mark.parametrize("num_seeds", [0, -1])
def test_no_further_seed_is_refused_before_anything_is_read(num_seeds: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--seeds {num_seeds}: at least one further seed"):
        confirm(Store(root=tmp_path), num_seeds=num_seeds, trials=None, say=print)


def test_a_search_without_a_front_has_nothing_to_confirm() -> None:
    failed = [r for r in RECORDS if r.state is not TrialState.COMPLETE]
    with pytest.raises(UserError, match="made-up has no front"):
        chosen_trials(failed, OBJECTIVES, None, "made-up")


def with_seed(record: TrialRecord, seed: int) -> TrialRecord:
    return replace(record, config=Training.of(record, seed).config.to_dict())


@pytest.mark.parametrize("own", [0, 5, 2**32 - 2])
def test_further_seeds_are_others_and_more_of_them_begin_alike(own: int) -> None:
    record = with_seed(RECORDS[0], own)
    seeds = further_seeds(record, 5)
    assert len({own, *seeds}) == 6
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert further_seeds(record, 3) == seeds[:3]


def test_only_the_seed_is_another() -> None:
    training = Training.of(RECORDS[0], 7)
    own = TrialConfig.from_dict(RECORDS[0].config or {})
    assert training.seed == 7
    assert training.config.layout == own.layout
    assert replace(training.config.recipe, seed=own.recipe.seed) == own.recipe


def test_seed_by_seed_and_world_sizes_there_and_back() -> None:
    chosen = [RECORDS[n] for n in (0, 1, 2, 4)]
    sizes = {r.number: r.params["world_size"] for r in chosen}
    assert set(sizes.values()) == {1, 2}
    plan = outstanding(chosen, 3)
    assert [t.seed for t in plan] == [1] * 4 + [2] * 4 + [3] * 4
    changes = sum(sizes[a.record.number] != sizes[b.record.number] for a, b in pairwise(plan))
    assert changes == 3, "once a round"
    assert {(t.record.number, t.seed) for t in plan} == {(r.number, seed) for r in chosen for seed in (1, 2, 3)}


def test_what_is_confirmed_is_not_trained_again_and_what_broke_is() -> None:
    events = [
        confirmed_event(0, 1, accuracy=0.8, seconds=9.0),
        confirmed_event(0, 2, accuracy=0.8, seconds=9.0, error=DIVERGED),
        confirmed_event(0, 3, accuracy=0.8, seconds=9.0, error=LOST),
    ]
    record = replay([*EVENTS, *events]).records[0]
    assert [t.seed for t in outstanding([record], 4)] == [3, 4]
    again = replay([*EVENTS, *events, confirmed_event(0, 3, accuracy=0.7, seconds=9.0)]).records[0]
    assert [(c.seed, c.state.value) for c in again.confirmations] == [(1, "COMPLETE"), (2, "FAIL"), (3, "COMPLETE")]
    assert TrialRecord.from_dict(again.to_dict()) == again


def test_neither_the_study_nor_the_front_knows_of_a_confirmation(tmp_path: Path) -> None:
    def searched(directory: Path, *, confirms: bool) -> tuple[list[Any], list[int]]:
        engine, _, store = make(directory, trials=6, learning_rate={"log_uniform": [1e-4, 1e-1]})
        for number in range(3):
            engine.next()
            engine.reported(number, report(0.5 + number / 10, 10.0 + number))
            engine.ended(number, {"state": "complete"})
        if confirms:
            for seed in (1, 2):
                event = confirmed_event(2, seed, accuracy=0.99, seconds=0.1, test=0.99)
                Ledger(store.ledger_path).append("confirmed", **{k: v for k, v in event.items() if k not in ("event", "time")})
        resumed, _, _ = make(directory, trials=6, learning_rate={"log_uniform": [1e-4, 1e-1]})
        assert len(resumed.state.records[2].confirmations) == (2 if confirms else 0)
        proposals = [a.config for a in (resumed.next() for _ in range(3)) if a is not None]
        return proposals, [r.number for r in resumed.front()]

    assert searched(tmp_path / "with", confirms=True) == searched(tmp_path / "without", confirms=False)


def train_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ends: dict[str, dict[str, Any]], *, has_test: bool = True) -> Any:
    """Return what is recorded of one further seed whose jobs end like this, and the kinds of its jobs."""
    kinds = []

    def run(_: object, job: Any, __: object) -> Any:
        kinds.append(job.kind)
        assert job.config["recipe"]["seed"] == 1
        return ends[job.kind], [report(0.8, 9.0)] if job.kind == "train" and ends["train"]["state"] == "complete" else []

    monkeypatch.setattr(module, "run_to_end", run)
    prepared: Any = SimpleNamespace(data=SimpleNamespace(test=object() if has_test else None))
    nobody: Any = None
    training = Training.of(RECORDS[0], 1)
    return module._train(nobody, Store(root=tmp_path / "s"), training, prepared, OBJECTIVES, nobody), kinds


def test_a_seed_is_trained_and_then_scored_on_the_test_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ends = {"train": {"state": "complete"}, "test": {"state": "complete", "metrics": {"accuracy": 0.7}}}
    found, kinds = train_one(monkeypatch, tmp_path, ends)
    assert kinds == ["train", "test"]
    assert (found["state"], found["values"], found["test"]) == (
        "COMPLETE",
        {"accuracy": 0.8, "train_seconds": 9.0},
        {"accuracy": 0.7},
    )
    found, kinds = train_one(monkeypatch, tmp_path, ends, has_test=False)
    assert (found["test"], kinds) == ({}, ["train"])


def test_a_failure_is_recorded_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, kinds = train_one(monkeypatch, tmp_path, {"train": {"state": "failed", **DIVERGED}})
    assert (found["state"], found["error"], found["values"], kinds) == ("FAIL", DIVERGED, {}, ["train"])
    found, _ = train_one(monkeypatch, tmp_path, {"train": {"state": "complete"}, "test": {"state": "failed", **LOST}})
    assert found["state"] == "FAIL"
    assert found["error"] == {"kind": "worker_lost", "message": "not scored on the test rows: a worker was killed"}


def test_what_is_said_names_the_rows_and_the_shift() -> None:
    record = replay([*EVENTS, confirmed_event(0, 1, accuracy=0.8, seconds=9.0, test=0.7)]).records[0]
    searched = f"{record.values['accuracy']:.4g} in the search"
    assert f"trial 0000 seed 1: accuracy 0.7 (on test rows, {searched})" in progress_text(record, record.confirmations[0], OBJECTIVES)
    record = replay([*EVENTS, confirmed_event(0, 1, accuracy=0.8, seconds=9.0)]).records[0]
    assert f"accuracy 0.8 ({searched})" in progress_text(record, record.confirmations[0], OBJECTIVES)
    (line,) = split_lines({"test_rows": 30, "test_rows_also_in_train": 2, "test_rows_also_in_evaluation": 1})
    assert line == "scored on the 30 test rows (2 also in train, 1 also in evaluation)"
    (line,) = split_lines({})
    assert "data.test names no test rows: scored on the evaluation rows" in line
    (line,) = announcement([Training.of(record, 1), Training.of(record, 2)])
    assert line.startswith("confirming trial 0: 2 trainings, one at a time; about ")


@pytest.mark.parametrize(("failures", "exit_code"), [([], 0), (["trial 0 failed with seed 1: diverged: nan"], 1)])
def test_the_exit_code_says_whether_a_seed_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failures: list[str], exit_code: int
) -> None:
    from search import cli

    _, _, store = make(tmp_path, trials=1, learning_rate=1e-3)
    Ledger(store.ledger_path).append("search_started", name="s")
    monkeypatch.setattr(module, "confirm", lambda store, **_: failures)
    monkeypatch.setattr(cli, "_show_front", lambda *_: print("the front"))
    done = CliRunner().invoke(cli.app, ["confirm", "s", "--directory", str(store.root.parent)])
    assert done.exit_code == exit_code
    assert done.stdout.startswith("the front")
    assert all(f"error: {line}" in done.output for line in failures)


@pytest.mark.parametrize(("is_finished", "end"), [(True, "finish"), (False, "leave KILLED")])
def test_what_is_confirmed_already_is_published_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_finished: bool, end: str
) -> None:
    _, _, store = make(tmp_path)
    store.spec_path.write_text((tmp_path / "spec.yaml").read_text())
    members = sorted(numbers_on_front(RECORDS))
    events = [e for e in EVENTS if is_finished or e["event"] != "search_finished"]
    events += [confirmed_event(number, seed, accuracy=0.8, seconds=9.0) for seed in (1, 2) for number in members]
    store.ledger_path.write_text("".join(json.dumps(event) + "\n" for event in events))

    def again(tracker: FakeTracker) -> list[str]:
        monkeypatch.setattr(module, "connected_tracker", lambda _: tracker)
        said: list[str] = []
        assert module.confirm(store, num_seeds=2, trials=None, say=said.append) == []
        return said

    tracker = FakeTracker()
    assert again(tracker) == [f"confirmed already: {len(members)} trials with 2 further seeds"]
    front = f"front of {len(members)}, confirmed {2 * len(members)} times"
    assert tracker.calls == [f"reopen s {EVENTS[0]['mlflow_run_id']}", front, end]
    assert tracker.events == events
    assert (store.report_path / "confirmations.csv").read_text().count("\n") == 1 + 2 * len(members)
    assert Ledger(store.ledger_path).events() == events

    again(FakeTracker(undelivered=3))
    command = f"paretune confirm s --seeds 2 --directory {store.root.parent}"
    assert f"3 events wait for an answer; `{command}` delivers the rest" in capsys.readouterr().err
