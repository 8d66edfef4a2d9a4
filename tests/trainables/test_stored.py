"""Weights that are stored in half: held as they are, as pages of their file, and trained as if they had been stored in fp32."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import distributed
import pytest
import torch
from families import make
from memory_grid import Case
from safetensors.torch import load_file, save_file

from spaces.blueprint import FAMILIES
from trainables.loop import Command, train
from trainables.loss import TrainingLoss
from trainables.mesh import World
from trainables.model import BaseModel, _compute_in_fp32, build, trainable
from trainables.optim import make_optimizer
from trainables.parallelize import autocast

LABELS = ("a", "b", "c", "d", "e")
HALVES = (torch.bfloat16, torch.float16)
METHODS = ("lora", "rslora", "dora", "vera", "ia3", "oft", "bottleneck", "prefix")


def stored(case: Case, directory: Path, dtype: torch.dtype) -> tuple[BaseModel, BaseModel]:
    """Return a model that is stored in half, and the same values stored in fp32."""
    labels = LABELS if case.task == "sequence-classification" else ()
    module: Any = make(case.family, case.task).to(dtype)
    bases = []
    for name, as_stored in (("half", module), ("whole", module.float())):
        as_stored.to(dtype if name == "half" else torch.float32).save_pretrained(directory / name)
        bases.append(BaseModel.load(str(directory / name), None, case.task, labels))
    return bases[0], bases[1]


def mapped(directory: Path) -> list[range]:
    """Return the addresses at which this process has files of a directory mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line]
    ends = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return [range(first, last) for first, last in ends]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_half_is_the_file_and_all_beside_the_weights_is_as_in_fp32(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    half, whole = stored(Case(family=family), tmp_path, dtype)
    pairs = list(zip(half.module.named_parameters(), whole.module.named_parameters(), strict=True))
    assert all(name == other and torch.equal(weights.float(), values) for (name, weights), (other, values) in pairs)
    assert {p.dtype for p in half.module.parameters()} == {dtype}
    tables, others = dict(half.module.named_buffers()), dict(whole.module.named_buffers())
    assert tables.keys() == others.keys()
    assert all(table.dtype == others[name].dtype and torch.equal(table, others[name]) for name, table in tables.items())
    settings, expected = half.module.config.to_dict(), whole.module.config.to_dict()
    assert settings == {**expected, "_name_or_path": half.name}
    if Path("/proc/self/maps").exists():
        # Transformers stacks the matrices of experts, which no file has as one.
        own = [p for name, p in half.module.named_parameters() if "experts" not in name]
        ranges = mapped(tmp_path / "half")
        assert all(any(p.data_ptr() in pages for pages in ranges) for p in own)


def trained(case: Case, base: BaseModel) -> tuple[list[float], dict[str, torch.Tensor]]:
    config = case.config(1)
    torch.manual_seed(0)
    batch = case.batch()
    module = build(config, base, World.alone())
    optimizer, losses = make_optimizer(trainable(module), config.recipe), []
    for _ in range(2):
        with autocast(config, World.alone()):
            loss = TrainingLoss(case.task)(module, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach() for name, p in trainable(module).items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(family="gemma"),
        Case(family="bert"),
        *(Case(family="llama", adapter="all-linear", method=m) for m in METHODS),
        *(Case(family="llama", adapter="all-linear", quantization=q) for q in ("nf4", "int8", "float8")),
        Case(family="llama", adapter="all-linear", method="dora", quantization="nf4"),
        Case(family="distilbert", adapter="all-linear"),
        Case(family="mixtral", adapter="all-linear"),
    ],
    ids=lambda case: "-".join((case.family, case.adapter, case.method, case.quantization)),
)
def test_what_is_stored_in_half_trains_as_the_same_values_in_fp32(case: Case, precision: str, tmp_path: Path) -> None:
    case = replace(case, precision=precision)
    half, whole = stored(case, tmp_path, torch.bfloat16)
    (losses, weights), (expected, others) = trained(case, half), trained(case, whole)
    assert losses == expected
    assert weights.keys() == others.keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, others[name]) for name, p in weights.items())


def test_weights_of_several_formats_are_held_in_fp32(tmp_path: Path) -> None:
    """Norms in fp32 beside matrices in bf16 would lose digits in bf16."""
    make("llama", "causal-lm").to(torch.bfloat16).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.norm.weight"] = torch.full((64,), 1.001)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    base = BaseModel.load(str(tmp_path), None, "causal-lm", ())
    assert {p.dtype for p in base.module.parameters()} == {torch.float32}
    assert torch.equal(base.module.get_parameter("model.norm.weight"), weights["model.norm.weight"])


def test_shards_are_all_looked_at(tmp_path: Path) -> None:
    make("llama", "causal-lm").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="100KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert BaseModel.load(str(tmp_path), None, "causal-lm", ()).module.dtype == torch.bfloat16
    BaseModel.load.cache_clear()
    save_file({name: weights.float() for name, weights in load_file(files[-1]).items()}, files[-1], {"format": "pt"})
    assert BaseModel.load(str(tmp_path), None, "causal-lm", ()).module.dtype == torch.float32


def curves(world: World, half: str, whole: str) -> list[tuple[list[float], list[float]]]:
    """Every strategy, in full and with an adapter, from both files."""
    found = []
    for strategy, adapter in product(("ddp", "fsdp", "tp"), ("none", "all-linear")):
        case = Case(family="llama", adapter=adapter, rows=4, num_micro_batches=2)
        trial, pair = case.config(world.world_size, strategy), []
        for name in (half, whole):
            base = BaseModel.load(name, None, case.task, ())
            before = {name: weights.clone() for name, weights in base.module.named_parameters()}
            reports = list(train(trial, case.data(16), base, world, control=lambda _: Command.CONTINUE, checkpoints=None))
            assert all(torch.equal(weights, before[name]) for name, weights in base.module.named_parameters()), (strategy, adapter)
            pair.append(reports[-1].details["train_losses"])
        found.append(tuple(pair))
    return found


def test_every_strategy_learns_the_same_from_both_and_leaves_the_base_as_it_is(tmp_path: Path) -> None:
    half, whole = stored(Case(family="llama"), tmp_path, torch.bfloat16)
    for ranks in distributed.run(2, curves, half.name, whole.name):
        assert len(ranks) == 6
        for of_half, of_whole in ranks:
            assert of_half == of_whole
            assert len(of_half) > 1


def test_a_table_that_was_learned_is_that_of_the_file(tmp_path: Path) -> None:
    """As the biases of routers are."""
    half, _ = stored(Case(family="llama"), tmp_path, torch.bfloat16)
    module: Any = half.module
    module.register_buffer("learned", torch.tensor([1.5, 2.5], dtype=torch.bfloat16))
    bare = half.module.__class__

    class Fresh:
        @staticmethod
        def from_config(*args: Any, **kwargs: Any) -> Any:
            fresh: Any = bare._from_config(*args, **kwargs)
            fresh.register_buffer("learned", torch.zeros(2))
            return fresh

    _compute_in_fp32(module, Fresh, set())
    assert module.learned.dtype == torch.float32
    assert module.learned.tolist() == [1.5, 2.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_does_not_train_is_not_trained(dtype: torch.dtype, tmp_path: Path) -> None:
    """As tables of sinusoids are."""
    make("gpt2", "causal-lm").to(dtype).save_pretrained(tmp_path)
    base = BaseModel.load(str(tmp_path), None, "causal-lm", ())
    base.module.get_parameter("transformer.wpe.weight").requires_grad_(False)
    table = build(Case(family="gpt2").config(1), base, World.alone()).get_parameter("transformer.wpe.weight")
    assert not table.requires_grad
    assert table.dtype == torch.float32
