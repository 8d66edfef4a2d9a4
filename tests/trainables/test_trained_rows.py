"""Rows of an embedding that no token has: left alone, they end where AdamW would have left them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_grid import Case
from synthetic_data import task_data

from spaces.config import TrialConfig
from trainables.batching import Batch
from trainables.checkpoint import CheckpointStore, read_checkpoint
from trainables.data import TaskData, TokenTable
from trainables.loop import Command, train
from trainables.mesh import World
from trainables.model import build, trainable
from trainables.tokenization import Encoded
from trainables.trained_rows import TrainedRows, rows_of

NUM_USED = 40


def rows_up_to(num_tokens: int, task: str, num_rows: int = 48) -> TokenTable:
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, num_tokens, size=rng.integers(3, 12)).tolist() for _ in range(num_rows)]
    is_causal = task == "causal-lm"
    encoded = [Encoded(input_ids=ids, targets=ids if is_causal else None) for ids in rows]
    return TokenTable.build(encoded, None if is_causal else [i % 3 for i in range(num_rows)])


def data_of(task: str) -> TaskData:
    """Rows to evaluate on have tokens that no training row has."""
    names = () if task == "causal-lm" else ("a", "b", "c")
    return task_data(task, rows_up_to(NUM_USED, task), rows_up_to(97, task), names)


def trained(case: Case, directory: Path, *, micro: int = 8) -> tuple[list[float], dict[str, float], dict[str, torch.Tensor]]:
    """Return the losses of all steps, the scores at the end, and the weights."""
    config = case.config(1).to_dict()
    config["recipe"] |= {"epochs": 3.0, "weight_decay": 5.0, "learning_rate": 5e-3, "warmup_fraction": 0.2, "global_batch_size": 8}
    config["layout"] |= {"micro_batch_size": micro}
    trial = TrialConfig.from_dict(config)
    base, data = case.base(), data_of(case.task)
    store = CheckpointStore(directory)
    (*_, report) = train(trial, data, base, World.alone(), control=lambda _: Command.CONTINUE, checkpoints=store)
    return report.details["train_losses"], dict(report.metrics), read_checkpoint(directory / "final").weights


@pytest.mark.parametrize("family", ["llama", "bert", "distilbert", "roberta"])
def test_what_is_learned_is_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(family=family)
    losses, scores, weights = trained(case, tmp_path / "some")
    monkeypatch.setattr("trainables.model.train_used_rows", lambda *_: None)
    whole_losses, whole_scores, whole_weights = trained(case, tmp_path / "all")
    assert losses == pytest.approx(whole_losses, rel=1e-5)
    assert {m: scores[m] for m in ("eval_loss", "accuracy")} == pytest.approx(
        {m: whole_scores[m] for m in ("eval_loss", "accuracy")}, rel=1e-4
    )
    assert weights.keys() == whole_weights.keys()
    for name, weight in whole_weights.items():
        assert weights[name].shape == weight.shape
        assert (weights[name] - weight).norm() <= 1e-4 * weight.norm(), name
    # Else the comparison would be empty: the rows that were left alone have decayed.
    before = dict(case.base().module.named_parameters())
    table = next(name for name, weight in whole_weights.items() if weight.shape[0] == 97 and "head" not in name)
    decayed = (whole_weights[table][NUM_USED:] / before[table].detach()[NUM_USED:]).nanmedian()
    assert 0.5 < decayed < 0.99


def module_of(case: Case, world_size: int = 1, strategy: str = "ddp", used: int = NUM_USED) -> Any:
    return build(case.config(world_size, strategy), case.base(), World.alone(), used_tokens=np.arange(used))


def is_partly_trained(module: Any) -> bool:
    return any(isinstance(part, TrainedRows) for part in module.modules())


def test_only_where_the_whole_table_is_held_and_nothing_else_is_computed_from_it() -> None:
    assert is_partly_trained(module_of(Case(family="bert")))
    assert not is_partly_trained(module_of(Case(family="bert"), used=97))
    assert not is_partly_trained(module_of(Case(family="bert", adapter="all-linear")))
    assert not is_partly_trained(module_of(Case(family="gpt2"))), "its head is the same table"
    assert not is_partly_trained(module_of(Case(family="gemma2"))), "its embedding scales what it looks up"


def test_a_table_comes_apart_and_together_again() -> None:
    module = module_of(Case(family="bert"))
    (parameter,) = (p for p in trainable(module).values() if rows_of(p) is not None)
    rows = rows_of(parameter)
    assert rows is not None
    whole = torch.randn(97, 64)
    part = rows.of(whole)
    assert torch.equal(part, whole[:NUM_USED])
    rows.scale = 0.5
    assert torch.equal(rows.whole(part, is_weight=True)[:NUM_USED], part)
    assert torch.equal(rows.whole(part, is_weight=True)[NUM_USED:], 0.5 * rows.idle)
    assert not rows.whole(part, is_weight=False)[NUM_USED:].any()


def test_outside_of_training_every_token_has_its_row() -> None:
    case = Case(family="bert")
    whole, some = build(case.config(1), case.base(), World.alone()).eval(), module_of(case).eval()
    batch: Batch = case.batch()  # of all tokens
    assert batch.input_ids.max() >= NUM_USED
    with torch.no_grad():
        assert torch.equal(some(input_ids=batch.input_ids).logits, whole(input_ids=batch.input_ids).logits)
