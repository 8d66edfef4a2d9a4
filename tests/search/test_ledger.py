from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from search.errors import UserError
from search.ledger import Ledger, SearchState, replay
from search.record import TrialState

CONFIG = {"recipe": {"epochs": 1.0}, "layout": {"world_size": 1}}


def report(step: int, *, final: bool = False, **metrics: float) -> dict[str, Any]:
    return {"step": step, "num_steps": 9, "fidelity": step / 9, "metrics": metrics, "final": final, "details": {}}


def write_a_search(ledger: Ledger) -> list[dict[str, Any]]:
    """Every kind of event once, with text that is not ASCII."""
    return [
        ledger.append("search_started", name="banking", mlflow_run_id="a1", machine="two cores, größer"),
        ledger.append("reference", metrics={"accuracy": 0.1}),
        ledger.append("trial_started", number=0, params={"learning_rate": 1e-3}, config=CONFIG),
        ledger.append("trial_infeasible", number=1, params={}, config=CONFIG, constraints={"world_size": 1.0}),
        ledger.append("trial_started", number=2, params={}, config=CONFIG),
        ledger.append("trial_reported", number=0, report=report(1, accuracy=0.5)),
        ledger.append("trial_reported", number=0, report=report(9, final=True, accuracy=0.7)),
        ledger.append(
            "trial_finished",
            number=0,
            state="COMPLETE",
            values={"accuracy": 0.7},
            error=None,
            attempts=1,
            details={"a": 1},
        ),
        ledger.append("resumed", in_flight=[2]),
        ledger.append(
            "trial_finished",
            number=2,
            state="FAIL",
            values={},
            error={"kind": "out_of_memory", "message": "no\nroom"},
            constraints={"memory": 1.0},
        ),
        ledger.append("test_scored", number=0, metrics={"accuracy": 0.69}),
        ledger.append("search_finished", reason="trials"),
    ]


def test_what_was_appended_is_what_is_read(tmp_path: Path) -> None:
    appended = write_a_search(Ledger(tmp_path / "ledger.jsonl"))
    assert Ledger(tmp_path / "ledger.jsonl").events() == appended
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == len(appended)


def test_replay_gives_the_records(tmp_path: Path) -> None:
    state = replay(write_a_search(Ledger(tmp_path / "ledger.jsonl")))
    assert state.finished
    assert state.in_flight == set()
    assert state.reference == {"accuracy": 0.1}
    assert state.started is not None
    assert state.started["mlflow_run_id"] == "a1"
    complete, infeasible, failed = (state.records[n] for n in range(3))
    assert complete.state is TrialState.COMPLETE
    assert [r["step"] for r in complete.reports] == [1, 9]
    assert (complete.values, complete.test, complete.details) == ({"accuracy": 0.7}, {"accuracy": 0.69}, {"a": 1})
    assert complete.started_at is not None
    assert complete.finished_at is not None
    assert complete.finished_at >= complete.started_at
    assert infeasible.state is TrialState.PRUNED
    assert not infeasible.feasible_before_launch
    assert failed.error == {"kind": "out_of_memory", "message": "no\nroom"}
    assert not failed.feasible
    assert failed.feasible_before_launch


def test_a_kill_at_every_byte_loses_only_the_line_that_was_being_written(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    events = write_a_search(Ledger(whole))
    data = whole.read_bytes()
    cut = tmp_path / "cut.jsonl"
    for size in range(len(data) + 1):
        cut.write_bytes(data[:size])
        num_whole_lines = data[:size].count(b"\n")
        assert Ledger(cut).events() == events[:num_whole_lines]
        assert cut.read_bytes() == data[:size], "reading must not touch the file of a running search"
        ledger = Ledger(cut)
        added = ledger.append("resumed", in_flight=[])
        assert ledger.events() == [*events[:num_whole_lines], added]


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b"\0\0\n", b'{"event": "x"', b"[1]\n", b'{"event":"x"}\n', b"\xff\xfe\n"])
def test_garbage_at_the_end_is_trimmed_with_a_warning(tmp_path: Path, tail: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "ledger.jsonl"
    events = write_a_search(Ledger(path))
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    ledger = Ledger(path)
    with caplog.at_level(logging.WARNING):
        assert ledger.events() == events
        ledger.append("resumed", in_flight=[])
    assert path.read_bytes().startswith(whole + b'{"event":"resumed"')
    assert "half-written last line" in caplog.text


@pytest.mark.parametrize("damage", [b"not json\n", b"\0\0\n", b'{"event":"search_started"}\n', b"\n"])
def test_damage_in_the_middle_names_file_and_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    write_a_search(Ledger(path))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], damage, *lines[4:]]))
    with pytest.raises(UserError, match=rf"{path}:4: damaged line"):
        Ledger(path).events()
    before = path.read_bytes()
    with pytest.raises(UserError, match=":4:"):
        Ledger(path).append("resumed", in_flight=[])
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_ledger_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    events = write_a_search(ledger)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"{path}: cannot write the ledger: No space left"):
            ledger.append("resumed", in_flight=[])
    assert ledger.events() == events
    ledger.append("resumed", in_flight=[])
    assert len(ledger.events()) == len(events) + 1


def test_a_value_that_json_does_not_know_writes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("resumed", in_flight=[])
    with pytest.raises(TypeError):
        ledger.append("resumed", in_flight={1})
    assert len(ledger.events()) == 1


def test_an_event_is_on_the_disk_when_append_returns(tmp_path: Path) -> None:
    """The process says each number only after `append` returned, and is then killed without a chance to flush."""
    path = tmp_path / "ledger.jsonl"
    program = (
        "import sys; from pathlib import Path; from search.ledger import Ledger\n"
        "ledger, n = Ledger(Path(sys.argv[1])), 0\n"
        "while True:\n"
        "    ledger.append('resumed', in_flight=[n]); print(n, flush=True); n += 1\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == 20:
            process.send_signal(signal.SIGKILL)
            break
    acknowledged = [20, *(int(line) for line in process.stdout)]
    process.wait()
    found = [event["in_flight"][0] for event in Ledger(path).events()]
    assert found[: acknowledged[-1] + 1] == list(range(acknowledged[-1] + 1))


def test_the_first_end_counts_and_later_news_of_the_trial_change_nothing() -> None:
    state = SearchState()
    state.apply({"event": "trial_started", "time": 1.0, "number": 0, "params": {}, "config": None})
    state.apply({"event": "trial_started", "time": 1.5, "number": 0, "params": {"seed": 1}, "config": None})
    assert state.in_flight == {0}
    state.apply({"event": "trial_finished", "time": 2.0, "number": 0, "state": "COMPLETE", "values": {"accuracy": 0.5}})
    first = state.records[0]
    assert first.started_at == 1.0
    state.apply({"event": "trial_finished", "time": 3.0, "number": 0, "state": "FAIL", "values": {}})
    state.apply({"event": "trial_reported", "time": 3.0, "number": 0, "report": report(4)})
    assert state.records[0] == first


def test_steps_that_are_trained_again_replace_what_they_reported_before() -> None:
    state = SearchState()
    state.apply({"event": "trial_started", "time": 1.0, "number": 0, "params": {}, "config": None})
    for step, accuracy in ((1, 0.1), (3, 0.2), (5, 0.3), (3, 0.25), (5, 0.35)):
        state.apply({"event": "trial_reported", "time": 2.0, "number": 0, "report": report(step, accuracy=accuracy)})
    assert [(r["step"], r["metrics"]["accuracy"]) for r in state.records[0].reports] == [(1, 0.1), (3, 0.25), (5, 0.35)]


def test_a_resumed_search_is_not_finished() -> None:
    state = replay([{"event": "search_finished", "time": 1.0}, {"event": "resumed", "time": 2.0, "in_flight": []}])
    assert not state.finished


def test_news_of_an_unknown_trial_are_an_error() -> None:
    with pytest.raises(UserError, match="trial 7, which was never started"):
        replay([json.loads('{"event":"trial_finished","time":1,"number":7,"state":"COMPLETE"}')])
    with pytest.raises(UserError, match="trial 7, which was never started"):
        replay([json.loads('{"event":"search_cut_short","time":1,"reason":"x","held_seconds":{"7":1.5}}')])
