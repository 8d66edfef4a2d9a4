"""What a search leaves for its readers when it ends, or is confirmed: the report, and the front in MLflow."""

from __future__ import annotations

import sys

from search.advice import recommendation_lines
from search.budget import used
from search.ledger import Ledger, SearchState
from search.pareto import hypervolume_of
from search.report import write_report
from search.results import Results, number_of
from search.store import Store
from search.tracking import Tracker, TrackingError

# Knobs that a trial config, and so MLflow, names otherwise than the user's file: there, rank is a process.
TRACKED_KNOBS = {
    "lora_rank": "adapter_rank",
    "lora_alpha": "adapter_alpha",
    "lora_target_modules": "adapter_target_modules",
}
# What is left for the tracking server to catch up with when the search is over, and when it is cut short.
TRACKING_FLUSH_SECONDS, LEAVING_FLUSH_SECONDS = 60.0, 5.0


def publish(results: Results, tracker: Tracker, *, command_for_rest: str) -> None:
    """Write the report and send the front to MLflow.

    Args:
        results: of the search.
        tracker: which has been given all events.
        command_for_rest: what the user runs to deliver what the server does not take now.
    """
    paths = write_report(results)
    try:
        undelivered = tracker.flush(TRACKING_FLUSH_SECONDS)
        if undelivered:
            raise TrackingError(f"{undelivered} events wait for an answer")
        note = recommendation_lines(results.members, results.objectives, results.name)
        chosen = results.recommended
        note += [] if chosen is None else [f"```bash\n{results.command_of(chosen)}\n```"]
        tracker.write_front(
            results.members,
            [o.metric for o in results.objectives],
            [TRACKED_KNOBS.get(knob, knob) for knob in results.spec.space.names_searched()],
            list(paths.values()),
            recommended=number_of(chosen),
            note="\n\n".join(note),
            metrics=search_metrics(results),
        )
        if results.state.finished:
            tracker.finish()
        else:
            tracker.leave("KILLED", LEAVING_FLUSH_SECONDS)
    except TrackingError as error:
        # All of it is in the ledger and the report; hours of training must not end in an error because of their mirror.
        print(f"MLflow does not have all of the search: {error}; `{command_for_rest}` delivers the rest", file=sys.stderr)


def publish_again(store: Store, tracker: Tracker, state: SearchState, *, command_for_rest: str) -> None:
    """Publish a search that has ended: the last time may have been cut off, or MLflow away, before all of it was there."""
    reopen(tracker, store, state)
    publish(Results.of(store, state), tracker, command_for_rest=command_for_rest)


def reopen(tracker: Tracker, store: Store, state: SearchState) -> None:
    """Open the search's run in MLflow again, and give it all events so far."""
    tracker.reopen_search(store.name, (state.started or {})["mlflow_run_id"], spec_path=store.spec_path)
    for event in Ledger(store.ledger_path).events():
        tracker.submit(event)


def search_metrics(results: Results) -> dict[str, float]:
    """Return what the search's own run says of its front and its budget; nothing of a front whose hypervolume is unknown."""
    volume = hypervolume_of(results.records, results.objectives)
    reached = {} if volume is None else {"front/hypervolume": volume, "front/size": len(results.members)}
    return {**reached, **{f"budget/{limit}": value for limit, value in used(results.spec, results.state).as_dict().items()}}
