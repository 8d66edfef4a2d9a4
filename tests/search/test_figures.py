from __future__ import annotations

import math
from typing import Any

import pytest
from scipy import stats
from synthetic import HELD_MEMORY, OBJECTIVES, PREDICTED_MEMORY, confirmed_event, numbers_on_front, synthetic_events

from search.data_scaling import DataCurve, SizePoint, data_curves
from search.figures import (
    axis_label,
    front_figure,
    hypervolume_history,
    log_ticks,
    memory_bars,
    outcome,
    parallel_axes,
    rung_curves,
    scaling_figure,
    timeline,
)
from search.ledger import SearchState, replay
from search.pareto import eligible, front, hypervolume_of
from search.record import TrialRecord, TrialState
from search.scaling import Law, fit_law
from spaces.config import TrialConfig
from spaces.space import SpaceSpec
from spaces.spec import Objective

KNOBS = ("learning_rate", "lora_rank", "strategy", "world_size", "dataset_fraction")
STATE = replay(synthetic_events(24))
RECORDS = list(STATE.records.values())


def trial(number: int, accuracy: float, seconds: float, **fields: Any) -> TrialRecord:
    values = {"accuracy": accuracy, "train_seconds": seconds}
    return TrialRecord(number=number, state=TrialState.COMPLETE, params={}, values=values, **fields)


def state_of(*records: TrialRecord) -> SearchState:
    return SearchState(records={record.number: record for record in records})


def test_the_figure_shows_the_complete_trials_and_counts_the_others() -> None:
    figure = front_figure(STATE, KNOBS, OBJECTIVES)
    assert (figure.x_metric, figure.y_metric) == ("train_seconds", "accuracy")
    assert {p.number for p in figure.points if p.on_front} == numbers_on_front(RECORDS)
    assert len(figure.points) + sum(figure.left_out.values()) == len(RECORDS)
    assert set(figure.left_out) == {"pruned", "infeasible", "out of memory", "diverged"}
    assert figure.untrained == 0.04
    assert figure.knee_number in numbers_on_front(RECORDS)
    (first,) = [p for p in figure.points if p.number == 0]
    assert first.hover[0] == "trial 0"
    assert "test accuracy 0.71" in first.hover
    assert any(line.startswith("learning_rate = ") for line in first.hover)


def test_confirmed_trials_stand_at_their_means_with_students_intervals() -> None:
    assert front_figure(STATE, KNOBS, OBJECTIVES).confirmed == ()
    scores, times = (0.70, 0.72, 0.77), (40.0, 42.0, 41.0)
    events = [
        confirmed_event(0, seed, accuracy=0.9, seconds=t, test=a)
        for seed, (a, t) in enumerate(zip(scores, times, strict=True), start=1)
    ]
    state = replay([*synthetic_events(24), *events])
    figure = front_figure(state, KNOBS, OBJECTIVES)
    (point,) = figure.confirmed
    for values, drawn in ((scores, point.y), (times, point.x)):
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert drawn == pytest.approx((sum(values) / 3, low, high))
    assert point.searched == (state.records[0].values["train_seconds"], state.records[0].values["accuracy"])
    assert figure.confirmed_label == "further seeds (test rows): mean, 95% interval"
    assert (figure.points, figure.steps) == (
        front_figure(STATE, KNOBS, OBJECTIVES).points,
        front_figure(STATE, KNOBS, OBJECTIVES).steps,
    )


def test_an_interval_that_reaches_to_nothing_has_a_place_on_a_logarithmic_axis() -> None:
    events = [confirmed_event(0, seed, accuracy=0.9, seconds=t) for seed, t in ((1, 40.0), (2, 50.0))]
    (point,) = front_figure(replay([*synthetic_events(24), *events]), KNOBS, OBJECTIVES).confirmed
    mean, low, high = point.x
    assert 0 < low < mean < high
    (once,) = front_figure(replay([*synthetic_events(24), events[0]]), KNOBS, OBJECTIVES).confirmed
    assert once.x == (40.0, 40.0, 40.0), "one seed has no interval"


def test_the_line_is_what_is_reached_at_each_price() -> None:
    figure = front_figure(state_of(trial(0, 0.2, 1), trial(1, 0.8, 4), trial(2, 0.7, 9)), (), OBJECTIVES)
    assert figure.steps == ((1, 0.2), (4, 0.2), (4, 0.8), (9, 0.8))


def test_the_price_is_on_the_x_axis_wherever_it_stands() -> None:
    figure = front_figure(STATE, KNOBS, OBJECTIVES[::-1])
    assert (figure.x_metric, figure.y_metric) == ("train_seconds", "accuracy")


def test_three_objectives_have_no_line() -> None:
    memory = Objective(metric="peak_memory_bytes", direction="minimize", reference=2e9)
    assert front_figure(STATE, KNOBS, (*OBJECTIVES, memory)).steps == ()


def test_an_empty_search_has_an_empty_figure() -> None:
    figure = front_figure(SearchState(), KNOBS, OBJECTIVES)
    assert (figure.points, figure.steps, figure.knee_number, figure.untrained) == ((), (), None, None)
    assert timeline(SearchState()) == []


def test_the_hypervolume_grows_to_that_of_the_whole_search() -> None:
    history = hypervolume_history(STATE, OBJECTIVES)
    seconds, volumes = [h[0] for h in history], [h[1] for h in history]
    assert seconds == sorted(seconds)
    assert volumes == sorted(volumes)
    ended = sorted((r for r in RECORDS if r.finished_at), key=lambda r: r.finished_at or 0.0)
    assert volumes == [hypervolume_of(ended[: n + 1], OBJECTIVES) for n in range(len(ended))]
    assert hypervolume_history(STATE, (Objective(metric="eval_loss", direction="minimize", reference=None),) * 2) == []


def test_without_its_first_event_a_search_begins_with_its_first_trial() -> None:
    state = state_of(trial(0, 0.5, 1, started_at=100.0, finished_at=110.0))
    (span,) = timeline(state)
    assert (span.begin_seconds, span.end_seconds) == (0.0, 10.0)
    assert hypervolume_history(state, OBJECTIVES)[0][0] == 10.0


def test_a_trial_is_shown_from_when_it_had_workers_and_the_time_that_the_search_was_away_is_not_there() -> None:
    def at(time: float, event: str, **more: Any) -> dict[str, Any]:
        return {"time": time, "event": event, **more}

    config = TrialConfig.from_params(SpaceSpec().first()).to_dict()
    begun = {"params": {}, "config": config, "predicted": {}, "source": None}
    ended = {"state": "COMPLETE", "values": {"accuracy": 0.5, "train_seconds": 2.0}, "error": None, "constraints": {}, "attempts": 1}
    state = replay(
        [
            at(100.0, "search_started", name="s"),
            at(110.0, "trial_started", number=0, **begun),
            at(110.0, "trial_started", number=1, **begun),
            at(150.0, "trial_finished", number=0, **ended, held_seconds=40.0, details={}),
            at(160.0, "search_cut_short", reason="Interrupted"),
            at(90_000.0, "resumed", in_flight=[1]),
            at(90_020.0, "trial_finished", number=1, **ended, held_seconds=15.0, details={}),
        ]
    )
    first, second = timeline(state)
    assert (first.begin_seconds, first.end_seconds) == (10.0, 50.0)
    assert (second.begin_seconds, second.end_seconds) == (65.0, 80.0)
    assert [seconds for seconds, _ in hypervolume_history(state, OBJECTIVES)] == [50.0, 80.0]


def test_the_timeline_shows_every_trial_that_ran() -> None:
    spans = timeline(STATE)
    assert {s.number for s in spans} == {r.number for r in RECORDS if r.feasible_before_launch}
    assert all(0 <= s.begin_seconds < s.end_seconds for s in spans)
    assert {s.world_size for s in spans} == {1, 2}


def test_curves_and_memory_come_from_the_reports() -> None:
    curves = rung_curves(RECORDS, "accuracy")
    assert curves[0][-1] == (1.0, STATE.records[0].values["accuracy"])
    assert 5 not in curves, "an infeasible trial never reported"
    bars = memory_bars(front(RECORDS, OBJECTIVES))
    for number in {bar.number for bar in bars}:
        first, *ranks = [bar for bar in bars if bar.number == number]
        assert (first.label, first.num_bytes) == ("predicted", PREDICTED_MEMORY)
        assert [bar.label for bar in ranks] == [f"rank {rank}" for rank in range(STATE.records[number].params["world_size"])]
        assert all(bar.num_bytes == HELD_MEMORY for bar in ranks)


def test_axes_place_numbers_words_and_orders_of_magnitude() -> None:
    shown = eligible(RECORDS, OBJECTIVES)
    axes = {axis.label: axis for axis in parallel_axes(shown, KNOBS, OBJECTIVES)}
    assert [text for _, text in axes["strategy"].ticks] == ["ddp", "fsdp"]
    assert [text for _, text in axes["lora_rank"].ticks] == ["4", "8", "16"]
    assert axes["dataset_fraction"].ticks == ()
    assert axes["dataset_fraction"].positions == tuple(r.params["dataset_fraction"] for r in shown)
    rate = axes["learning_rate"]
    assert rate.positions[0] == pytest.approx(math.log10(shown[0].params["learning_rate"]))
    assert "0.001" in [text for _, text in rate.ticks]
    assert all(len(axis.positions) == len(shown) for axis in axes.values())
    assert parallel_axes([], KNOBS, OBJECTIVES)[0].positions == ()


def test_ticks_of_a_logarithm() -> None:
    assert log_ticks(3, 60) == [5, 10, 20, 50]
    assert log_ticks(0.1, 1) == pytest.approx([0.1, 0.2, 0.5, 1])
    assert log_ticks(3, 4) == []


def test_a_law_is_drawn_through_its_points_up_to_twice_the_data() -> None:
    law = Law(scale=20.0, pre_learned=0.0, exponent=0.4, floor=0.5)
    points = tuple(SizePoint(number=n, rows=rows, loss=law.loss(rows)) for n, rows in enumerate((500, 1000, 2000, 4000, 8000)))
    fit = fit_law([p.rows for p in points], [p.loss for p in points])
    curve = DataCurve(adapter="none", adapter_rank=None, points=points, total_rows=8000, fit=fit, reason="")
    (line,) = scaling_figure([curve])
    assert (line.rows[0], line.rows[-1]) == pytest.approx((500, 16000))
    assert line.loss == pytest.approx([law.loss(rows) for rows in line.rows], rel=1e-3)
    assert all(low <= loss <= high for low, loss, high in zip(line.low, line.loss, line.high, strict=True))


def test_points_without_a_law_are_drawn_alone() -> None:
    (line,) = scaling_figure(data_curves(RECORDS[:3]))
    assert line.points
    assert line.rows == line.loss == line.low == line.high == ()


def test_units_stand_at_the_axes() -> None:
    assert axis_label("train_seconds") == "train seconds [s]"
    assert axis_label("accuracy") == "accuracy"


def test_outcomes_have_words() -> None:
    assert {outcome(r) for r in RECORDS} == {"complete", "pruned", "infeasible", "out of memory", "diverged"}
