"""Scores of lm-evaluation-harness against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from choices import right_choices
from tiny import make_language_model, make_task

from trainables.harness import Harness, HarnessError
from trainables.model import BaseModel
from trainables.tokenization import load_tokenizer


@pytest.mark.parametrize("limit", [None, 10])
def test_the_accuracy_is_that_of_the_likeliest_choice(tmp_path: Path, limit: int | None) -> None:
    base = BaseModel.load(str(make_language_model(tmp_path / "model")), None, "causal-lm", ())
    tokenizer, tasks = load_tokenizer(base.name, None), make_task(tmp_path / "tasks")
    harness = Harness(["subjects"], include_path=tasks, limit=limit)
    found = harness.scores(base.module, tokenizer, "subjects")
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()][:limit]
    right = right_choices(base.module, tokenizer, rows)
    assert 0 < sum(right) < len(right), "all alike would be right by accident"
    assert found["subjects/acc"]["value"] == pytest.approx(sum(right) / len(right))
    spread = torch.tensor(right, dtype=torch.float64).std().item() / len(right) ** 0.5
    assert found["subjects/acc"]["stderr"] == pytest.approx(spread)


def test_a_task_that_is_not_there_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"no task 'subject'; .*did you mean 'subjects'"):
        Harness(["subject"], include_path=make_task(tmp_path))


def test_a_task_whose_rows_are_gone_says_so_in_one_line(tmp_path: Path) -> None:
    base = BaseModel.load(str(make_language_model(tmp_path / "model")), None, "causal-lm", ())
    tasks = make_task(tmp_path / "tasks", name="gone")
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(HarnessError, match="--tasks gone: ") as raised:
        Harness(["gone"], include_path=tasks).scores(base.module, load_tokenizer(base.name, None), "gone")
    assert len(str(raised.value).splitlines()) == 1
