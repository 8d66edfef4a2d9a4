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
# `torch.nn.utils.clip_grads_with_norm_` adds it to a norm that may be zero.
NORM_EPSILON = 1e-6


def make_optimizer(parameters: dict[str, nn.Parameter], recipe: Recipe) -> AdamW:
    """Return AdamW; only matrices decay, since a decayed bias, norm weight or scale of (IA)3 pulls towards nothing sensible."""
    # PEFT holds (IA)3's vectors as matrices of one row or column.
    matrices = {name for name, p in parameters.items() if p.dim() > 1 and ".ia3_l." not in name}
    groups = [
        {"params": [p for name, p in parameters.items() if name in matrices], "weight_decay": recipe.weight_decay},
        {"params": [p for name, p in parameters.items() if name not in matrices], "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=recipe.learning_rate, fused=True)


def update(optimizer: AdamW, parameters: Iterable[nn.Parameter]) -> None:
    """Make a step with the gradients scaled down to a norm of `MAX_GRAD_NORM` together; every rank must call it.

    The fused kernel scales them as it reads them, where `clip_grad_norm_` reads and writes them all once more; of shards it
    would take none but a sharded scale.
    """
    trained = [p for p in parameters if p.grad is not None]
    is_split = any(piece_of(p) is not None for p in trained)
    norm = total_norm(trained) if is_split else torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    if not any(isinstance(p, DTensor) for p in trained):
        # As `torch.amp.GradScaler` hands it over: what the gradients are divided by.
        optimizer.grad_scale = ((norm + NORM_EPSILON) / MAX_GRAD_NORM).clamp(min=1.0)  # type: ignore[attr-defined]
    else:
        torch.nn.utils.clip_grads_with_norm_(trained, MAX_GRAD_NORM, norm)
    optimizer.step()


def learning_rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """Return the rate of a step, counted from 0: a linear rise over the warm-up, then a linear fall to zero."""
    warmup = round(recipe.warmup_fraction * num_steps)
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * (num_steps - step) / max(1, num_steps - warmup)
