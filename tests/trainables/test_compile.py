"""Compiled blocks learn what blocks as they are written learn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from memory_grid import Case
from torch._dynamo.utils import counters

from trainables.evaluation import summed_loss
from trainables.loop import Trainer
from trainables.mesh import World
from trainables.model import build
from trainables.parallelize import autocast

STEPS = 5


def trained(case: Case, compile: str) -> tuple[list[float], float]:
    """Return the losses of all steps and of the evaluation, and the hardware FLOPs of a step."""
    config = case.config(1)
    config = replace(config, layout=replace(config.layout, compile=compile))  # type: ignore[arg-type]
    trainer = Trainer(config, case.data(STEPS), case.base(), World.alone(), checkpoints=None)
    for _ in range(trainer.num_steps):
        trainer.train_step()
    report = trainer.final_report(0)
    return [*report.details["train_losses"], report.metrics["eval_loss"]], report.metrics["hfu"] / report.metrics["mfu"]


@pytest.mark.parametrize(
    ("adapter", "recomputation"),
    [
        ("all-linear", "none"),
        pytest.param("none", "full", marks=pytest.mark.slow),
        pytest.param("all-linear", "full", marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_learn_the_same_and_count_the_same(adapter: str, recomputation: str) -> None:
    """One compilation serves all three blocks, and what their FLOPs are is seen before it."""
    case = Case(family="llama", adapter=adapter, recomputation=recomputation)
    expected, twice = trained(case, "none")
    counters.clear()
    losses, compiled_twice = trained(case, "blocks")
    assert losses == pytest.approx(expected, rel=1e-4)
    assert compiled_twice == pytest.approx(twice)
    # One of the loss, the others of blocks: the first one's input may need no gradient.
    assert 2 <= counters["stats"]["unique_graphs"] <= 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_without_padding_need_no_mask(family: str, precision: str) -> None:
    case = Case(family=family, precision=precision)
    config, world = case.config(1), World.alone()
    module = build(config, case.base(), world)
    batch = case.batch()
    assert batch.attention_mask is not None
    assert batch.attention_mask.all()
    with torch.no_grad(), autocast(config, world):
        masked, _ = summed_loss(module, batch, case.task)
        bare, _ = summed_loss(module, replace(batch, attention_mask=None), case.task)
    assert bare.item() == pytest.approx(masked.item(), rel=1e-5 if precision == "fp32" else 1e-2)
