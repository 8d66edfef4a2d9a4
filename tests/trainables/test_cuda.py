"""What a GPU computes against what a CPU does, and what it holds against what is predicted; without a GPU all of it is skipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from memory_grid import Case
from torch._dynamo.utils import counters
from torch.nn.attention.varlen import varlen_attn
from unequal_rows import LENGTHS, base_of, data_of, gradients

from spaces.config import TrialConfig
from spaces.memory import rank_memory
from trainables.batching import collate
from trainables.checkpoint import CheckpointStore
from trainables.loop import Trainer
from trainables.mesh import World
from trainables.model import build
from trainables.packed import packing_for
from trainables.parallelize import autocast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = World(rank=0, world_size=1, device=torch.device("cuda", 0), control_group=None)
STEPS = 6
# Some gigabytes, beside which the workspaces of cuBLAS (a tenth of one) are little.
WIDE = (("hidden_size", 1024), ("intermediate_size", 2816), ("head_dim", 64), ("vocab_size", 16_000), ("num_hidden_layers", 8))


def losses(case: Case, config: TrialConfig, world: World) -> list[float]:
    torch.manual_seed(0)
    trainer = Trainer(config, case.data(STEPS), case.base(), world, checkpoints=None)
    for _ in range(trainer.num_steps):
        trainer.train_step()
    report = trainer.final_report(0)
    return [*report.details["train_losses"], report.metrics["eval_loss"]]


def with_layout(case: Case, **changes: str) -> TrialConfig:
    config = case.config(1)
    return replace(config, layout=replace(config.layout, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{}, {"recomputation": "full"}, {"compile": "blocks"}, {"recomputation": "full", "compile": "blocks"}]
)
@pytest.mark.parametrize(("adapter", "method"), [("none", "lora"), ("all-linear", "lora"), ("all-linear", "dora")])
def test_a_gpu_learns_what_a_cpu_learns(adapter: str, method: str, changes: dict[str, str]) -> None:
    case = Case(family="llama", adapter=adapter, method=method)
    expected = losses(case, case.config(1), World.alone())
    assert losses(case, with_layout(case, **changes), GPU) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert"])
def test_the_kernel_for_all_rows_computes_what_those_of_one_length_do(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(family=family, precision="bf16")
    config, base, data = case.config(1), base_of(case), data_of(case.task)
    module = build(config, base, GPU).train()
    batch = collate(data.train, np.arange(len(LENGTHS)), 0, packing_for(base.module, config, data)).to(GPU.device)
    calls: list[str] = []

    def watched(*args: Any, **options: Any) -> Any:
        calls.append(family)
        return varlen_attn(*args, **options)

    monkeypatch.setattr("trainables.packed.varlen_attn", watched)
    with autocast(config, GPU):
        loss, found = gradients(module, [batch], case.task)
    assert len(calls) == base.shape.num_layers
    monkeypatch.setattr("trainables.packed.takes_all_rows", lambda *_: False)
    module = build(config, base, GPU).train()
    with autocast(config, GPU):
        expected_loss, expected = gradients(module, [batch], case.task)
    assert len(calls) == base.shape.num_layers
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 3e-2 * gradient.norm() + 1e-4, name


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_packed_rows_are_compiled_with_their_attention(family: str) -> None:
    case = Case(family=family, precision="bf16", adapter="all-linear", rows=4)
    data = data_of(case.task, tuple(range(9, 41)))
    found = {}
    for compile in ("none", "blocks"):
        counters.clear()
        trainer = Trainer(with_layout(case, compile=compile), data, base_of(case), GPU, checkpoints=None)
        for _ in range(trainer.num_steps):
            trainer.train_step()
        found[compile] = trainer.final_report(0).details["train_losses"]
    assert found["blocks"] == pytest.approx(found["none"], rel=1e-2)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.parametrize(("quantization", "tolerance"), [("nf4", 1e-3), ("int8", 1e-2)])
def test_a_gpu_learns_what_a_cpu_learns_over_a_quantised_base(quantization: str, tolerance: float) -> None:
    case = Case(family="llama", adapter="all-linear", quantization=quantization)
    assert losses(case, case.config(1), GPU) == pytest.approx(losses(case, case.config(1), World.alone()), rel=tolerance)


@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ["none", "all-linear"])
def test_what_a_gpu_holds_is_predicted(adapter: str, precision: str, recomputation: str) -> None:
    case = Case(family="llama", adapter=adapter, precision=precision, rows=8, length=512, recomputation=recomputation, changes=WIDE)
    config = case.config(1)
    trainer = Trainer(config, case.data(3), case.base(), GPU, checkpoints=None)
    for _ in range(trainer.num_steps):
        trainer.train_step()
    with trainer.memory.pause():
        held = trainer.memory.measured()
    assert held is not None
    predicted = rank_memory(case.blueprint(), config, case.length, case.rows * (case.length - 1), is_on_gpu=True).peak_bytes
    error = predicted / held.tensor_bytes - 1
    print(f"{adapter} {precision} {recomputation}: predicted {error:+.1%} of {held.tensor_bytes / 2**20:.0f} MiB")
    # No formula has the workspaces of cuBLAS.
    assert -0.12 < error < 0.1


@pytest.fixture
def one_of_a_group() -> Iterator[World]:
    """The process group that a worker has."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield GPU
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ["none", "all-linear"])
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_a_gpu_goes_on_from_a_checkpoint_and_holds_what_is_predicted_also_where_it_leaves_weights_to_the_host(
    one_of_a_group: World, offload: str, adapter: str, precision: str, tmp_path: Path
) -> None:
    case = Case(family="llama", adapter=adapter, precision=precision, rows=8, length=512, offload=offload, changes=WIDE)
    kept = replace(case, offload="none")
    expected = losses(kept, kept.config(1), GPU)
    assert losses(case, case.config(1, "fsdp"), one_of_a_group) == pytest.approx(expected, rel=1e-3 if precision == "fp32" else 2e-2)
    ends = []
    for start in (0, STEPS // 2):
        trainer = Trainer(
            case.config(1, "fsdp"), case.data(STEPS), case.base(), one_of_a_group, checkpoints=CheckpointStore(tmp_path)
        )
        assert trainer.step == start
        while trainer.step < trainer.num_steps:
            trainer.train_step()
            if trainer.step == STEPS // 2:
                trainer.save()
        with trainer.memory.pause():
            held = trainer.memory.measured()
        ends.append(trainer.final_report(0).metrics["eval_loss"])
        del trainer
    assert ends[1] == pytest.approx(ends[0], rel=1e-5)
    assert held is not None
    predicted = rank_memory(case.blueprint(), case.config(1, "fsdp"), 512, 8 * 511, is_on_gpu=True).peak_bytes
    error = predicted / held.tensor_bytes - 1
    print(f"{adapter} {precision}: predicted {error:+.1%} of {held.tensor_bytes / 2**20:.0f} MiB")
    assert -0.12 < error < 0.15
