"""What a search leaves for its readers when it ends, or is confirmed: the report, and the front in MLflow."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from search.advice import knee, recommendation_lines
from search.budget import used
from search.ledger import SearchState, objectives_of
from search.pareto import front, hypervolume_of
from search.provenance import reproduce_command
from search.report import write_report
from search.store import Store
from search.tracking import Tracker, TrackingError
from spaces.spec import Objective, SearchSpec

# Knobs that a trial config, and so MLflow, names otherwise than the user's file: there, rank is a process.
TRACKED_KNOBS = {
    "lora_rank": "adapter_rank",
    "lora_alpha": "adapter_alpha",
    "lora_target_modules": "adapter_target_modules",
}
# What is left for the tracking server to catch up with when the search is over, and when it is cut short.
TRACKING_FLUSH_SECONDS, LEAVING_FLUSH_SECONDS = 60.0, 5.0


def publish(state: SearchState, store: Store, tracker: Tracker, *, command_for_rest: str) -> None:
    """Write the report and send the front to MLflow.

    Args:
        state: of the search.
        store: the search.
        tracker: which has been given all events.
        command_for_rest: what the user runs to deliver what the server does not take now.
    """
    spec, records = store.load_spec().spec, list(state.records.values())
    objectives = objectives_of(spec, state)
    members = front(records, objectives)
    chosen = knee(members, objectives)
    command = reproduce_command(spec, str(store.spec_path), store.name, chosen.number, chosen.params) if chosen else ""
    paths = write_report(state, spec, objectives, store.report_path, command=command)
    try:
        undelivered = tracker.flush(TRACKING_FLUSH_SECONDS)
        if undelivered:
            raise TrackingError(f"{undelivered} events wait for an answer")
        tracker.write_front(
            members,
            [o.metric for o in objectives],
            [TRACKED_KNOBS.get(knob, knob) for knob in spec.space.names_searched()],
            list(paths.values()),
            note="\n\n".join([*recommendation_lines(members, objectives, store.name), f"```bash\n{command}\n```"]),
            metrics=search_metrics(state, spec, objectives),
        )
        if state.finished:
            tracker.finish()
        else:
            tracker.leave("KILLED", LEAVING_FLUSH_SECONDS)
    except TrackingError as error:
        # All of it is in the ledger and the report; hours of training must not end in an error because of their mirror.
        print(f"MLflow does not have all of the search: {error}; `{command_for_rest}` delivers the rest", file=sys.stderr)


def search_metrics(state: SearchState, spec: SearchSpec, objectives: Sequence[Objective]) -> dict[str, float]:
    """Return what the search's own run says of its front and its budget; nothing of a front whose hypervolume is unknown."""
    records = list(state.records.values())
    volume = hypervolume_of(records, objectives)
    reached = {} if volume is None else {"front/hypervolume": volume, "front/size": len(front(records, objectives))}
    return {**reached, **{f"budget/{limit}": value for limit, value in used(spec, state).as_dict().items()}}
