from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spaces.config import TrialConfig
from spaces.constraints import Limits, is_feasible, violations
from spaces.space import SpaceSpec

ROOMY = Limits(num_workers=8, hidden_size=384)


def config(**params: object) -> TrialConfig:
    return TrialConfig.from_params({**SpaceSpec().first(), **params}, max_length=128)


def test_the_default_space_is_feasible():
    values = violations(config(), ROOMY)
    assert list(values) == ["global_batch_divisible", "world_size_within_cluster", "adapter_rank_within_width"]
    assert is_feasible(values)


@pytest.mark.parametrize(
    ("params", "limits", "name", "value"),
    [
        ({"global_batch_size": 16, "world_size": 3}, ROOMY, "global_batch_divisible", 1),
        ({"global_batch_size": 16, "micro_batch_size": 5}, ROOMY, "global_batch_divisible", 1),
        ({"global_batch_size": 2, "world_size": 4}, ROOMY, "global_batch_divisible", 2),
        ({"world_size": 4}, Limits(num_workers=1, hidden_size=None), "world_size_within_cluster", 3),
        ({"lora_rank": 385}, ROOMY, "adapter_rank_within_width", 1),
    ],
)
def test_each_constraint_alone(params, limits, name, value):
    values = violations(config(**params), limits)
    assert {k: v for k, v in values.items() if v > 0} == {name: value}
    assert not is_feasible(values)


def test_the_edges_are_feasible():
    assert is_feasible(violations(config(lora_rank=384, world_size=8), ROOMY))
    assert is_feasible(violations(config(lora_rank=9999), Limits(num_workers=1, hidden_size=None)))
    assert is_feasible(violations(config(adapter="none", lora_rank=9999), ROOMY))


@given(batch=st.integers(1, 256), world=st.integers(1, 8), micro=st.one_of(st.just("auto"), st.integers(1, 64)))
def test_a_feasible_layout_deals_every_row_exactly_once(batch, world, micro):
    made = config(global_batch_size=batch, world_size=world, micro_batch_size=micro)
    feasible = is_feasible(violations(made, ROOMY))
    assert feasible == (made.num_grad_accum_steps * world * made.layout.micro_batch_size == batch)
