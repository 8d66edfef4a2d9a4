"""The cross entropy of a batch: with its logits for scores, and without all of them at once for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spaces.architecture import DECODERS
from trainables.batching import Batch
from trainables.compilation import Compilation
from trainables.head_loss import Differentiate, differentiate, head_loss, head_scores
from trainables.model import unwrapped
from trainables.packed import inputs_of


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the summed cross entropy, in fp32 whatever the logits are in."""
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def scored_loss(
    module: nn.Module, batch: Batch, task: str, loss: Callable[..., torch.Tensor] = cross_entropy
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross entropy of a batch, in fp32, and the logits where it has targets.

    Without a target it is zero, but connected to every parameter, so that the collectives of the backward pass run.

    Args:
        loss: `cross_entropy`, compiled or not.

    Returns:
        loss (), logits (targets, classes or vocabulary)
    """
    # Over a large vocabulary the head is the most expensive layer, and of a prompt nobody asks what comes next.
    picked = _picking(unwrapped(module).get_output_embeddings(), batch.positions) if task == "causal-lm" else nullcontext()
    with picked:
        logits = _outputs(module, batch).logits
    if task != "causal-lm":
        logits = logits[batch.positions]
    return loss(logits, batch.targets), logits


@torch.no_grad()
def evaluated(module: nn.Module, batch: Batch, task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed cross entropy of a batch, in fp32, and the token or class that is predicted for every target.

    Of a language model as many logits are there together as in training.

    Returns:
        loss (), predictions (targets,)
    """
    head = _plain_head(module, task)
    if head is None:
        loss, logits = scored_loss(module, batch, task)
        return loss, logits.argmax(-1)
    found: list[torch.Tensor] = []

    def scores(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss, predicted = head_scores(hidden, weight, targets)
        found.append(predicted)
        return loss

    with _losing(head, batch, scores):
        loss = _outputs(module, batch).logits
    return loss, found[0]


class TrainingLoss:
    """The summed cross entropy of a batch in training, in fp32.

    A language model's head and its loss are one operation: see `trainables.head_loss`.
    """

    def __init__(self, task: str, compilation: Compilation | None = None) -> None:
        self._task = task
        self._cross_entropy: Callable[..., torch.Tensor] = cross_entropy
        self._differentiate: Differentiate = differentiate
        if compilation is not None:
            self._cross_entropy, self._differentiate = compilation.function(cross_entropy), compilation.function(differentiate)

    def __call__(self, module: nn.Module, batch: Batch) -> torch.Tensor:
        """Run the model forward and return the loss (); without a target it is zero, but connected to every parameter."""
        head = _plain_head(module, self._task)
        if head is None:
            return scored_loss(module, batch, self._task, self._cross_entropy)[0]
        with _losing(head, batch, partial(head_loss, differentiate=self._differentiate)):
            loss: torch.Tensor = _outputs(module, batch).logits
        return loss


def _outputs(module: nn.Module, batch: Batch) -> Any:
    with inputs_of(unwrapped(module), batch) as inputs:
        return module(**inputs)


def _plain_head(module: nn.Module, task: str) -> nn.Linear | None:
    """Return a language model's head if the scores are what it computes: known families do nothing after it, unless they cap them."""
    if task != "causal-lm":
        return None
    model = unwrapped(module)
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    is_known = config.model_type in DECODERS and not getattr(config, "final_logit_softcapping", None)
    return head if is_known and type(head) is nn.Linear and head.bias is None else None


@contextmanager
def _losing(head: nn.Linear, batch: Batch, loss: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Have a head return the loss in the place of the logits: of its input where targets are, its weight, and the targets.

    Inside the model's forward pass, because only there a sharded weight is whole.
    """

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return loss(hidden.flatten(0, 1).index_select(0, batch.positions), head.weight, batch.targets)

    head.forward = forward  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        del head.forward


@contextmanager
def _picking(head: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """Have a head compute some positions alone: of what it is given, (rows, length, width), it sees (positions, width)."""

    def pick(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0].flatten(0, 1).index_select(0, positions),)

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
