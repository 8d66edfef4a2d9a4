"""What a search says about more data: the best loss of each adapter against its training rows, the law through it, and its words.

A search varies the data together with everything else, so the law goes through a lower envelope. Sizes are all rows, and from there
down by factors of the square root of two; of the complete trials of one adapter and rank that are nearest to a size, the one with the
lowest loss counts, at its own number of rows, whatever its learning rate, batch size and epochs. That is what the search found near
each size: an upper bound of what can be reached, and the fewer trials were there, the further above it may lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from search.formatting import number_text
from search.record import TrialRecord, TrialState
from search.scaling import MAX_TIMES, NoLaw, Range, ScalingFit, fit_law
from spaces.config import ADAPTER_KNOBS
from spaces.metrics import EVAL_LOSS

# Doubling the data pays as long as it lowers the loss by more nats than this: one percent of the perplexity.
WORTHWHILE_NATS = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class SizePoint:
    """The best trial near one size of the data."""

    number: int
    rows: int
    """Training rows that it saw, however often."""
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCurve:
    """The best loss of one adapter against its training rows."""

    adapter: str
    adapter_rank: int | None
    """None: no rank, or all together, where no single one was trained on enough sizes."""
    points: tuple[SizePoint, ...]
    """By ascending rows."""
    total_rows: int
    fit: ScalingFit | None
    reason: str
    """Why there is no law; empty where there is one."""

    @property
    def label(self) -> str:
        """Return what was trained, in words."""
        if self.adapter == "none":
            return "full fine-tuning"
        if "lora_rank" not in ADAPTER_KNOBS.get(self.adapter.rpartition(" ")[2], ()):  # type: ignore[call-overload]
            return self.adapter
        return f"{self.adapter} of {'any rank' if self.adapter_rank is None else f'rank {self.adapter_rank}'}"


def data_curves(records: Iterable[TrialRecord]) -> list[DataCurve]:
    """Return a curve for each adapter and rank with enough sizes for a law, and for the other adapters one over all ranks."""
    groups: dict[str, dict[int | None, list[tuple[SizePoint, int]]]] = {}
    for record in records:
        sized = _sized(record)
        if sized is not None:
            recipe = (record.config or {})["recipe"]
            quantization = recipe.get("quantization", "none")  # of a search before there was one
            adapter = recipe["adapter"] if quantization == "none" else f"{quantization} {recipe['adapter']}"
            groups.setdefault(adapter, {}).setdefault(recipe["adapter_rank"], []).append(sized)
    curves = []
    for adapter, ranks in sorted(groups.items()):
        # Ranks are no labels but numbers; None comes alone.
        single = [_curve(adapter, rank, trials) for rank, trials in sorted(ranks.items(), key=lambda item: item[0] or 0)]
        if any(curve.fit for curve in single):
            curves += [curve for curve in single if curve.fit]
        else:
            curves.append(_curve(adapter, None, [trial for trials in ranks.values() for trial in trials]))
    return curves


def _sized(record: TrialRecord) -> tuple[SizePoint, int] | None:
    """Return a trial's place on a curve and all rows that there are; None for one that is not complete or says neither."""
    loss = record.values.get(EVAL_LOSS, 0.0)
    rows, total = record.details.get("distinct_rows"), record.details.get("train_rows")
    if record.state is not TrialState.COMPLETE or not record.config or not rows or not total or not 0 < loss < math.inf:
        return None
    return SizePoint(number=record.number, rows=rows, loss=loss), total


def _curve(adapter: str, rank: int | None, trials: Sequence[tuple[SizePoint, int]]) -> DataCurve:
    total = max(rows for _, rows in trials)
    points = envelope([point for point, _ in trials], total)
    fit, reason = None, ""
    try:
        fit = fit_law([p.rows for p in points], [p.loss for p in points])
    except NoLaw as error:
        reason = str(error)
    return DataCurve(adapter=adapter, adapter_rank=rank, points=points, total_rows=total, fit=fit, reason=reason)


def envelope(points: Iterable[SizePoint], total_rows: int) -> tuple[SizePoint, ...]:
    """Return the point of the lowest loss near each size, by ascending rows; sizes are a factor of the square root of two apart."""
    best: dict[int, SizePoint] = {}
    for point in points:
        size = round(2 * math.log2(total_rows / point.rows))
        if size not in best or point.loss < best[size].loss:
            best[size] = point
    return tuple(sorted(best.values(), key=lambda point: point.rows))


def scaling_lines(curves: Sequence[DataCurve]) -> list[str]:
    """Return one line for every law: what all rows give and twice as many, and when more data stops paying."""
    return [f"more data, {curve.label}: {_said(curve, curve.fit)}" for curve in curves if curve.fit]


def missing_lines(curves: Sequence[DataCurve]) -> list[str]:
    """Return one line for every curve without a law, and why."""
    return [f"no law for {curve.label}: {curve.reason}" for curve in curves if not curve.fit]


def _said(curve: DataCurve, fit: ScalingFit) -> str:
    total = curve.total_rows
    law = f"a {fit.law.kind} law through {fit.num_points} sizes from {fit.smallest:,.0f} to {fit.largest:,.0f} rows"
    full, twice = (_loss_text(fit.loss(rows)) for rows in (total, 2 * total))
    stop = fit.stops_paying(WORTHWHILE_NATS)
    most = fit.largest * MAX_TIMES
    said = f"{law} says {EVAL_LOSS} {full} with all {total:,} and {twice} with twice as many ({fit.level:.0%} intervals)"
    if fit.loss(2 * total).high >= fit.loss(fit.largest).value:
        return f"{law} does not tell whether more data pays: {EVAL_LOSS} {full} with all {total:,} ({fit.level:.0%} interval)"
    if stop.value > most:
        early = "" if stop.low > most else f", or less from {stop.low:,.0f} rows on"
        return f"{said}; a doubling gains {WORTHWHILE_NATS} nats or more even at {MAX_TIMES:,.0f} times as many{early}"
    until = "" if stop.high <= most else " or never"
    return f"{said}; a doubling gains less than {WORTHWHILE_NATS} nats beyond {stop.value:,.0f} rows ({_span(stop, most)}{until})"


def _loss_text(loss: Range) -> str:
    value, low, high = (number_text(EVAL_LOSS, x) for x in (loss.value, loss.low, loss.high))
    return f"{value} ({low} to {high})"


def _span(rows: Range, most: float) -> str:
    return f"{rows.low:,.0f} to {min(rows.high, most):,.0f}"


def scaling_as_json(curves: Sequence[DataCurve]) -> list[dict[str, Any]]:
    """Return the curves with their laws, ready for JSON; what is infinite is null."""
    return [
        {
            "adapter": curve.adapter,
            "adapter_rank": curve.adapter_rank,
            "points": [asdict(point) for point in curve.points],
            "total_rows": curve.total_rows,
            "reason": curve.reason,
            "law": None if curve.fit is None else _law_as_json(curve.fit, curve.total_rows),
        }
        for curve in curves
    ]


def _law_as_json(fit: ScalingFit, total: int) -> Mapping[str, Any]:
    said = {
        "loss_with_all": fit.loss(total),
        "loss_with_twice": fit.loss(2 * total),
        "gain_of_doubling": fit.gain(total),
        "rows_where_doubling_stops_paying": fit.stops_paying(WORTHWHILE_NATS),
    }
    return {
        "kind": fit.law.kind,
        **asdict(fit.law),
        "level": fit.level,
        "noise": fit.noise,
        **{name: {k: v if math.isfinite(v) else None for k, v in asdict(range_).items()} for name, range_ in said.items()},
    }
