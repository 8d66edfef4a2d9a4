"""What the figures of a report show, as plain data; `report` draws it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from search.advice import knee
from search.confidence import LEVEL, confirmed, score_text
from search.data_scaling import DataCurve, SizePoint
from search.formatting import number_text, short_text
from search.ledger import SearchState
from search.pareto import cost_objective, eligible, front, hypervolume_of
from search.record import TrialRecord, TrialState
from spaces.metrics import is_known, metric_of
from spaces.spec import Objective

FRONT_COLOR, OTHER_COLOR, KNEE_COLOR, CONFIRMED_COLOR = "#d7191c", "#b8b8b8", "#2c7bb6", "#333333"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One complete trial in the figure of the front."""

    number: int
    x: float
    y: float
    on_front: bool
    hover: tuple[str, ...]
    """Lines about the trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfirmedPoint:
    """Where further seeds see a trial, with the interval along both axes."""

    number: int
    x: tuple[float, float, float]
    """Mean, low and high; all the same where there are too few seeds for an interval."""
    y: tuple[float, float, float]
    searched: tuple[float, float]
    """Where the search saw it."""
    hover: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontFigure:
    """The price along x, what it buys along y."""

    x_metric: str
    y_metric: str
    points: tuple[Point, ...]
    steps: tuple[tuple[float, float], ...]
    """Corners of the line that bounds what was reached, by ascending x; empty for three objectives, which have none."""
    knee_number: int | None
    untrained: float | None
    """The untrained model's y."""
    confirmed: tuple[ConfirmedPoint, ...]
    confirmed_on: str
    """The rows that they were scored on: test or evaluation."""
    left_out: dict[str, int]
    """How many trials are not among the points, by what became of them."""

    @property
    def confirmed_label(self) -> str:
        """What the error bars are, for the legend."""
        rows = f" ({self.confirmed_on} rows)" if self.confirmed_on else ""
        return f"further seeds{rows}: mean, {LEVEL:.0%} interval"

    @property
    def is_log(self) -> bool:
        """Whether x is shown by its logarithm: time and memory trade by factors, so that shows the small end too."""
        return metric_of(self.x_metric).unit in ("s", "B") and all(p.x > 0 for p in self.points) and bool(self.points)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """The time in which a trial ran."""

    number: int
    begin_seconds: float
    end_seconds: float
    """Both since the search began."""
    state: str
    world_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBar:
    """The memory of one rank."""

    number: int
    label: str
    num_bytes: Mapping[str, float]
    """By term, from the bottom up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingLine:
    """The best losses of one adapter against the training rows, and the law through them."""

    label: str
    points: tuple[SizePoint, ...]
    rows: tuple[float, ...]
    """Where the law is drawn, up to twice all rows; empty without a law, as the three that follow."""
    loss: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One axis of the parallel coordinates: a knob or an objective, one position per trial."""

    label: str
    positions: tuple[float, ...]
    ticks: tuple[tuple[float, str], ...]
    """(position, text); empty where the positions are the numbers themselves."""


def axis_label(metric: str) -> str:
    """Return a metric's name with its unit, for an axis."""
    unit = metric_of(metric).unit
    return f"{metric.replace('_', ' ')} [{unit}]" if unit else metric.replace("_", " ")


def log_ticks(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2 and 5 times a power of ten between two positive ones."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= tick <= high]


def outcome(record: TrialRecord) -> str:
    """Return what became of a trial, in one word or two."""
    if not record.feasible_before_launch:
        return "infeasible"
    if record.state is TrialState.FAIL and record.error is not None:
        return record.error["kind"].replace("_", " ")
    if record.was_cut_off:
        return "cut off"
    return record.state.value.lower()


def front_figure(state: SearchState, knobs: Sequence[str], objectives: Sequence[Objective]) -> FrontFigure:
    """Return the figure of the front; with three objectives, its shadow on the price and the first other one."""
    records = list(state.records.values())
    shown = eligible(records, objectives)
    members = front(records, objectives)
    numbers = {record.number for record in members}
    price = cost_objective(objectives)
    x, y = price.metric, next(o.metric for o in objectives if o is not price)
    left_out: dict[str, int] = {}
    for record in records:
        if record not in shown:
            left_out[outcome(record)] = left_out.get(outcome(record), 0) + 1
    chosen = knee(members, objectives)
    return FrontFigure(
        x_metric=x,
        y_metric=y,
        points=tuple(
            Point(
                number=record.number,
                x=record.values[x],
                y=record.values[y],
                on_front=record.number in numbers,
                hover=_hover(record, knobs),
            )
            for record in shown
        ),
        steps=_steps(members, shown, x, y) if len(objectives) == 2 else (),
        knee_number=chosen.number if chosen else None,
        untrained=(state.reference or {}).get(y),
        confirmed=tuple(point for record in shown if (point := _confirmed_point(record, x, y)) is not None),
        confirmed_on=next((c.split for record in shown if (c := confirmed(record, y)) is not None), ""),
        left_out=left_out,
    )


def _confirmed_point(record: TrialRecord, x: str, y: str) -> ConfirmedPoint | None:
    along, up = confirmed(record, x), confirmed(record, y)
    if along is None or up is None:
        return None
    # A logarithmic axis has no place for an interval that reaches to nothing.
    low = along.estimate.low if along.estimate.low > 0 or along.estimate.mean <= 0 else min(record.values[x], along.estimate.mean) / 2
    return ConfirmedPoint(
        number=record.number,
        x=(along.estimate.mean, low, along.estimate.high),
        y=(up.estimate.mean, up.estimate.low, up.estimate.high),
        searched=(record.values[x], record.values[y]),
        hover=(f"trial {record.number}, confirmed", *(f"{c.metric} {c.text}" for c in (up, along))),
    )


def _hover(record: TrialRecord, knobs: Sequence[str]) -> tuple[str, ...]:
    measured = [f"{m} {score_text(record, m)}" for m in record.values if is_known(m)]
    tested = [f"test {m} {number_text(m, v)}" for m, v in record.test.items() if is_known(m)]
    chosen = [f"{k} = {short_text(record.shown_params[k])}" for k in knobs if k in record.params]
    noisy = [f"noisy: {record.noise}"] if record.noise else []
    return (f"trial {record.number}", *noisy, *measured, *tested, *chosen)


def _steps(members: Sequence[TrialRecord], shown: Sequence[TrialRecord], x: str, y: str) -> tuple[tuple[float, float], ...]:
    """Between two members, the best that is reached is still what the cheaper one reaches."""
    corners: list[tuple[float, float]] = []
    for member in members:
        if corners:
            corners.append((member.values[x], corners[-1][1]))
        corners.append((member.values[x], member.values[y]))
    if corners:
        corners.append((max(record.values[x] for record in shown), corners[-1][1]))
    return tuple(corners)


def hypervolume_history(state: SearchState, objectives: Sequence[Objective]) -> list[tuple[float, float]]:
    """Return (seconds since the search began, hypervolume) after every trial that ended."""
    begin = _begin(state)
    ended = sorted((r for r in state.records.values() if r.finished_at is not None), key=lambda r: r.finished_at or 0.0)
    history, members, volume = [], list[TrialRecord](), hypervolume_of([], objectives)
    if volume is None:
        return []
    for record in ended:
        # Whatever dominates a newcomer is on the front of those before it.
        known, members = members, front([*members, record], objectives)
        if members != known:
            volume = hypervolume_of(members, objectives) or 0.0
        history.append((state.active_until(record.finished_at or 0.0, begin), volume))
    return history


def timeline(state: SearchState) -> list[Span]:
    """Return when every trial that ran and ended did so, from when it had workers."""
    begin = _begin(state)

    def at(time: float) -> float:
        return state.active_until(time, begin)

    return [
        Span(
            number=record.number,
            begin_seconds=max(at(record.started_at), at(record.finished_at) - (record.held_seconds or math.inf)),
            end_seconds=at(record.finished_at),
            state=outcome(record),
            world_size=(record.config or {}).get("layout", {}).get("world_size", 1),
        )
        for record in state.records.values()
        if record.started_at is not None and record.finished_at is not None
    ]


def rung_curves(records: Sequence[TrialRecord], metric: str) -> dict[int, list[tuple[float, float]]]:
    """Return (fidelity, value) along every trial that reported the metric more than once."""
    curves = {
        record.number: [(r["fidelity"], r["metrics"][metric]) for r in record.reports if metric in r["metrics"]] for record in records
    }
    return {number: curve for number, curve in curves.items() if len(curve) > 1}


def memory_bars(records: Sequence[TrialRecord]) -> list[MemoryBar]:
    """Return what was predicted of every trial's rank, and what each of its ranks held."""
    bars = []
    for record in records:
        held = [(rank, terms) for rank, terms in enumerate(record.details.get("memory_by_rank", ())) if terms]
        predicted = record.predicted.get("memory")
        if predicted and held:
            bars.append(MemoryBar(number=record.number, label="predicted", num_bytes=predicted))
        bars += [MemoryBar(number=record.number, label=f"rank {rank}", num_bytes=terms) for rank, terms in held]
    return bars


def scaling_figure(curves: Sequence[DataCurve]) -> list[ScalingLine]:
    """Return what is drawn of every curve of the loss against the rows."""
    lines = []
    for curve in curves:
        rows = np.geomspace(curve.points[0].rows, 2 * curve.total_rows, 40).tolist() if curve.fit else []
        said = [curve.fit.loss(x) for x in rows] if curve.fit else []
        lines.append(
            ScalingLine(
                label=curve.label,
                points=curve.points,
                rows=tuple(rows),
                loss=tuple(s.value for s in said),
                low=tuple(s.low for s in said),
                high=tuple(s.high for s in said),
            )
        )
    return lines


def parallel_axes(records: Sequence[TrialRecord], knobs: Sequence[str], objectives: Sequence[Objective]) -> list[Axis]:
    """Return the axes of the parallel coordinates over the records: the knobs, then the objectives."""
    axes = [_knob_axis(knob, [record.params.get(knob) for record in records]) for knob in knobs]
    for objective in objectives:
        values = tuple(record.values[objective.metric] for record in records)
        axes.append(Axis(label=axis_label(objective.metric), positions=values, ticks=()))
    return axes


def _knob_axis(knob: str, values: Sequence[object]) -> Axis:
    numbers = [float(v) for v in values if isinstance(v, int | float)]
    if len(numbers) < len(values):
        names = sorted({str(v) for v in values})
        ticks = tuple((float(n), name) for n, name in enumerate(names))
        return Axis(label=knob, positions=tuple(float(names.index(str(v))) for v in values), ticks=ticks)
    distinct = sorted(set(numbers))
    is_wide = bool(distinct) and distinct[0] > 0 and distinct[-1] / distinct[0] >= 8
    if len(distinct) > 6 and not is_wide:
        return Axis(label=knob, positions=tuple(numbers), ticks=())
    # Knobs over orders of magnitude were searched by their logarithm, and are seen by it.
    scale = math.log10 if is_wide else float
    if len(distinct) > 6:
        distinct = log_ticks(distinct[0], distinct[-1])
    return Axis(
        label=knob,
        positions=tuple(scale(v) for v in numbers),
        ticks=tuple((scale(v), f"{v:.3g}") for v in distinct),
    )


def _begin(state: SearchState) -> float:
    """MLflow alone does not know when the search began, but when its first trial did."""
    if state.started is not None:
        return float(state.started["time"])
    return min((r.started_at for r in state.records.values() if r.started_at is not None), default=0.0)
