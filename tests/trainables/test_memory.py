"""Predicted bytes against the tensors that really live in two steps of training."""

from __future__ import annotations

import math
import statistics
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast
from unittest.mock import patch

import distributed
import numpy as np
import pytest
import torch
import torch.distributed as dist
from families import NUM_LABELS, batch_of, make
from memory_grid import (
    ALONE,
    ALONE_IN_SHORT,
    FEW_TOKENS,
    IDLE,
    REPLICATED,
    REPLICATED_IN_SHORT,
    SHARDED,
    SHARDED_IN_SHORT,
    SPLIT,
    SPLIT_IN_SHORT,
    UNCOPIED,
    Case,
    error,
    measured,
    peaks_of,
    peaks_of_second_steps,
)
from synthetic_data import task_data
from torch.testing._internal.distributed.fake_pg import FakeStore
from varlen_kernel import kernels_of

from spaces import memory
from spaces.blueprint import FAMILIES, with_idle_rows
from spaces.constraints import Limits, predicted_memory
from spaces.memory import ADAMW_STATES, num_trained, rank_memory
from spaces.tensor_parallel import PLANS, local_blueprint
from spaces.widths import FP32_BYTES
from trainables.adapters import add_adapter
from trainables.data import TokenTable
from trainables.loop import Trainer
from trainables.loss import evaluated
from trainables.memory_meter import LiveBytes
from trainables.mesh import World
from trainables.model import build, trainable
from trainables.packed import attend_by_rows
from trainables.parallelize import autocast, blocks_of, parallelize
from trainables.tokenization import Encoded

# What the grids have; what is too low is worse, since it then does not fit.
LEAST, MOST = -0.06, 0.08


def check(errors: dict[Case, float]) -> None:
    assert statistics.median(map(abs, errors.values())) < 0.02
    worst, least = max(errors, key=lambda case: errors[case]), min(errors, key=lambda case: errors[case])
    assert errors[worst] < MOST, f"{worst}: {errors[worst]:+.1%}"
    assert errors[least] > LEAST, f"{least}: {errors[least]:+.1%}"


def check_alone(cases: list[Case]) -> None:
    errors = {}
    for case in cases:
        config, plan = case.config(1), case.blueprint()
        peak, trained = measured(case, config, World.alone())
        assert trained == num_trained(plan, config.recipe) - plan.num_idle_params, case
        errors[case] = error(case, 1, peak)
    check(errors)


def check_on_two(cases: list[Case], strategy: str) -> list[int]:
    peaks = [peak for peak, _ in distributed.run(2, peaks_of, cases, strategy)[0]]
    check({case: error(case, 2, peak, strategy) for case, peak in zip(cases, peaks, strict=True)})
    return peaks


def check_split(cases: list[Case]) -> None:
    for results in distributed.run(2, peaks_of, cases, "tp"):
        errors = {}
        for case, (peak, trained) in zip(cases, results, strict=True):
            assert trained == num_trained(local_blueprint(case.blueprint(), 2), case.config(2, "tp").recipe), case
            errors[case] = error(case, 2, peak, "tp")
        check(errors)


def some(cases: list[Case]) -> list[Case]:
    """Return every seventh, of every kind some: all take longer than a test may, and `benchmarks/metering.py` has them."""
    chosen = cases[::7]
    for kind in ("family", "adapter", "method", "quantization", "precision", "recomputation", "num_micro_batches"):
        assert {getattr(case, kind) for case in chosen} == {getattr(case, kind) for case in cases}, kind
    return chosen


def test_every_family_and_precision_is_predicted() -> None:
    assert {(c.family, c.precision) for c in ALONE_IN_SHORT} == {(f, p) for f in FAMILIES for p in ("fp32", "bf16")}
    check_alone(ALONE_IN_SHORT)


def test_replicated_layouts_are_predicted_and_hold_no_gradient_twice() -> None:
    """Of what DDP exchanges, its buckets, one rank has all as well where the gradients of several micro batches are added up."""
    for case, peak in zip(REPLICATED_IN_SHORT, check_on_two(REPLICATED_IN_SHORT, "ddp"), strict=True):
        alone, trained = measured(case, case.config(1), World.alone())
        assert 0 <= peak - alone <= FP32_BYTES * trained, case
        if case in FEW_TOKENS and case.num_micro_batches > 1:
            assert peak == alone, case


def test_replicated_layouts_are_predicted_in_the_step_that_makes_the_buckets_anew() -> None:
    cases = [c for c in FEW_TOKENS if c.family in ("llama", "bert")]
    peaks = distributed.run(2, peaks_of_second_steps, cases, "ddp")[0]
    check({case: error(case, 2, peak, "ddp") for case, peak in zip(cases, peaks, strict=True)})


@pytest.mark.slow
def test_sharded_layouts_are_predicted() -> None:
    check_on_two(SHARDED_IN_SHORT, "fsdp")


@pytest.mark.parametrize(("world_size", "shard_size"), [(2, None), (8, None), (8, 2), (8, 4)])
def test_sharded_layouts_are_predicted_where_no_collective_copies(world_size: int, shard_size: int | None) -> None:
    """As NCCL: torch's fake backend exchanges nothing, so that what lives is what FSDP2 itself holds, over any number of ranks."""
    check_without_copies([replace(case, shard_size=shard_size) for case in UNCOPIED], world_size, "fsdp")


@pytest.mark.parametrize("world_size", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_sharded_pieces_are_predicted_where_no_collective_copies(world_size: int) -> None:
    """Two ranks split the matrices, and others have the other shards of their pieces."""
    families = ("llama", "qwen3", "gemma2")
    check_without_copies([replace(case, tp_size=2) for case in SPLIT_IN_SHORT if case.family in families], world_size, "tp")


def test_experts_that_the_shards_do_not_divide_are_filled_up() -> None:
    """Four of one stacked weight on eight ranks."""
    kinds = (("none", "none"), ("none", "full"), ("all-linear", "none"))
    families = ("mixtral", "qwen3_moe")
    cases = [Case(family=f, adapter=a, precision=p, recomputation=r) for f in families for p in ("fp32", "bf16") for a, r in kinds]
    assert {m.num_experts for c in cases for m in c.blueprint().block} == {1, 4}
    check_without_copies(cases, 8, "fsdp")


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow), 8])
def test_what_stays_on_a_device_that_leaves_its_weights_to_the_host_is_predicted(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what comes from the host nothing is seen here, where both are one."""
    monkeypatch.setattr(memory, "_arriving", lambda *_: 0)
    check_without_copies([replace(case, offload="cpu") for case in UNCOPIED], world_size, "fsdp")


def check_without_copies(cases: list[Case], world_size: int, strategy: str) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        world = World(rank=0, world_size=world_size, device=torch.device("cpu"), control_group=None)
        peaks = peaks_of(world, cases, strategy)
    finally:
        dist.destroy_process_group()
    with ExitStack() as shared:
        for module in ("attention", "activations"):  # a CPU repeats no heads of keys
            shared.enter_context(patch(f"spaces.{module}.num_kept_kv_heads", lambda plan, *_, **__: plan.shape.num_kv_heads))
        found = {case: error(case, world_size, peak, strategy, is_on_gpu=True) for case, (peak, _) in zip(cases, peaks, strict=True)}
    check(found)


@pytest.mark.parametrize("adapter", ["none", "all-linear"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_heads_of_keys_that_a_gpu_repeats_in_fp32_are_predicted(family: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(family=family, adapter=adapter, length=128)
    base, batch = case.base(), replace(case.batch(), attention_mask=None)
    attend_by_rows(base.module)
    monkeypatch.setattr(Case, "base", lambda _: base)
    monkeypatch.setattr(Case, "batch", lambda _: batch)
    assert base.shape.num_kv_heads < base.shape.num_heads
    shared, _ = measured(case, case.config(1), World.alone())
    with kernels_of("cpu", torch.bfloat16):
        repeated, _ = measured(case, case.config(1), World.alone())
    predicted = [
        rank_memory(case.blueprint(), case.config(1), case.length, is_on_gpu=is_on_gpu).peak_bytes for is_on_gpu in (False, True)
    ]
    assert repeated - shared == pytest.approx(predicted[1] - predicted[0], rel=0.1)


def test_tensor_parallel_layouts_are_predicted() -> None:
    assert {c.family for c in SPLIT_IN_SHORT} == set(PLANS)
    check_split(SPLIT_IN_SHORT)


@pytest.mark.slow
def test_some_of_the_rest_of_the_tensor_parallel_grid_is_predicted() -> None:
    check_split(some([case for case in SPLIT if case not in SPLIT_IN_SHORT]))


@pytest.mark.slow
def test_some_of_the_rest_of_the_grid_is_predicted() -> None:
    check_alone(some([case for case in ALONE if case not in ALONE_IN_SHORT]))


@pytest.mark.slow
def test_some_of_the_rest_of_the_sharded_grid_is_predicted() -> None:
    check_on_two(some([case for case in SHARDED if case not in SHARDED_IN_SHORT]), "fsdp")


@pytest.mark.slow
def test_the_rest_of_the_replicated_grid_is_predicted() -> None:
    check_on_two([case for case in REPLICATED if case not in REPLICATED_IN_SHORT], "ddp")


def test_rows_of_the_embedding_that_the_data_never_read_are_held_once() -> None:
    assert {c.family for c in IDLE if c.blueprint().num_idle_params} == {"llama", "bert", "distilbert"}
    check_alone(IDLE)
    sharded = replace(next(c for c in IDLE if c.family == "bert"), num_micro_batches=1)
    whole = replace(sharded, num_used=None)
    assert rank_memory(sharded.blueprint(), sharded.config(2, "fsdp"), 32) == rank_memory(
        whole.blueprint(), whole.config(2, "fsdp"), 32
    )


@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_the_loop_itself_holds_no_more_than_the_steps_of_the_grid(recomputation: str) -> None:
    """With a wide vocabulary, where one name too many for the logits is most of the memory."""
    case = Case(family="llama", adapter="all-linear", recomputation=recomputation, changes=(("vocab_size", 1000),))
    trainer = Trainer(case.config(1), case.data(3), case.base(), World.alone(), checkpoints=None)
    for _ in range(trainer.num_steps):
        trainer.train_step()
    held = trainer.memory.measured()
    assert held is not None
    assert LEAST < error(case, 1, held.tensor_bytes) < MOST


@pytest.mark.parametrize(("family", "budget"), [("llama", 100), ("llama", 1000), ("gemma2", 100), ("bert", 100)])
@pytest.mark.parametrize("adapter", ["none", "all-linear"])
def test_a_budget_of_tokens_holds_what_is_predicted_of_the_micro_batch_that_fills_it(family: str, adapter: str, budget: int) -> None:
    """Of rows of unequal length, laid end to end or (Gemma 2) padded."""
    case = Case(family=family, adapter=adapter)
    config = case.config(1)
    config = replace(config, layout=replace(config.layout, micro_batch_size=None, micro_batch_tokens=budget))
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 97, size=length).tolist() for length in rng.integers(4, 40, size=40)]
    is_causal = case.task == "causal-lm"
    encoded = [Encoded(input_ids=ids, targets=ids if is_causal else None) for ids in rows]
    table = TokenTable.build(encoded, None if is_causal else [i % NUM_LABELS for i in range(40)])
    data = task_data(case.task, table, table, () if is_causal else tuple("abcdefgh"[:NUM_LABELS]))
    trainer = Trainer(config, data, case.base(), World.alone(), checkpoints=None)
    for _ in range(trainer.num_steps):
        trainer.train_step()
    held = trainer.memory.measured()
    assert held is not None
    sizes, plan = trainer.sizes, with_idle_rows(case.blueprint(), len(data.tokens()))

    def peak_bytes(step: int) -> int:
        tokens, num_rows = int(sizes.micro_tokens[step]), int(sizes.micro_rows[step])
        return rank_memory(
            plan,
            config,
            math.ceil(tokens / num_rows),
            int(sizes.micro_targets[step]),
            num_tokens=tokens,
            num_micro_batches=int(sizes.micro_batches[step]),
        ).peak_bytes

    # Of all steps, not of those alone that were followed.
    predicted_bytes = max(peak_bytes(step) for step in range(1, trainer.num_steps))
    assert predicted_bytes == max(map(peak_bytes, sizes.fullest))
    assert LEAST < predicted_bytes / held.tensor_bytes - 1 < MOST
    limits = Limits(
        num_workers=1,
        hidden_size=None,
        plan=plan,
        max_length=data.longest,
        max_targets=int(table.num_targets.max()),
        targets_per_token=float((table.num_targets / table.lengths).max()),
    )
    full = predicted_memory(config, limits)
    assert full is not None
    assert full.peak_bytes >= predicted_bytes, "what a search holds against the device before it knows the batches"


def test_a_wide_vocabulary_and_a_wide_layer_move_the_peak() -> None:
    """The three moments that can be the peak, each made the largest."""
    for family, changes in (
        ("llama", ("vocab_size", 4000)),
        ("llama", ("intermediate_size", 900)),
        ("bert", ("intermediate_size", 900)),
    ):
        small = Case(family=family)
        large = replace(small, changes=(changes,))
        bytes_of = [rank_memory(case.blueprint(), case.config(1), case.length).peak_bytes for case in (small, large)]
        assert bytes_of[0] < bytes_of[1]
    tiny_batch = rank_memory(small.blueprint(), replace(small, rows=1).config(1), 4)
    assert tiny_batch.gradients_bytes > 0
    assert tiny_batch.activations_bytes == 0, "with one short row the optimizer step is the peak"


@pytest.mark.parametrize("adapter", ["none", "all-linear"])
def test_recomputation_is_switched_on_where_the_layout_says_so(adapter: str) -> None:
    for recomputation, blocks in (("none", []), ("half", [0, 2]), ("full", [0, 1, 2])):
        config = Case(family="llama", adapter=adapter, recomputation=recomputation).config(1)
        module = make("llama", "causal-lm")
        if config.recipe.adapter == "lora":
            module = add_adapter(module, config.recipe, "causal-lm", ())
        spread: Any = parallelize(module, config, World.alone())
        assert [i for i, block in enumerate(blocks_of(spread)) if cast("Any", block).gradient_checkpointing] == blocks


def test_frozen_weights_are_held_in_the_precision_of_the_recipe() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        case = Case(family="llama", adapter="all-linear", precision=precision)
        module = build(case.config(1), case.base(), World.alone())
        assert {p.dtype for p in module.parameters() if not p.requires_grad} == {dtype}
        assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}


def test_evaluation_takes_less_than_training_on_as_many_tokens() -> None:
    """Of the grid, the cases in which it comes the closest; the optimizer's state is there while it runs."""
    world = World.alone()
    cases = [c for c in ALONE if c.rows == 2 and c.length == 120 and c.family == "mixtral" and c.recomputation == "full"]
    assert len(cases) == 6
    wide = [
        Case(family=f, adapter=a, precision=p, num_prompt=n, recomputation="full", changes=(("vocab_size", 8000),))
        for f in ("llama", "gemma2")
        for a in ("none", "all-linear")
        for p in ("fp32", "bf16")
        for n in (1, 24)
    ]
    for case in [*cases, *wide]:
        config = case.config(1)
        module = build(config, case.base(), world).eval()
        batch = batch_of(case.task, torch.randint(3, 97, (case.rows, case.length)), num_prompt=case.num_prompt)
        with torch.no_grad(), LiveBytes() as tensors:
            for part in (*module.parameters(), *module.buffers()):
                tensors.hold(part)
            with autocast(config, world):
                evaluated(module, batch, case.task)
        state = ADAMW_STATES * FP32_BYTES * sum(p.numel() for p in trainable(module).values())
        assert tensors.peak + state < measured(case, config, world)[0], case
