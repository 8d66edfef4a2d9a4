"""The report of a search: the figures' data first, then their drawing; one HTML file that works offline, a picture, tables."""

from __future__ import annotations

import csv
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.formatting import number_text, short_text
from search.ledger import SearchState
from search.pareto import front, hypervolume_of, knee
from search.record import TrialRecord, TrialState
from spaces.metrics import METRICS
from spaces.spec import Objective, SearchSpec

FRONT_COLOUR, OTHER_COLOUR, KNEE_COLOUR = "#d7191c", "#b8b8b8", "#2c7bb6"


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One trial in the figure of the front."""

    number: int
    x: float
    y: float
    on_front: bool
    hover: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FrontFigure:
    """What the figure of the front shows: the last objective along x, the first along y."""

    points: tuple[Point, ...]
    x_metric: str
    y_metric: str
    steps: tuple[tuple[float, float], ...]
    """Corners of the line that bounds what was reached, by ascending x."""
    knee_number: int | None
    untrained: float | None
    """The untrained model's y."""


def front_figure(state: SearchState, spec: SearchSpec, objectives: Sequence[Objective]) -> FrontFigure:
    """Return what the figure of the front shows."""
    records = list(state.records.values())
    members = front(records, objectives)
    numbers = {r.number for r in members}
    x, y = objectives[-1].metric, objectives[0].metric
    complete = [r for r in records if r.state is TrialState.COMPLETE and r.feasible]
    knobs = spec.space.names_searched()
    points = [
        Point(
            number=r.number,
            x=r.values[x],
            y=r.values[y],
            on_front=r.number in numbers,
            hover="<br>".join(
                [f"trial {r.number}", *(f"{m}: {number_text(m, v)}" for m, v in r.values.items() if m in METRICS)]
                + [f"{k} = {short_text(r.params[k])}" for k in knobs if k in r.params]
            ),
        )
        for r in complete
    ]
    steps: list[tuple[float, float]] = []
    for member in members:
        if steps:
            steps.append((member.values[x], steps[-1][1]))
        steps.append((member.values[x], member.values[y]))
    chosen = knee(members, objectives)
    return FrontFigure(
        points=tuple(points),
        x_metric=x,
        y_metric=y,
        steps=tuple(steps) if len(objectives) == 2 else (),
        knee_number=chosen.number if chosen else None,
        untrained=(state.reference or {}).get(y),
    )


def hypervolume_history(state: SearchState, objectives: Sequence[Objective]) -> list[tuple[float, float]]:
    """Return (seconds since the search began, hypervolume) after every trial that ended."""
    if state.started is None:
        return []
    ended = sorted((r for r in state.records.values() if r.finished_at), key=lambda r: r.finished_at or 0.0)
    volumes = [(r.finished_at or 0.0, hypervolume_of(ended[: i + 1], objectives)) for i, r in enumerate(ended)]
    return [(at - state.started["time"], volume) for at, volume in volumes if volume is not None]


def recommendation(members: Sequence[TrialRecord], objectives: Sequence[Objective], name: str) -> str:
    """Return the recommendation in one sentence."""
    chosen = knee(members, objectives)
    if chosen is None:
        return f"No trial of {name} gives a point of the front."
    first, last = objectives[0], objectives[-1]
    sign = -1.0 if first.direction == "maximize" else 1.0
    best = min(members, key=lambda r: sign * r.values[first.metric])

    def described(record: TrialRecord) -> str:
        parts = [f"{o.metric} {number_text(o.metric, record.values[o.metric])}" for o in (first, last)]
        if first.metric in record.test:
            parts.append(f"{number_text(first.metric, record.test[first.metric])} on the test file")
        return f"trial {record.number} ({', '.join(parts)})"

    if best.number == chosen.number:
        return f"Recommended: {described(best)}, the best of {name} and the knee of its front."
    return f"Recommended: {described(chosen)}, the knee of the front; the best is {described(best)}."


def write_report(
    state: SearchState, spec: SearchSpec, objectives: Sequence[Objective], directory: Path, *, command: str = ""
) -> dict[str, Path]:
    """Write `report.html`, `front.png`, `front.csv`, `trials.csv` and `front.json`; return them by kind."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {
        "html": directory / "report.html",
        "png": directory / "front.png",
        "front_csv": directory / "front.csv",
        "trials_csv": directory / "trials.csv",
        "json": directory / "front.json",
    }
    records = list(state.records.values())
    members = front(records, objectives)
    figure = front_figure(state, spec, objectives)
    _write_csv(paths["front_csv"], members)
    _write_csv(paths["trials_csv"], records)
    paths["json"].write_text(json.dumps([r.to_dict() for r in members], indent=2))
    _draw_png(figure, paths["png"], title=spec.name or "")
    paths["html"].write_text(_page(state, spec, objectives, figure, command), encoding="utf-8")
    return paths


def _write_csv(path: Path, records: Sequence[TrialRecord]) -> None:
    knobs = list(dict.fromkeys(k for r in records for k in r.params))
    metrics = [m for m in METRICS if any(m in r.values for r in records)]
    tested = [m for m in METRICS if any(m in r.test for r in records)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", *metrics, *(f"test_{m}" for m in tested), *knobs])
        for r in records:
            values = [r.values.get(m, "") for m in metrics] + [r.test.get(m, "") for m in tested]
            writer.writerow([r.number, r.state.value, *values, *(r.params.get(k, "") for k in knobs)])


def _label(metric: str) -> str:
    unit = METRICS[metric].unit
    return f"{metric.replace('_', ' ')}{f' [{unit}]' if unit else ''}"


def _draw_png(figure: FrontFigure, path: Path, *, title: str) -> None:
    # The object interface, not pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    others = [p for p in figure.points if not p.on_front]
    members = [p for p in figure.points if p.on_front]
    axes.scatter([p.x for p in others], [p.y for p in others], color=OTHER_COLOUR, label="dominated", zorder=2)
    if figure.steps:
        axes.plot(*zip(*figure.steps, strict=True), color=FRONT_COLOUR, linewidth=1, zorder=1)
    axes.scatter([p.x for p in members], [p.y for p in members], color=FRONT_COLOUR, label="front", zorder=3)
    for point in members:
        if point.number == figure.knee_number:
            axes.scatter([point.x], [point.y], s=160, facecolors="none", edgecolors=KNEE_COLOUR, label="knee", zorder=4)
        axes.annotate(str(point.number), (point.x, point.y), textcoords="offset points", xytext=(5, -11), fontsize=8)
    if figure.untrained is not None:
        axes.axhline(figure.untrained, color="black", linewidth=0.8, linestyle=":", label="untrained model")
    if METRICS[figure.x_metric].unit == "s" and figure.points:
        axes.set_xscale("log")
    axes.set(xlabel=_label(figure.x_metric), ylabel=_label(figure.y_metric), title=title)
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=8)
    drawing.savefig(path, dpi=130)


def _page(state: SearchState, spec: SearchSpec, objectives: Sequence[Objective], figure: FrontFigure, command: str) -> str:
    import plotly.io

    records = list(state.records.values())
    members = front(records, objectives)
    drawings = [_front_plot(figure), _parallel_plot(records, {r.number for r in members}, spec, objectives)]
    drawings += [_hypervolume_plot(state, objectives), _curves_plot(records, objectives), _memory_plot(members)]
    # The library is embedded once, in the first figure: 4.8 MB, and the file needs no network.
    bodies = [
        plotly.io.to_html(d, full_html=False, include_plotlyjs=i == 0, config={"displaylogo": False}) for i, d in enumerate(drawings)
    ]
    counts = {s.value: sum(r.state is s for r in records) for s in TrialState}
    facts = [f"{n} {s.lower()}" for s, n in counts.items() if n]
    volume = hypervolume_of(records, objectives)
    started = state.started or {}
    lines = [
        f"<h1>{html.escape(spec.name or 'search')}</h1>",
        f"<p><b>{html.escape(recommendation(members, objectives, spec.name or 'the search'))}</b></p>",
        f"<p><code>{html.escape(command)}</code></p>" if command else "",
        f"<p>Trials: {', '.join(facts)}. Hypervolume: {'unknown' if volume is None else f'{volume:.6g}'}. "
        f"{html.escape(str(started.get('machine', '')))}</p>",
        _html_table(members, spec, objectives),
        *bodies,
        "<h2>Data</h2><pre>" + html.escape(json.dumps(started.get("data", {}), indent=2)) + "</pre>",
    ]
    style = "body{font-family:sans-serif;max-width:1100px;margin:2em auto}table{border-collapse:collapse}"
    style += "td,th{border:1px solid #ccc;padding:3px 8px;text-align:right}pre{white-space:pre-wrap}"
    head = f"<meta charset='utf-8'><title>{html.escape(spec.name or 'paretune')}</title><style>{style}</style>"
    return f"<!doctype html><html><head>{head}</head><body>{''.join(lines)}</body></html>"


def _html_table(members: Sequence[TrialRecord], spec: SearchSpec, objectives: Sequence[Objective]) -> str:
    """The front as a table: readable without JavaScript."""
    knobs = spec.space.names_searched()
    columns = list(dict.fromkeys([*(o.metric for o in objectives), "mfu", "tokens_per_second", "peak_memory_bytes"]))
    first = objectives[0].metric
    tested = any(first in r.test for r in members)
    heading = ["trial", *columns, *([f"{first} on test"] if tested else []), *knobs]
    rows = [
        [str(r.number), *(number_text(m, r.values.get(m)) for m in columns)]
        + ([number_text(first, r.test.get(first))] if tested else [])
        + [short_text(r.params.get(k)) for k in knobs]
        for r in members
    ]
    cells = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in heading) + f"</tr>{cells}</table>"


def _front_plot(figure: FrontFigure) -> Any:
    from plotly import graph_objects as go

    drawing = go.Figure()
    for name, colour, chosen in (("dominated", OTHER_COLOUR, False), ("front", FRONT_COLOUR, True)):
        points = [p for p in figure.points if p.on_front is chosen]
        drawing.add_scatter(
            x=[p.x for p in points],
            y=[p.y for p in points],
            mode="markers+text" if chosen else "markers",
            text=[str(p.number) for p in points],
            textposition="bottom right",
            hovertext=[p.hover for p in points],
            hoverinfo="text",
            marker={
                "color": colour,
                "size": 9,
                "line": {"width": [3 * (p.number == figure.knee_number) for p in points]},
            },
            name=name,
        )
    if figure.steps:
        xs, ys = zip(*figure.steps, strict=True)
        drawing.add_scatter(x=xs, y=ys, mode="lines", line={"color": FRONT_COLOUR, "width": 1}, showlegend=False)
    if figure.untrained is not None:
        drawing.add_hline(y=figure.untrained, line_dash="dot", annotation_text="untrained model")
    kind = "log" if METRICS[figure.x_metric].unit == "s" else "linear"
    drawing.update_layout(title="The front; the knee is outlined", template="simple_white")
    drawing.update_xaxes(title=_label(figure.x_metric), type=kind)
    drawing.update_yaxes(title=_label(figure.y_metric))
    return drawing


def _parallel_plot(records: Sequence[TrialRecord], on_front: set[int], spec: SearchSpec, objectives: Sequence[Objective]) -> Any:
    from plotly import graph_objects as go

    shown = [r for r in records if r.state is TrialState.COMPLETE]
    dimensions: list[dict[str, Any]] = []
    for knob in spec.space.names_searched():
        values = [r.params.get(knob) for r in shown]
        if all(isinstance(v, int | float) for v in values):
            dimensions.append({"label": knob, "values": values})
        else:
            names = sorted({str(v) for v in values})
            ticks = list(range(len(names)))
            indices = [names.index(str(v)) for v in values]
            dimensions.append({"label": knob, "values": indices, "tickvals": ticks, "ticktext": names})
    dimensions += [{"label": o.metric, "values": [r.values[o.metric] for r in shown]} for o in objectives]
    colours = [float(r.number in on_front) for r in shown]
    line = {"color": colours, "colorscale": [[0, OTHER_COLOUR], [1, FRONT_COLOUR]], "cmin": 0, "cmax": 1}
    return go.Figure(go.Parcoords(line=line, dimensions=dimensions)).update_layout(title="Knobs; red is the front")


def _hypervolume_plot(state: SearchState, objectives: Sequence[Objective]) -> Any:
    from plotly import graph_objects as go

    history = hypervolume_history(state, objectives)
    drawing = go.Figure(go.Scatter(x=[h[0] for h in history], y=[h[1] for h in history], line_shape="hv"))
    drawing.update_layout(title="Hypervolume over the search", template="simple_white")
    return drawing.update_xaxes(title="wall time [s]").update_yaxes(title="hypervolume")


def _curves_plot(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> Any:
    from plotly import graph_objects as go

    metric = objectives[0].metric
    drawing = go.Figure()
    for r in records:
        points = [(p["fidelity"], p["metrics"][metric]) for p in r.reports if metric in p["metrics"]]
        if points:
            drawing.add_scatter(x=[p[0] for p in points], y=[p[1] for p in points], name=f"trial {r.number}")
    drawing.update_layout(title="Reports along the trials", template="simple_white")
    return drawing.update_xaxes(title="share of the trial's own tokens").update_yaxes(title=_label(metric))


def _memory_plot(members: Sequence[TrialRecord]) -> Any:
    from plotly import graph_objects as go

    drawing = go.Figure()
    ranks = max((len(r.details.get("peak_memory_bytes_by_rank", ())) for r in members), default=0)
    for rank in range(ranks):
        having = [r for r in members if rank < len(r.details.get("peak_memory_bytes_by_rank", ()))]
        gib = [r.details["peak_memory_bytes_by_rank"][rank] / 2**30 for r in having]
        drawing.add_bar(x=[f"trial {r.number}" for r in having], y=gib, name=f"rank {rank}")
    drawing.update_layout(title="Peak memory of every rank on the front", template="simple_white")
    return drawing.update_yaxes(title="GiB")
