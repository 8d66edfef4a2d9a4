"""What a search found, as text for a terminal."""

from __future__ import annotations

from search.advice import doubts, recommendation_lines
from search.bases import NOTE, adapter_lines, bases_table
from search.budget import amount_text, used, used_by_seeds
from search.confidence import confirmed, failure_lines, rival_lines, score_text
from search.data_scaling import data_curves, scaling_lines
from search.formatting import aligned, number_text, short_text
from search.pareto import hypervolume_of
from search.provenance import command_in
from search.record import HarnessRun, TrialRecord
from search.results import Results
from search.tables import WORTH_SEEING, front_table, stopped_line
from spaces.metrics import MFU, PEAK_MEMORY_BYTES, TOKENS_PER_SECOND, TRAIN_SECONDS


def render_front(results: Results) -> str:
    """Return the front as a table, with the recommendation and the way to MLflow."""
    members = results.members
    heading, rows = front_table(members, results.spec, results.objectives, WORTH_SEEING)
    lines = aligned([heading, *rows])
    volume = hypervolume_of(results.records, results.objectives)
    text = f"front of {len(members)}"
    if volume is not None:
        corner = (f"{o.metric} {number_text(o.metric, o.reference)}" for o in results.objectives if o.reference is not None)
        text += f"; hypervolume {volume:.6g} against {', '.join(corner)}"
    lines += ["", text]
    if results.state.started and not results.state.finished:
        going = f"{len(results.state.in_flight)} trials are in flight; `{command_in(results.directory, 'resume', results.name)}`"
        lines.append(f"not at its end: {going} goes on, where no other process does")
    untrained = results.state.reference or {}
    if shown := {o.metric: untrained[o.metric] for o in results.objectives if o.metric in untrained}:
        lines.append("untrained model: " + ", ".join(f"{m} {number_text(m, v)}" for m, v in shown.items()))
    spent = ", ".join(amount_text(limit, value) for limit, value in used_by_seeds(results.spec, results.state).items())
    lines.append(f"used: {used(results.spec, results.state).text()}" + (f"; by further seeds: {spent}" if spent else ""))
    stopped = stopped_line(results.records)
    lines += [stopped] if stopped else []
    lines += recommendation_lines(members, results.objectives, results.name)
    lines += adapter_lines(results.records, results.objectives)
    if members and not any(r.confirmations for r in members):
        command = command_in(results.directory, "confirm", results.name)
        lines.append(f"one seed each: `{command}` trains the members with further seeds, and says how sure this is")
    if (bases := bases_table(results.records, results.objectives)) is not None:
        lines += ["", *aligned([bases[0], *bases[1]]), NOTE, ""]
    lines += scaling_lines(data_curves(results.records))
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
