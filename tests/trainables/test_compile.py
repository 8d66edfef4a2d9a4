"""Compiled blocks learn what blocks as they are written learn, and nothing is compiled twice."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from memory_grid import Case
from synthetic_data import task_data
from torch._dynamo.utils import counters
from unequal_rows import base_of, data_of
from varlen_kernel import varlen_on_cpu

from spaces.packing import Packing
from trainables.batching import BatchPlan, Form
from trainables.compilation import Compilation
from trainables.data import TaskData, TokenTable
from trainables.loop import Trainer
from trainables.loss import scored_loss
from trainables.mesh import World
from trainables.model import build
from trainables.parallelize import autocast
from trainables.tokenization import Encoded

STEPS = 5


def rows_of(lengths: list[int]) -> TaskData:
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 97, size=length).tolist() for length in lengths]
    table = TokenTable.build([Encoded(input_ids=ids, targets=ids) for ids in rows], None)
    return task_data("causal-lm", table, table)


def unequal(case: Case) -> TaskData:
    """Return rows of many lengths, no two micro batches of which are alike."""
    return data_of(case.task, tuple(range(9, 41)))


def trained(case: Case, compile: str, data: TaskData | None = None, *, is_packed: bool = False) -> tuple[list[float], float]:
    """Return the losses of all steps and of the evaluation, and the hardware FLOPs of a step."""
    config = case.config(1)
    config = replace(config, layout=replace(config.layout, compile=compile))  # type: ignore[arg-type]
    base = base_of(case) if is_packed else case.base()
    trainer = Trainer(config, data or case.data(STEPS), base, World.alone(), checkpoints=None)
    for _ in range(trainer.num_steps):
        trainer.train_step()
    report = trainer.final_report(0)
    return [*report.details["train_losses"], report.metrics["eval_loss"]], report.metrics["hfu"] / report.metrics["mfu"]


@pytest.mark.parametrize(
    ("adapter", "recomputation", "quantization"),
    [
        ("all-linear", "none", "none"),
        pytest.param("all-linear", "half", "none", marks=pytest.mark.slow),
        *(pytest.param("all-linear", "none", q, marks=pytest.mark.slow) for q in ("nf4", "int8", "float8")),
    ],
)
def test_compiled_blocks_learn_the_same_and_count_the_same(adapter: str, recomputation: str, quantization: str) -> None:
    """One compilation serves all three blocks, and what their FLOPs are is seen before it."""
    case = Case(family="llama", adapter=adapter, recomputation=recomputation, quantization=quantization)
    expected, twice = trained(case, "none")
    counters.clear()
    losses, compiled_twice = trained(case, "blocks")
    assert losses == pytest.approx(expected, rel=1e-4)
    assert compiled_twice == pytest.approx(twice)
    # One of the loss, the others of blocks: the first one's input may need no gradient, and what is computed again is one of its own.
    assert 2 <= counters["stats"]["unique_graphs"] <= 3 + (recomputation == "half")
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("lengths", "num_graphs"),
    [
        # Two rows a step, the last one alone. The first block is a graph of its own where its input needs no gradient.
        ([32] * 41, 3),
        # Every length from 9 on, no two rows alike.
        pytest.param([*range(9, 41)], 3, marks=pytest.mark.slow),
    ],
)
def test_batches_of_other_forms_compile_nothing_again(lengths: list[int], num_graphs: int) -> None:
    case = Case(family="llama", adapter="all-linear", rows=2)
    expected, _ = trained(case, "none", rows_of(lengths))
    counters.clear()
    losses, _ = trained(case, "blocks", rows_of(lengths))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert counters["stats"]["unique_graphs"] <= num_graphs


@pytest.mark.parametrize("family", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_packed_rows_in_one_kernel_are_compiled_once(family: str) -> None:
    """As a GPU would have it: however many rows and tokens a micro batch has, and nothing is left out of the graphs."""
    case = Case(family=family, adapter="all-linear", rows=4)
    with varlen_on_cpu(base_of(case).shape.head_dim) as called:
        expected, twice = trained(case, "none", unequal(case), is_packed=True)
        as_written = len(called)
        counters.clear()
        losses, compiled_twice = trained(case, "blocks", unequal(case), is_packed=True)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert compiled_twice == pytest.approx(twice)
    assert len(called) == 2 * as_written
    assert not counters["graph_break"]
    # Of the loss, of blocks, of the first one, whose input needs no gradient, and of an encoder's last, which ends at first tokens.
    assert counters["stats"]["unique_graphs"] == 3 + (family == "bert")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_packed_rows_by_length_are_compiled_around_their_attention(family: str) -> None:
    case = Case(family=family, adapter="all-linear", rows=4)
    expected, _ = trained(case, "none", unequal(case), is_packed=True)
    counters.clear()
    losses, _ = trained(case, "blocks", unequal(case), is_packed=True)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert all("attention_by_length" in reason for reason in counters["graph_break"])
    assert counters["graph_break"]


@pytest.mark.parametrize("is_packed", [True, False])
def test_the_forms_of_a_plan_are_those_of_its_batches(is_packed: bool) -> None:
    case = Case(family="llama", rows=3)
    config = replace(case.config(2), recipe=replace(case.config(2).recipe, epochs=1.7))
    plan = BatchPlan(config, rows_of([5, 9, 9, 12, 7, 7, 7, 31, 8, 20, 21]), Packing(first_position=0) if is_packed else None)
    dealt = Counter(
        b.form for step in range(plan.num_steps) for rank in range(2) for b in plan.micro_batches(step, rank) if len(b.targets)
    )
    assert plan.forms() == dealt


def test_what_is_compiled_covers_what_is_common() -> None:
    usual, rest = Form(rows=8, width=256, kind="even"), Form(rows=3, width=256, kind="even")
    text = Compilation.of(Counter({usual: 99, rest: 1}))
    assert (text.dynamic, text.covers(usual), text.covers(rest)) == (None, True, False)
    padded = {Form(rows=8, width=width, kind="padded"): 1 for width in range(20, 60)}
    even = Form(rows=8, width=30, kind="even")
    prompts = Compilation.of(Counter({**padded, even: 2}))
    assert prompts.dynamic
    assert all(prompts.covers(form) for form in padded)
    assert not prompts.covers(even), "as rare as two in 42"
    assert Compilation.of(Counter({**padded, even: 20})).covers(even)
    packed = {Form(rows=1, width=width, kind="packed"): 1 for width in range(200, 240)}
    together = Compilation.of(Counter({**packed, Form(rows=1, width=30, kind="even"): 2}))
    assert together.dynamic
    assert all(together.covers(form) for form in packed)
    assert not together.covers(Form(rows=1, width=30, kind="even")), "has a graph of its own"


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
        masked, _ = scored_loss(module, batch, case.task)
        bare, _ = scored_loss(module, replace(batch, attention_mask=None), case.task)
    assert bare.item() == pytest.approx(masked.item(), rel=1e-5 if precision == "fp32" else 1e-2)
