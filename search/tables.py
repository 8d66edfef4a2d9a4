"""The tables of a report: for people, as CSV and as JSON."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from search.calibration import calibrate
from search.confidence import confirmed, score_text
from search.data_scaling import DataCurve
from search.figures import outcome
from search.formatting import number_text, short_text
from search.record import TrialRecord, TrialState
from search.results import Results, front_as_json
from spaces.metrics import CUSTOM, EXACT_MATCH, MFU, PEAK_MEMORY_BYTES, TOKENS_PER_SECOND, in_order, metric_of
from spaces.spec import Objective, SearchSpec

# Of a front, beside its objectives: scores of completions, which are there where they were asked for, and how the hardware was used.
WORTH_SEEING = (EXACT_MATCH, CUSTOM, TOKENS_PER_SECOND, MFU, PEAK_MEMORY_BYTES)


def write_tables(results: Results, scaling: Sequence[DataCurve]) -> dict[str, Path]:
    """Write the front, all trials, what was predicted of them and the loss by rows as CSV, the front as JSON; return the files."""
    directory, records = results.report_path, results.records
    paths = {
        "front_csv": directory / "front.csv",
        "trials_csv": directory / "trials.csv",
        "calibration_csv": directory / "calibration.csv",
        "scaling_csv": directory / "scaling.csv",
        "confirmations_csv": directory / "confirmations.csv",
        "json": directory / "front.json",
    }
    _write_csv(paths["front_csv"], results.members)
    _write_csv(paths["trials_csv"], records)
    _write_calibration(paths["calibration_csv"], records)
    _write_scaling(paths["scaling_csv"], scaling)
    _write_confirmations(paths["confirmations_csv"], records)
    paths["json"].write_text(json.dumps(front_as_json(results), indent=2))
    return paths


def _write_csv(path: Path, records: Sequence[TrialRecord]) -> None:
    knobs = list(dict.fromkeys(k for r in records for k in r.params))
    metrics = in_order(m for r in records for m in r.values)
    tested = in_order(m for r in records for m in r.test)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        heading = ["trial", "outcome", "stopped", "source", "noise"]
        writer.writerow([*heading, *metrics, *(f"test_{m}" for m in tested), *knobs])
        for r in records:
            values = [r.values.get(m, "") for m in metrics] + [r.test.get(m, "") for m in tested]
            source = "" if r.source is None else r.source
            writer.writerow([r.number, outcome(r), r.why_stopped, source, r.noise, *values, *(r.params.get(k, "") for k in knobs)])


def _write_calibration(path: Path, records: Sequence[TrialRecord]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "what", "source", "predicted", "measured", "error"])
        for row in calibrate(records):
            writer.writerow([row.number, row.what, row.source, row.predicted, row.measured, row.error])


def _write_scaling(path: Path, curves: Sequence[DataCurve]) -> None:
    """Write every curve's points with what its law says there, and the law alone with all rows and twice as many."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["adapter", "adapter_rank", "trial", "rows", "eval_loss", "law", "law_loss", "low", "high"])
        for curve in curves:
            measured = [(point.number, point.rows, point.loss) for point in curve.points]
            for number, rows, loss in [*measured, ("", curve.total_rows, ""), ("", 2 * curve.total_rows, "")]:
                said = curve.fit.loss(rows) if curve.fit else None
                if said or number != "":
                    law = (curve.fit.law.kind, said.value, said.low, said.high) if curve.fit and said else ("", "", "", "")
                    writer.writerow([curve.adapter, curve.adapter_rank, number, rows, loss, *law])


def _write_confirmations(path: Path, records: Sequence[TrialRecord]) -> None:
    """Write every further seed of every trial, with what it gave."""
    rows = [(r, c) for r in records for c in r.confirmations]
    metrics = in_order(m for _, c in rows for m in c.values)
    tested = in_order(m for _, c in rows for m in c.test)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "seed", "state", *metrics, *(f"test_{m}" for m in tested), "error"])
        for r, c in rows:
            values = [c.values.get(m, "") for m in metrics] + [c.test.get(m, "") for m in tested]
            writer.writerow([r.number, c.seed, c.state.value, *values, f"{c.error['kind']}: {c.error['message']}" if c.error else ""])


def complete_text(records: Sequence[TrialRecord]) -> str:
    """Return how many trials are complete, and of how many of a recipe that was trained the steps were timed."""
    complete = [record for record in records if record.state is TrialState.COMPLETE]
    num_timed = sum(record.source is not None for record in complete)
    return f"{len(complete) - num_timed} complete" + (f" and {num_timed} timed" if num_timed else "")


def stopped_line(records: Sequence[TrialRecord]) -> str:
    """Return in one sentence how many trials were stopped at which rung; empty of none."""
    shares = Counter(r.stopped["share"] for r in records if r.stopped is not None)
    counts = ", ".join(f"{count} at {share:.0%} of their steps" for share, count in sorted(shares.items()))
    return f"Stopped early, because too many others were better there: {counts}." if counts else ""


def stopped_table(
    records: Sequence[TrialRecord], spec: SearchSpec, objectives: Sequence[Objective]
) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the trials that were stopped at a rung, with what they had reached there."""
    knobs = spec.space.names_searched()
    metrics = [o.metric for o in objectives if metric_of(o.metric).is_interim]
    heading = ["trial", "stopped at", "place", "front", *metrics, *knobs]
    rows = [
        [
            str(r.number),
            f"{r.stopped['share']:.0%}",
            f"{r.stopped['place']} of {r.stopped['num_entries']}",
            f"{r.stopped['front']} of {r.stopped['num_fronts']}",
            *(number_text(m, r.reports[-1]["metrics"].get(m)) for m in metrics),
            *(short_text(r.shown_params.get(k)) for k in knobs),
        ]
        for r in records
        if r.stopped is not None and r.reports
    ]
    return [h.replace("_", " ") for h in heading], rows


def front_table(
    members: Sequence[TrialRecord], spec: SearchSpec, objectives: Sequence[Objective], others: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the front as people read it: the objectives and what was measured of the others."""
    metrics = [*dict.fromkeys([*(o.metric for o in objectives), *others])]
    metrics = [m for m in metrics if any(m in r.values for r in members)]
    tested = [m for m in metrics if any(m in r.test for r in members)]
    sure = [o.metric for o in objectives if any(confirmed(r, o.metric) for r in members)]
    knobs = spec.space.names_searched()
    heading = ["trial", *metrics, *(f"test {m}" for m in tested), *(f"confirmed {m}" for m in sure), *knobs]
    rows = [
        [
            str(r.number),
            *(score_text(r, m) for m in metrics),
            *(number_text(m, r.test.get(m)) for m in tested),
            *(c.short_text if (c := confirmed(r, m)) is not None else "-" for m in sure),
            *(short_text(r.shown_params.get(k)) for k in knobs),
        ]
        for r in members
    ]
    return [h.replace("_", " ") for h in heading], rows
