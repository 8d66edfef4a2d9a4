"""Token tables made on the spot, for what needs shapes and no text."""

from __future__ import annotations

import numpy as np

from trainables.data import TaskData, TokenTable
from trainables.tokenization import Encoded


def token_data(num_rows: int = 90) -> TaskData:
    """Return rows of 4 to 29 tokens with three labels."""
    rng = np.random.default_rng(0)

    def table(rows: int) -> TokenTable:
        encoded = [Encoded(input_ids=rng.integers(1, 30, size=rng.integers(4, 30)).tolist(), targets=None) for _ in range(rows)]
        return TokenTable.build(encoded, rng.integers(0, 3, size=rows).tolist())

    return task_data("sequence-classification", table(num_rows), table(23), ("a", "b", "c"))


def task_data(task: str, train: TokenTable, evaluation: TokenTable, label_names: tuple[str, ...] = ()) -> TaskData:
    """Return tables as prepared data, whose subsets are their first rows."""
    return TaskData(
        task=task,
        train=train,
        evaluation=evaluation,
        test=None,
        fraction_key=np.arange(train.num_rows) / train.num_rows,
        label_names=label_names,
        answer_pattern=None,
        pad_token_id=0,
        end_token_ids=(),
        fingerprint="",
        summary={},
    )
