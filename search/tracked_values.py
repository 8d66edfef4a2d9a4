"""What MLflow is told of a trial in numbers: names, and values as they follow from its record."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from search.confidence import confirmed
from search.record import TrialRecord
from spaces.metrics import TOTAL_SECONDS, TRAIN_SECONDS, in_order, is_known, metric_of


def tracked_name(metric: str) -> str:
    """Return a metric's name in MLflow."""
    return metric_of(metric).tracked_name if is_known(metric) else metric


def metric_name(name: str) -> str:
    """Return a name with nothing in it that MLflow refuses."""
    return re.sub(r"[^\w./ :-]", "_", name)


def predicted_metrics(record: TrialRecord) -> dict[str, float]:
    """Return what was said of a trial before it ran."""
    metrics = {f"predicted/{term}": float(value) for term, value in record.predicted.get("memory", {}).items()}
    seconds = record.predicted.get(TRAIN_SECONDS)
    return metrics if seconds is None else {**metrics, f"predicted/{TRAIN_SECONDS}": seconds}


def memory_metrics(record: TrialRecord) -> dict[str, float]:
    """Return what every rank held, and why."""
    return {
        f"memory/rank{rank}/{term}": float(value)
        for rank, terms in enumerate(record.details.get("memory_by_rank", ()))
        for term, value in (terms or {}).items()
    }


def confirmed_metrics(record: TrialRecord) -> dict[str, float]:
    """Return means over the further seeds, each with the half width of its interval, for the trial's own run."""
    scored = in_order(m for c in record.confirmations for m in (*c.values, *c.test))
    wanted = [m for m in scored if m == TRAIN_SECONDS or metric_of(m).section == "eval"]
    found = [c for m in wanted if (c := confirmed(record, m)) is not None]
    means = {f"confirmed/{c.split + '_' if c.split else ''}{c.metric}": c.estimate for c in found}
    halves = {f"{name}_half_width": e.half_width for name, e in means.items() if e.half_width is not None}
    return {**{name: e.mean for name, e in means.items()}, **halves}


def loss_curve(record: TrialRecord, report: Mapping[str, Any], time_ms: int) -> Iterator[tuple[int, float, int]]:
    """Yield the training losses that no earlier report has told, with their last steps and about when that was, in milliseconds.

    Args:
        record: the trial.
        report: of it, the newest.
        time_ms: when that came.
    """
    metrics, details = report["metrics"], report["details"]
    earlier = (r for r in record.reports if r["step"] < report["step"] and "train_losses" in r["details"])
    told = max((r["step"] for r in earlier), default=0)
    # `train_seconds` is of the whole training, also before its end.
    share = report["step"] / report["num_steps"]
    took_ms = 1000 * metrics.get(TOTAL_SECONDS, share * metrics.get(TRAIN_SECONDS, 0.0))
    for number, loss in enumerate(details.get("train_losses", ()), start=1):
        step = min(number * details.get("steps_per_loss", 1), report["step"])
        if step > told:
            yield step, loss, int(time_ms - took_ms * (1 - step / report["step"]))
