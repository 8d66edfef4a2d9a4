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

    return TaskData(
        task="sequence-classification",
        train=table(num_rows),
        evaluation=table(23),
        test=None,
        fraction_key=np.arange(num_rows) / num_rows,
        label_names=("a", "b", "c"),
        answers=None,
        answer_pattern=None,
        pad_token_id=0,
        eos_token_id=None,
        fingerprint="",
        summary={},
    )
