"""The rows of a task as tokens, the same for every trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainables.formats import DataError
from trainables.tokenization import IGNORE, Encoded
from trainables.user_metric import UserMetric

# Of the training tokens: of a language that is written otherwise nearly all are.
MOST_UNKNOWN = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTable:
    """Rows of tokens, flat, so that they travel through the object store without a copy."""

    input_ids: np.ndarray
    """int32 (num_tokens,)"""
    offsets: np.ndarray
    """int64 (num_rows + 1,): row i is input_ids[offsets[i]:offsets[i + 1]]"""
    targets: np.ndarray | None
    """causal-lm: int32 (num_tokens,), the token itself where the loss counts it, else -100; not shifted"""
    labels: np.ndarray | None
    """classification: int64 (num_rows,)"""
    domains: np.ndarray | None = None
    """int64 (num_rows,): index into `TaskData.domains`; None where the data have none"""
    answers: tuple[str, ...] | None = None
    """The answer that each row expects, for exact match; None where that is not asked for"""

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 (num_rows,): tokens per row"""
        return np.diff(self.offsets)

    @property
    def num_targets(self) -> np.ndarray:
        """int64 (num_rows,): positions per row that the loss counts; one for a classified row.

        The first token of a row is never predicted, so a target there does not count.
        """
        if self.targets is None:
            return np.ones(self.num_rows, dtype=np.int64)
        counted = np.concatenate([[0], np.cumsum(self.targets != IGNORE)])
        first = (self.targets[self.offsets[:-1]] != IGNORE).astype(np.int64)
        return (counted[self.offsets[1:]] - counted[self.offsets[:-1]] - first).astype(np.int64)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a row's token ids and targets."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[part], None if self.targets is None else self.targets[part]

    @classmethod
    def build(cls, encoded: Sequence[Encoded], labels: Sequence[int] | None, domains: Sequence[int] | None = None) -> TokenTable:
        """Lay rows end to end."""
        lengths = np.array([len(e.input_ids) for e in encoded], dtype=np.int64)
        has_targets = bool(encoded) and encoded[0].targets is not None
        return cls(
            input_ids=np.concatenate([np.asarray(e.input_ids, dtype=np.int32) for e in encoded]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            targets=np.concatenate([np.asarray(e.targets, dtype=np.int32) for e in encoded]) if has_targets else None,
            labels=None if labels is None else np.asarray(labels, dtype=np.int64),
            domains=None if domains is None else np.asarray(domains, dtype=np.int64),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """All that a trial trains and is evaluated on."""

    task: str
    train: TokenTable
    evaluation: TokenTable
    test: TokenTable | None
    fraction_key: np.ndarray
    """float64 (num_train_rows,): a row is in fraction f if its key is below f, so smaller fractions are subsets"""
    label_names: tuple[str, ...]
    answer_pattern: str | None
    pad_token_id: int
    end_token_ids: tuple[int, ...]
    """Behind each of which a completion is over; none where the tokenizer has no such token"""
    fingerprint: str
    """sha256 over all tokens, targets and labels"""
    summary: dict[str, Any]
    """What was found in the data, for people; plain values"""
    chat_template: str | None = None
    """That the user gave in the place of the tokenizer's"""
    metric: UserMetric | None = None
    domains: tuple[str, ...] = ()
    domain_weights: tuple[float, ...] | None = None
    """How many of the trained rows are of each domain, relative to one another; None: every row as often as any other"""

    @property
    def longest(self) -> int:
        """Tokens of the longest row"""
        return max(int(table.lengths.max()) for table in (self.train, self.evaluation, self.test) if table is not None)

    def tokens(self) -> np.ndarray:
        """Return all tokens that batches of training rows may hold, padding too, each once and ascending: int64 (tokens,)."""
        is_used = np.zeros(max(int(self.train.input_ids.max()), self.pad_token_id) + 1, dtype=bool)
        is_used[self.train.input_ids] = is_used[self.pad_token_id] = True
        return np.flatnonzero(is_used)

    @property
    def judges_completions(self) -> bool:
        """Whether a score needs completions."""
        return self.task == "causal-lm" and (self.answer_pattern is not None or self.metric is not None)

    def subset(self, fraction: float) -> np.ndarray:
        """Return the indices of the training rows in a fraction, ascending: int64 (num_rows,)."""
        return np.flatnonzero(self.fraction_key < fraction)


def expected_text(table: TokenTable, index: int, tokenizer: Any) -> str:
    """Return the completion that a row of prompt and completion has, as the model was shown it."""
    _, targets = table.row(index)
    assert targets is not None  # only causal-lm has completions
    return str(tokenizer.decode(targets[targets != IGNORE], skip_special_tokens=True))


def check_tokens(tokenizer: Any, name: str, tables: Mapping[str, TokenTable], num_known: int) -> None:
    """Check that a tokenizer is that of its model, and of the language of the data.

    Args:
        tokenizer: of a model.
        name: of the model.
        tables: of rows, by role.
        num_known: tokens that the model has embeddings of.

    Raises:
        DataError: it has others, or does not know what the data say.
    """
    highest = max(int(table.input_ids.max()) for table in tables.values())
    if highest >= num_known:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise DataError(f"model.name: the tokenizer of {name} has '{token}' as token {highest}; its model knows {num_known}")
    unknown, ids = tokenizer.unk_token_id, tables["train"].input_ids
    if unknown is None:
        return
    words = ids[~np.isin(ids, [i for i in tokenizer.all_special_ids if i != unknown])]
    share = float((words == unknown).mean()) if len(words) else 0.0
    if share > MOST_UNKNOWN:
        # Of a directory without a tokenizer transformers makes one that knows nothing.
        raise DataError(
            f"model.name: to the tokenizer of {name} {share:.0%} of the training tokens are unknown: "
            "its files are not beside the model, or it knows another language"
        )
