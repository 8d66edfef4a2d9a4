"""Trials whose memory is predicted and measured: the grid that a test checks and a benchmark prints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from families import NUM_LABELS, SOME_TARGETS, batch_of, config_of, make
from synthetic_data import task_data
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from spaces.architecture import ModelShape
from spaces.blueprint import FAMILIES, Blueprint, blueprint, with_idle_rows
from spaces.config import IA3_RESULTS, LAST_PRODUCTS, Layout, Recipe, TrialConfig
from spaces.memory import rank_memory
from spaces.packing import Packing, can_pack
from spaces.tensor_parallel import PLANS
from trainables.batching import Batch
from trainables.data import TaskData, TokenTable
from trainables.loss import TrainingLoss
from trainables.memory_meter import LiveBytes
from trainables.mesh import World
from trainables.model import BaseModel, build, trainable
from trainables.optim import make_optimizer, update
from trainables.packed import attend_by_rows
from trainables.packed_rows import PackedRows
from trainables.parallelize import GradientExchange, autocast, summing
from trainables.tensor_parallel import sum_partial_gradients
from trainables.tokenization import Encoded

ENCODERS = {"bert", "roberta", "xlm-roberta", "camembert", "distilbert"}
# One of every modelling file that keeps something of its own; the others repeat one of these.
DISTINCT = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen3_moe", "gpt2", "bert", "distilbert")
VECTORS, WITHOUT_ALPHA = ("vera", "ia3"), ("vera", "ia3", "oft", "bottleneck", "prefix")
OWN_TARGETS = {"ia3": (*IA3_RESULTS, *LAST_PRODUCTS), "bottleneck": LAST_PRODUCTS, "prefix": None}
RANK = 8
ADAPTERS, PRECISIONS = ("none", "all-linear", "some"), ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trial whose memory is predicted and measured."""

    family: str
    adapter: str = "none"
    rows: int = 8
    length: int = 32
    num_prompt: int = 1
    num_micro_batches: int = 1
    precision: str = "fp32"
    recomputation: str = "none"
    quantization: str = "none"
    method: str = "lora"
    """Of those with an adapter."""
    changes: tuple[tuple[str, int], ...] = ()
    num_used: int | None = None
    """Tokens that the data have; None: all of the vocabulary."""
    shard_size: int | None = None
    """Ranks that hold one copy of a sharded model; None: all."""
    tp_size: int | None = None
    """Ranks that split matrices together; None: all, where any do."""
    offload: str = "none"

    @property
    def task(self) -> str:
        return "sequence-classification" if self.family in ENCODERS else "causal-lm"

    def config(self, world_size: int, strategy: str = "ddp") -> TrialConfig:
        targets = {"none": None, "all-linear": ("all-linear",)}.get(self.adapter, SOME_TARGETS.get(self.family, ("q_proj", "v_proj")))
        targets = OWN_TARGETS.get(self.method, targets)
        layout = Layout(
            world_size=world_size,
            strategy=strategy,  # type: ignore[arg-type]
            micro_batch_size=self.rows,
            recomputation=self.recomputation,  # type: ignore[arg-type]
            shard_size=self.shard_size,
            tp_size=self.tp_size,
            offload=self.offload,  # type: ignore[arg-type]
        )
        recipe = Recipe(
            learning_rate=1e-3,
            global_batch_size=self.rows * layout.data_parallel_size * self.num_micro_batches,
            dataset_fraction=1,
            epochs=1,
            warmup_fraction=0,
            weight_decay=0.01,
            precision=self.precision,  # type: ignore[arg-type]
            seed=0,
            adapter="none" if self.adapter == "none" else self.method,  # type: ignore[arg-type]
            adapter_rank=RANK if self.adapter != "none" and self.method != "ia3" else None,
            adapter_alpha=16.0 if targets and self.method not in WITHOUT_ALPHA else None,
            adapter_target_modules=targets,
            quantization=self.quantization,  # type: ignore[arg-type]
        )
        return TrialConfig(recipe=recipe, layout=layout)

    def base(self) -> BaseModel:
        module = make(self.family, self.task, **dict(self.changes))
        module.config.use_cache = False
        if self.method == "prefix":
            attend_by_rows(module)
        shape = ModelShape.from_config(config_of(module))
        return BaseModel(name="", revision=None, task=self.task, module=module, new_parameters=(), shape=shape)

    def batch(self) -> Batch:
        """Return one micro batch without padding; behind a prefix it is laid end to end."""
        batch = batch_of(self.task, torch.randint(3, 97, (self.rows, self.length)), num_prompt=self.num_prompt)
        if self.method != "prefix" or not can_pack(self.family):
            return batch
        rows = PackedRows.of(np.full(self.rows, self.length), Packing(first_position=0, num_before=RANK))
        return replace(batch, input_ids=batch.input_ids.reshape(1, -1), attention_mask=None, packed=rows)

    def data(self, num_steps: int) -> TaskData:
        """Return random rows for a causal model, all of one length, with as many targets as a prompt of one token leaves."""
        rng = np.random.default_rng(0)
        rows = [rng.integers(3, 97, size=self.length).tolist() for _ in range(num_steps * self.rows)]
        table = TokenTable.build([Encoded(input_ids=ids, targets=ids) for ids in rows], None)
        return task_data("causal-lm", table, table)

    def blueprint(self) -> Blueprint:
        plan = blueprint(config_of(make(self.family, self.task, **dict(self.changes))), self.task, NUM_LABELS)  # type: ignore[arg-type]
        return plan if self.num_used is None else with_idle_rows(plan, self.num_used)


ALONE = [
    Case(family=f, adapter=a, precision=p, rows=r, length=n)
    for f in FAMILIES
    for p in PRECISIONS
    for a in ADAPTERS
    for r, n in ((2, 16), (8, 32), (16, 48))
]
ALONE += [
    Case(family=f, adapter=a, precision=p, rows=r, length=n, recomputation="full")
    for f in FAMILIES
    for p in PRECISIONS
    for a in ADAPTERS
    for r, n in ((8, 32), (16, 48))
]
# The last block of three is computed again, that of four is not.
HALF = [
    Case(family=f, adapter=a, precision=p, recomputation="half", changes=(("num_hidden_layers", n),))
    for f in ("llama", "bert", "gemma2", "mixtral", "gpt2", "distilbert")
    for p in PRECISIONS
    for a in ("none", "all-linear")
    for n in (3, 4)
]
ALONE += HALF
WIDE = (("vocab_size", 2000),)
ALONE += [
    Case(family=f, adapter=a, precision=p, num_prompt=24, changes=WIDE)
    for f in ("llama", "gpt2", "gemma2")
    for p in PRECISIONS
    for a in ("none", "all-linear")
]
# Where a layer is narrower between its matrices than outside, as one rank's part of it is, the normalisation before it is the peak.
ALONE += [
    Case(family="llama", adapter=a, precision=p, recomputation=c, changes=(("intermediate_size", 40),))
    for p in PRECISIONS
    for a in ADAPTERS
    for c in ("none", "full")
]
# What grows with the square of the length, with the experts that a token meets, and with those that it does not.
ALONE += [
    Case(family=f, adapter=a, precision=p, rows=2, length=120, recomputation=c, changes=v)
    for f, v in (
        ("gemma2", (("num_key_value_heads", 4),)),
        ("mixtral", (("num_local_experts", 8), ("num_experts_per_tok", 1))),
        ("qwen3_moe", (("num_experts", 16), ("num_experts_per_tok", 8), ("moe_intermediate_size", 24))),
    )
    for p in PRECISIONS
    for a in ADAPTERS
    for c in ("none", "full")
]
ACCUMULATED = [
    Case(family=f, adapter=a, precision=p, num_micro_batches=2, recomputation=c)
    for f in ("llama", "gpt2", "bert", "mixtral")
    for p in PRECISIONS
    for a in ("none", "all-linear")
    for c in ("none", "full")
]
ALONE += ACCUMULATED
QUANTIZED = [
    Case(family=f, adapter=a, precision=p, rows=r, length=n, recomputation=c, quantization=q)
    for f in ("llama", "qwen3", "gemma", "gpt2", "bert")
    for q in ("nf4", "int8")
    for p in PRECISIONS
    for a in ("all-linear", "some")
    for c in ("none", "full")
    for r, n in ((2, 16), (8, 32), (16, 48))
]
QUANTIZED += [
    Case(family=f, adapter="all-linear", precision=p, rows=r, length=n, recomputation=c, quantization="float8")
    for f in ("llama", "gemma", "bert")
    for p in PRECISIONS
    for c in ("none", "full")
    for r, n in ((2, 16), (8, 32))
]
ALONE += QUANTIZED
VARIANTS = [
    Case(family=f, adapter=a, precision=p, rows=r, length=n, recomputation=c, method=m)
    for f in ("llama", "qwen3", "gemma2", "phi3", "gpt2", "bert", "distilbert")
    for m in ("rslora", "dora")
    for p in PRECISIONS
    for a in ("all-linear", "some")
    for c in ("none", "full")
    for r, n in ((2, 16), (8, 32), (16, 48))
]
VARIANTS += [
    Case(family=f, adapter=a, precision=p, rows=r, length=n, recomputation=c, method=m)
    for f in ("llama", "qwen3", "gemma2", "phi3", "gpt2", "bert", "distilbert")
    for m, a in (
        ("vera", "all-linear"),
        ("vera", "some"),
        ("ia3", "all-linear"),
        ("oft", "all-linear"),
        ("oft", "some"),
        ("bottleneck", "all-linear"),
        ("prefix", "all-linear"),
    )
    if not (f == "gpt2" and m == "oft") and not (f in ENCODERS and m == "prefix")
    for p in PRECISIONS
    for c in ("none", "full")
    if not (f == "gpt2" and m == "prefix" and c == "full")
    for r, n in ((2, 16), (8, 32), (16, 48))
]
VARIANTS += [
    Case(family=f, adapter="all-linear", precision=p, recomputation=c, quantization=q, method=m)
    for m in ("oft", "bottleneck", "prefix")
    for f in ("llama", "gemma", "bert")
    if not (f in ENCODERS and m == "prefix")
    for q in ("nf4", "int8")
    for p in PRECISIONS
    for c in ("none", "full")
]
VARIANTS += [
    Case(family=f, adapter="all-linear", method="prefix", precision=p) for f in ("gemma3_text", "mixtral") for p in PRECISIONS
]
ALONE += VARIANTS
IDLE = [
    Case(family=f, precision=p, changes=WIDE, num_used=97, num_micro_batches=n)
    for f in ("llama", "gemma2", "bert", "gpt2", "distilbert")
    for p in PRECISIONS
    for n in (1, 2)
]
ALONE += IDLE
REPLICATED = [
    Case(family=f, adapter=a, precision=p, num_micro_batches=n, recomputation=c)
    for f in ("llama", "bert")
    for p in PRECISIONS
    for a in ("none", "all-linear")
    for c in ("none", "full")
    for n in (1, 2)
]
# With few tokens the update is the peak, or the backward pass of the embedding.
FEW_TOKENS = [
    Case(family=f, precision=p, rows=1, length=8, num_micro_batches=n, changes=v)
    for f in ("llama", "bert", "gpt2", "gemma2", "mixtral")
    for p in PRECISIONS
    for n in (1, 2)
    for v in ((), WIDE)
    if f not in ENCODERS or not v
]
REPLICATED += FEW_TOKENS
SHARDED = [
    Case(family=f, adapter=a, precision=p, rows=r, length=n, recomputation=c, changes=v)
    for f in DISTINCT
    for p in PRECISIONS
    for a in ("none", "all-linear")
    for r, n, c, v in (
        (8, 32, "none", ()),
        (8, 32, "full", ()),
        (2, 16, "none", ()),
        (4, 32, "none", (("vocab_size", 1000),)),
    )
]
SHARDED += [c for c in ACCUMULATED if c.recomputation == "none"]
# Where what FSDP2 gathers and reduces is the peak, and where it is not.
UNCOPIED = [
    Case(family=f, adapter=a, precision=p, rows=r, length=n, recomputation=c, changes=v)
    for f in ("llama", "gpt2")
    for p in PRECISIONS
    for a, r, n, c, v in (
        ("none", 1, 8, "none", (("vocab_size", 6000),)),
        ("none", 8, 32, "full", (("num_hidden_layers", 4),)),
        ("none", 8, 32, "none", ()),
        ("all-linear", 2, 16, "none", ()),
    )
]
SPLIT = [
    Case(family=f, adapter=a, precision=p, rows=r, length=n, recomputation=c, changes=v)
    for f in PLANS
    for p in PRECISIONS
    for a in ADAPTERS
    for c in ("none", "full")
    for r, n, v in ((8, 32, ()), (2, 16, ()), (4, 32, (("vocab_size", 1000),)))
]
SPLIT += [c for c in ACCUMULATED if c.family in PLANS]
SPLIT += [Case(family="llama", adapter=a, changes=(("attention_bias", True), ("mlp_bias", True))) for a in ("none", "all-linear")]
# Of the grids what a test run has time for: every family in every precision, every modelling file with every adapter and
# recomputation; on two ranks every kind of block, and either precision.
# Two and three of five: no pattern of the grids repeats after five.
_LEFT_OUT = {case for i, case in enumerate([*QUANTIZED, *VARIANTS, *HALF]) if i % 5 > 1}
ALONE_IN_SHORT = [
    c
    for c in ALONE
    if c.num_used is None
    and c not in _LEFT_OUT
    and ((c.rows == 8 and c.family in DISTINCT) or (c.rows == 16 and c.recomputation == c.adapter == "none"))
]
ALONE_IN_SHORT = [c for i, c in enumerate(ALONE_IN_SHORT) if i % 5 in (0, 2, 4) or c.rows == 16]
ALONE_IN_SHORT += [c for c in ALONE if c.length == 120 and c.adapter != "some" and c.recomputation == "none"]
_REPLICATED_IN_SHORT = (("llama", "fp32", 2), ("bert", "bf16", 1))
REPLICATED_IN_SHORT = [c for c in REPLICATED if (c.family, c.precision, c.num_micro_batches) in _REPLICATED_IN_SHORT]
REPLICATED_IN_SHORT += FEW_TOKENS[::5]
_SHARDED_IN_SHORT = {"llama": ("fp32", "bf16"), "bert": ("fp32",), "qwen3_moe": ("fp32",)}
_SHARDED_IN_SHORT |= dict.fromkeys(("gpt2", "gemma2", "mixtral"), ("bf16",))
_SHARDED = [c for c in SHARDED if c.precision in _SHARDED_IN_SHORT.get(c.family, ())]
SHARDED_IN_SHORT = [case for i, case in enumerate(_SHARDED) if i % 5 < 3]
SPLIT_IN_SHORT = [c for c in SPLIT if c.rows == 8 and c.adapter != "some" and (c.precision == "fp32" or c.family == "llama")]
SPLIT_IN_SHORT = [c for i, c in enumerate(SPLIT_IN_SHORT) if i % 5 in (0, 2, 4)]


class OnDevice(LiveBytes):
    """Counts what would be on a GPU whose weights are left to the host, on a machine where both are one."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(is_resized=True)
        self._shards: list[Any] = list(module.parameters())
        self._optimizer = optimizer

    def now(self) -> int:
        """See `LiveBytes`."""
        states = [value for state in self._optimizer.state.values() for value in state.values()]
        left: list[Any] = [*self._shards, *(p.grad for p in self._shards if p.grad is not None), *states]
        storages = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in left]
        return super().now() - sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def measured(case: Case, config: TrialConfig, world: World, num_steps: int | None = None) -> tuple[int, int]:
    """Return the peak of a step in bytes, and the parameters that train.

    Between ranks, gloo's threads let go of a collective's buffers some time after it, and in one step of about ten one more is there
    at the peak; so it is the smallest of several equal steps, the first of all left out, which has no optimizer state.
    """
    num_steps = num_steps or (2 if world.control_group is None else 7)
    used = None if case.num_used is None else np.arange(case.num_used)
    module = build(config, case.base(), world, used_tokens=used)
    module.train()
    batch = case.batch()
    trained = trainable(module)
    optimizer, exchange = make_optimizer(trained, config.recipe), GradientExchange(module)

    def step() -> None:
        for i in range(1, case.num_micro_batches + 1):
            with exchange.passing(is_last=i == case.num_micro_batches):
                with autocast(config, world):
                    loss = TrainingLoss(case.task)(module, batch)
                loss.backward()
                del loss
        sum_partial_gradients(trained.values(), summing(world.tensor_parallel(config.layout), None))
        update(optimizer, trained.values())
        exchange.end_step(optimizer)

    # To follow a step takes longer than the step, and the optimizer's state is there from the second on.
    step()
    is_here = config.layout.offload == "none"
    follower = LiveBytes(is_resized=isinstance(module, FSDPModule)) if is_here else OnDevice(module, optimizer)
    with follower as tensors:
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        for part in (*module.parameters(), *module.buffers(), *states, *gradients):
            tensors.hold(part)
        peaks = []
        for _ in range(num_steps - 1):
            tensors.peak = 0
            step()
            peaks.append(tensors.peak)
    return min(peaks), sum(p.numel() for p in trained.values())


def peaks_of_second_steps(world: World, cases: list[Case], strategy: str) -> list[int]:
    """Return the smallest peak of several second steps."""
    return [min(measured(c, c.config(world.world_size, strategy), world, num_steps=2)[0] for _ in range(4)) for c in cases]


def peaks_of(world: World, cases: list[Case], strategy: str) -> list[tuple[int, int]]:
    """Return what `measured` does of every case on the ranks of a world."""
    return [measured(case, case.config(world.world_size, strategy), world) for case in cases]


def error(case: Case, world_size: int, peak: int, strategy: str = "fsdp", *, is_on_gpu: bool = False) -> float:
    """Return the relative error of the prediction against a measured peak; several ranks share the model by the strategy."""
    plan = case.blueprint()
    num_targets = case.rows * (case.length - case.num_prompt if case.task == "causal-lm" else 1)
    config = case.config(world_size, strategy)
    return rank_memory(plan, config, case.length, num_targets, is_on_gpu=is_on_gpu).peak_bytes / peak - 1
