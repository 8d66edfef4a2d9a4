"""Classifiers that are loaded: where their class is read, and which classes a head has that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make

from trainables.model import BaseModel, _order_classes

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


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_head_that_is_there_keeps_its_classes_whatever_their_order(family: str, tmp_path: Path) -> None:
    made: Any = make(family, "sequence-classification")
    made.config.id2label = dict(enumerate(("E", "a", "c", "b", "D")))
    made.save_pretrained(tmp_path)
    base = BaseModel.load(str(tmp_path), None, "sequence-classification", LABELS, 0)
    ids = torch.tensor([[1, 11, 12, 13]])
    with torch.no_grad():
        expected, found = (model.eval()(input_ids=ids).logits[0] for model in (made, base.module))
    torch.testing.assert_close(found, expected[[1, 3, 2, 4, 0]])
    assert base.new_parameters == ()


def test_classes_that_a_head_numbers_are_put_in_the_order_of_the_data_s_where_both_have_the_same_names() -> None:
    module: Any = make("roberta", "sequence-classification")
    names = [f"LABEL_{i}" for i in range(5)]
    before = module.classifier.out_proj.weight.detach().clone()
    assert _order_classes(module, names, names, ()) == set()
    torch.testing.assert_close(module.classifier.out_proj.weight.detach(), before)
    assert _order_classes(module, names, names[::-1], ()) == set()
    torch.testing.assert_close(module.classifier.out_proj.weight.detach(), before.flip(0))
    assert _order_classes(module, names, LABELS, ()) == set(), "names that say nothing"
    torch.testing.assert_close(module.classifier.out_proj.weight.detach(), before.flip(0))


def test_a_head_of_other_classes_is_drawn_anew_and_one_without_names_is_kept(tmp_path: Path) -> None:
    made: Any = make("roberta", "sequence-classification")
    made.save_pretrained(tmp_path / "unnamed")
    assert BaseModel.load(str(tmp_path / "unnamed"), None, "sequence-classification", LABELS).new_parameters == ()
    made.config.id2label = dict(enumerate(("v", "w", "x", "y", "z")))
    made.save_pretrained(tmp_path / "others")
    new = BaseModel.load(str(tmp_path / "others"), None, "sequence-classification", LABELS).new_parameters
    assert new == ("classifier.out_proj.bias", "classifier.out_proj.weight")
