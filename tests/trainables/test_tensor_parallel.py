"""What ranks that split every matrix hold and exchange, counted on real steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import distributed
import pytest
import torch
import torch.distributed as dist
from families import batch_of
from memory_grid import Case

from spaces.estimate import exchanges
from trainables.loss import TrainingLoss
from trainables.mesh import World
from trainables.model import build, trainable
from trainables.parallelize import autocast, summing
from trainables.report import TrialError
from trainables.tensor_parallel import piece_of, split, sum_partial_gradients

CASES = [
    Case(family=family, adapter=adapter, precision=precision, recomputation=recomputation)
    for family in ("qwen3", "gemma2")
    for adapter in ("none", "all-linear")
    for precision in ("fp32", "bf16")
    for recomputation in ("none", "full")
]


def exchanged(world: World, cases: list[Case]) -> list[int]:
    """Return the bytes that a rank hands to sums over the ranks in one step."""
    totals = []
    plain = dist.all_reduce

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        totals[-1] += tensor.numel() * tensor.element_size()
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        for case in cases:
            config = case.config(world.world_size, "tp")
            module = build(config, case.base(), world)
            module.train()
            totals.append(0)
            with autocast(config, world):
                loss = TrainingLoss(case.task)(module, batch_of(case.task, torch.randint(3, 97, (case.rows, case.length))))
            loss.backward()
            sum_partial_gradients(trainable(module).values(), summing(world, None))
    finally:
        dist.all_reduce = plain
    return totals


def test_the_bytes_between_the_ranks_are_those_of_the_formula() -> None:
    for results in distributed.run(2, exchanged, CASES):
        for case, seen in zip(CASES, results, strict=True):
            plan, config, num_tokens = case.blueprint(), case.config(2, "tp"), case.rows * case.length
            expected = exchanges(plan, config, num_tokens)[0].num_bytes / 2  # which has what is summed twice
            assert seen == expected, case


def split_twice(world: World) -> tuple[bool, list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Return whether the shared weights stay as they are, and the shapes of a layer's and its adapter's pieces."""
    case = Case(family="llama", adapter="all-linear")
    base = case.base()
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in base.module.named_parameters()}
    for _ in range(2):
        module = build(case.config(world.world_size, "tp"), base, world)
    after = dict(base.module.named_parameters())
    is_same = all(after[n].data_ptr() == pointer and torch.equal(after[n], value) for n, (pointer, value) in before.items())
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters() if piece_of(p) is not None}
    parts = ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")
    layer = "base_model.model.model.layers.1"
    by_outputs, by_inputs = (
        [shapes.get(f"{layer}.{matrix}.{part}", ()) for part in parts] for matrix in ("mlp.up_proj", "mlp.down_proj")
    )
    return is_same, by_outputs, by_inputs


def test_pieces_are_copies_and_an_adapter_is_cut_where_its_matrix_is() -> None:
    """Of 160 outputs and inputs each of two ranks has 80; () is what every rank has whole."""
    for is_same, by_outputs, by_inputs in distributed.run(2, split_twice):
        assert is_same
        assert by_outputs == [(80, 64), (), (80, 8)]
        assert by_inputs == [(64, 80), (8, 80), ()]


def test_a_plan_with_other_parts_is_refused() -> None:
    module = Case(family="phi3").base().module
    world = World(rank=0, world_size=2, device=torch.device("cpu"), control_group=None)
    with pytest.raises(TrialError, match=r"strategy tp: the model's plan wants '.*' for model.layers.0.self_attn"):
        split(module, world, summing(world, None))


def test_what_cannot_be_cut_is_refused() -> None:
    world = World(rank=0, world_size=2, device=torch.device("cpu"), control_group=None)
    with pytest.raises(TrialError, match="no plan for this model"):
        split(Case(family="gpt2").base().module, world, summing(world, None))
    with pytest.raises(TrialError, match=r"float32 of shape \(64, 64\) cannot be cut in 3 along dim 0"):
        split(Case(family="llama").base().module, replace(world, world_size=3), summing(world, None))
    quantized = Case(family="llama", adapter="all-linear", quantization="nf4")
    with pytest.raises(TrialError, match="uint8 of shape"):
        split(build(quantized.config(1), quantized.base(), World.alone()), world, summing(world, None))
