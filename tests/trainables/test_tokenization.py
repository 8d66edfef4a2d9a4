"""What of a row that is too long is kept, and how rows begin."""

from __future__ import annotations

from typing import Any

import pytest

from trainables.tokenization import IGNORE, _begin, _shorten

BEGIN = 1


def row(num_prompt: int, num_answer: int, begin: int | None = None) -> tuple[list[int], list[int]]:
    prompt = list(range(100, 100 + num_prompt))
    if begin is not None:
        prompt[0] = begin
    answer = list(range(500, 500 + num_answer))
    return prompt + answer, [IGNORE] * num_prompt + answer


@pytest.mark.parametrize(
    ("num_prompt", "num_answer", "prompt_kept", "answer_kept"),
    [
        (100, 4, 16, 4),  # the answer fits: all of it stays
        (100, 15, 10, 10),  # neither fits a half: half each
        (6, 60, 6, 14),  # a short question stays whole
        (0, 60, 0, 20),
        (100, 0, 20, 0),
    ],
)
def test_half_of_the_window_is_the_prompts_if_the_answer_is_longer(
    num_prompt: int, num_answer: int, prompt_kept: int, answer_kept: int
) -> None:
    ids, targets = _shorten(*row(num_prompt, num_answer), 20, None)
    whole, _ = row(num_prompt, num_answer)
    assert ids == whole[num_prompt - prompt_kept : num_prompt + answer_kept]
    assert targets == [IGNORE] * prompt_kept + whole[num_prompt : num_prompt + answer_kept]


def test_what_is_cut_begins_as_the_model_knows_it() -> None:
    ids, targets = _shorten(*row(100, 4, begin=BEGIN), 20, BEGIN)
    assert ids == [BEGIN, *range(185, 200), *range(500, 504)]
    assert targets == [IGNORE] * 16 + list(range(500, 504))
    ids, _ = _shorten(*row(8, 40, begin=BEGIN), 20, BEGIN)
    assert ids == [BEGIN, *range(101, 108), *range(500, 512)], "nothing was cut before"


class Tokenizer:
    bos_token_id = BEGIN

    def __init__(self, *before: int) -> None:
        self.before = before

    def __call__(self, _: str) -> dict[str, Any]:
        return {"input_ids": [*self.before, 42]}


def test_a_row_begins_with_what_the_tokenizer_puts_before_a_text() -> None:
    """GPT-2 has a begin-of-text token that its tokenizer puts nowhere."""
    assert _begin(Tokenizer(BEGIN)) == [BEGIN]
    assert _begin(Tokenizer()) == []
    assert _begin(Tokenizer(7)) == []
