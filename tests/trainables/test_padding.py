"""Decoders that classify: their class is read at a row's last token, whatever rows are padded with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import make

from trainables.model import BaseModel

LABELS = ("a", "b", "c", "d", "e")


def logits(base: BaseModel, rows: list[list[int]], pad: int) -> torch.Tensor:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    module: Any = base.module.eval()
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=ids, attention_mask=mask).logits
    return found


def test_the_class_of_a_row_does_not_depend_on_its_neighbours_where_tokenizer_and_model_pad_with_other_tokens(tmp_path: Path) -> None:
    """As Qwen3's do: its tokenizer pads with a token that the model's configuration does not name."""
    make("qwen3", "sequence-classification").save_pretrained(tmp_path)
    base = BaseModel.load(str(tmp_path), None, "sequence-classification", LABELS, 7)
    short, long = [11, 12, 13], [21, 22, 23, 24, 25, 26]
    together = logits(base, [short, long], 7)
    torch.testing.assert_close(together[0], logits(base, [short], 7)[0])
    assert base.module.config.pad_token_id == 7
    assert base.module.config.problem_type == "single_label_classification"


def test_an_encoder_keeps_its_own(tmp_path: Path) -> None:
    """RoBERTa counts its positions from there."""
    make("roberta", "sequence-classification").save_pretrained(tmp_path)
    own = BaseModel.load(str(tmp_path), None, "sequence-classification", LABELS).module.config.pad_token_id
    BaseModel.load.cache_clear()
    assert BaseModel.load(str(tmp_path), None, "sequence-classification", LABELS, own + 6).module.config.pad_token_id == own
