"""Which rows are trained together: a function of the recipe alone, so that every layout learns from the same batches."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch

from spaces.architecture import ModelShape
from spaces.config import TrialConfig
from spaces.packing import Packing
from trainables.data import TaskData, TokenTable
from trainables.mesh import World
from trainables.packed_rows import PackedRows
from trainables.tokenization import IGNORE

# Rows are sorted by length within this many global batches: long enough to save most padding, short enough to stay random.
BUCKET_BATCHES = 16
# Padded tokens of an evaluation batch. A GPU wants much work at once; a CPU wants activations that stay in its caches (measured with
# MiniLM on one core: 512 to 1,024 tokens are twice as fast as 8,192).
EVALUATION_TOKENS = {"cuda": 16_384, "cpu": 768}
# Logits of an evaluation batch with what the cross entropy makes of them: a wide vocabulary would take more than training does.
EVALUATION_LOGITS_BYTES, BYTES_PER_LOGIT = 2 * 1024**3, 8
# What an evaluation batch may always have, however small the micro batches of the training are: nothing beside any device's memory.
LEAST_TOKENS, LEAST_LOGITS_BYTES = 768, 32 * 1024**2


Kind = Literal["even", "padded", "packed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """What a batch looks like to the model."""

    rows: int
    width: int
    """Tokens of the longest row, or of all that are laid end to end."""
    kind: Kind
    """Whether its rows are of one length, padded, or laid end to end"""

    @classmethod
    def of(cls, lengths: np.ndarray, packing: Packing | None) -> Form:
        """Return that of a batch of rows of these lengths; see `collate`."""
        longest, is_even = int(lengths.max()), bool(lengths.min() == lengths.max())
        if packing is not None and (packing.num_before > 0 or not is_even):
            return cls(rows=1, width=int(lengths.sum()), kind="packed")
        return cls(rows=len(lengths), width=longest, kind="even" if is_even else "padded")


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows padded to the longest, or laid end to end as one."""

    input_ids: torch.Tensor
    """int64 (rows, length), or (1, tokens)"""
    attention_mask: torch.Tensor | None
    """int64 (rows, length), 1 for real tokens; None where all are: attention then needs none"""
    positions: torch.Tensor
    """int64 (targets,): where a target is predicted; causal-lm: index into the flat positions, of the token before; classification:
    the row"""
    targets: torch.Tensor
    """int64 (targets,): the token or class that is expected there"""
    packed: PackedRows | None = None
    """Where rows lie that are laid end to end; None: they are padded, or of one length"""

    @property
    def form(self) -> Form:
        rows, width = self.input_ids.shape
        kind: Kind = "packed" if self.packed is not None else "even" if self.attention_mask is None else "padded"
        return Form(rows=rows, width=width, kind=kind)

    @property
    def num_rows(self) -> int:
        return len(self.input_ids) if self.packed is None else self.packed.num_rows

    def inputs(self) -> dict[str, Any]:
        """Return the model's arguments."""
        tokens = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return tokens if self.packed is None else tokens | self.packed.inputs()

    def row_of_targets(self, task: str) -> torch.Tensor:
        """Return the row of every target: int64 (targets,)."""
        if task != "causal-lm":
            return self.positions
        if self.packed is None:
            return self.positions // self.input_ids.shape[1]
        return torch.searchsorted(self.packed.starts, self.positions, right=True) - 1

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; to a GPU from pinned memory, from which alone nobody waits for the copy."""
        parts: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        if device.type == "cuda":
            parts = {name: None if part is None else part.pin_memory() for name, part in parts.items()}
        moved: dict[str, Any] = {n: None if part is None else part.to(device, non_blocking=True) for n, part in parts.items()}
        return Batch(**moved)


def collate(table: TokenTable, rows: np.ndarray, pad_token_id: int, packing: Packing | None = None) -> Batch:
    """Lay rows end to end, or pad them at the right to the longest of them.

    No rows at all become one row without targets: a rank without work must still take part in the collectives.

    Args:
        table: the rows.
        rows: indices into it.
        pad_token_id: what they are padded with.
        packing: how they are laid end to end; None: they are padded. Rows of one length need neither, but behind a prefix, where
            attention takes a mask of what is not laid end to end.
    """
    is_dummy = len(rows) == 0
    indices = np.zeros(1, dtype=np.int64) if is_dummy else rows
    # Of these rows alone: all lengths of a large table, for every micro batch, would take longer than the step.
    lengths = table.offsets[indices + 1] - table.offsets[indices]
    width = int(lengths.max())
    is_real = np.arange(width) < lengths[:, None]
    tokens = np.repeat(table.offsets[indices] - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    input_ids = np.full(is_real.shape, pad_token_id, dtype=np.int64)
    input_ids[is_real] = table.input_ids[tokens]
    is_packed = Form.of(lengths, packing).kind == "packed"
    if table.labels is None:
        assert table.targets is not None  # of a language model
        # The token at i is predicted from the tokens before it.
        expected = np.full(is_real.shape, IGNORE, dtype=np.int64)
        if not is_dummy:
            expected[is_real] = table.targets[tokens]
            expected = np.concatenate([expected[:, 1:], np.full((len(indices), 1), IGNORE)], axis=1)
        flat = expected[is_real] if is_packed else expected.ravel()
        positions = np.flatnonzero(flat != IGNORE)
        targets = flat[positions]
    else:
        positions, targets = np.arange(len(rows)), table.labels[rows]
    return Batch(
        input_ids=torch.from_numpy(input_ids[is_real][None] if is_packed else input_ids),
        attention_mask=None if is_packed or is_real.all() else torch.from_numpy(is_real.astype(np.int64)),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        packed=PackedRows.of(lengths, packing) if is_packed and packing is not None else None,
    )


class BatchPlan:
    """All global batches of a trial, and how each is dealt to ranks and accumulation steps."""

    def __init__(self, config: TrialConfig, data: TaskData, packing: Packing | None = None, shape: ModelShape | None = None) -> None:
        """Plan them.

        Args:
            config: the trial's.
            data: its data.
            packing: see `collate`.
            shape: of the model, whose windows its attention's cost depends on; None: there are none.
        """
        self._table, self._packing = data.train, packing
        self._squared = np.square if shape is None else shape.squared
        self._lengths, self._num_targets = data.train.lengths, data.train.num_targets
        self._pad = data.pad_token_id
        self._layout = config.layout
        self._batches = _global_batches(config, data)

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole trial."""
        return len(self._batches)

    @property
    def num_distinct_rows(self) -> int:
        """Training rows that the trial sees at all, however often."""
        return len(np.unique(np.concatenate(self._batches)))

    def num_targets(self, step: int) -> int:
        """Return what the step's loss is divided by: target tokens or rows of the whole global batch."""
        return int(self._num_targets[self._batches[step]].sum())

    def micro_batches(self, step: int, rank: int) -> list[Batch]:
        """Return a rank's micro batches of a step, as many on every rank."""
        return [collate(self._table, part[rank], self._pad, self._packing) for part in self._dealt(step)]

    def forms(self) -> Counter[Form]:
        """Return how many micro batches of every form there are, over all steps and ranks."""
        found: Counter[Form] = Counter()
        for step in range(self.num_steps):
            for part in (part for parts in self._dealt(step) for part in parts if len(part)):
                found[Form.of(self._lengths[part], self._packing)] += 1
        return found

    def sizes(self) -> StepSizes:
        """Return what every step works on, over all ranks."""
        lengths, num_targets = self._lengths, self._num_targets
        rounds = [self._dealt(step) for step in range(self.num_steps)]
        dealt = [[part for parts in step for part in parts if len(part)] for step in rounds]
        rows = np.array([len(batch) for batch in self._batches])
        tokens = np.array([lengths[batch].sum() for batch in self._batches])
        squares = np.array([self._squared(lengths[batch].astype(np.float64)).sum() for batch in self._batches])
        computed = [[self._computed(lengths[part]) for part in parts] for parts in dealt]
        fullest = [int(np.argmax(step)) for step in computed]
        targets = np.array([num_targets[batch].sum() for batch in self._batches])
        micro_targets = np.array([max(int(num_targets[part].sum()) for part in parts) for parts in dealt])
        return StepSizes(
            rows=rows,
            tokens=tokens,
            targets=targets,
            padded_tokens=np.array([sum(step) for step in computed]),
            micro_batches=np.array([len(step) for step in rounds]),
            micro_tokens=np.array([step[i] for step, i in zip(computed, fullest, strict=True)]),
            micro_rows=np.array([len(parts[i]) for parts, i in zip(dealt, fullest, strict=True)]),
            squared_lengths=squares,
            micro_targets=micro_targets,
        )

    def _computed(self, lengths: np.ndarray) -> int:
        """Return the tokens of a micro batch, with padding where there is any."""
        return int(lengths.sum() if self._packing is not None else len(lengths) * lengths.max())

    def _dealt(self, step: int) -> list[list[np.ndarray]]:
        """Return rows by accumulation step and rank; an empty part for a rank that there are no rows for.

        Sorted by length and cut into neighbours: the ranks then work on rows of nearly the same length at the same time.
        """
        batch, layout = self._batches[step], self._layout
        by_length = batch[np.argsort(self._lengths[batch], kind="stable")]
        world = layout.data_parallel_size
        if layout.micro_batch_size is not None:
            ends = list(range(layout.micro_batch_size, len(batch), layout.micro_batch_size))
        else:
            assert layout.micro_batch_tokens is not None  # one of the two is given
            lengths = self._lengths[by_length].tolist()
            ends = cuts(lengths, layout.micro_batch_tokens, world, is_padded=self._packing is None)
        parts = np.split(by_length, ends)
        parts += [by_length[:0]] * (-len(parts) % world)
        return [parts[i : i + world] for i in range(0, len(parts), world)]


def cuts(lengths: Sequence[int], most_tokens: int, num_ranks: int, *, is_padded: bool) -> list[int]:
    """Return where a global batch is cut into micro batches of neighbours, by a budget of tokens.

    As few on every rank as the budget allows, as even as whole rows can be, and none empty that need not be: no rank then waits for
    others for long. A row that exceeds the budget is a micro batch of its own.

    Args:
        lengths: tokens of every row, ascending.
        most_tokens: the budget.
        num_ranks: those that the micro batches are dealt to.
        is_padded: whether the rows of a micro batch count as long as the longest of them.
    """
    num_rows, sums = len(lengths), [0, *accumulate(lengths)]

    def ends(most: int) -> list[int]:
        """Return the end of every part, each with as many rows as fit. Neighbours cannot be cut into fewer parts."""
        found = [0]
        while (start := found[-1]) < num_rows:
            tokens = (lambda end: (end - start) * lengths[end - 1]) if is_padded else (lambda end: sums[end] - sums[start])
            found.append(start + 1 + bisect_right(range(start + 2, num_rows + 1), most, key=tokens))
        return found[1:]

    num_parts = -(-len(ends(most_tokens)) // num_ranks) * num_ranks
    found = ends(bisect_left(range(most_tokens), True, key=lambda most: len(ends(most)) <= num_parts))
    while len(found) < min(num_parts, num_rows):
        starts = [0, *found[:-1]]
        start, end = max(zip(starts, found, strict=True), key=lambda part: part[1] - part[0])
        insort(found, (start + end) // 2)
    return found[:-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """What each optimizer step works on, over all ranks; float64 or int64 (num_steps,)."""

    rows: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    """Positions that the loss counts."""
    padded_tokens: np.ndarray
    """Of tokens and padding; without padding the tokens."""
    micro_batches: np.ndarray
    """Of each rank."""
    micro_tokens: np.ndarray
    """Of the micro batch that has the most of these."""
    micro_rows: np.ndarray
    """Of the same micro batch."""
    squared_lengths: np.ndarray
    """Sums of the rows' squared lengths, less what is beyond a window: `ModelShape.squared`."""
    micro_targets: np.ndarray
    """Positions that the loss counts, in the micro batch that has the most of them."""

    @property
    def fullest(self) -> tuple[int, ...]:
        """The steps in one of which a rank holds the most: with the largest micro batch of those of one pass, and of several passes.

        These hold gradients beside it. Of equal ones it is that with the most tokens. Not the first step, where there are others: the
        optimizer's state is not there yet.
        """
        steps = range(1, len(self.padded_tokens)) or range(1)
        kinds = [[step for step in steps if (self.micro_batches[step] > 1) == accumulates] for accumulates in (False, True)]
        return tuple(sorted(max(kind, key=lambda s: (self.micro_tokens[s], self.padded_tokens[s])) for kind in kinds if kind))


def evaluation_batches(table: TokenTable, world: World, *, training_tokens: int, vocab_size: int = 0) -> list[np.ndarray]:
    """Return the rows of each of a rank's evaluation batches: every row on one rank only, as many batches on every rank.

    Args:
        table: all rows.
        world: the ranks.
        training_tokens: the most padded tokens of a micro batch that the rank trains on. Without a backward pass as many take less
            memory, so that what fits to train fits to evaluate; some tokens that take next to nothing are always allowed.
        vocab_size: what every target has a logit for; 0 where that is nothing to speak of.
    """
    most_tokens, least_tokens = EVALUATION_TOKENS[world.device.type], LEAST_TOKENS
    if vocab_size:
        most_tokens = min(most_tokens, EVALUATION_LOGITS_BYTES // (BYTES_PER_LOGIT * vocab_size))
        least_tokens = min(least_tokens, LEAST_LOGITS_BYTES // (BYTES_PER_LOGIT * vocab_size))
    most_tokens = min(most_tokens, max(training_tokens, least_tokens))
    order = np.argsort(-table.lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        rows = max(1, most_tokens // int(table.lengths[order[start]]))
        batches.append(order[start : start + rows])
        start += rows
    mine = batches[world.rank :: world.world_size]
    missing = -(-len(batches) // world.world_size) - len(mine)
    return mine + [np.zeros(0, dtype=np.int64)] * missing


def _global_batches(config: TrialConfig, data: TaskData) -> list[np.ndarray]:
    """Return the rows of every global batch: seeded epochs laid end to end, bucketed by length, cut, and shuffled again."""
    recipe = config.recipe
    rng = np.random.default_rng(recipe.seed)
    rows = data.subset(recipe.dataset_fraction)
    total = max(1, round(recipe.epochs * len(rows)))
    if data.domain_weights is None:
        order = _epochs(rows, total, rng)
    else:
        order = _mixed(rows, total, data.train.domains, data.domain_weights, rng)
    bucket, lengths = BUCKET_BATCHES * recipe.global_batch_size, data.train.lengths
    batches: list[np.ndarray] = []
    for start in range(0, total, bucket):
        part = order[start : start + bucket]
        part = part[np.argsort(lengths[part], kind="stable")]
        cut = [part[i : i + recipe.global_batch_size] for i in range(0, len(part), recipe.global_batch_size)]
        # Without this, long rows would always be trained last in their bucket.
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


def _epochs(rows: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Return so many rows: all of them in one random order after the other."""
    return np.concatenate([rng.permutation(rows) for _ in range(-(-total // len(rows)))])[:total]


def _mixed(
    rows: np.ndarray, total: int, domains: np.ndarray | None, weights: tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    """Return so many rows of which every domain has the share that its weight says, spread evenly over the whole."""
    assert domains is not None  # where there are weights, there are domains
    shares = np.array(weights) / sum(weights)
    # Rounded so that they add up; a domain that would have none has one.
    ends = np.rint(np.cumsum(shares) * total).astype(np.int64)
    counts = np.maximum(1, np.diff(ends, prepend=0))
    chosen, places = [], []
    for domain, count in enumerate(counts):
        chosen.append(_epochs(rows[domains[rows] == domain], int(count), rng))
        places.append((np.arange(count) + rng.random(count)) / count)
    return np.concatenate(chosen)[np.argsort(np.concatenate(places), kind="stable")][:total]
