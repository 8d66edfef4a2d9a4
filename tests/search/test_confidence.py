from __future__ import annotations

import random
import statistics
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats
from synthetic import OBJECTIVES, confirmed_event, synthetic_events

from search.advice import noise_lines
from search.confidence import (
    binomial_interval,
    confidence_lines,
    confirmed,
    difference,
    estimate,
    failure_lines,
    rival_lines,
    rivals,
    score_text,
    told_apart,
)
from search.formatting import interval_text
from search.ledger import replay
from search.record import TrialRecord

EVENTS = synthetic_events(8)


def record_with(*values: float, number: int = 0, test: bool = True, **further: Any) -> TrialRecord:
    events = [
        confirmed_event(number, seed, accuracy=v, seconds=10 * v, test=v - 0.1 if test else None, **further)
        for seed, v in enumerate(values, start=1)
    ]
    return replay([*EVENTS, *events]).records[number]


@pytest.mark.parametrize("num", [2, 3, 4, 10, 50])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_is_that_of_students_t(num: int, level: float) -> None:
    random_ = random.Random(num)
    values = [random_.gauss(0.8, 0.01) for _ in range(num)]
    ours = estimate(values, level)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(level)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-12)
    assert ours.mean == pytest.approx(statistics.mean(values), rel=1e-12)


@pytest.mark.parametrize(("num_a", "num_b"), [(2, 2), (3, 3), (2, 7), (20, 4)])
def test_the_difference_is_welchs(num_a: int, num_b: int) -> None:
    random_ = random.Random(num_a)
    a, b = [random_.gauss(0.8, 0.03) for _ in range(num_a)], [random_.gauss(0.7, 0.01) for _ in range(num_b)]
    ours = difference(a, b)
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-9)


@pytest.mark.parametrize("num", [2, 3, 5])
def test_the_interval_holds_the_truth_as_often_as_it_says(num: int) -> None:
    random_ = random.Random(7)
    draws = [estimate([random_.gauss(3.0, 2.0) for _ in range(num)]) for _ in range(5000)]
    covered = sum(e.low <= 3.0 <= e.high for e in draws) / len(draws)
    # Three standard errors of a share of 5,000.
    assert covered == pytest.approx(0.95, abs=0.0093)


def test_equals_are_told_apart_as_seldom_as_it_says() -> None:
    random_ = random.Random(3)

    def draw(spread: float) -> list[float]:
        return [random_.gauss(0.0, spread) for _ in range(4)]

    gaps = [difference(draw(1.0), draw(3.0)) for _ in range(5000)]
    wrong = sum(abs(gap.mean) > (gap.half_width or 0) for gap in gaps) / len(gaps)
    # Welch's degrees of freedom are an approximation.
    assert 0.03 < wrong < 0.065


def test_one_seed_has_no_interval_and_equal_seeds_a_narrow_one() -> None:
    assert estimate([0.5]).half_width is None
    assert difference([0.5], [0.4, 0.5]).half_width is None
    assert estimate([0.5, 0.5, 0.5]).half_width == 0
    assert difference([0.5, 0.5], [0.4, 0.4]).half_width == 0


def test_seeds_that_score_alike_on_few_rows_tell_nothing_apart() -> None:
    low, high = (record_with(8.0, 8.0, test=False), record_with(9.0, 9.0, test=False))
    scores, seconds = ([confirmed(record, metric) for record in (low, high)] for metric in ("accuracy", "train_seconds"))
    (a, b), (c, d) = scores, seconds
    assert a is not None
    assert b is not None
    assert c is not None
    assert d is not None
    assert (a.values, b.values) == ((8.0, 8.0), (9.0, 9.0))
    assert not told_apart(a, b)
    assert "±" not in a.text
    assert told_apart(replace(c, values=(1.0, 1.0)), replace(d, values=(2.0, 2.0))), "what is no score is the same with every seed"


def test_quality_is_scored_on_the_test_rows_and_time_is_not() -> None:
    record = record_with(0.8, 0.82, 0.84)
    accuracy, seconds = confirmed(record, "accuracy"), confirmed(record, "train_seconds")
    assert accuracy is not None
    assert (accuracy.values, accuracy.split) == (pytest.approx((0.7, 0.72, 0.74)), "test")
    assert accuracy.text == "0.720 ± 0.050 (test, 3 seeds)"
    assert seconds is not None
    assert (seconds.values, seconds.split) == (pytest.approx((8.0, 8.2, 8.4)), "")
    assert seconds.text == "8.20 ± 0.50 s (3 seeds)"
    assert confirmed(record, "mfu") is None


def test_without_test_rows_the_score_says_where_it_is_from() -> None:
    record = record_with(0.8, test=False)
    known = confirmed(record, "accuracy")
    assert known is not None
    assert known.text == "0.8 (evaluation, 1 seed)"
    assert "which the search chose by" in confidence_lines([record], OBJECTIVES)[0]
    assert "test rows" in confidence_lines([record_with(0.8)], OBJECTIVES)[0]


def test_seeds_are_compared_on_the_rows_that_all_of_them_were_scored_on() -> None:
    """The first was confirmed before completions were scored on the test rows."""
    record = record_with(0.8, 0.82)
    (first, second) = (replace(c, values={**c.values, "exact_match": 0.3 + c.seed / 10}) for c in record.confirmations)
    second = replace(second, test={**second.test, "exact_match": 0.9})
    known = confirmed(replace(record, confirmations=[first, second]), "exact_match")
    assert known is not None
    assert (known.values, known.split) == (pytest.approx((0.4, 0.5)), "evaluation")
    first = replace(first, test={**first.test, "exact_match": 0.8})
    known = confirmed(replace(record, confirmations=[first, second]), "exact_match")
    assert known is not None
    assert (known.values, known.split) == ((0.8, 0.9), "test")


def test_the_trials_own_seed_does_not_count() -> None:
    record = record_with(0.2, 0.2)
    known = confirmed(record, "train_seconds")
    assert known is not None
    assert record.values["train_seconds"] not in known.values


def test_a_seed_that_failed_is_told_and_not_averaged() -> None:
    error = {"kind": "diverged", "message": "the loss is nan"}
    record = record_with(0.8, 0.82).confirmed_by(record_with(0.0, 0.0, 0.0, error=error).confirmations[2])
    known = confirmed(record, "accuracy")
    assert known is not None
    assert len(known.values) == 2
    assert failure_lines(record) == ["trial 0 failed with seed 3: diverged: the loss is nan"]
    assert failure_lines(record)[0] in confidence_lines([record], OBJECTIVES)


def test_a_noisy_seed_is_named_and_its_times_are_not_to_be_trusted() -> None:
    drifting = confirmed_event(0, 2, accuracy=0.8, seconds=9.0)
    drifting["values"]["time_drift"] = 0.5
    events = [*EVENTS, confirmed_event(0, 1, accuracy=0.8, seconds=9.0)]
    quiet, noisy = (
        replace(r, values={**r.values, "time_drift": 0.3}) for r in (replay(e).records[0] for e in (events, [*events, drifting]))
    )
    assert "trial 0 is noisy with seed 2: its pace changed by 50% while it trained" in confidence_lines([noisy], OBJECTIVES)
    assert noise_lines([quiet]) == ["trial 0 is noisy: its pace changed by 30% while it trained; trust its confirmed times"]
    assert noise_lines([noisy])[0].endswith("train it again before you trust its times")


def test_rivals_are_who_the_seeds_do_not_tell_apart() -> None:
    near, far = record_with(0.80, 0.82, 0.84, number=0), record_with(0.90, 0.92, 0.94, number=1)
    close, once = record_with(0.81, 0.85, 0.83, number=2), record_with(0.5, number=4)
    members = [near, far, close, once]
    assert [r.number for r in rivals(near, members, "accuracy")] == [2, 4], "one seed tells nothing apart"
    assert [r.number for r in rivals(far, members, "accuracy")] == [4]
    a, b = confirmed(near, "accuracy"), confirmed(far, "accuracy")
    assert a is not None
    assert b is not None
    assert told_apart(a, b)
    assert stats.ttest_ind(a.values, b.values, equal_var=False).pvalue < 0.05
    lines = rival_lines(near, members, OBJECTIVES)
    assert lines[0] == "not told apart from trial 0 in accuracy (0.720 ± 0.050): trial 2 (0.730 ± 0.050), trial 4 (0.4)"
    assert rival_lines(near, [near], OBJECTIVES) == []


def test_a_front_without_confirmations_says_nothing_of_them() -> None:
    assert confidence_lines(list(replay(EVENTS).records.values()), OBJECTIVES) == []


@pytest.mark.parametrize(
    ("metric", "mean", "half", "text"),
    [
        ("accuracy", 0.87123, 0.00612, "0.8712 ± 0.0061"),
        ("accuracy", 0.87123, 0.0996, "0.871 ± 0.100"),
        ("accuracy", 0.87123, None, "0.8712"),
        ("accuracy", 0.87123, 0.0, "0.8712 ± 0"),
        ("train_seconds", 1234.5, 123.4, "1,234 ± 123 s"),
        ("train_seconds", 40.123, 0.45, "40.12 ± 0.45 s"),
        ("mfu", 0.4012, 0.012, "40.1 ± 1.2%"),
        ("peak_memory_bytes", 3 * 2**30, 2**28, "3.00 ± 0.25 GiB"),
        ("tokens_per_second", 9123.4, 77.0, "9,123 ± 77/s"),
    ],
)
def test_a_number_has_as_many_digits_as_its_interval_allows(metric: str, mean: float, half: float | None, text: str) -> None:
    assert interval_text(metric, mean, half) == text


@pytest.mark.parametrize(("right", "num_rows"), [(0, 64), (1, 64), (20, 64), (64, 64), (3, 7), (500, 1319)])
def test_the_interval_of_a_share_is_wilsons(right: int, num_rows: int) -> None:
    expected = stats.binomtest(right, num_rows).proportion_ci(0.95, method="wilson")
    assert binomial_interval(right / num_rows, num_rows) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_an_exact_match_is_shown_with_what_so_few_rows_can_say() -> None:
    record = record_with()
    asked = replace(record, values={**record.values, "exact_match": 0.25}, details={**record.details, "exact_match_rows": 64})
    assert score_text(asked, "exact_match") == "0.25 (0.16 to 0.37)"
    assert score_text(replace(asked, details={}), "exact_match") == "0.25"
    assert score_text(asked, "macro_f1") == "-"
