"""A language model's head and its loss as one operation, without all logits at once.

Some hundred or thousand targets at a time are computed, with their gradients: of a wide vocabulary all logits would take more memory
than the blocks do. (Wijmans et al. 2024, https://arxiv.org/abs/2411.09009; torch 2.13 has `linear_cross_entropy`, which torch.compile
cannot enter.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary

from spaces.memory import targets_at_once

# Takes logits (targets, vocabulary) and targets (targets,).
Differentiate = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def differentiate(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross entropy in fp32, and its gradient, in the place of the logits: softmax less one at the target."""
    chosen = targets[:, None]
    scores = logits.float()
    picked = scores.gather(1, chosen)
    largest = scores.amax(1, keepdim=True)
    scores = scores.sub_(largest).exp_()
    total = scores.sum(1, keepdim=True)
    loss = (total.log() + largest - picked).sum()
    scores = scores.div_(total).scatter_add_(1, chosen, torch.full_like(total, -1.0))
    # What torch compiles keeps no fp32 scores, and would write its result twice to have it in a place of ours.
    return loss, scores.to(logits.dtype) if torch.compiler.is_compiling() else logits.copy_(scores)


def head_loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, differentiate: Differentiate) -> torch.Tensor:
    """Return the summed cross entropy of `hidden @ weight.T`, in fp32; a function of its own, because `trainables.meter` sees it.

    Its backward pass can run only once.

    Args:
        hidden: (targets, width)
        weight: (vocabulary, width)
        targets: (targets,)
        differentiate: the function of this name, compiled or not.
    """
    if has_torch_function_unary(hidden):
        return handle_torch_function(head_loss, (hidden,), hidden, weight, targets, differentiate)
    loss: torch.Tensor = _HeadLoss.apply(hidden, weight, targets, differentiate)
    return loss


@torch.no_grad()
def head_scores(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross entropy of `hidden @ weight.T`, in fp32, and for each target the output with the highest score.

    Args:
        hidden: (targets, width)
        weight: (outputs, width)
        targets: (targets,)
    """
    loss = hidden.new_zeros((), dtype=torch.float32)
    at_once, predicted = targets_at_once(len(weight)), torch.empty_like(targets)
    for start in range(0, len(targets), at_once):
        chunk = slice(start, start + at_once)
        logits = functional.linear(hidden[chunk], weight)
        predicted[chunk] = logits.argmax(-1)
        loss += differentiate(logits, targets[chunk])[0]
        del logits  # before there are the next ones
    return loss, predicted


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, differentiate: Differentiate) -> Any:
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        at_once = targets_at_once(len(weight))
        loss = hidden.new_zeros((), dtype=torch.float32)
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight and len(targets) > at_once else None
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(targets), at_once):
                chunk = slice(start, start + at_once)
                given = hidden[chunk].to(dtype)
                part, gradient = differentiate(given @ matrix.T, targets[chunk])
                loss += part
                if of_hidden is not None:
                    of_hidden[chunk] = gradient @ matrix
                if of_weight is not None:
                    _add_product(of_weight, gradient.T, given)
                elif needs_weight:
                    of_weight = (gradient.T @ given).to(weight.dtype)
                del gradient  # before there are the next logits
        if needs_weight and of_weight is None:
            of_weight = torch.zeros_like(weight)
        # Not by `save_for_backward`, which would keep what the parameter's gradient shall be, so that it would be copied.
        ctx.gradients = of_hidden, None if of_weight is None else of_weight.to(weight.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (of_loss,), (of_hidden, of_weight) = gradients, ctx.gradients
        del ctx.gradients
        return *(None if g is None else g.mul_(of_loss) for g in (of_hidden, of_weight)), None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add left @ right to an fp32 total."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right
