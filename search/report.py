"""The report of a search: one HTML file that works offline, a picture, and tables; beside `picture` the only module that draws."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from search.advice import recommendation_lines
from search.bases import NOTE, adapter_lines, bases_table
from search.calibration import Calibration, calibrate, kind, summary_lines
from search.comparison import Comparison, comparison_of, lines_of, table_of, write
from search.data_scaling import DataCurve, data_curves, missing_lines, scaling_lines
from search.figures import (
    CONFIRMED_COLOR,
    FRONT_COLOR,
    KNEE_COLOR,
    OTHER_COLOR,
    FrontFigure,
    MemoryBar,
    ScalingLine,
    axis_label,
    front_figure,
    hypervolume_history,
    log_ticks,
    memory_bars,
    parallel_axes,
    rung_curves,
    scaling_figure,
    timeline,
)
from search.ledger import SearchState
from search.pareto import eligible, hypervolume_of
from search.picture import draw_png
from search.record import TrialRecord
from search.results import Results
from search.tables import WORTH_SEEING, complete_text, front_table, stopped_line, stopped_table, write_tables
from spaces.metrics import EVAL_LOSS
from spaces.spec import Objective

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STATE_COLORS = {"complete": "#4d9221", "pruned": "#b8b8b8", "cut off": "#b8b8b8"}
FAILED_COLOR = "#762a83"
# Times the tallest bar of memory.
FAR_ABOVE = 3
# What was predicted: its name for people, and what they count it in.
PREDICTED = {"train_seconds": ("train seconds [s]", 1.0), "tensor_bytes": ("tensors of a rank [GiB]", 2.0**30)}
_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
.recommendation { font-size: 1.15em; border-left: 4px solid #d7191c; padding: .4em 1em; background: #faf5f5 }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9em }
td, th { border: 1px solid #ddd; padding: 3px 8px; text-align: right; white-space: nowrap }
tr.recommended td { font-weight: bold }
pre { background: #f5f5f5; padding: .6em 1em; white-space: pre-wrap; overflow-wrap: anywhere }
p.note { color: #555; margin-bottom: 0 }
"""


def write_report(results: Results) -> dict[str, Path]:
    """Write the report of a search to its `report_path`, which is made if there is none.

    Returns:
        The files by what they are: `html`, `png`, `front_csv`, `trials_csv`, `calibration_csv`, `scaling_csv`,
        `confirmations_csv`, `json`; of a comparison of methods `methods_csv` and `methods_png` too.
    """
    directory = results.report_path
    directory.mkdir(parents=True, exist_ok=True)
    scaling = data_curves(results.records)
    paths = write_tables(results, scaling)
    figure = front_figure(results.state, results.spec.space.names_searched(), results.objectives)
    paths["png"] = directory / "front.png"
    draw_png(figure, results, paths["png"])
    paths["html"] = directory / "report.html"
    methods: list[str] = []
    if results.state.is_comparison:
        comparison = comparison_of(results.state, results.spec, results.objectives)
        paths["methods_csv"], paths["methods_png"] = write(comparison, directory)
        methods = _methods_parts(comparison, paths["methods_png"])
    paths["html"].write_text(draw_html(results, figure, scaling, methods), encoding="utf-8")
    return paths


def draw_html(results: Results, figure: FrontFigure, scaling: Sequence[DataCurve], methods: Sequence[str]) -> str:
    """Return the report as one HTML page that needs neither a network nor, for the front's table, JavaScript."""
    import plotly.io

    name, spec, objectives, records, members = results.name, results.spec, results.objectives, results.records, results.members
    chosen, volume = results.recommended, hypervolume_of(records, objectives)
    command = "" if chosen is None else results.command_of(chosen)
    counts = [complete_text(records), *(f"{n} {what}" for what, n in figure.left_out.items())]
    started = results.state.started or {}
    facts = [f"Trials: {', '.join(counts)}.", f"Hypervolume: {'unknown' if volume is None else f'{volume:.6g}'}."]
    facts += [f"Machine: {started['machine']}."] if "machine" in started else []
    advice, *doubts = recommendation_lines(members, objectives, name)
    parts = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p class='recommendation'>{html.escape(advice)}</p>",
        f"<p class='note'>This trains it again:</p><pre>{html.escape(command)}</pre>" if command else "",
        f"<p>{html.escape(' '.join(facts))}</p>",
        *methods,
        "<h2>The front</h2>",
        _html_table(*front_table(members, spec, objectives, WORTH_SEEING), marked="" if chosen is None else str(chosen.number)),
        *(
            f"<p class='note'>{html.escape(line)}</p>"
            for line in [*doubts, *adapter_lines(records, objectives), *scaling_lines(scaling)]
        ),
    ]
    for number, (title, note, drawing) in enumerate(_drawings(results, figure, scaling)):
        # The library is embedded once, in the first figure; it is most of the file's 5 MB.
        body = plotly.io.to_html(
            drawing, full_html=False, include_plotlyjs=number == 0, config={"displaylogo": False, "responsive": True}
        )
        parts += [f"<h2>{html.escape(title)}</h2><p class='note'>{html.escape(note)}</p>", body]
    if (bases := bases_table(records, objectives)) is not None:
        note = f"<p class='note'>{html.escape(NOTE)}</p>"
        parts.append(f"<h2>What does a quantised base save, and cost?</h2>{note}{_html_table(*bases)}")
    if stopped_line(records):
        table = _html_table(*stopped_table(records, spec, objectives))
        parts.append(f"<h2>Which trials were stopped early?</h2><p class='note'>{stopped_line(records)}</p>{table}")
    if "data" in started:
        parts.append(f"<h2>Data</h2><pre>{html.escape(json.dumps(started['data'], indent=2, ensure_ascii=False))}</pre>")
    head = f"<meta charset='utf-8'><title>{html.escape(name)}</title><style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def _html_table(heading: Sequence[str], rows: Sequence[Sequence[str]], marked: str = "") -> str:
    """Return a table; the row whose first cell is `marked` is in bold."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in heading) + "</tr>"]
    for row in rows:
        style = " class='recommended'" if row[0] == marked else ""
        lines.append(f"<tr{style}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"


def _methods_parts(comparison: Comparison, picture: Path) -> list[str]:
    """Return which method is the best for how much data, with the picture of it."""
    heading, *rows = table_of(comparison)
    image = base64.b64encode(picture.read_bytes()).decode()
    return [
        "<h2>Which method is the best for how much data?</h2>",
        _html_table([h.replace("_", " ") for h in heading], rows),
        *(f"<p class='note'>{html.escape(line)}</p>" for line in lines_of(comparison)),
        f"<img alt='quality against rows and seconds' style='max-width: 100%' src='data:image/png;base64,{image}'>",
    ]


def _drawings(results: Results, figure: FrontFigure, scaling: Sequence[DataCurve]) -> list[tuple[str, str, Figure]]:
    """Return title, what it answers, and drawing of every figure that has something to show."""
    state, objectives, records, members = results.state, results.objectives, results.records, results.members
    knobs = results.spec.space.names_searched()
    drawings = [
        (
            "What does it cost?",
            "Each point is a trial, trained or timed under another layout; the ringed one is the knee; hover for their knobs.",
            _front_plot(figure),
        )
    ]
    shown = eligible(records, objectives)
    if shown:
        note = "Red trials are on the front; drag along an axis to select."
        drawings.append(("Which knobs lead to the front?", note, _parallel_plot(shown, members, knobs, objectives)))
    history = hypervolume_history(state, objectives)
    if history:
        note = "Hypervolume of the front over the wall time of the search: flat means that more trials found nothing new."
        drawings.append(("Was the search long enough?", note, _history_plot(history)))
    curves = rung_curves(records, figure.y_metric)
    if curves:
        note = "Every trial that was evaluated before its end, along its own token budget."
        drawings.append(("How did the trials get there?", note, _curves_plot(curves, members, figure.y_metric)))
    if scaling:
        note = ". ".join(["The best trial near each size of the data", *missing_lines(scaling)]) + ". All numbers: scaling.csv."
        drawings.append(("Does more data pay?", note, _scaling_plot(scaling_figure(scaling), scaling[0].total_rows)))
    if timeline(state):
        note = "From start to end of every trial; the width of its group stands in the label."
        drawings.append(("When did which trial run?", note, _timeline_plot(state)))
    bars = memory_bars(members)
    if bars:
        note = "What every rank of the trials on the front held, beside what its tensors were predicted to take."
        capacity = (state.device or {}).get("capacity_bytes")
        note += f" There are {capacity / 2**30:.1f} GiB for one rank." if capacity else ""
        drawings.append(("How much memory does it take, and why?", note, _memory_plot(bars, capacity)))
    predictions = calibrate(records)
    if predictions:
        note = ". ".join(summary_lines(predictions)) + ". All rows: calibration.csv."
        drawings.append(("How right were the predictions?", note, _calibration_plot(predictions)))
    return drawings


def _front_plot(figure: FrontFigure) -> Figure:
    from plotly import graph_objects as go

    drawing = go.Figure()
    if figure.steps:
        xs, ys = zip(*figure.steps, strict=True)
        line = {"color": FRONT_COLOR, "width": 1}
        drawing.add_scatter(x=xs, y=ys, mode="lines", line=line, hoverinfo="skip", showlegend=False)
    for name, color, on_front in (("dominated", OTHER_COLOR, False), ("front", FRONT_COLOR, True)):
        points = [p for p in figure.points if p.on_front is on_front]
        rings = [3 if p.number == figure.knee_number else 0 for p in points]
        drawing.add_scatter(
            x=[p.x for p in points],
            y=[p.y for p in points],
            mode="markers+text" if on_front else "markers",
            text=[str(p.number) for p in points],
            textposition="bottom right",
            hovertext=["<br>".join(map(html.escape, p.hover)) for p in points],
            hoverinfo="text",
            marker={"color": color, "size": 11, "line": {"width": rings, "color": KNEE_COLOR}},
            name=f"{name} ({len(points)})",
        )
    _add_confirmed(drawing, figure)
    if figure.untrained is not None:
        drawing.add_hline(y=figure.untrained, line_dash="dot", annotation_text="untrained model")
    drawing.update_xaxes(title=axis_label(figure.x_metric), type="log" if figure.is_log else "linear")
    if figure.is_log:
        prices = [*(p.x for p in figure.points), *(x for p in figure.confirmed for x in p.x)]
        ticks = log_ticks(min(prices), max(prices))
        if len(ticks) > 2:  # over a short range plotly's own say more
            drawing.update_xaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return _styled(drawing.update_yaxes(title=axis_label(figure.y_metric)))


def _add_confirmed(drawing: Figure, figure: FrontFigure) -> None:
    """Draw where further seeds see the trials, each tied to where the search saw it."""
    if not figure.confirmed:
        return
    tie = {"mode": "lines", "line": {"color": CONFIRMED_COLOR, "width": 1, "dash": "dot"}}
    for point in figure.confirmed:
        xs, ys = zip(point.searched, (point.x[0], point.y[0]), strict=True)
        drawing.add_scatter(x=xs, y=ys, hoverinfo="skip", showlegend=False, **tie)
    bars = {
        f"error_{axis}": {"array": [v[2] - v[0] for v in values], "arrayminus": [v[0] - v[1] for v in values], "thickness": 1.2}
        for axis, values in (("x", [p.x for p in figure.confirmed]), ("y", [p.y for p in figure.confirmed]))
    }
    drawing.add_scatter(
        x=[p.x[0] for p in figure.confirmed],
        y=[p.y[0] for p in figure.confirmed],
        mode="markers+text",
        text=[str(p.number) for p in figure.confirmed],
        textposition="top right",
        marker={"color": CONFIRMED_COLOR, "symbol": "diamond", "size": 7},
        hovertext=["<br>".join(map(html.escape, p.hover)) for p in figure.confirmed],
        hoverinfo="text",
        name=figure.confirmed_label,
        **bars,
    )


def _parallel_plot(
    shown: Sequence[TrialRecord], members: Sequence[TrialRecord], knobs: Sequence[str], objectives: Sequence[Objective]
) -> Figure:
    from plotly import graph_objects as go

    # Later lines are drawn over earlier ones.
    numbers = {record.number for record in members}
    ordered = sorted(shown, key=lambda record: record.number in numbers)
    dimensions = []
    for axis in parallel_axes(ordered, knobs, objectives):
        ticks = {"tickvals": [t for t, _ in axis.ticks], "ticktext": [t for _, t in axis.ticks]} if axis.ticks else {}
        dimensions.append({"label": axis.label.replace("_", " "), "values": axis.positions, **ticks})
    colors = [float(record.number in numbers) for record in ordered]
    line = {"color": colors, "colorscale": [[0, OTHER_COLOR], [1, FRONT_COLOR]], "cmin": 0, "cmax": 1}
    return _styled(go.Figure(go.Parcoords(line=line, dimensions=dimensions)))


def _history_plot(history: Sequence[tuple[float, float]]) -> Figure:
    from plotly import graph_objects as go

    xs, ys = zip(*history, strict=True)
    drawing = go.Figure(go.Scatter(x=[0.0, *xs], y=[0.0, *ys], line={"shape": "hv", "color": KNEE_COLOR}))
    return _styled(drawing.update_xaxes(title="wall time [s]").update_yaxes(title="hypervolume"))


def _curves_plot(curves: dict[int, list[tuple[float, float]]], members: Sequence[TrialRecord], metric: str) -> Figure:
    from plotly import graph_objects as go

    numbers = {record.number for record in members}
    drawing = go.Figure()
    for number, curve in sorted(curves.items(), key=lambda item: item[0] in numbers):
        xs, ys = zip(*curve, strict=True)
        color = FRONT_COLOR if number in numbers else OTHER_COLOR
        drawing.add_scatter(x=xs, y=ys, mode="lines+markers", line={"color": color}, name=f"trial {number}")
    drawing.update_xaxes(title="share of the trial's own tokens", range=[0, 1.05], tickformat=".0%")
    return _styled(drawing.update_yaxes(title=axis_label(metric)))


def _timeline_plot(state: SearchState) -> Figure:
    from plotly import graph_objects as go

    drawing = go.Figure()
    spans = timeline(state)
    for what in dict.fromkeys(span.state for span in spans):
        chosen = [span for span in spans if span.state == what]
        drawing.add_bar(
            y=[f"{s.number} (x{s.world_size})" for s in chosen],
            x=[s.end_seconds - s.begin_seconds for s in chosen],
            base=[s.begin_seconds for s in chosen],
            orientation="h",
            name=what,
            marker={"color": STATE_COLORS.get(what, FAILED_COLOR)},
        )
    order = [f"{s.number} (x{s.world_size})" for s in sorted(spans, key=lambda s: s.number, reverse=True)]
    drawing.update_layout(barmode="overlay", height=max(300, 22 * len(spans) + 120))
    drawing.update_yaxes(title="trial", categoryorder="array", categoryarray=order, type="category")
    return _styled(drawing.update_xaxes(title="wall time [s]"))


def _memory_plot(bars: Sequence[MemoryBar], capacity: float | None) -> Figure:
    from plotly import graph_objects as go

    drawing = go.Figure()
    places = [[f"trial {bar.number}" for bar in bars], [bar.label for bar in bars]]
    for term in dict.fromkeys(term for bar in bars for term in bar.num_bytes):
        gib = [bar.num_bytes.get(term, 0) / 2**30 for bar in bars]
        drawing.add_bar(x=places, y=gib, name=term.removesuffix("_bytes").replace("_", " "))
    tallest = max(sum(bar.num_bytes.values()) for bar in bars)
    if capacity and capacity <= FAR_ABOVE * tallest:  # farther up it would leave the bars no height
        drawing.add_hline(y=capacity / 2**30, line_dash="dot", annotation_text="device")
    drawing.update_layout(barmode="stack")
    return _styled(drawing.update_yaxes(title="memory [GiB]"))


def _calibration_plot(rows: Sequence[Calibration]) -> Figure:
    from plotly.subplots import make_subplots

    predicted = list(dict.fromkeys(row.what for row in rows))
    drawing = make_subplots(cols=len(predicted), subplot_titles=[PREDICTED[what][0] for what in predicted])
    for column, what in enumerate(predicted, start=1):
        chosen = [row for row in rows if row.what == what]
        unit = PREDICTED[what][1]
        ends = [f(v / unit for row in chosen for v in (row.predicted, row.measured)) for f in (min, max)]
        line = {"color": OTHER_COLOR, "dash": "dot"}
        drawing.add_scatter(x=ends, y=ends, mode="lines", line=line, hoverinfo="skip", showlegend=False, row=1, col=column)
        for source in dict.fromkeys(row.source for row in chosen):
            points = [row for row in chosen if row.source == source]
            drawing.add_scatter(
                x=[row.measured / unit for row in points],
                y=[row.predicted / unit for row in points],
                mode="markers",
                hovertext=[f"trial {row.number}: {row.error:+.1%}" for row in points],
                name=kind(what, source),
                row=1,
                col=column,
            )
    drawing.update_xaxes(title="measured", type="log").update_yaxes(title="predicted", type="log")
    return _styled(drawing)


def _scaling_plot(lines: Sequence[ScalingLine], total_rows: int) -> Figure:
    from plotly import graph_objects as go
    from plotly.colors import qualitative

    drawing = go.Figure()
    for line, color in zip(lines, qualitative.D3 * len(lines), strict=False):
        xs, hidden = list(line.rows), {"showlegend": False, "hoverinfo": "skip", "legendgroup": line.label}
        band = {"x": [*xs, *reversed(xs)], "y": [*line.high, *reversed(line.low)], "fill": "toself", "fillcolor": color}
        drawing.add_scatter(**band, opacity=0.15, mode="none", **hidden)
        drawing.add_scatter(x=xs, y=line.loss, mode="lines", line={"color": color}, **hidden)
        drawing.add_scatter(
            x=[point.rows for point in line.points],
            y=[point.loss for point in line.points],
            mode="markers",
            marker={"color": color, "size": 9},
            hovertext=[f"trial {point.number}: {point.rows:,} rows" for point in line.points],
            legendgroup=line.label,
            name=line.label,
        )
    drawing.add_vline(x=total_rows, line_dash="dot", annotation_text="all rows")
    drawing.update_xaxes(title="training rows", type="log").update_yaxes(title=axis_label(EVAL_LOSS))
    return _styled(drawing)


def _styled(drawing: Figure) -> Figure:
    return drawing.update_layout(template="simple_white", margin={"t": 60, "b": 60, "l": 70, "r": 70})
