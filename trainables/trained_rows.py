"""Full fine-tuning of an embedding whose rows are not all read.

AdamW leaves a row alone that no token of the data has: without a gradient both its moments stay zero, and only the weight decay
shrinks it, every row by the same factor. So the rows that the data have are the parameter, and the others are kept beside it: of a
small encoder that is fine-tuned on few rows half of all gradients, moments, updates and exchanges are not needed. What is learned is
the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from spaces.config import TrialConfig
from spaces.memory import leaves_rows_alone

_ROWS = "rows"


@dataclass(kw_only=True, slots=True)
class Rows:
    """Which rows of a whole table a parameter is."""

    order: torch.Tensor
    """int64 (table,): the whole table's rows, those of the parameter first"""
    idle: torch.Tensor
    """(idle rows, width), as they were before the training"""
    scale: float = 1.0
    """What weight decay has left of the idle rows."""

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return the parameter's part of a whole table."""
        return whole[self.order[: len(self.order) - len(self.idle)]]

    def whole(self, part: torch.Tensor, *, is_weight: bool) -> torch.Tensor:
        """Return the whole table on the CPU: of weights, or of what the optimizer keeps, which is zero for idle rows."""
        idle = self.idle * self.scale if is_weight else torch.zeros_like(self.idle)
        table = torch.empty(len(self.order), *part.shape[1:], dtype=part.dtype)
        table[self.order] = torch.cat([part.detach().cpu(), idle.to(part.dtype)])
        return table


class TrainedRows(nn.Module):
    """An embedding of which some rows train. In training it must be given no others; else all are there."""

    def __init__(self, embedding: nn.Embedding, used: torch.Tensor) -> None:
        super().__init__()
        whole, num_used = embedding.weight.detach().float(), len(used)
        is_idle = torch.ones(len(whole), dtype=torch.bool)
        is_idle[used] = False
        order = torch.cat([used, is_idle.nonzero().flatten()])
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        self.rows = Rows(order=order, idle=whole[order[num_used:]])
        self.weight = nn.Parameter(whole[used])
        setattr(self.weight, _ROWS, self.rows)
        self.register_buffer("idle", self.rows.idle, persistent=False)
        self.register_buffer("place", place, persistent=False)
        padding = embedding.padding_idx
        self.padding_idx = int(place[padding]) if padding is not None and place[padding] < num_used else None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return (rows, length, width) for ids (rows, length)."""
        place, num_used = cast("torch.Tensor", self.place)[input_ids], len(self.weight)
        if self.training:
            return functional.embedding(place, self.weight, self.padding_idx)
        used = functional.embedding(place.clamp(max=num_used - 1), self.weight)
        idle = functional.embedding((place - num_used).clamp(min=0), cast("torch.Tensor", self.idle)) * self.rows.scale
        return torch.where((place < num_used)[..., None], used, idle)


def train_used_rows(module: Any, config: TrialConfig, used_tokens: np.ndarray) -> None:
    """Have a model train only the rows of its embedding that are read, where that changes nothing of what is learned.

    Not where the scores of all tokens are computed from the same table, nor where ranks hold parts of it.

    Args:
        module: the transformers model; changed in place.
        config: the trial's.
        used_tokens: int64 (tokens,), each once: all that training batches hold, padding too.
    """
    embedding = module.get_input_embeddings()
    is_plain = type(embedding) is nn.Embedding and not embedding.sparse and embedding.max_norm is None
    if not is_plain or not leaves_rows_alone(config) or len(used_tokens) == embedding.num_embeddings:
        return
    names = [name for name, parameter in module.named_parameters(remove_duplicate=False) if parameter is embedding.weight]
    if len(names) == 1:
        module.set_submodule(names[0].rpartition(".")[0], TrainedRows(embedding, torch.from_numpy(used_tokens)))


def rows_of(parameter: torch.Tensor) -> Rows | None:
    """Return which rows of a table a parameter is; None where it is all of it."""
    rows: Rows | None = getattr(parameter, _ROWS, None)
    return rows
