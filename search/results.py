"""What a finished or running search found, read from its directory or from MLflow alone, as text and as JSON."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.advice import best_in, doubts, knee, known_values, recommendation_lines, within
from search.bases import NOTE, bases_table
from search.budget import used
from search.calibration import calibration_as_json
from search.confidence import confirmed, confirmed_as_json, failure_lines, rival_lines, score_text
from search.data_scaling import data_curves, scaling_as_json, scaling_lines
from search.endpoint import redacted
from search.formatting import aligned, number_text, short_text
from search.ledger import SearchState, objectives_of
from search.pareto import front, hypervolume_of
from search.provenance import command_in, reproduce_command
from search.record import HarnessRun, TrialRecord, TrialState
from search.report import write_report
from search.store import Store, StoreError
from search.tables import WORTH_SEEING, front_table, stopped_line
from spaces.loading import parse_spec
from spaces.metrics import MFU, PEAK_MEMORY_BYTES, TOKENS_PER_SECOND, TRAIN_SECONDS
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

    @property
    def members(self) -> list[TrialRecord]:
        return front(list(self.state.records.values()), self.objectives)

    def command_of(self, record: TrialRecord) -> str:
        """Return the command that trains a trial again."""
        return self.fetch_spec + reproduce_command(self.spec, self.spec_path, self.name, record.number, record.params)


def load_results(name: str, directory: Path, tracking_uri: str | None = None) -> Results:
    """Read a search from its directory, or from MLflow if a tracking URI is given.

    Raises:
        StoreError: there is no such search.
        search.tracking.TrackingError: MLflow does not answer, or does not know it.
    """
    if tracking_uri is None:
        store = Store.open(name, directory)
        spec = store.load_spec().spec
        state = store.state()
        return Results(
            name=store.name,
            spec=spec,
            spec_path=str(store.spec_path),
            directory=store.root.parent,
            report_path=store.report_path,
            state=state,
            objectives=objectives_of(spec, state),
        )
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
        StoreError: no member satisfies the limits.
    """
    members = within(results.members, limits)
    if not members:
        wanted = ", ".join(f"{metric} {op} {number_text(metric, value)}" for metric, (op, value) in limits.items())
        spans = [[value for value in known_values(results.members, m) if value is not None] for m in limits]
        there = ", ".join(
            f"{m} from {number_text(m, min(s))} to {number_text(m, max(s))}" for m, s in zip(limits, spans, strict=True) if s
        )
        raise StoreError(f"no member of the front of {results.name} has {wanted or 'a result'}; the front has {there or 'no member'}")
    chosen = knee(members, results.objectives) if at_knee else None
    # Within the limits on the others, the best in the first objective is what the user is after.
    return chosen or best_in(members, results.objectives, results.objectives[0])


def front_as_json(results: Results) -> dict[str, Any]:
    """Return the front with its commands, ready for JSON."""
    records = list(results.state.records.values())
    return {
        "search": results.name,
        "objectives": [{"metric": o.metric, "direction": o.direction, "reference": o.reference} for o in results.objectives],
        "hypervolume": hypervolume_of(records, results.objectives),
        "reference": results.state.reference,
        "used": used(results.spec, results.state).as_dict(),
        "trials": {s.value: sum(r.state is s for r in records) for s in TrialState},
        "front": [pick_as_json(results, record) for record in results.members],
        "scaling": scaling_as_json(data_curves(records)),
        "calibration": calibration_as_json(records),
    }


def pick_as_json(results: Results, record: TrialRecord) -> dict[str, Any]:
    """Return one trial with its configuration, results and command, ready for JSON."""
    plain = record.to_dict()
    return {
        "number": record.number,
        "params": record.params,
        "config": record.config,
        "metrics": record.values,
        "test": record.test,
        "confirmed": confirmed_as_json(record, results.objectives),
        "confirmations": plain["confirmations"],
        "harness": plain["harness"],
        "command": results.command_of(record),
    }


def render_front(results: Results) -> str:
    """Return the front as a table, with the recommendation and the way to MLflow."""
    members = results.members
    heading, rows = front_table(members, results.spec, results.objectives, WORTH_SEEING)
    lines = aligned([heading, *rows])
    volume = hypervolume_of(list(results.state.records.values()), results.objectives)
    text = f"front of {len(members)}"
    if volume is not None:
        corner = (f"{o.metric} {number_text(o.metric, o.reference)}" for o in results.objectives if o.reference is not None)
        text += f"; hypervolume {volume:.6g} against {', '.join(corner)}"
    lines += ["", text]
    untrained = results.state.reference or {}
    if shown := {o.metric: untrained[o.metric] for o in results.objectives if o.metric in untrained}:
        lines.append("untrained model: " + ", ".join(f"{m} {number_text(m, v)}" for m, v in shown.items()))
    lines.append(f"used: {used(results.spec, results.state).text()}")
    stopped = stopped_line(list(results.state.records.values()))
    lines += [stopped] if stopped else []
    lines += recommendation_lines(members, results.objectives, results.name)
    if members and not any(r.confirmations for r in members):
        command = command_in(results.directory, "confirm", results.name)
        lines.append(f"one seed each: `{command}` trains the members with further seeds, and says how sure this is")
    if (bases := bases_table(list(results.state.records.values()), results.objectives)) is not None:
        lines += ["", *aligned([bases[0], *bases[1]]), NOTE, ""]
    lines += scaling_lines(data_curves(results.state.records.values()))
    written = results.report_path / "report.html"
    if written.exists():
        lines.append(f"report: {written}")
    link = (results.state.started or {}).get("mlflow_url")
    if link:
        lines += [f"MLflow: {link}", f"        (after `{command_in(results.directory, 'ui')}`)"]
    return "\n".join(lines)


def render_pick(results: Results, record: TrialRecord) -> str:
    """Return one trial as text: its results, its configuration, its command."""
    lines = [f"trial {record.number} of {results.name}", *doubts([record]), "", "measured"]
    lines += [f"  {m}: {score_text(record, m)}" for m in sorted(record.values)]
    if record.test:
        lines += ["on the test file", *(f"  {m}: {number_text(m, v)}" for m, v in sorted(record.test.items()))]
    if record.harness:
        lines += ["lm-evaluation-harness", *(f"  {line}" for run in record.harness for line in harness_lines(run))]
    lines += _confirmed_lines(results, record)
    lines += ["configuration", *(f"  {knob}: {short_text(value)}" for knob, value in record.shown_params.items())]
    return "\n".join([*lines, "", "to train it again", results.command_of(record)])


def harness_lines(run: HarnessRun) -> list[str]:
    """Return a model's scores on a task, each in a line."""
    rows = "" if run.limit is None else f" (of {run.limit} rows)"
    return [f"{name}: {run.text(name)}{rows}" for name in run.own]


def _confirmed_lines(results: Results, record: TrialRecord) -> list[str]:
    if not record.confirmations:
        command = command_in(results.directory, "confirm", results.name, "--trials", str(record.number))
        return [f"not confirmed: `{command}` trains it with further seeds"]
    metrics = dict.fromkeys([*(o.metric for o in results.objectives), TRAIN_SECONDS, TOKENS_PER_SECOND, MFU, PEAK_MEMORY_BYTES])
    texts = [f"{c.metric}: {c.text}" for m in metrics if (c := confirmed(record, m)) is not None]
    texts += rival_lines(record, results.members, results.objectives) + failure_lines(record)
    return ["confirmed with further seeds, each trained alone", *(f"  {text}" for text in texts)]


def write_results(results: Results) -> list[Path]:
    """Write the report of the search into its directory; return the files."""
    chosen = knee(results.members, results.objectives)
    command = results.command_of(chosen) if chosen else ""
    return list(write_report(results.state, results.spec, results.objectives, results.report_path, command=command).values())
