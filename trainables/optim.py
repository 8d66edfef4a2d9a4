"""The optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from spaces.config import Recipe
from trainables.tensor_parallel import piece_of, total_norm

MAX_GRAD_NORM = 1.0


def make_optimizer(parameters: dict[str, nn.Parameter], recipe: Recipe) -> AdamW:
    """Return AdamW; only matrices decay, since a decayed bias, norm weight or scale of (IA)3 pulls towards nothing sensible."""
    values = list(parameters.values())
    # PEFT holds (IA)3's vectors as matrices of one row or column.
    matrices = {name for name, p in parameters.items() if p.dim() > 1 and ".ia3_l." not in name}
    groups = [
        {"params": [p for name, p in parameters.items() if name in matrices], "weight_decay": recipe.weight_decay},
        {"params": [p for name, p in parameters.items() if name not in matrices], "weight_decay": 0.0},
    ]
    sharded = any(isinstance(p, DTensor) for p in values)
    return AdamW([g for g in groups if g["params"]], lr=recipe.learning_rate, fused=None if sharded else True)


def clip_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Scale the gradients down to a norm of `MAX_GRAD_NORM` together; every rank must call it."""
    clipped = list(parameters)
    if any(piece_of(p) is not None for p in clipped):
        torch.nn.utils.clip_grads_with_norm_(clipped, MAX_GRAD_NORM, total_norm(clipped))
    else:
        torch.nn.utils.clip_grad_norm_(clipped, MAX_GRAD_NORM)


def learning_rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """Return the rate of a step, counted from 0: a linear rise over the warm-up, then a linear fall to zero."""
    warmup = round(recipe.warmup_fraction * num_steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * (num_steps - step) / max(1, num_steps - warmup)
