"""A step against torch's own clipping and AdamW."""

from __future__ import annotations

import distributed
import pytest
import torch
from memory_grid import Case
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from trainables.mesh import World
from trainables.optim import MAX_GRAD_NORM, make_optimizer, update

SHAPES = {"w": (7, 5), "b": (5,), "idle": (3,)}


def parameters_of(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("size", [100.0, 1.0, 1e-3, 0.0])
def test_gradients_are_clipped_together_as_torch_clips_them(size: float) -> None:
    recipe = Case(family="bert").config(1).recipe
    ours, theirs = parameters_of(0), parameters_of(0)
    optimizer = make_optimizer(ours, recipe)
    groups = [
        {"params": [theirs["w"]], "weight_decay": recipe.weight_decay},
        {"params": [theirs["b"], theirs["idle"]], "weight_decay": 0.0},
    ]
    plain = torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=False, foreach=False)
    for step in range(3):
        # Large, then small: the moments remember what was clipped.
        factor = size / (1 + 50 * step)
        for name in ("w", "b"):
            gradient = factor * torch.randn(ours[name].shape, generator=torch.Generator().manual_seed(step))
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(list(theirs.values()), MAX_GRAD_NORM)
        assert (norm > MAX_GRAD_NORM) == (factor > 0.5), "both kinds of steps are seen"
        plain.step()
        update(optimizer, ours.values())
        optimizer.zero_grad()
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-5, atol=1e-7)


def updated_on_the_host(world: World) -> list[torch.Tensor]:
    """Make a step with parameters as FSDP2 leaves them to the host: on the CPU, sharded over a mesh of GPUs."""
    mesh = DeviceMesh("cuda", range(world.world_size))
    recipe = Case(family="bert").config(1).recipe

    def shard(whole: torch.Tensor) -> torch.Tensor:
        layout = DTensorSpec(mesh, (Shard(0),), TensorMeta(whole.shape, whole.stride(), whole.dtype))
        return DTensor(whole.chunk(world.world_size)[world.rank].clone(), layout, requires_grad=False)

    parameters = {name: nn.Parameter(shard(whole.detach())) for name, whole in even_parameters().items()}
    for parameter, gradient in zip(parameters.values(), gradients_of(even_parameters()), strict=True):
        parameter.grad = shard(gradient)
    optimizer = make_optimizer(parameters, recipe)
    update(optimizer, parameters.values())
    assert all(p.device.type == "cpu" and optimizer.state[p]["exp_avg"].device.type == "cpu" for p in parameters.values())
    return [p.full_tensor() for p in parameters.values()]


def even_parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in {"w": (8, 3), "b": (6,)}.items()}


def gradients_of(parameters: dict[str, nn.Parameter]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(p.shape, generator=generator) for p in parameters.values()]


def test_what_gpus_leave_to_their_hosts_is_clipped_together_and_updated_as_whole() -> None:
    """The norm and the gathering go over gloo, which a group of GPUs has for tensors of the CPU."""
    whole = even_parameters()
    for parameter, gradient in zip(whole.values(), gradients_of(whole), strict=True):
        parameter.grad = gradient
    update(make_optimizer(whole, Case(family="bert").config(1).recipe), whole.values())
    for results in distributed.run(2, updated_on_the_host):
        for result, expected in zip(results, whole.values(), strict=True):
            torch.testing.assert_close(result, expected.detach(), rtol=1e-5, atol=1e-7)
