"""Scores of a model on a table of rows: every row counts exactly once, at any world size."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from spaces import metrics
from spaces.config import TrialConfig
from trainables.batching import collate, evaluation_batches
from trainables.compilation import as_written
from trainables.data import TaskData, TokenTable
from trainables.loss import evaluated
from trainables.mesh import World
from trainables.model import unwrapped
from trainables.parallelize import autocast
from trainables.tokenization import IGNORE

GENERATION_ROWS = 32


@torch.no_grad()
def evaluate(module: nn.Module, config: TrialConfig, data: TaskData, table: TokenTable, world: World) -> dict[str, float]:
    """Return eval_loss and accuracy, and macro_f1 for classification; every rank must call it."""
    module.eval()
    rows_world = world.data_parallel(config.layout)
    num_classes = len(data.label_names)
    totals = torch.zeros(3, dtype=torch.float64)  # loss, right, counted
    confusion = torch.zeros(num_classes * num_classes, dtype=torch.float64)
    vocab_size = unwrapped(module).config.get_text_config().vocab_size if data.task == "causal-lm" else 0
    training_tokens = config.layout.micro_batch_size * int(data.train.lengths.max())
    for rows in evaluation_batches(table, rows_world, training_tokens=training_tokens, vocab_size=vocab_size):
        batch = collate(table, rows, data.pad_token_id).to(world.device)
        with autocast(config, world), as_written(config.layout.compile == "blocks"):
            loss, predicted = evaluated(module, batch, data.task)
        targets = batch.targets
        right = (predicted == targets).sum()
        totals += torch.stack([loss.double(), right.double(), torch.tensor(float(len(targets))).to(loss)]).cpu()
        if num_classes:
            confusion += torch.bincount((targets * num_classes + predicted).cpu(), minlength=num_classes**2)
    module.train()
    summed = rows_world.sum(torch.cat([totals, confusion])).cpu()
    loss_sum, num_right, num_counted = summed[:3].tolist()
    result = {metrics.EVAL_LOSS: loss_sum / num_counted, metrics.ACCURACY: num_right / num_counted}
    if num_classes:
        result[metrics.MACRO_F1] = _macro_f1(summed[3:].reshape(num_classes, num_classes))
    return result


def _macro_f1(confusion: torch.Tensor) -> float:
    """Mean F1 over the classes that occur among targets or predictions; confusion is (target, predicted)."""
    hits = confusion.diagonal()
    total = confusion.sum(0) + confusion.sum(1)
    there = total > 0
    return float((2 * hits[there] / total[there]).mean())


@torch.no_grad()
def exact_match(module: nn.Module, config: TrialConfig, data: TaskData, world: World, tokenizer: Any, num_rows: int) -> float:
    """Return the share of the first evaluation rows whose greedy completion gives the expected answer.

    Every rank generates its own rows, or all where it sees all, and must call this; with FSDP2 all step on until the last is done.
    """
    assert data.answers is not None  # the caller asks only for data with answers
    assert data.answer_pattern is not None
    model = unwrapped(module)
    model.eval()
    if isinstance(module, FSDPModule):
        module.unshard()  # generation calls the model inside PEFT's, whose hooks gather nothing of what no block holds
    num_rows = min(num_rows, data.evaluation.num_rows)
    limit = int(np.percentile(data.evaluation.num_targets[:num_rows], 95))
    rows_world = world.data_parallel(config.layout)
    mine = np.arange(num_rows)[rows_world.rank :: rows_world.world_size]
    per_rank = -(-num_rows // rows_world.world_size)
    right = 0
    for start in range(0, per_rank, GENERATION_ROWS):
        rows = mine[start : start + GENERATION_ROWS]
        prompts = [_prompt(data.evaluation, int(i)) for i in rows] or [_prompt(data.evaluation, 0)]
        width = max(map(len, prompts))
        # Padding at the left: the completion must follow its prompt.
        ids = torch.tensor([[data.pad_token_id] * (width - len(p)) + p for p in prompts], device=world.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=world.device)
        with autocast(config, world), as_written(config.layout.compile == "blocks"):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=limit,
                do_sample=False,
                use_cache=True,
                pad_token_id=data.pad_token_id,
                eos_token_id=data.eos_token_id,
                synced_gpus=rows_world.world_size > 1,
            )
        for i, completion in zip(rows, out[:, width:], strict=False):
            found = re.search(data.answer_pattern, tokenizer.decode(completion, skip_special_tokens=True))
            right += found is not None and found.group(1).strip() == data.answers[int(i)]
    model.train()
    return float(rows_world.sum(torch.tensor([float(right)]))[0]) / num_rows


def _prompt(table: TokenTable, index: int) -> list[int]:
    ids, targets = table.row(index)
    assert targets is not None  # only causal-lm generates
    first = int(np.flatnonzero(targets != IGNORE)[0])
    return [int(i) for i in ids[:first]]
