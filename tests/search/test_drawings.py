"""What the figures draw, as objects of plotly and matplotlib: a page's text does not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure as Drawing
from synthetic import OBJECTIVES, confirmed_event, synthetic_events

from search.advice import knee
from search.calibration import calibrate
from search.confidence import confirmed
from search.figures import MemoryBar, ScalingLine, front_figure
from search.ledger import replay
from search.pareto import front
from search.picture import draw_methods
from search.report import FAR_ABOVE, _calibration_plot, _front_plot, _memory_plot, _scaling_plot

EVENTS = synthetic_events(24)
MEMBERS = front(list(replay(EVENTS).records.values()), OBJECTIVES)
SEEDS = [
    confirmed_event(r.number, seed, accuracy=0.9, seconds=10.0 + seed + r.number, test=0.7 + 0.01 * seed)
    for r in MEMBERS
    for seed in (1, 2, 3)
]
STATE = replay([*EVENTS, *SEEDS])


def named(drawing: Any, beginning: str) -> Any:
    (found,) = (trace for trace in drawing.data if trace.name and trace.name.startswith(beginning))
    return found


def test_the_front_has_a_ring_around_its_knee_and_bars_on_what_further_seeds_say() -> None:
    state = replay(EVENTS)
    plain = _front_plot(front_figure(state, ["learning_rate"], OBJECTIVES))
    chosen = knee(MEMBERS, OBJECTIVES)
    assert chosen is not None
    shown = named(plain, "front")
    assert [int(number) for number, width in zip(shown.text, shown.marker.line.width, strict=True) if width] == [chosen.number]
    assert not any(trace.error_y.array is not None for trace in plain.data)
    drawing = _front_plot(front_figure(STATE, ["learning_rate"], OBJECTIVES))
    means = named(drawing, front_figure(STATE, ["learning_rate"], OBJECTIVES).confirmed_label)
    for i, number in enumerate(map(int, means.text)):
        for axis, metric in (("y", "accuracy"), ("x", "train_seconds")):
            known = confirmed(STATE.records[number], metric)
            assert known is not None
            assert known.estimate.half_width is not None
            assert means[axis][i] == pytest.approx(known.estimate.mean)
            bars = means[f"error_{axis}"]
            assert bars.array[i] == pytest.approx(known.estimate.half_width) == bars.arrayminus[i]


def test_memory_is_in_gib_and_the_device_is_drawn_where_it_leaves_the_bars_their_height() -> None:
    bars = [MemoryBar(number=3, label="rank 0", num_bytes={"weights_bytes": 2**31, "optimizer_bytes": 2**30})]
    for capacity, is_drawn in ((FAR_ABOVE * 3 * 2**30, True), (FAR_ABOVE * 3 * 2**30 + 1, False), (None, False)):
        drawing = _memory_plot(bars, capacity)
        assert [list(trace.y) for trace in drawing.data] == [[2.0], [1.0]]
        assert bool(drawing.layout.shapes) == is_drawn
        assert drawing.layout.yaxis.title.text == "memory [GiB]"


def test_predictions_stand_over_what_was_measured_in_the_units_of_people() -> None:
    rows = calibrate(list(STATE.records.values()))
    drawing = _calibration_plot(rows)
    assert [title.text for title in drawing.layout.annotations] == ["train seconds [s]", "tensors of a rank [GiB]"]
    for what, unit, name in (("train_seconds", 1.0, "train seconds from an estimate"), ("tensor_bytes", 2**30, "tensor bytes")):
        own = [row for row in rows if row.what == what and (row.source == "estimate" or what == "tensor_bytes")]
        trace = named(drawing, name)
        assert list(trace.x) == pytest.approx([row.measured / unit for row in own])
        assert list(trace.y) == pytest.approx([row.predicted / unit for row in own])


def test_a_law_has_its_interval_around_it() -> None:
    line = ScalingLine(label="lora", points=(), rows=(10.0, 20.0), loss=(2.0, 1.5), low=(1.8, 1.2), high=(2.2, 1.9))
    band, middle, _ = _scaling_plot([line], 20).data
    assert list(band.x) == [10.0, 20.0, 20.0, 10.0]
    assert list(band.y) == [2.2, 1.9, 1.2, 1.8]
    assert list(middle.y) == [2.0, 1.5]


def test_a_comparison_has_bars_on_quality_and_time_and_a_marker_for_each_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(Drawing, "savefig", lambda self, *_, **__: drawn.append(self))
    rows = [
        {"method": m, "rows": 100, "metric": "accuracy", "mean": 0.5 + i / 10, "half_width": 0.02, "train_seconds": 9.0 + i}
        | {"train_seconds_half_width": 1.5}
        for i, m in enumerate(("full", "lora 8"))
    ]
    draw_methods(rows, "made-up", tmp_path / "methods.png")
    by_rows, by_time = ([c for c in axes.containers if isinstance(c, ErrorbarContainer)] for axes in drawn[0].axes)
    assert [(c.has_xerr, c.has_yerr) for c in by_rows] == [(False, True)] * 2
    assert [(c.has_xerr, c.has_yerr) for c in by_time] == [(True, True)] * 2
    assert len({c.lines[0].get_marker() for c in by_time}) == 2
    ends = by_time[0].lines[2][0].get_segments()[0]
    assert [end[0] for end in ends] == pytest.approx([7.5, 10.5])
