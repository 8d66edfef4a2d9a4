"""Predicted bytes against the tensors that really live in two steps of training."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import distributed
import pytest
import torch
from families import NUM_LABELS, SOME_TARGETS, config_of, make
from live import LiveBytes

from spaces.architecture import ModelShape
from spaces.blueprint import FAMILIES, Blueprint, blueprint
from spaces.config import Layout, Recipe, TrialConfig
from spaces.memory import num_trained, rank_memory
from trainables.adapters import add_lora
from trainables.batching import Batch
from trainables.evaluation import summed_loss
from trainables.mesh import World
from trainables.model import BaseModel, build, trainable
from trainables.optim import make_optimizer
from trainables.parallelize import autocast, parallelize

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
    precision: str = "fp32"
    recomputation: str = "none"
    changes: tuple[tuple[str, int], ...] = ()

    @property
    def task(self) -> str:
        return task_of(self.family)

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
    targets = ids if case.task == "causal-lm" else torch.arange(case.rows) % NUM_LABELS
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), targets=targets)
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


def check(errors: dict[Case, float], worst_allowed: float) -> None:
    assert statistics.median(map(abs, errors.values())) < 0.03
    worst = max(errors, key=lambda case: abs(errors[case]))
    assert abs(errors[worst]) < worst_allowed, f"{worst}: {errors[worst]:+.1%}"


def test_every_family_adapter_shape_and_precision_is_predicted() -> None:
    errors = {}
    for case in ALONE:
        config, plan = case.config(1), case.blueprint()
        peak, trained = measured(case, config, World.alone())
        assert trained == num_trained(plan, config.recipe), case
        errors[case] = rank_memory(plan, config, case.length).peak_bytes / peak - 1
    assert len(errors) >= 180
    check(errors, 0.06)


def test_sharded_layouts_are_predicted() -> None:
    peaks = distributed.run(2, peaks_of, SHARDED)[0]
    errors = {}
    for case, peak in zip(SHARDED, peaks, strict=True):
        errors[case] = rank_memory(case.blueprint(), case.config(2, "fsdp"), case.length).peak_bytes / peak - 1
    assert len(errors) >= 60
    check(errors, 0.12)


def task_of(family: str) -> str:
    return "sequence-classification" if family in ENCODERS else "causal-lm"


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
    for recomputation in ("none", "full"):
        config = Case(family="llama", adapter=adapter, recomputation=recomputation).config(1)
        module = make("llama", "causal-lm")
        if config.recipe.adapter == "lora":
            module = add_lora(module, config.recipe, "causal-lm", ())
        assert parallelize(module, config, World.alone()).is_gradient_checkpointing == (recomputation == "full")


@pytest.mark.parametrize("world_size", [1, 2])
def test_ddp_holds_every_gradient_twice(world_size: int) -> None:
    case = Case(family="llama", rows=2, length=16)
    plan = case.blueprint()
    memory = rank_memory(plan, case.config(world_size), case.length)
    assert memory.communication_bytes == (0 if world_size == 1 else 4 * plan.num_params)


def test_frozen_weights_are_held_in_the_precision_of_the_recipe() -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        case = Case(family="llama", adapter="all-linear", precision=precision)
        module = build(case.config(1), case.base(), World.alone())
        assert {p.dtype for p in module.parameters() if not p.requires_grad} == {dtype}
        assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
