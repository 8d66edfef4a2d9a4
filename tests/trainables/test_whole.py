from __future__ import annotations

import torch
import torch.distributed as dist
from memory_grid import Case
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainables.mesh import World
from trainables.optim import make_optimizer
from trainables.whole import load_state, whole_state, whole_weights


def test_an_optimizer_goes_on_on_the_device_of_its_parameters() -> None:
    recipe = Case(family="bert").config(1).recipe
    trained = {"w": nn.Parameter(torch.ones(3, 2)), "b": nn.Parameter(torch.ones(2))}
    optimizer = make_optimizer(trained, recipe)
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = whole_state(optimizer, trained)
    assert {"w/step", "b/step", "w/exp_avg", "b/exp_avg_sq"} <= set(saved)
    # No GPU is needed to have parameters elsewhere; all that fused AdamW reads must be there, the count of steps too.
    elsewhere = {name: nn.Parameter(parameter.detach().to("meta")) for name, parameter in trained.items()}
    other = make_optimizer(elsewhere, recipe)
    load_state(other, elsewhere, saved)
    assert {f"{n}/{key}" for n, p in elsewhere.items() for key in other.state[p]} == set(saved)
    assert {value.device.type for p in elsewhere.values() for value in other.state[p].values()} == {"meta"}


def test_a_rank_that_does_not_write_keeps_no_copy() -> None:
    trained = {"w": nn.Parameter(torch.ones(3, 2))}
    optimizer = make_optimizer(trained, Case(family="bert").config(1).recipe)
    trained["w"].grad = torch.ones(3, 2)
    optimizer.step()
    assert whole_weights(trained, is_kept=False) == whole_state(optimizer, trained, is_kept=False) == {}
    kept = whole_weights(trained)
    assert kept["w"].data_ptr() != trained["w"].data_ptr(), "the next step changes the parameter"


def test_every_trial_of_a_group_shards_over_the_same_mesh() -> None:
    """Each mesh may have process groups of its own, with their threads and files."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        world = World(rank=0, world_size=2, device=torch.device("cpu"), control_group=None)
        layout = Case(family="bert").config(2, "fsdp").layout
        assert world.sharding(layout) is world.sharding(layout)
    finally:
        dist.destroy_process_group()
