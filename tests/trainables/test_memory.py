"""Predicted bytes against the tensors that really live in two steps of training."""

from __future__ import annotations

import statistics

import pytest
import torch
from families import NUM_LABELS, SOME_TARGETS, config_of, make
from live import LiveBytes

from spaces.blueprint import FAMILIES, blueprint
from spaces.config import Layout, Recipe, TrialConfig
from spaces.memory import RankMemory, num_trained, rank_memory
from trainables.adapters import add_lora
from trainables.batching import Batch
from trainables.evaluation import summed_loss
from trainables.mesh import World
from trainables.optim import make_optimizer
from trainables.parallelize import parallelize

ENCODERS = {"bert", "roberta", "xlm-roberta", "distilbert"}
# Routed experts and attention that is written out keep what depends on the routing and on the square of the length.
WITHOUT_FORMULA = {"mixtral", "qwen3_moe", "gemma2"}
SHAPES = [(2, 16), (8, 32), (16, 48)]
KNOWN = [f for f in FAMILIES if f not in WITHOUT_FORMULA]
CASES = [(f, a, s, "none") for f in KNOWN for a in ("none", "all-linear", "some") for s in SHAPES]
CASES += [(f, a, (8, 32), "full") for f in KNOWN for a in ("none", "all-linear")]


def trial(family: str, adapter: str, rows: int, recomputation: str = "none") -> TrialConfig:
    targets = {"none": None, "all-linear": ("all-linear",)}.get(adapter, SOME_TARGETS.get(family, ("q_proj", "v_proj")))
    recipe = Recipe(
        learning_rate=1e-3,
        global_batch_size=rows,
        dataset_fraction=1,
        epochs=1,
        warmup_fraction=0,
        weight_decay=0.01,
        precision="fp32",
        seed=0,
        adapter="lora" if targets else "none",
        adapter_rank=8 if targets else None,
        adapter_alpha=16.0 if targets else None,
        adapter_target_modules=targets,
    )
    layout = Layout(world_size=1, strategy="ddp", micro_batch_size=rows, recomputation=recomputation)
    return TrialConfig(recipe=recipe, layout=layout)


def measured(family: str, config: TrialConfig, length: int) -> tuple[int, int, RankMemory]:
    """Return the peak of two steps in bytes, the parameters that train, and the prediction."""
    task = "sequence-classification" if family in ENCODERS else "causal-lm"
    module = make(family, task)
    predicted = rank_memory(blueprint(config_of(module), task, NUM_LABELS), config, length)
    if config.recipe.adapter == "lora":
        module = add_lora(module, config.recipe, task, ())
    module.config.use_cache = False
    module.train()
    if config.layout.recomputation == "full":
        module.gradient_checkpointing_enable({"use_reentrant": False})
    rows = config.layout.micro_batch_size
    ids = torch.randint(3, 97, (rows, length))
    targets = ids if task == "causal-lm" else torch.arange(rows) % NUM_LABELS
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), targets=targets)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(trained, config.recipe)
    with LiveBytes() as tensors:
        for part in (*module.parameters(), *module.buffers()):
            tensors.hold(part)
        for _ in range(2):  # the optimizer's state is there from the second step on
            loss = summed_loss(module, batch, task)[0]
            loss.backward()
            del loss
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return tensors.peak, sum(p.numel() for p in trained.values()), predicted


def test_every_family_adapter_and_shape_is_predicted() -> None:
    errors = {}
    for family, adapter, (rows, length), recomputation in CASES:
        config = trial(family, adapter, rows, recomputation)
        peak, trained, predicted = measured(family, config, length)
        plan = blueprint(config_of(make(family, task := task_of(family))), task, NUM_LABELS)
        assert trained == num_trained(plan, config.recipe), (family, adapter)
        errors[family, adapter, rows, recomputation] = predicted.peak_bytes / peak - 1
    assert len(errors) >= 120
    assert statistics.median(map(abs, errors.values())) < 0.03
    worst = max(errors, key=lambda case: abs(errors[case]))
    assert abs(errors[worst]) < 0.10, f"{worst}: {errors[worst]:+.1%}"


def task_of(family: str) -> str:
    return "sequence-classification" if family in ENCODERS else "causal-lm"


def test_a_wide_vocabulary_and_a_wide_layer_move_the_peak() -> None:
    """The three moments that can be the peak, each made the largest."""
    for family, changes in (
        ("llama", {"vocab_size": 4000}),
        ("llama", {"intermediate_size": 900}),
        ("bert", {"intermediate_size": 900}),
    ):
        config = trial(family, "none", 8)
        task = task_of(family)
        plan = blueprint(config_of(make(family, task, **changes)), task, NUM_LABELS)
        small = blueprint(config_of(make(family, task)), task, NUM_LABELS)
        assert rank_memory(plan, config, 32).peak_bytes > rank_memory(small, config, 32).peak_bytes
    tiny_batch = rank_memory(small, trial("bert", "none", 1), 4)
    assert tiny_batch.gradients_bytes > 0
    assert tiny_batch.activations_bytes == 0, "with one short row the optimizer step is the peak"


@pytest.mark.parametrize("adapter", ["none", "all-linear"])
def test_recomputation_is_switched_on_where_the_layout_says_so(adapter: str) -> None:
    for recomputation in ("none", "full"):
        config = trial("llama", adapter, 2, recomputation)
        module = make("llama", "causal-lm")
        if config.recipe.adapter == "lora":
            module = add_lora(module, config.recipe, "causal-lm", ())
        assert parallelize(module, config, World.alone()).is_gradient_checkpointing == (recomputation == "full")


@pytest.mark.parametrize("world_size", [1, 2])
def test_ddp_holds_every_gradient_twice(world_size: int) -> None:
    config = trial("llama", "none", 2)
    layout = Layout(world_size=world_size, strategy="ddp", micro_batch_size=2)
    plan = blueprint(config_of(make("llama", "causal-lm")), "causal-lm")
    memory = rank_memory(plan, TrialConfig(recipe=config.recipe, layout=layout), 16)
    assert memory.communication_bytes == (0 if world_size == 1 else 4 * plan.num_params)
