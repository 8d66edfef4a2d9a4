"""A search that ended: nothing is left of it, or it gets a later end, by further points or another budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from search.budget import amount_text, limits_of, used, used_up
from search.errors import NoResult, UserError
from search.formatting import number_text
from search.growth import Growth
from search.ledger import Ledger, objectives_of
from search.provenance import own_command
from search.publication import publish_again
from search.results import Results, why_nothing
from search.session import connected_tracker
from search.store import Store
from spaces.loading import load_spec
from spaces.spec import SearchSpec


def why_nothing_is_left(store: Store) -> str:
    """Return in words why a search has no more to do, or nothing.

    A limit was reached, or the hypervolume stopped growing, and the front is scored on the test rows.
    """
    results = Results.of(store)
    has_test = any(source.test for source in results.spec.data.sources.values())
    if not results.state.finished or (has_test and not all(record.test for record in results.members)):
        return ""
    return used_up(results.spec, results.state) or Growth(results.spec.budget, results.records, results.objectives).ended


def deliver_rest(store: Store) -> None:
    """Publish a search that ended once more: the last time MLflow may not have had all of it.

    Raises:
        spaces.loading.SpecError: the tracking server does not answer.
        NoResult: it has no front.
    """
    with store.lock():
        tracker, results = connected_tracker(store.load_spec_here()), Results.of(store)
        publish_again(store, tracker, results.state, command_for_rest=store.command("resume", store.name))
    if not results.members:
        raise NoResult(why_nothing(results.records))


def lengthen(store: Store, spec: SearchSpec, why: str, *, num_further: int = 0) -> dict[str, Any]:
    """Have a search go by another spec when it is resumed; return what the ledger says of it.

    Args:
        store: of the search.
        spec: with more to do than it has.
        why: in words.
        num_further: points that are further.
    """
    # First that it is not at its end any more: whatever comes between, the same command goes on.
    ledger = Ledger(store.ledger_path)
    known = {"num_trials": spec.budget.max_trials, "num_further": num_further, "why": why}
    longer = ledger.append("lengthened", **known, command=own_command())
    store.write_spec(spec)
    return longer


def command_of_comparison(store: Store) -> str:
    """Return the newest command of a comparison of methods; empty where the search is none."""
    events = [event for event in Ledger(store.ledger_path).events() if event["event"] in ("search_started", "lengthened")]
    commands = [event["command"] for event in events if str(event.get("command")).startswith("paretune compare-methods ")]
    return str(commands[-1]) if commands else ""


def give_budget(store: Store, amounts: Sequence[str]) -> None:
    """Give a search these limits in the place of its own.

    Args:
        store: of the search.
        amounts: as `--budget` has them, of the whole search: what it has used counts.

    Raises:
        UserError: it has used as much already, or is a comparison, whose own command takes limits.
        spaces.loading.SpecError: one is no amount.
    """
    loaded, state = load_spec(store.spec_path, (), amounts), store.state()
    if own := command_of_comparison(store):
        raise UserError(f"--budget: {store.name} is a comparison, which takes its limits from its own command: {own}")
    spent = used(loaded.spec, state).as_dict()
    limits = limits_of(loaded.spec.budget)
    for limit, most in limits.items():
        if spent.get(limit, 0.0) >= most:
            taken = f"{amount_text(limit, spent[limit])} are used already"
            raise UserError(f"--budget: {amount_text(limit, most)} for the whole search, of which {taken}; allowed: more than that")
    words = " or ".join(amount_text(limit, most) for limit, most in limits.items())
    spec, records, unlimited = loaded.spec, list(state.records.values()), ""
    if Growth(spec.budget, records, objectives_of(spec, state)).ended:
        spec = spec.model_copy(update={"budget": spec.budget.model_copy(update={"patience": None})})
        unlimited = ", and the patience that ended it is none any more"
    with store.lock():
        moved = _moved_references(store.load_spec().spec, spec)
        lengthen(store, spec, f"its budget is now {words} in all{unlimited}{moved}")


def _moved_references(known: SearchSpec, spec: SearchSpec) -> str:
    """Return in words from where the hypervolume is measured otherwise: without a reference a time has the budget's minutes."""
    before = {o.metric: o.reference for o in known.resolved_objectives()}
    moved = [o for o in spec.resolved_objectives() if o.reference != before[o.metric]]
    texts = [f"{o.metric} {number_text(o.metric, o.reference)}, not {number_text(o.metric, before[o.metric])}" for o in moved]
    return f"; the hypervolume is measured from {', '.join(texts)}: not to be held against the one before" if texts else ""
