"""A multiple-choice task as plain transformers answers it."""

from __future__ import annotations

from typing import Any

import torch


def right_choices(module: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[bool]:
    """Return of every row whether the right choice is the likeliest behind the question."""
    right = []
    for row in rows:
        ids = [tokenizer(f"{row['question']} {choice}", add_special_tokens=False).input_ids for choice in row["choices"]]
        with torch.no_grad():
            scores = [float(module(torch.tensor([i])).logits[0, -2].log_softmax(-1)[i[-1]]) for i in ids]
        right.append(scores.index(max(scores)) == row["label"])
    return right
