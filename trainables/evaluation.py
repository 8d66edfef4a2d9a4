"""Scores of a model on a table of rows: every row counts exactly once, at any world size."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from spaces import metrics
from spaces.adapters import num_prefix_tokens
from spaces.config import TrialConfig
from trainables.batching import Batch, collate, evaluation_batches
from trainables.compilation import as_written
from trainables.data import TaskData, TokenTable, expected_text
from trainables.hub import num_positions
from trainables.loss import evaluated
from trainables.mesh import World
from trainables.model import BaseModel, unwrapped
from trainables.packed import packing_for
from trainables.parallelize import autocast
from trainables.report import TrialError
from trainables.tokenization import IGNORE, load_tokenizer

GENERATION_ROWS = 32
# Whatever a model's own generation settings say.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_new_tokens": 0}
# Beyond it, its exponential is no number any more.
MAX_LOSS = 700.0


@torch.no_grad()
def evaluate(
    module: nn.Module, config: TrialConfig, data: TaskData, table: TokenTable, world: World, *, is_final: bool = True
) -> dict[str, float]:
    """Return eval_loss and accuracy; for classification macro_f1 and the user's own score; the accuracy of every domain.

    Every rank must call it.

    Args:
        module: the model, as it is spread over the ranks.
        config: the trial's.
        data: its data.
        table: the rows.
        world: the ranks.
        is_final: whether training is over. Of a model that knows nothing yet, and predicts one class for all rows, the user's own
            score may not be defined, and is then left out.

    Raises:
        TrialError: the user's own score failed in the end.
    """
    module.eval()
    rows_world = world.data_parallel(config.layout)
    tally = _Tally(data, table)
    vocab_size = unwrapped(module).config.get_text_config().vocab_size if data.task == "causal-lm" else 0
    training_tokens = config.most_tokens(int(data.train.lengths.max()))
    packing = packing_for(unwrapped(module), config, data)
    for rows in evaluation_batches(table, rows_world, training_tokens=training_tokens, vocab_size=vocab_size):
        batch = collate(table, rows, data.pad_token_id, packing).to(world.device)
        with autocast(config, world), as_written(config.layout.compile == "blocks"):
            loss, predicted = evaluated(module, batch, data.task)
        tally.add(rows, batch, loss, predicted)
    module.train()
    return tally.scores(rows_world, is_final=is_final)


class _Tally:
    """What the scores are made of, summed over a rank's batches."""

    def __init__(self, data: TaskData, table: TokenTable) -> None:
        self._data, self._table = data, table
        num_classes = len(data.label_names)
        self._totals = torch.zeros(3, dtype=torch.float64)  # loss, right, counted
        self._confusion = torch.zeros(num_classes * num_classes, dtype=torch.float64)
        self._domains = torch.zeros(2, len(data.domains), dtype=torch.float64)  # right, counted
        # The class of every row, plus one.
        self._predicted = torch.zeros(table.num_rows if num_classes and data.metric else 0, dtype=torch.float64)

    def add(self, rows: np.ndarray, batch: Batch, loss: torch.Tensor, predicted: torch.Tensor) -> None:
        """Add the rows of a batch; of one without rows nothing counts."""
        data, table, num_classes = self._data, self._table, len(self._data.label_names)
        right = predicted == batch.targets
        self._totals += torch.stack([loss.double(), right.sum().double(), torch.tensor(float(len(right))).to(loss)]).cpu()
        predicted, right = predicted.cpu(), right.cpu()
        if num_classes:
            self._confusion += torch.bincount(batch.targets.cpu() * num_classes + predicted, minlength=num_classes**2)
        if len(self._predicted):
            self._predicted[torch.from_numpy(rows)] = predicted.double() + 1
        if table.domains is not None and len(rows):
            domains = torch.from_numpy(table.domains[rows])[batch.row_of_targets(data.task).cpu()]
            self._domains += torch.stack([torch.bincount(d, minlength=len(data.domains)) for d in (domains[right], domains)])

    def scores(self, world: World, *, is_final: bool) -> dict[str, float]:
        """Return the scores over all ranks.

        Raises:
            TrialError: the user's own score failed in the end.
        """
        data, num_classes = self._data, len(self._data.label_names)
        parts = (self._totals, self._confusion, self._domains.flatten(), self._predicted)
        totals, confusion, domains, predicted = world.sum(torch.cat(parts)).cpu().split([len(part) for part in parts])
        loss, right, counted = totals.tolist()
        found = {metrics.EVAL_LOSS: loss / counted, metrics.ACCURACY: right / counted}
        if data.task == "causal-lm":
            found[metrics.PERPLEXITY] = math.exp(min(found[metrics.EVAL_LOSS], MAX_LOSS))
        if num_classes:
            found[metrics.MACRO_F1] = _macro_f1(confusion.reshape(num_classes, num_classes))
        for name, right, counted in zip(data.domains, *domains.reshape(2, -1).tolist(), strict=True):
            if counted:  # not every domain has test rows
                found[metrics.domain_accuracy(name)] = right / counted
        if data.metric is not None and self._table.labels is not None:
            names = data.label_names
            with nullcontext() if is_final else suppress(TrialError):
                found[metrics.CUSTOM] = data.metric([names[int(i) - 1] for i in predicted], [names[i] for i in self._table.labels])
        return found


def _macro_f1(confusion: torch.Tensor) -> float:
    """Mean F1 over the classes that occur among targets or predictions; confusion is (target, predicted)."""
    hits = confusion.diagonal()
    total = confusion.sum(0) + confusion.sum(1)
    there = total > 0
    return float((2 * hits[there] / total[there]).mean())


def completion_scores(
    module: nn.Module, config: TrialConfig, data: TaskData, table: TokenTable, world: World, tokenizer: Any, num_rows: int
) -> dict[str, float]:
    """Return what is judged by greedy completions of a table's first rows: exact_match, and the user's own score.

    Every rank must call it.

    Raises:
        TrialError: the user's own score failed.
    """
    texts = completions(module, config, data, table, world, tokenizer, num_rows)
    scores = {}
    if table.answers is not None and data.answer_pattern is not None:
        scores[metrics.EXACT_MATCH] = _exact_match(texts, table.answers, data.answer_pattern)
    if data.metric is not None:
        scores[metrics.CUSTOM] = data.metric(texts, [expected_text(table, i, tokenizer) for i in range(len(texts))])
    return scores


def score_completions(
    module: nn.Module, config: TrialConfig, data: TaskData, table: TokenTable, world: World, base: BaseModel, num_rows: int
) -> dict[str, float]:
    """Return `completion_scores`; nothing where completions judge nothing, or of no rows."""
    if not data.judges_completions or num_rows == 0:
        return {}
    return completion_scores(module, config, data, table, world, load_tokenizer(base.name, base.revision), num_rows)


def _exact_match(texts: list[str], answers: Sequence[str], pattern: str) -> float:
    """Return the share of completions that give the expected answer."""
    found = [re.search(pattern, text) for text in texts]
    right = [match is not None and (match.group(1) or "").strip() == answer for match, answer in zip(found, answers, strict=False)]
    return sum(right) / len(texts)


@torch.no_grad()
def completions(
    module: nn.Module, config: TrialConfig, data: TaskData, table: TokenTable, world: World, tokenizer: Any, num_rows: int
) -> list[str]:
    """Return the greedy completions of a table's first rows, on every rank.

    Every rank generates its own rows, or all where it sees all, and must call this; with FSDP2 all step on until the last is done.
    """
    model = unwrapped(module)
    model.eval()
    if isinstance(module, FSDPModule):
        module.unshard()  # generation calls the model inside PEFT's, whose hooks gather nothing of what no block holds
    num_rows = min(num_rows, table.num_rows)
    rows_world = world.data_parallel(config.layout)
    num_places = num_positions(model.config.get_text_config().to_dict()) or sys.maxsize
    texts: dict[int, str] = {}
    for together, num_new in _generated_together(table, num_rows, num_places - num_prefix_tokens(config.recipe), rows_world):
        rows = together[rows_world.rank :: rows_world.world_size]
        prompts = [_prompt(table, int(i)) for i in rows] or [_prompt(table, int(together[0]))]
        width = max(map(len, prompts))
        # Padding at the left: the completion must follow its prompt.
        ids = torch.tensor([[data.pad_token_id] * (width - len(p)) + p for p in prompts], device=world.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=world.device)
        with autocast(config, world), as_written(config.layout.compile == "blocks"):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=num_new,
                **GREEDY,
                use_cache=True,
                pad_token_id=data.pad_token_id,
                eos_token_id=list(data.end_token_ids) or None,
                synced_gpus=rows_world.world_size > 1,
            )
        for i, completion in zip(rows, out[:, width:], strict=False):
            texts[int(i)] = tokenizer.decode(completion, skip_special_tokens=True)
    model.train()
    gathered = {i: text for part in world.gather(texts) for i, text in part.items()}
    return [gathered[i] for i in range(num_rows)]


def _generated_together(table: TokenTable, num_rows: int, num_places: int, world: World) -> Iterator[tuple[np.ndarray, int]]:
    """Yield rows that all ranks complete at once, and the most tokens that each of them may be given.

    That is as many as most expected completions have, or as a row has places for, whoever shares its batch: the longest prompt of
    a batch leaves the fewest.
    """
    limit = int(np.percentile(table.num_targets[:num_rows], 95))
    allowed = np.array([max(1, min(limit, num_places - len(_prompt(table, i)))) for i in range(num_rows)])
    for num_new in np.unique(allowed):
        rows = np.flatnonzero(allowed == num_new)
        size = GENERATION_ROWS * world.world_size
        yield from ((rows[start : start + size], int(num_new)) for start in range(0, len(rows), size))


def _prompt(table: TokenTable, index: int) -> list[int]:
    ids, targets = table.row(index)
    assert targets is not None  # only causal-lm generates
    first = int(np.flatnonzero(targets != IGNORE)[0])
    return [int(i) for i in ids[:first]]
