"""A search that ended: nothing is left of it, or it gets a later end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_runs import FakeTracker
from synthetic import numbers_on_front, synthetic_events
from tiny import make_spec

from search.errors import NoResult, UserError
from search.ledger import Ledger, replay
from search.lengthening import deliver_rest, give_budget, why_nothing_is_left
from search.store import Store
from spaces.budget import BudgetSpec
from spaces.loading import SpecError, load_spec


def ended(tmp_path: Path, command: str = "paretune search spec.yaml") -> Store:
    store = Store.create(load_spec(make_spec(tmp_path, budget={"trials": 5, "minutes": 60})))
    ledger = Ledger(store.ledger_path)
    ledger.append("search_started", name=store.name, command=command)
    ledger.append("search_finished", reason="60 minutes used up")
    return store


def test_limits_take_the_place_of_those_that_there_were_and_the_search_is_not_at_its_end(tmp_path: Path) -> None:
    store = ended(tmp_path)
    give_budget(store, ["2h", "40trials"])
    budget = store.load_spec().spec.budget
    assert (budget.trials, budget.minutes) == (40, 120)
    events = list(Ledger(store.ledger_path).events())
    assert events[-1]["why"].startswith(
        "its budget is now 40 trials or 120 minutes in all; the hypervolume is measured from train_seconds"
    )
    assert not replay(events).finished


def test_patience_that_ended_a_search_does_not_end_it_again(tmp_path: Path) -> None:
    store = Store.create(load_spec(make_spec(tmp_path, budget={"patience": 2, "min_growth": 1.0})))
    store.ledger_path.write_text("".join(json.dumps(event) + "\n" for event in synthetic_events(24)))
    give_budget(store, ["2h"])
    assert (store.load_spec().spec.budget.patience, store.load_spec().spec.budget.minutes) == (None, 120)
    why = list(Ledger(store.ledger_path).events())[-1]["why"]
    assert why.startswith("its budget is now 120 minutes in all, and the patience that ended it is none any more; the hypervolume")


def test_a_budget_from_which_the_hypervolume_is_measured_otherwise_says_so(tmp_path: Path) -> None:
    for amounts, moved in (
        (["40trials"], "train_seconds 3,600 s, not 1,200 s"),
        (["1h", "40trials"], "train_seconds 3,600 s, not 1,200 s"),
        (["20m", "40trials"], ""),
    ):
        store = Store.create(load_spec(make_spec(tmp_path / amounts[0], objectives=None, budget={"trials": 5, "minutes": 20})))
        Ledger(store.ledger_path).append("search_started", name=store.name, command="paretune search spec.yaml")
        Ledger(store.ledger_path).append("search_finished", reason="5 trials used up")
        give_budget(store, amounts)
        why = list(Ledger(store.ledger_path).events())[-1]["why"]
        assert moved in why
        assert ("the hypervolume is measured from" in why) == bool(moved)


def test_what_is_used_already_is_no_budget(tmp_path: Path) -> None:
    store = ended(tmp_path)
    before = store.spec_path.read_bytes(), store.ledger_path.read_bytes()
    with pytest.raises(
        UserError, match=r"--budget: 0.0000001 minutes for the whole search, of which .* minutes are used already; allowed"
    ):
        give_budget(store, ["0.0000001m"])
    with pytest.raises(SpecError, match="--budget 2x: not a budget"):
        give_budget(store, ["2x"])
    assert (store.spec_path.read_bytes(), store.ledger_path.read_bytes()) == before


def test_a_comparison_is_told_its_own_command(tmp_path: Path) -> None:
    store = ended(tmp_path, "paretune compare-methods spec.yaml")
    with pytest.raises(UserError, match=r"takes its limits from its own command: paretune compare-methods spec\.yaml"):
        give_budget(store, ["2h"])


def test_of_a_search_whose_budget_is_used_up_and_whose_front_is_scored_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(load_spec(make_spec(tmp_path, budget={"trials": 5})))
    events = synthetic_events(24)
    members = numbers_on_front(list(replay(events).records.values()))
    untested = [event for event in events if event["event"] != "test_scored"]
    tested = [{**events[-1], "event": "test_scored", "number": number, "metrics": {"accuracy": 0.7}} for number in members]

    def left(events: list[dict[str, Any]]) -> str:
        store.ledger_path.write_text("".join(json.dumps(event) + "\n" for event in events))
        return why_nothing_is_left(store)

    assert left([*untested, *tested]) == "5 trials used up"
    assert left(untested) == "", "the front has yet to be scored"
    assert left([event for event in (*untested, *tested) if event["event"] != "search_finished"]) == "", "it was cut off"
    store.write_spec(store.load_spec().spec.model_copy(update={"budget": BudgetSpec(trials=500)}))
    assert left([*untested, *tested]) == "", "something else had ended it, and may not now"

    store.write_spec(store.load_spec().spec.model_copy(update={"budget": BudgetSpec(patience=2, min_growth=1.0)}))
    assert left([*untested, *tested]) == "the hypervolume grew by less than 1 of itself in 2 trials"

    store.write_spec(store.load_spec().spec.model_copy(update={"budget": BudgetSpec(trials=5)}))
    tracker = FakeTracker()
    monkeypatch.setattr("search.lengthening.connected_tracker", lambda _: tracker)
    deliver_rest(store)
    assert tracker.events == [*untested, *tested], "MLflow has all of it"
    assert tracker.calls[-1] == "finish"
    assert (store.report_path / "report.html").exists()


def test_a_search_that_found_nothing_says_so_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(load_spec(make_spec(tmp_path, budget={"trials": 1})))
    events = [event for event in synthetic_events(24) if event.get("number") is None]
    store.ledger_path.write_text("".join(json.dumps(event) + "\n" for event in events))
    monkeypatch.setattr("search.lengthening.connected_tracker", lambda _: FakeTracker())
    with pytest.raises(NoResult, match="no trial succeeded: none was completed"):
        deliver_rest(store)
