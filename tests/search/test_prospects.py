"""What is known of a proposal before it is tried."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from engines import Profiles

from search.prospects import MAX_COMPARED, Prospects, belief, features
from search.record import TrialRecord, TrialState
from spaces.config import Recipe, TrialConfig
from spaces.constraints import Limits
from spaces.presets import usual_rate
from spaces.space import SpaceSpec
from spaces.spec import SearchSpec

LIMITS = Limits(num_workers=2, hidden_size=64, max_length=32)


class TenARank(Profiles):
    source = "estimate"

    def rough_seconds(self, config: TrialConfig) -> tuple[float, str]:
        return 10.0 / config.layout.world_size, self.source


class Search:
    """What is known of a search that has done nothing yet."""

    def __init__(self) -> None:
        model = {"name": "m", "task": "sequence-classification"}
        spec = SearchSpec.model_validate({"model": model, "data": {"train": "t"}})
        self.outlook, self.left, self.device_left = TenARank(), math.inf, math.inf
        self.records: dict[int, TrialRecord] = {}
        self.known: set[str] = set()
        self.trained: set[Recipe] = set()
        self.prospects = Prospects(
            spec,
            self.outlook,
            LIMITS,
            records=self.records,
            is_known=lambda config: config.key() in self.known,
            is_trained=lambda config: config.recipe in self.trained,
            seconds_left=lambda: self.left,
            device_seconds_left=lambda: self.device_left,
        )

    def seconds(self, **given: Any) -> float:
        return self.prospects.point(params(**given)).device_seconds

    def is_open(self, **given: Any) -> bool:
        return self.prospects.point(params(**given)).is_open


def params(**given: Any) -> dict[str, Any]:
    return SpaceSpec().first(**given)


def record(given: dict[str, Any], *, took: float, held: float, number: int = 0, ended: float = 1.0) -> TrialRecord:
    config = TrialConfig.from_params(given)
    values = {"accuracy": 0.5, "train_seconds": took}
    state = TrialState.COMPLETE
    return TrialRecord(
        number=number, state=state, params=given, config=config.to_dict(), values=values, held_seconds=held, finished_at=ended
    )


def test_an_estimated_time_is_told_by_how_far_those_before_were_off_and_a_measured_one_as_it_is() -> None:
    search = Search()
    estimate, profile = ({"train_seconds": 30.0, "time_source": source, "memory": {}} for source in ("estimate", "profile"))
    assert search.prospects.corrected(estimate) == estimate, "nothing is known yet"
    # What is said roughly of these is ten seconds, whatever was planned batch by batch.
    for took, planned in ((5.0, 20.0), (4.0, 8.0), (20.0, 10.0)):
        told = {"train_seconds": planned, "time_source": "estimate"}
        search.prospects.ended(replace(record(params(), took=took, held=took), predicted=told))
    corrected = search.prospects.corrected(estimate)
    assert corrected == {"train_seconds": 15.0, "time_source": "corrected estimate", "memory": {}, "estimated_seconds": 30.0}
    search.prospects.ended(replace(record(params(), took=60.0, held=60.0), predicted=corrected))  # twice what was estimated
    assert search.prospects.corrected(estimate)["train_seconds"] == 30.0 * (0.5 + 2.0) / 2, "not of what was corrected"
    assert search.prospects.corrected(profile) == profile
    assert search.prospects.corrected({"memory": {}}) == {"memory": {}}, "a family without formulas"


def test_a_point_trains_within_a_time_once_times_are_known_and_there_is_time_for_it() -> None:
    search = Search()
    assert not search.prospects.trains_within(params(), 1000.0), "nobody knows yet"
    search.prospects.ended(record(params(), took=20.0, held=23.0))
    assert [search.prospects.trains_within(params(), seconds) for seconds in (19.0, 21.0)] == [False, True]
    assert search.prospects.trains_within(params(world_size=2), 11.0)
    assert search.prospects.trains_within({"adapter": "lora", "epochs": 1.0}, 21.0), "a usual point leaves some knobs open"
    assert not search.prospects.trains_within(params(world_size=4), 1000.0), "there are two workers"
    search.left = 15.0
    assert not search.prospects.trains_within(params(), 1000.0)
    search.left, search.device_left = math.inf, 22.0
    assert not search.prospects.trains_within(params(), 1000.0), "it holds its device for three seconds more"
    search.device_left = 23.5
    assert search.prospects.trains_within(params(), 1000.0)
    assert not search.prospects.trains_within(params(world_size=2), 1000.0), "two of them for thirteen seconds each"
    search.device_left = math.inf
    search.known.add(TrialConfig.from_params(params()).key())
    assert not search.prospects.trains_within(params(), 1000.0)


def test_costs_are_device_seconds_corrected_by_what_trials_took() -> None:
    search = Search()
    assert search.seconds(world_size=2) == 10.0
    for took, held in ((20.0, 23.0), (30.0, 34.0), (15.0, 15.5)):  # two, three and one and a half times as long as predicted
        search.prospects.ended(record(params(), took=took, held=held))
    search.prospects.ended(TrialRecord(number=9, state=TrialState.FAIL, params={}, config=None))
    assert search.seconds(world_size=1) == pytest.approx(10 * 2 + 3)
    assert search.seconds(world_size=2) == pytest.approx(2 * (5 * 2 + 3))
    search.outlook.source = "profile"
    assert search.seconds(world_size=1) == pytest.approx(10 + 3), "how far estimates are off says nothing of profiles"


def test_what_cannot_run_or_end_in_time_or_is_known_is_not_open() -> None:
    search = Search()
    assert search.is_open()
    assert not search.is_open(world_size=4)
    search.left = 9.0
    assert not search.is_open()
    search.outlook.source = "rows"
    assert search.is_open(), "a number of rows is no time"
    search.left = 11.0
    search.outlook.source = "estimate"
    assert search.is_open()
    search.known.add(TrialConfig.from_params(params()).key())
    assert not search.is_open()
    assert search.is_open(lora_rank=8)


def test_a_recipe_that_was_trained_under_another_layout_costs_next_to_nothing() -> None:
    search = Search()
    trained = record(params(world_size=1), took=10.0, held=12.0)
    search.prospects.ended(trained)
    assert search.seconds(world_size=2) == pytest.approx(2 * (5.0 + 2.0))
    search.trained.add(trained.trial_config.recipe)
    assert search.seconds(world_size=2) == pytest.approx(2 * 2.0)


def test_a_trial_is_looked_at_as_it_was_trained_and_one_of_an_earlier_search_by_its_params() -> None:
    search = Search()
    search.records[3] = record(params(world_size=1), took=10.0, held=12.0, number=3)
    as_trained = search.prospects.trial(3, params(world_size=2))
    assert as_trained.timed["world_size"] == 0.0
    for number in (None, 4):  # an earlier search's, and one that waits and is no trial yet
        assert search.prospects.trial(number, params(world_size=2)).timed["world_size"] == pytest.approx(math.log(2))


def test_only_the_latest_trials_correct_what_is_predicted_also_after_a_resume() -> None:
    # By number the fast ones come last, by their ends the slow ones.
    factors = [1.0] * 8 + [2.0] * MAX_COMPARED
    records = [
        record(params(), took=10.0 * factor, held=30.0, number=len(factors) - n, ended=float(n)) for n, factor in enumerate(factors)
    ]
    restored, told = Search(), Search()
    restored.prospects.restore(records[::-1])
    for each in records:
        told.prospects.ended(each)
    assert restored.prospects._factors == told.prospects._factors == {"estimate": deque([2.0] * MAX_COMPARED)}
    assert restored.seconds() == told.seconds() == 30.0


@pytest.mark.parametrize("is_restored", [False, True])
def test_steps_that_ran_out_of_memory_are_feasible_no_more_where_no_formula_tells(is_restored: bool) -> None:
    search = Search()
    out = replace(
        record(params(world_size=2, micro_batch_size=8, recomputation="none"), took=1.0, held=1.0),
        state=TrialState.FAIL,
        error={"kind": "out_of_memory", "message": "x"},
    )
    if is_restored:
        search.prospects.restore([out])
    else:
        search.prospects.ended(out)
    assert not search.is_open(world_size=2, micro_batch_size=8, recomputation="none")
    (candidate,) = search.prospects.candidates(params(world_size=2, learning_rate=5e-3, micro_batch_size=8, recomputation="none"))
    assert candidate.constraints["memory_within_device"] > 0
    assert search.is_open(world_size=1, micro_batch_size=8)
    assert search.is_open(world_size=2, micro_batch_size=4)
    assert search.is_open(world_size=2, micro_batch_size=8, recomputation="auto"), "which computes blocks again"
    assert not search.prospects.fits_smaller(out), "its size is given"


def test_of_a_family_without_formulas_a_trial_that_ran_out_of_memory_is_tried_again_with_fewer_tokens_at_once() -> None:
    search = Search()
    out = replace(
        record(params(global_batch_size=256), took=1.0, held=1.0),
        state=TrialState.FAIL,
        error={"kind": "out_of_memory", "message": "x"},
    )
    (usual,) = search.prospects.candidates(out.params)
    search.prospects.ended(out)
    assert search.prospects.fits_smaller(out)
    (smaller,) = search.prospects.candidates(out.params)
    assert smaller.config.recipe == usual.config.recipe
    assert smaller.config.layout == replace(usual.config.layout, micro_batch_tokens=2048)


def test_rates_are_relative_to_the_usual_one_and_the_layout_is_nothing_that_is_learned_from() -> None:
    found = {}
    for adapter in ("none", "lora"):
        given = params(adapter=adapter, learning_rate=3 * usual_rate(adapter, 384), dataset_fraction=0.5, epochs=4.0)
        one, two = (features(TrialConfig.from_params({**given, "world_size": n}), 384) for n in (1, 2))
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
            belief(TrialConfig.from_params(params(adapter=adapter, learning_rate=rate)), 64) for rate in rates
        )
        assert usual == pytest.approx(higher)
        assert middle == pytest.approx(0.0)
        assert off == pytest.approx(-0.5), "one standard deviation"
        assert max(high, low) < off < usual
    assert belief(TrialConfig.from_params(params()), None) == 0.0
