"""A search that ended gets a later end."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_spec

from search.ledger import Ledger, replay
from search.lengthening import give_budget
from search.store import Store, StoreError
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
    assert events[-1]["why"] == "its budget is now 40 trials or 120 minutes in all"
    assert not replay(events).finished


def test_what_is_used_already_is_no_budget(tmp_path: Path) -> None:
    store = ended(tmp_path)
    before = store.spec_path.read_bytes(), store.ledger_path.read_bytes()
    with pytest.raises(
        StoreError, match=r"--budget: 0.0000001 minutes for the whole search, of which .* minutes are used already; allowed"
    ):
        give_budget(store, ["0.0000001m"])
    with pytest.raises(SpecError, match="--budget 2x: not a budget"):
        give_budget(store, ["2x"])
    assert (store.spec_path.read_bytes(), store.ledger_path.read_bytes()) == before


def test_a_comparison_is_told_its_own_command(tmp_path: Path) -> None:
    store = ended(tmp_path, "paretune compare-methods spec.yaml")
    with pytest.raises(StoreError, match=r"takes its limits from its own command: paretune compare-methods spec\.yaml"):
        give_budget(store, ["2h"])
