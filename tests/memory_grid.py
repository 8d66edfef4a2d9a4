"""Trials whose memory is predicted and measured: the grid that a test checks and a benchmark prints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from families import NUM_LABELS, SOME_TARGETS, batch_of, config_of, make

from spaces.architecture import ModelShape
from spaces.blueprint import FAMILIES, Blueprint, blueprint
from spaces.config import Layout, Recipe, TrialConfig
from spaces.memory import rank_memory
from trainables.evaluation import summed_loss
from trainables.memory_meter import LiveBytes
from trainables.mesh import World
from trainables.model import BaseModel, build, trainable
from trainables.optim import make_optimizer
from trainables.parallelize import autocast

ENCODERS = {"bert", "roberta", "xlm-roberta", "distilbert"}
# Routed experts and attention that is written out keep what depends on the routing and on the square of the length.
WITHOUT_FORMULA = {"mixtral", "qwen3_moe", "gemma2"}
KNOWN = [f for f in FAMILIES if f not in WITHOUT_FORMULA]
RMS = [f for f in KNOWN if f not in ENCODERS | {"gpt2"}]
ADAPTERS = ("none", "all-linear", "some")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One trial whose memory is predicted and measured."""

    family: str
    adapter: str = "none"
    rows: int = 8
    length: int = 32
    num_prompt: int = 1
    precision: str = "fp32"
    recomputation: str = "none"
    changes: tuple[tuple[str, int], ...] = ()

    @property
    def task(self) -> str:
        return "sequence-classification" if self.family in ENCODERS else "causal-lm"

    def config(self, world_size: int, strategy: str = "ddp") -> TrialConfig:
        targets = {"none": None, "all-linear": ("all-linear",)}.get(self.adapter, SOME_TARGETS.get(self.family, ("q_proj", "v_proj")))
        recipe = Recipe(
            learning_rate=1e-3,
            global_batch_size=self.rows * world_size,
            dataset_fraction=1,
            epochs=1,
            warmup_fraction=0,
            weight_decay=0.01,
            precision=self.precision,  # type: ignore[arg-type]
            seed=0,
            adapter="lora" if targets else "none",
            adapter_rank=8 if targets else None,
            adapter_alpha=16.0 if targets else None,
            adapter_target_modules=targets,
        )
        layout = Layout(
            world_size=world_size,
            strategy=strategy,  # type: ignore[arg-type]
            micro_batch_size=self.rows,
            recomputation=self.recomputation,  # type: ignore[arg-type]
        )
        return TrialConfig(recipe=recipe, layout=layout)

    def base(self) -> BaseModel:
        module = make(self.family, self.task, **dict(self.changes))
        module.config.use_cache = False
        shape = ModelShape.from_config(config_of(module))
        return BaseModel(name="", revision=None, task=self.task, module=module, new_parameters=(), shape=shape)

    def blueprint(self) -> Blueprint:
        return blueprint(config_of(make(self.family, self.task, **dict(self.changes))), self.task, NUM_LABELS)  # type: ignore[arg-type]


ALONE = [Case(family=f, adapter=a, rows=r, length=n) for f in KNOWN for a in ADAPTERS for r, n in ((2, 16), (8, 32), (16, 48))]
ALONE += [Case(family=f, adapter=a, recomputation="full") for f in KNOWN for a in ("none", "all-linear")]
ALONE += [Case(family=f, adapter=a, precision="bf16", recomputation=r) for f in RMS for a in ADAPTERS for r in ("none", "full")]
ALONE += [Case(family=f, adapter=a, precision="bf16", rows=2, length=16) for f in RMS for a in ADAPTERS]
WIDE = (("vocab_size", 2000),)
ALONE += [
    Case(family=f, adapter=a, precision=p, num_prompt=24, changes=WIDE)
    for f, p in (("llama", "fp32"), ("llama", "bf16"), ("gpt2", "fp32"))
    for a in ("none", "all-linear")
]
SHARDED = [
    Case(family=f, adapter=a, precision=p, rows=r, length=n, recomputation=c, changes=v)
    for f, p in [(f, p) for f in ("llama", "qwen3", "phi3") for p in ("fp32", "bf16")] + [("bert", "fp32"), ("gpt2", "fp32")]
    for a in ("none", "all-linear")
    for r, n, c, v in (
        (8, 32, "none", ()),
        (8, 32, "full", ()),
        (2, 16, "none", ()),
        (4, 32, "none", (("vocab_size", 1000),)),
    )
]


def measured(case: Case, config: TrialConfig, world: World) -> tuple[int, int]:
    """Return the peak of two steps in bytes, and the parameters that train."""
    module = build(config, case.base(), world)
    module.train()
    ids = torch.randint(3, 97, (case.rows, case.length))
    batch = batch_of(case.task, ids, num_prompt=case.num_prompt)
    trained = trainable(module)
    optimizer = make_optimizer(trained, config.recipe)
    with LiveBytes() as tensors:
        for part in (*module.parameters(), *module.buffers()):
            tensors.hold(part)
        for _ in range(2):  # the optimizer's state is there from the second step on
            with autocast(config, world):
                loss = summed_loss(module, batch, case.task)[0]
            loss.backward()
            del loss
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return tensors.peak, sum(p.numel() for p in trained.values())


def peaks_of(world: World, cases: list[Case]) -> list[int]:
    return [measured(case, case.config(world.world_size, "fsdp"), world)[0] for case in cases]


def error(case: Case, world_size: int, peak: int) -> float:
    """Return the relative error of the prediction against a measured peak; several ranks share the model with FSDP2."""
    plan = case.blueprint()
    num_targets = case.rows * (case.length - case.num_prompt if case.task == "causal-lm" else 1)
    return rank_memory(plan, case.config(world_size, "fsdp"), case.length, num_targets).peak_bytes / peak - 1
