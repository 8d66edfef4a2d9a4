"""Completions that judge a model: greedy, and within its positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_grid import Case
from synthetic_data import task_data

from trainables.data import TaskData, TokenTable
from trainables.evaluation import completions
from trainables.hub import num_positions
from trainables.mesh import World
from trainables.model import build
from trainables.tokenization import IGNORE, Encoded


class Numbers:
    @staticmethod
    def decode(ids: torch.Tensor, *, skip_special_tokens: bool) -> str:
        return " ".join(str(int(i)) for i in ids)


def data_of(num_prompt: int, num_answer: int) -> TaskData:
    ids = [3 + i % 90 for i in range(num_prompt + num_answer)]
    table = TokenTable.build([Encoded(input_ids=ids, targets=[IGNORE] * num_prompt + ids[num_prompt:])], None)
    return task_data("causal-lm", table, table)


def completed(family: str, num_prompt: int, num_answer: int, **settings: Any) -> str:
    case = Case(family=family)
    module: Any = build(case.config(1), case.base(), World.alone())
    module.generation_config.update(**settings)
    return completions(
        module,
        case.config(1),
        data_of(num_prompt, num_answer),
        data_of(num_prompt, num_answer).evaluation,
        World.alone(),
        Numbers(),
        1,
    )[0]


@pytest.mark.parametrize("settings", [{"repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"num_beams": 3}])
def test_completions_are_greedy_whatever_a_models_own_settings_are(settings: dict[str, Any]) -> None:
    assert completed("llama", 6, 12, **settings) == completed("llama", 6, 12)


def test_no_completion_is_longer_than_a_models_positions() -> None:
    """GPT-2 of 64 positions, of which the prompt takes 60: a look-up beyond them is an error of the index."""
    assert len(completed("gpt2", 60, 12).split()) <= 4


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 514}, 512),
        ({"model_type": "mpnet", "max_position_embeddings": 514}, 512),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "bloom"}, None),
    ],
)
def test_positions_behind_a_padding_token_are_two_less(sizes: dict[str, Any], expected: int | None) -> None:
    assert num_positions(sizes) == expected
