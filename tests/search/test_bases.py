from __future__ import annotations

from dataclasses import replace
from typing import Any

from memory_grid import Case
from synthetic import OBJECTIVES

from search.bases import adapter_lines, bases_table
from search.record import TrialRecord, TrialState

MIB = 2**20


def trial(
    number: int, base: str, accuracy: float, seconds: float, weights: int, pace: float, *, method: str = "lora", **layout: Any
) -> TrialRecord:
    config = Case(family="bert", adapter="all-linear", quantization=base, method=method).config(1)
    config = replace(config, layout=replace(config.layout, **layout))
    values = {"accuracy": accuracy, "train_seconds": seconds, "tokens_per_second": pace * config.layout.world_size}
    details = {"memory_by_rank": [{"weights_bytes": weights * MIB}]}
    return TrialRecord(number=number, state=TrialState.COMPLETE, params={}, config=config.to_dict(), values=values, details=details)


def test_bases_are_compared_by_weights_pace_and_the_best_of_each() -> None:
    records = [
        trial(0, "nf4", 0.70, 12.0, 20, 700),
        trial(1, "none", 0.75, 9.0, 90, 1000),
        trial(2, "none", 0.60, 4.0, 92, 1200, world_size=2),
        # Of shards a rank holds a part.
        trial(3, "none", 0.50, 4.0, 45, 400, world_size=2, strategy="fsdp"),
        trial(4, "nf4", 0.70, 5.0, 22, 800),
    ]
    table = bases_table(records, OBJECTIVES)
    assert table is not None
    heading, rows = table
    assert heading == ["base", "trials", "weights of a rank", "times the seconds of a token", "best accuracy", "at train seconds"]
    # On two ranks only the whole base was tried: nothing is held against that.
    assert rows == [["none", "3", "91 MiB", "1.00", "0.75", "9 s"], ["nf4", "2", "21 MiB", "1.33", "0.7", "5 s"]]


def test_a_bases_pace_is_held_against_the_same_adapter_and_layout() -> None:
    records = [
        trial(0, "none", 0.7, 12.0, 90, 1000),
        trial(1, "none", 0.7, 12.0, 90, 300, world_size=2),
        trial(2, "nf4", 0.7, 12.0, 20, 500),
        trial(3, "nf4", 0.7, 12.0, 20, 600, world_size=2),
        trial(4, "int8", 0.7, 12.0, 30, 2000, recomputation="full"),
        trial(5, "int8", 0.7, 12.0, 40, 2000, strategy="fsdp"),  # of one rank, which holds all
        trial(6, "int8", 0.7, 12.0, 40, 2000, method="bottleneck"),
        trial(7, "nf4", 0.7, 12.0, 1, 500, micro_batch_size=3),  # as many rows at once change nothing
        trial(8, "none", 0.7, 12.0, 1, 1000, world_size=2, strategy="tp"),  # of half of the weights
    ]
    table = bases_table(records, OBJECTIVES)
    assert table is not None
    # Twice as long on one rank, half as long on two.
    assert [row[:4] for row in table[1]] == [
        ["none", "3", "90 MiB", "1.00"],
        ["int8", "3", "40 MiB", "-"],
        ["nf4", "3", "20 MiB", "1.00"],
    ]


def test_one_base_is_compared_with_nothing() -> None:
    in_full = Case(family="bert").config(1)
    full = TrialRecord(
        number=1,
        state=TrialState.COMPLETE,
        params={},
        config=in_full.to_dict(),
        values={"accuracy": 0.9, "train_seconds": 1.0},
    )
    assert bases_table([trial(0, "nf4", 0.7, 12.0, 20, 700), full], OBJECTIVES) is None, "full fine-tuning has no base"
    assert bases_table([], OBJECTIVES) is None


def test_the_best_of_each_adapter_within_the_time_that_there_is_stands_in_a_line() -> None:
    in_full = Case(family="bert").config(1).to_dict()

    def full(number: int, accuracy: float, seconds: float) -> TrialRecord:
        values = {"accuracy": accuracy, "train_seconds": seconds}
        return TrialRecord(number=number, state=TrialState.COMPLETE, params={}, config=in_full, values=values)

    lora = [trial(0, "none", 0.7, 12.0, 20, 700), trial(1, "none", 0.9, 121.0, 20, 700)]
    accuracy, seconds = OBJECTIVES
    limited = (accuracy, replace(seconds, is_limit=True))
    (line,) = adapter_lines([*lora, full(2, 0.6, 9.0), full(3, 0.8, 120.0)], limited)
    assert line.startswith(
        "best accuracy of each adapter within 120 s: none 0.8 at 120 s (trial 3), lora 0.7 at 12 s (trial 0); they differ"
    )
    (line,) = adapter_lines([lora[0], full(2, 0.6, 121.0)], limited)
    assert "none nothing, lora 0.7" in line
    (line,) = adapter_lines([lora[0], full(2, 0.6, 121.0)], OBJECTIVES)
    assert line.startswith("best accuracy of each adapter: none 0.6 at 121 s")
    assert adapter_lines(lora, OBJECTIVES) == adapter_lines([], OBJECTIVES) == []
