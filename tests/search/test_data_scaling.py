from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from search.data_scaling import SizePoint, data_curves, envelope, missing_lines, scaling_as_json, scaling_lines
from search.record import TrialRecord, TrialState
from search.scaling import Law

LAW = Law(scale=20.0, pre_learned=0.0, exponent=0.4, floor=0.5)
TOTAL = 8000
RATES = (1e-4, 1e-3, 1e-2)


def trial(number: int, rows: int | None, loss: float, *, adapter: str = "lora", rank: int | None = 8, **fields: Any) -> TrialRecord:
    return TrialRecord(
        number=number,
        state=fields.pop("state", TrialState.COMPLETE),
        params={},
        config={"recipe": {"adapter": adapter, "adapter_rank": rank}, "layout": {}},
        values={"eval_loss": loss},
        details={"distinct_rows": rows, "train_rows": TOTAL} if rows else {},
        **fields,
    )


def grid(first: int = 0, *, adapter: str = "lora", rank: int | None = 8, fractions: int = 7) -> list[TrialRecord]:
    """Trials on the law at the middle rate and above it at the others, in no order."""
    random_ = random.Random(first)
    records = []
    for k in range(fractions):
        rows = round(TOTAL / 2 ** (k / 2))
        for rate in RATES:
            worse = 1 + 0.3 * abs(math.log10(rate) + 3)
            loss = LAW.loss(rows) * worse * random_.uniform(0.998, 1.002)
            records.append(trial(first + len(records), rows, loss, adapter=adapter, rank=rank))
    return random_.sample(records, len(records))


def brute_envelope(records: list[TrialRecord]) -> list[int]:
    """The slow way: for every size on the scale, the best of the trials to which no other size is nearer."""
    sizes = [TOTAL / 2 ** (k / 2) for k in range(30)]
    numbers = []
    for size in sizes:
        near = [
            r
            for r in records
            if min(sizes, key=lambda s, r=r: abs(math.log(s / r.details["distinct_rows"]))) == size  # type: ignore[misc]
        ]
        if near:
            numbers.append(min(near, key=lambda r: r.values["eval_loss"]).number)
    return sorted(numbers, key=lambda n: next(r.details["distinct_rows"] for r in records if r.number == n))


def test_the_best_trial_near_each_size_is_on_the_curve() -> None:
    random_ = random.Random(5)
    records = [trial(n, round(TOTAL * 10 ** random_.uniform(-1.5, 0)), random_.uniform(1, 3)) for n in range(60)]
    (curve,) = data_curves(records)
    assert [point.number for point in curve.points] == brute_envelope(records)
    assert [point.rows for point in curve.points] == sorted(point.rows for point in curve.points)


def test_a_grid_of_rates_gives_the_law_of_the_best_one() -> None:
    (curve,) = data_curves(grid())
    assert [point.rows for point in curve.points] == [round(TOTAL / 2 ** (k / 2)) for k in reversed(range(7))]
    assert all(point.number % 3 == 1 for point in curve.points), "the middle rate is the best"
    assert curve.fit is not None
    assert curve.fit.loss(2 * TOTAL).value == pytest.approx(LAW.loss(2 * TOTAL), rel=0.02)
    (line,) = scaling_lines([curve])
    assert line.startswith("more data, lora of rank 8: a power law through 7 sizes from 1,000 to 8,000 rows says eval_loss ")
    assert "with all 8,000 and " in line
    assert "(80% intervals); a doubling gains less than 0.01 nats beyond " in line


def test_every_rank_with_enough_sizes_has_its_own_law() -> None:
    records = [*grid(), *grid(100, rank=16, fractions=3), *grid(200, adapter="none", rank=None)]
    curves = data_curves(records)
    assert [(c.adapter, c.adapter_rank, c.fit is not None) for c in curves] == [("lora", 8, True), ("none", None, True)]
    assert [c.label for c in curves] == ["lora of rank 8", "full fine-tuning"]


def test_ranks_with_too_few_sizes_are_taken_together() -> None:
    sizes = [1000, 1400, 2000, 2800, 4000, 5600]
    records = [trial(n, rows, LAW.loss(rows), rank=4 if n % 2 else 16) for n, rows in enumerate(sizes)]
    (curve,) = data_curves(records)
    assert curve.label == "lora of any rank"
    assert curve.fit is not None
    assert curve.fit.num_points == 6


def test_too_few_sizes_have_a_reason_and_no_law() -> None:
    curves = data_curves(grid(fractions=3))
    assert scaling_lines(curves) == []
    assert missing_lines(curves) == ["no law for lora of any rank: 3 of at least 4 different sizes"]
    assert data_curves([]) == []


@pytest.mark.parametrize(
    "left_out",
    [
        trial(90, 8000, 0.1, state=TrialState.PRUNED),
        trial(90, 8000, 0.1, state=TrialState.FAIL),
        trial(90, 8000, math.nan),
        trial(90, None, 0.1),
        TrialRecord(number=90, state=TrialState.COMPLETE, params={}, values={"eval_loss": 0.1}),
    ],
)
def test_a_trial_without_an_end_or_a_size_is_left_out(left_out: TrialRecord) -> None:
    (curve,) = data_curves([*grid(), left_out])
    assert 90 not in {point.number for point in curve.points}


def test_sizes_are_counted_from_all_rows_down() -> None:
    points = [SizePoint(number=n, rows=rows, loss=1.0 - 0.1 * n) for n, rows in enumerate((8000, 6800, 6600, 5700))]
    assert [p.number for p in envelope(points, 8000)] == [3, 1], "6,800 is near all, 6,600 near their share of 0.71"


def test_sizes_that_do_not_tell_are_said_not_to() -> None:
    """Losses that scatter by five percent about a law which falls by 16."""
    random_ = random.Random(1)
    losses = [2.0 * 2 ** (-0.06 * n) * (1 + random_.uniform(-0.05, 0.05)) for n in range(5)]
    curves = data_curves([trial(n, 250 * 2**n, loss) for n, loss in enumerate(losses)])
    assert curves[0].fit is not None
    (line,) = scaling_lines(curves)
    assert " rows does not tell whether more data pays: eval_loss " in line
    assert "doubling" not in line


def test_what_is_infinite_is_null_in_json() -> None:
    slow = Law(scale=3.0, pre_learned=0.0, exponent=0.06, floor=0.0)
    curves = data_curves([trial(n, rows, slow.loss(rows)) for n, rows in enumerate((500, 1000, 2000, 4000, 8000))])
    (data,) = json.loads(json.dumps(scaling_as_json(curves), allow_nan=False))
    assert data["law"]["rows_where_doubling_stops_paying"]["value"] is None
    assert data["law"]["loss_with_all"]["value"] == pytest.approx(slow.loss(8000), rel=1e-3)
    assert data["points"][0] == {"number": 0, "rows": 500, "loss": pytest.approx(slow.loss(500))}
    (line,) = scaling_lines(curves)
    assert line.endswith("; a doubling gains 0.01 nats or more even at 1,024 times as many")
