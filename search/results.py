"""What a finished or running search found, read from its directory or from MLflow alone, and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.advice import best_in, knee, known_values, recommended, within
from search.budget import used
from search.calibration import calibration_as_json
from search.confidence import confirmed_as_json
from search.data_scaling import data_curves, scaling_as_json
from search.endpoint import redacted
from search.errors import UserError
from search.formatting import number_text
from search.ledger import SearchState, objectives_of
from search.pareto import front, hypervolume_of
from search.provenance import reproduce_command
from search.record import TrialRecord, TrialState
from search.store import Store
from spaces.loading import parse_spec
from spaces.spec import Objective, SearchSpec

SPEC_FILE = "spec.yaml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """A search as a reader sees it."""

    name: str
    spec: SearchSpec
    spec_path: str
    """What the reproducing command names: the spec that the search wrote for itself."""
    directory: Path
    """Where the search is, beside others; of one that was read from MLflow, where its own machine has it."""
    report_path: Path
    """Where `paretune report` writes."""
    state: SearchState
    objectives: tuple[Objective, ...]
    fetch_spec: str = ""
    """What a shell runs before the reproducing command to get the spec, if it is not here."""

    @classmethod
    def of(cls, store: Store, state: SearchState | None = None) -> Results:
        """Return what the search of a directory found, as far as `state` knows, by default all that is written there."""
        spec, state = store.load_spec().spec, state or store.state()
        return cls(
            name=store.name,
            spec=spec,
            spec_path=str(store.spec_path),
            directory=store.root.parent,
            report_path=store.report_path,
            state=state,
            objectives=objectives_of(spec, state),
        )

    @property
    def records(self) -> list[TrialRecord]:
        return list(self.state.records.values())

    @property
    def members(self) -> list[TrialRecord]:
        return front(self.records, self.objectives)

    @property
    def recommended(self) -> TrialRecord | None:
        """The trial to take; None where none is worth it."""
        return recommended(self.members, self.objectives)

    def command_of(self, record: TrialRecord) -> str:
        """Return the command that trains a trial again."""
        return self.fetch_spec + reproduce_command(self.spec, self.spec_path, self.name, record.number, record.params)


def load_results(name: str, directory: Path, tracking_uri: str | None = None) -> Results:
    """Read a search from its directory, or from MLflow if a tracking URI is given.

    Raises:
        UserError: there is no such search.
        search.tracking.TrackingError: MLflow does not answer, or does not know it.
    """
    if tracking_uri is None:
        return Results.of(Store.open(name, directory))
    from search.tracked import load_search

    found = load_search(tracking_uri, name)
    spec = parse_spec(found.spec_yaml, f"{tracking_uri}: {name}/spec.yaml")
    state = SearchState(records={r.number: r for r in found.records}, reference=found.reference)
    return Results(
        name=found.name,
        spec=spec,
        spec_path=f"{found.name}-spec/{SPEC_FILE}",
        directory=Path(spec.directory),
        # Not over the report of the search itself, which knows more.
        report_path=Path(f"{found.name}-report"),
        fetch_spec=f"MLFLOW_TRACKING_URI={shlex.quote(redacted(tracking_uri))} mlflow artifacts download "
        f"--run-id {found.run_id} --artifact-path {SPEC_FILE} --dst-path {shlex.quote(found.name)}-spec && ",
        state=state,
        objectives=objectives_of(spec, state),
    )


def pick_one(results: Results, limits: Mapping[str, tuple[str, float]], *, at_knee: bool) -> TrialRecord:
    """Return the member of the front that a user with these limits wants.

    Raises:
        UserError: no member satisfies the limits.
    """
    members = within(results.members, limits)
    if not members:
        wanted = ", ".join(f"{metric} {op} {number_text(metric, value)}" for metric, (op, value) in limits.items())
        spans = [[value for value in known_values(results.members, m) if value is not None] for m in limits]
        there = ", ".join(
            f"{m} from {number_text(m, min(s))} to {number_text(m, max(s))}" for m, s in zip(limits, spans, strict=True) if s
        )
        raise UserError(f"no member of the front of {results.name} has {wanted or 'a result'}; the front has {there or 'no member'}")
    chosen = knee(members, results.objectives) if at_knee else None
    # Within the limits on the others, the best in the first objective is what the user is after.
    return chosen or best_in(members, results.objectives, results.objectives[0])


def front_as_json(results: Results) -> dict[str, Any]:
    """Return the front with its commands, ready for JSON."""
    records = results.records
    return {
        "search": results.name,
        "objectives": [{"metric": o.metric, "direction": o.direction, "reference": o.reference} for o in results.objectives],
        "hypervolume": hypervolume_of(records, results.objectives),
        "reference": results.state.reference,
        "used": used(results.spec, results.state).as_dict(),
        "trials": {s.value: sum(r.state is s for r in records) for s in TrialState},
        "recommended": number_of(results.recommended),
        "knee": number_of(knee(results.members, results.objectives)),
        "front": [pick_as_json(results, record) for record in results.members],
        "scaling": scaling_as_json(data_curves(records)),
        "calibration": calibration_as_json(records),
    }


def number_of(record: TrialRecord | None) -> int | None:
    """Return a trial's number; None of none."""
    return None if record is None else record.number


def pick_as_json(results: Results, record: TrialRecord) -> dict[str, Any]:
    """Return one trial with its configuration, results and command, ready for JSON."""
    plain = record.to_dict()
    return {
        "number": record.number,
        "source": record.source,
        "noise": record.noise,
        "params": record.params,
        "config": record.config,
        "metrics": record.values,
        "test": record.test,
        "confirmed": confirmed_as_json(record, results.objectives),
        "confirmations": plain["confirmations"],
        "harness": plain["harness"],
        "command": results.command_of(record),
    }


def why_nothing(records: Iterable[TrialRecord]) -> str:
    """Return in words why no trial of a search succeeded."""
    failures: dict[str, int] = {}
    for record in records:
        if record.state is TrialState.FAIL and record.error:
            key = f"{record.error['kind']}: {record.error['message']}"
            failures[key] = failures.get(key, 0) + 1
    reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(failures.items(), key=lambda kv: -kv[1])[:3])
    return f"no trial succeeded: {reasons or 'none was completed'}"
