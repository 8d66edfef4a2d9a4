"""Rows of unequal length, and what a model learns of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from memory_grid import Case
from synthetic_data import task_data

from trainables.data import TaskData, TokenTable
from trainables.loss import TrainingLoss
from trainables.model import BaseModel, trainable
from trainables.packed import attend_by_rows
from trainables.tokenization import IGNORE, Encoded

LENGTHS = (3, 7, 7, 7, 12, 12, 19)


def data_of(task: str, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> TaskData:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, 97, size=length).tolist() for length in lengths]
    is_causal = task == "causal-lm"
    # The first two tokens are a prompt.
    encoded = [Encoded(input_ids=ids, targets=[IGNORE, IGNORE, *ids[2:]] if is_causal else None) for ids in rows]
    table = TokenTable.build(encoded, None if is_causal else [i % 3 for i in range(len(rows))])
    return task_data(task, table, table, () if is_causal else ("a", "b", "c"))


def base_of(case: Case) -> BaseModel:
    base = case.base()
    attend_by_rows(base.module)
    return base


def gradients(module: Any, batches: list[Any], task: str) -> tuple[float, dict[str, torch.Tensor]]:
    total = 0.0
    for batch in batches:
        loss = TrainingLoss(task)(module, batch)
        loss.backward()
        total += float(loss.detach())
    found = {name: p.grad.clone() for name, p in trainable(module).items() if p.grad is not None}
    for p in module.parameters():
        p.grad = None
    return total, found
