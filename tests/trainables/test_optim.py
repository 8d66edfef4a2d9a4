"""A step against torch's own clipping and AdamW."""

from __future__ import annotations

import pytest
import torch
from memory_grid import Case
from torch import nn

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
