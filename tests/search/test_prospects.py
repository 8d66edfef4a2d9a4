"""What is known of a proposal before it is tried."""

from __future__ import annotations

import math
from typing import Any

import pytest
from engines import Profiles

from search.known import Known
from search.prospects import Prospects, belief, features
from search.record import TrialRecord, TrialState
from spaces.config import TrialConfig
from spaces.constraints import Limits
from spaces.presets import usual_rate
from spaces.space import SpaceSpec
from spaces.spec import SearchSpec

LIMITS = Limits(num_workers=2, hidden_size=64)


class TenARank(Profiles):
    def rough_seconds(self, config: TrialConfig) -> float:
        return 10.0 / config.layout.world_size


def make(**space: Any) -> tuple[Prospects, Known]:
    spec = SearchSpec.model_validate(
        {"model": {"name": "m", "task": "sequence-classification"}, "data": {"train": "t"}, "space": space}
    )
    known = Known([])
    return Prospects(spec, TenARank(), known, reuses=True), known


def params(**given: Any) -> dict[str, Any]:
    return SpaceSpec().first(**given)


def record(given: dict[str, Any], *, took: float, held: float, number: int = 0) -> TrialRecord:
    config = TrialConfig.from_params(given, max_length=128)
    values = {"accuracy": 0.5, "train_seconds": took}
    state = TrialState.COMPLETE
    return TrialRecord(number=number, state=state, params=given, config=config.to_dict(), values=values, held_seconds=held)


def test_costs_are_device_seconds_corrected_by_what_trials_took() -> None:
    prospects, _ = make()
    assert prospects.of(params(world_size=2), LIMITS).device_seconds == 10.0
    for took, held in ((20.0, 23.0), (30.0, 34.0), (15.0, 15.5)):  # two, three and one and a half times as long as predicted
        prospects.ended(record(params(), took=took, held=held))
    prospects.ended(TrialRecord(number=9, state=TrialState.FAIL, params={}, config=None))
    assert prospects.of(params(world_size=1), LIMITS).device_seconds == pytest.approx(10 * 2 + 3)
    assert prospects.of(params(world_size=2), LIMITS).device_seconds == pytest.approx(2 * (5 * 2 + 3))


def test_what_cannot_run_or_end_in_time_or_is_known_is_not_open() -> None:
    prospects, known = make()
    assert prospects.of(params(), LIMITS).is_open
    assert not prospects.of(params(world_size=4), LIMITS).is_open
    assert prospects.of(params(), LIMITS, seconds_left=11).is_open
    assert not prospects.of(params(), LIMITS, seconds_left=9).is_open
    known.started(record(params(), took=1.0, held=1.0))
    assert not prospects.of(params(), LIMITS).is_open
    assert prospects.of(params(lora_rank=8), LIMITS).is_open


def test_a_recipe_that_was_trained_under_another_layout_costs_next_to_nothing() -> None:
    prospects, known = make()
    trained = record(params(world_size=1), took=10.0, held=12.0)
    known.started(trained)
    known.ended(trained)
    prospects.ended(trained)
    assert prospects.of(params(world_size=2), LIMITS).device_seconds == pytest.approx(2 * 2.0)


def test_rates_are_relative_to_the_usual_one_and_the_layout_is_nothing_that_is_learned_from() -> None:
    found = {}
    for adapter in ("none", "lora"):
        given = params(adapter=adapter, learning_rate=3 * usual_rate(adapter, 384), dataset_fraction=0.5, epochs=4.0)
        one, two = (features(TrialConfig.from_params({**given, "world_size": n}, max_length=128), 384) for n in (1, 2))
        assert one[0] == two[0]
        assert one[1] != two[1]
        found[adapter] = one[0]
    assert found["none"]["learning_rate"] == pytest.approx(found["lora"]["learning_rate"])
    assert found["none"]["learning_rate"] == pytest.approx(math.log(3))
    assert found["none"]["rows"] == pytest.approx(math.log(2))
    assert found["lora"].keys() - found["none"].keys() >= {"adapter=lora", "adapter_rank", "adapter_alpha"}


def test_the_usual_rate_and_the_higher_one_are_believed_in_alike_and_rates_far_off_less_and_less() -> None:
    for adapter in ("none", "lora"):
        rates = [factor * usual_rate(adapter, 64) for factor in (1, 2, math.sqrt(2), 3 * math.sqrt(2), 100, 0.01)]
        usual, higher, middle, off, high, low = (
            belief(TrialConfig.from_params(params(adapter=adapter, learning_rate=rate), max_length=128), 64) for rate in rates
        )
        assert usual == pytest.approx(higher)
        assert middle == pytest.approx(0.0)
        assert off == pytest.approx(-0.5), "one standard deviation"
        assert max(high, low) < off < usual
    assert belief(TrialConfig.from_params(params(), max_length=128), None) == 0.0
