"""Successive halving over several objectives, against brute force and against what its authors define."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from dominance import dominates
from hypothesis import given
from hypothesis import strategies as st

from search.pareto import front_indices
from search.record import TrialRecord, TrialState
from search.rungs import Entry, Rungs, bracket_of, decide, net_order, shares_of
from spaces.spec import SearchSpec

Row = tuple[int, ...]


def rows_of(num_objectives: int, most: int = 5, size: int = 14) -> st.SearchStrategy[list[Row]]:
    """Few distinct values, so that ties and duplicates are common."""
    return st.lists(st.tuples(*[st.integers(-most, most)] * num_objectives), min_size=1, max_size=size)


ROWS = st.one_of(rows_of(1), rows_of(2), rows_of(3), rows_of(2, most=100, size=30), rows_of(3, most=100, size=30))


def peeled(rows: Sequence[Row]) -> list[int]:
    """The front of every row, by taking off what nothing left dominates, again and again."""
    fronts = [-1] * len(rows)
    index = 0
    while -1 in fronts:
        left = [i for i, front in enumerate(fronts) if front == -1]
        for i in left:
            if not any(dominates(rows[j], rows[i]) for j in left):
                fronts[i] = index
        index += 1
    return fronts


def greedy(rows: Sequence[Row]) -> list[int]:
    """The epsilon-net's order by its definition, in exact fractions: the farthest from its nearest chosen neighbour comes next."""
    columns = list(zip(*rows, strict=True))
    scaled = [tuple(Fraction(x - min(c), (max(c) - min(c)) or 1) for x, c in zip(row, columns, strict=True)) for row in rows]

    def gap(i: int, j: int) -> Fraction:
        return sum(((a - b) ** 2 for a, b in zip(scaled[i], scaled[j], strict=True)), Fraction(0))

    order = [min(range(len(rows)), key=lambda i: (rows[i], i))]
    while len(order) < len(rows):
        left = [i for i in range(len(rows)) if i not in order]
        order.append(max(left, key=lambda i: (min(gap(i, j) for j in order), -i)))
    return order


def ranked(rows: Sequence[Row]) -> list[int]:
    """All rows from the best to the worst: front by front, inside a front as `greedy` has it."""
    fronts = peeled(rows)
    best_first = []
    for index in range(max(fronts) + 1):
        peers = [i for i, front in enumerate(fronts) if front == index]
        best_first += [peers[i] for i in greedy([rows[i] for i in peers])]
    return best_first


def entries(rows: Sequence[Sequence[float]]) -> list[Entry]:
    return [Entry(number=i, costs=tuple(row)) for i, row in enumerate(rows)]


def verdict_on(rows: Sequence[Sequence[float]], factor: float = 3, me: int = -1) -> Any:
    known = entries(rows)
    newcomer = known.pop(me)
    return decide(known, newcomer, factor)


@given(ROWS)
def test_the_fronts_are_those_that_peeling_finds(rows: list[Row]) -> None:
    assert front_indices(np.array(rows, dtype=float)).tolist() == peeled(rows)


@given(ROWS)
def test_the_net_is_the_greedy_one(rows: list[Row]) -> None:
    assert net_order(np.array(rows, dtype=float)) == greedy(rows)


@given(ROWS, st.sampled_from([2, 2.5, 3, 4]), st.data())
def test_a_verdict_is_what_brute_force_says(rows: list[Row], factor: float, data: st.DataObject) -> None:
    me = data.draw(st.integers(0, len(rows) - 1))
    found = verdict_on(rows, factor, me)
    fronts, place = peeled(rows), ranked(rows).index(me) + 1
    is_early = len(rows) < factor
    is_last = fronts[me] == max(fronts) and fronts[me] > 0
    assert found.place == place
    assert (found.front, found.num_fronts, found.num_entries) == (fronts[me] + 1, max(fronts) + 1, len(rows))
    is_best = fronts[me] == 0 and rows[me] not in rows[:me]
    assert found.goes_on is (is_early or is_best or (Fraction(place, len(rows)) <= Fraction(1) / Fraction(factor) and not is_last))


@given(ROWS, st.randoms(use_true_random=False), st.lists(st.tuples(st.integers(1, 9), st.integers(-9, 9)), min_size=3, max_size=3))
def test_neither_the_order_of_arrival_nor_the_units_matter(rows: list[Row], shuffle: random.Random, units: list[Row]) -> None:
    known = entries(rows)
    newcomer = known[-1]
    expected = decide(known[:-1], newcomer, 3)
    shuffle.shuffle(known)
    assert decide(known, newcomer, 3) == expected
    other = [tuple(a * x + b for x, (a, b) in zip(row, units, strict=False)) for row in rows]
    assert verdict_on(other) == expected


@pytest.mark.parametrize("num_objectives", [1, 2, 3])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_in_random_populations_the_best_go_on_and_the_worst_do_not(num_objectives: int, factor: float) -> None:
    """What the open implementation gets wrong in most of the cases: it takes the order of the samples for their priorities."""
    rng = np.random.default_rng(num_objectives)
    going_on = 0
    for _ in range(200):
        rows = rng.random((29, num_objectives)).tolist()
        best, worst = [-1.0] * num_objectives, [2.0] * num_objectives
        assert verdict_on([*rows, best], factor).goes_on, "it dominates all others"
        assert not verdict_on([*rows, worst], factor).goes_on, "all others dominate it"
        newcomer = rng.random(num_objectives).tolist()
        found = verdict_on([*rows, newcomer], factor)
        fronts = peeled([*rows, newcomer])
        if fronts[-1] == max(fronts) > 0:
            assert not found.goes_on
        if fronts[-1] == 0:
            assert found.goes_on, "nothing dominates it"
        going_on += found.goes_on
    assert going_on / 200 == pytest.approx(1 / factor, abs=0.12)


def test_until_there_are_as_many_as_the_factor_all_go_on() -> None:
    assert verdict_on([(0, 0)]).goes_on
    assert verdict_on([(0, 0), (9, 9)]).goes_on
    assert not verdict_on([(0, 0), (1, 1), (9, 9)]).goes_on
    assert not verdict_on([(0, 0), (9, 9)], factor=2).goes_on


def test_with_one_objective_it_is_plain_successive_halving() -> None:
    losses = [(x,) for x in (0.5, 0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6)]
    assert [verdict_on([*losses[:i], *losses[i + 1 :], losses[i]]).goes_on for i in range(9)] == [x <= 0.3 for (x,) in losses]


def test_inside_a_front_the_ends_come_first_then_the_widest_gap() -> None:
    line = np.array([(0, 100), (10, 90), (50, 50), (60, 40), (100, 0)], dtype=float)
    assert net_order(line) == [0, 4, 2, 1, 3]


def test_of_two_that_are_equally_far_the_older_comes_first_whatever_their_last_bit_says() -> None:
    rows = [(7, 2), (5, 6), (4, 7), (6, 3)]  # thirds and fifths, which floats only have about
    assert net_order(np.array(rows, dtype=float)) == greedy(rows) == [2, 0, 1, 3]


def test_a_duplicate_adds_nothing_and_comes_after_all_that_is_new() -> None:
    rows = [(0, 4), (0, 4), (2, 2), (4, 0)]
    assert net_order(np.array(rows, dtype=float)) == [0, 3, 2, 1]
    assert verdict_on(rows, 2, me=1).place == 4
    assert not verdict_on(rows, 2, me=1).goes_on
    same = [(1, 1)] * 6
    assert [verdict_on(same, 3, me=i).goes_on for i in range(6)] == [True, True, False, False, False, False], "older ones first"


def test_a_front_larger_than_its_share_goes_on_whole_and_nothing_else_does() -> None:
    line = [(i, 9 - i) for i in range(10)]
    assert all(verdict_on(line, 3, me=i).goes_on for i in range(10))
    behind = verdict_on([*line, (5, 5)], 3)
    assert (behind.place, behind.quota, behind.goes_on) == (11, 10, False)


def test_a_small_better_front_leaves_the_last_one_no_place() -> None:
    rows = [(0, 0), (1, 5), (2, 4), (3, 3), (4, 2), (5, 1)]
    found = verdict_on(rows, 3, me=1)
    assert (found.place, found.quota, found.front) == (2, 2, 2)
    assert not found.goes_on


def test_a_second_entry_of_a_trial_replaces_its_first() -> None:
    known = entries([(0, 0), (1, 1), (2, 2)])
    again = decide(known, Entry(number=0, costs=(3, 3)), 3)
    assert (again.num_entries, again.place, again.goes_on) == (3, 3, False)
    assert decide(known, Entry(number=2, costs=(-1, -1)), 3).goes_on


# -- from reports to rungs -------------------------------------------------------------------------------------------------


def spec(
    metrics: Sequence[str] = ("accuracy", "train_seconds"), task: str = "sequence-classification", **scheduler: Any
) -> SearchSpec:
    sections = {"objectives": [{"metric": m} for m in metrics], "scheduler": {"method": "asha", **scheduler}}
    return SearchSpec.model_validate({"model": {"name": "m", "task": task}, "data": {"train": "t.csv"}, **sections})


def report(accuracy: float, seconds: float, step: int = 2, num_steps: int = 18, **metrics: float) -> dict[str, Any]:
    known = {"accuracy": accuracy, "eval_loss": 1 - accuracy, "train_seconds": seconds, **metrics}
    return {"step": step, "num_steps": num_steps, "fidelity": step / num_steps, "metrics": known, "final": step == num_steps}


def test_objectives_are_turned_once_and_a_rung_is_a_share_of_the_trials_own_steps() -> None:
    rungs = Rungs(spec())
    assert rungs.judge(0, report(0.9, 10.0)) is not None
    assert rungs.judge(1, report(0.8, 20.0, step=12, num_steps=108)) is not None
    worse = rungs.judge(2, report(0.7, 30.0, step=4, num_steps=36))
    assert worse is not None
    assert (worse["share"], worse["place"], worse["goes_on"]) == (pytest.approx(1 / 9), 3, False)
    better = rungs.judge(3, report(0.95, 5.0))
    assert better is not None
    assert better["goes_on"]
    further = rungs.judge(0, report(0.1, 10.0, step=6))
    assert further is not None
    assert (further["share"], further["num_entries"]) == (pytest.approx(1 / 3), 1)


def test_nothing_is_decided_off_a_rung_and_at_the_end() -> None:
    rungs = Rungs(spec())
    for number in range(5):
        assert rungs.judge(number, report(0.9 - number, 1.0 + number, step=18)) is None
        assert rungs.judge(number, report(0.9 - number, 1.0 + number, step=3)) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_cannot_be_compared_is_neither_stopped_nor_counted(value: float | None) -> None:
    rungs = Rungs(spec())
    for number in range(3):
        odd = report(0.1, 1.0)
        odd["metrics"].pop("train_seconds")
        if value is not None:
            odd["metrics"]["train_seconds"] = value
        assert rungs.judge(number, odd) is None
    first = rungs.judge(3, report(0.5, 1.0))
    assert first is not None
    assert first["num_entries"] == 1


def test_an_objective_that_only_the_end_tells_is_left_out() -> None:
    wanted = spec(("exact_match", "eval_loss", "train_seconds"), "causal-lm")
    assert [o.metric for o in wanted.rung_objectives()] == ["eval_loss", "train_seconds"]
    rungs = Rungs(wanted)
    verdicts = [rungs.judge(n, report(0.0, 1.0 + n, eval_loss=1.0 + n)) for n in range(3)]
    assert [v and v["goes_on"] for v in verdicts] == [True, True, False]


def test_the_loss_stands_in_for_the_accuracy() -> None:
    rungs = Rungs(spec())
    for number, loss in enumerate([1.0, 2.0, 3.0]):
        verdict = rungs.judge(number, report(0.1 * number, 5.0, eval_loss=loss))
        assert verdict is not None
        assert verdict["place"] == number + 1
    assert not verdict["goes_on"], "it has the best accuracy, and the worst loss"


def test_without_a_scheduler_nothing_is_decided_and_the_reports_are_where_they_were() -> None:
    off = spec(method="none")
    rungs = Rungs(off)
    assert all(rungs.judge(n, report(0.9 - n, 1.0 + n)) is None for n in range(5))
    assert shares_of(off, 7) == shares_of(spec(), 7) == pytest.approx((1 / 9, 1 / 3))


def test_the_rungs_of_a_resumed_search_are_those_of_its_records() -> None:
    reports = {n: [report(0.5 + 0.1 * n, 10.0 - n), report(0.6 + 0.1 * n, 10.0 - n, step=6)] for n in range(4)}
    rungs = Rungs(spec())
    for number, there in reports.items():
        for one in there:
            rungs.judge(number, one)
    records = [TrialRecord(number=n, state=TrialState.RUNNING, params={}, reports=tuple(there)) for n, there in reports.items()]
    resumed = Rungs(spec(), records)
    for number, one in [(4, report(0.0, 99.0)), (0, report(0.99, 0.5)), (5, report(0.65, 9.0, step=6))]:
        assert resumed.judge(number, one) == rungs.judge(number, one) is not None


def test_brackets_are_dealt_by_the_number_alone_in_ashas_proportions() -> None:
    dealt = Counter(bracket_of(number, 2, 3) for number in range(3000))
    weights = [math.exp(n) for n in (3, 2, 1)]  # rungs of the bracket, with the end of the trial
    assert [dealt[s] / 3000 for s in range(3)] == pytest.approx([w / sum(weights) for w in weights], abs=0.003)
    assert {bracket_of(number, 2, 1) for number in range(50)} == {0}


def test_a_bracket_spares_its_trials_the_first_rungs_and_keeps_to_itself() -> None:
    three = spec(brackets=3)
    number_of = {bracket_of(number, 2, 3): number for number in range(30)}
    assert [len(shares_of(three, number_of[s])) for s in range(3)] == [2, 1, 0]
    rungs = Rungs(three)
    assert rungs.judge(number_of[1], report(0.5, 1.0)) is None
    first = rungs.judge(number_of[0], report(0.5, 1.0, step=6))
    second = rungs.judge(number_of[1], report(0.4, 2.0, step=6))
    assert first is not None
    assert second is not None
    assert second["num_entries"] == 1
    assert rungs.judge(number_of[2], report(0.1, 9.0, step=6)) is None
