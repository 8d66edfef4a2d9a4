"""Pictures of a front and of a comparison: PNGs for where HTML cannot go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from search.confidence import LEVEL
from search.figures import CONFIRMED_COLOR, FRONT_COLOR, KNEE_COLOR, OTHER_COLOR, FrontFigure, axis_label
from search.results import Results
from search.tables import complete_text, front_table
from spaces.metrics import TRAIN_SECONDS

# With more members than this a table below the picture would be larger than the picture.
MAX_TABLE_ROWS = 12
# Of its columns, with their padding, at the size of its letters.
INCHES_PER_LETTER = 0.07
# Of methods, which colours alone would not tell everybody apart.
MARKERS = "os^Dv<>P*X"


def draw_png(figure: FrontFigure, results: Results, path: Path) -> None:
    """Draw the front with a table of its members' knobs below it."""
    # The object interface, not pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    members = results.members
    has_table = 0 < len(members) <= MAX_TABLE_ROWS
    table_inches = 0.24 * (len(members) + 2) if has_table else 0.01
    heading, rows = front_table(members, results.spec, results.objectives)
    letters = sum(max(map(len, column)) for column in zip(heading, *rows, strict=True)) if has_table else 0
    drawing = Drawing(figsize=(max(9, INCHES_PER_LETTER * letters), 4.6 + table_inches), layout="constrained")
    FigureCanvasAgg(drawing)
    axes, below = drawing.subplots(2, 1, height_ratios=[4.6, table_inches])
    _draw_points(axes, figure)
    counts = ", ".join(f"{n} {what}" for what, n in figure.left_out.items())
    title = f"{results.name}: a front of {len(members)}, {complete_text(results.records)}"
    axes.set_title(f"{title}; {counts}" if counts else title, fontsize=10)
    below.axis("off")
    if has_table:
        table = below.table(rows, colLabels=heading, loc="upper center", cellLoc="right", edges="horizontal")
        table.auto_set_font_size(False)
        table.set_fontsize(7.5)
        table.auto_set_column_width(list(range(len(heading))))
    # Where the labels are is known once the axes have their place.
    drawing.draw_without_rendering()
    _name_members(axes, figure)
    drawing.savefig(path, dpi=150)


def draw_methods(rows: Sequence[Mapping[str, Any]], name: str, path: Path) -> None:
    """Draw a comparison of methods: quality with its interval against rows, and beside it against training seconds.

    Args:
        rows: as `search.comparison.rows_of` has them.
        name: of the comparison.
        path: of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots(1, 2, sharey=True)
    known = [row for row in rows if row["mean"] is not None and row["rows"] is not None]
    for method, marker in zip(dict.fromkeys(row["method"] for row in known), cycle(MARKERS), strict=False):
        own = [row for row in known if row["method"] == method]
        bars = {"yerr": [row["half_width"] or 0.0 for row in own], "capsize": 2, "markersize": 5, "linewidth": 1}
        for part, x in zip(axes, ("rows", TRAIN_SECONDS), strict=True):
            wide = {"xerr": [row[f"{x}_half_width"] or 0.0 for row in own]} if x == TRAIN_SECONDS else {}
            part.errorbar([row[x] for row in own], [row["mean"] for row in own], label=method, marker=marker, **bars, **wide)
    for part, label in zip(axes, ("training rows", axis_label(TRAIN_SECONDS)), strict=True):
        _log_axis(part.xaxis, part)
        part.set(xlabel=label)
        part.grid(alpha=0.25)
    if known:
        axes[0].set(ylabel=axis_label(known[0]["metric"]))
        axes[0].legend(loc="best", fontsize=8)
    drawing.suptitle(f"{name}: the best rate of each method, mean and {LEVEL:.0%} interval over further seeds", fontsize=10)
    drawing.savefig(path, dpi=150)


def _draw_points(axes: Any, figure: FrontFigure) -> None:
    others = [p for p in figure.points if not p.on_front]
    members = [p for p in figure.points if p.on_front]
    if others:
        axes.scatter([p.x for p in others], [p.y for p in others], color=OTHER_COLOR, label="dominated", zorder=2)
    if figure.steps:
        axes.plot(*zip(*figure.steps, strict=True), color=FRONT_COLOR, linewidth=1, zorder=1)
    axes.scatter([p.x for p in members], [p.y for p in members], color=FRONT_COLOR, label="front", zorder=3)
    for point in members:
        if point.number == figure.knee_number:
            ring = {"facecolors": "none", "edgecolors": KNEE_COLOR, "linewidths": 1.5}
            axes.scatter([point.x], [point.y], s=150, label="knee", zorder=4, **ring)
    _draw_confirmed(axes, figure)
    if figure.untrained is not None:
        axes.axhline(figure.untrained, color="black", linewidth=0.8, linestyle=":", label="untrained model")
    if figure.is_log:
        _log_axis(axes.xaxis, axes)
    axes.set(xlabel=axis_label(figure.x_metric), ylabel=axis_label(figure.y_metric))
    axes.grid(alpha=0.25)
    axes.legend(loc="best", fontsize=8)


def _name_members(axes: Any, figure: FrontFigure) -> None:
    """Write each member's number beside it; members too close for labels of their own share one."""
    offset = {"textcoords": "offset points", "xytext": (6, -12), "fontsize": 8}
    labels: list[Any] = []
    for point in sorted((p for p in figure.points if p.on_front), key=lambda p: p.x):
        label = axes.annotate(f"trial {point.number}", (point.x, point.y), **offset)
        shared = next((other for other in labels if other.get_window_extent().overlaps(label.get_window_extent())), None)
        if shared is None:
            labels.append(label)
        else:
            shared.set_text(f"{shared.get_text()}, {point.number}")
            label.remove()


def _draw_confirmed(axes: Any, figure: FrontFigure) -> None:
    """Draw where further seeds see the trials, each tied to where the search saw it."""
    if not figure.confirmed:
        return
    for point in figure.confirmed:
        tie = {"color": CONFIRMED_COLOR, "linewidth": 0.7, "linestyle": ":"}
        axes.plot([point.searched[0], point.x[0]], [point.searched[1], point.y[0]], zorder=4, **tie)
    bars = {
        f"{axis}err": [[v[0] - v[1] for v in values], [v[2] - v[0] for v in values]]
        for axis, values in (("x", [p.x for p in figure.confirmed]), ("y", [p.y for p in figure.confirmed]))
    }
    style = {"fmt": "D", "color": CONFIRMED_COLOR, "markersize": 4, "linewidth": 1, "capsize": 2}
    means = [p.x[0] for p in figure.confirmed], [p.y[0] for p in figure.confirmed]
    axes.errorbar(*means, **bars, **style, label=figure.confirmed_label, zorder=5)


def _log_axis(axis: Any, axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
