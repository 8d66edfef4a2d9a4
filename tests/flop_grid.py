"""Steps whose FLOPs are predicted and counted: the grid that a test checks and a benchmark prints."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from families import NUM_LABELS, SOME_TARGETS, batch_of, config_of, make
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from spaces.adapters import num_prefix_tokens
from spaces.architecture import ModelShape
from spaces.blueprint import FAMILIES, Blueprint, blueprint
from spaces.config import IA3_RESULTS, LAST_PRODUCTS, Layout, Recipe, TrialConfig
from spaces.flops import StepFlops, TrainingFlops
from trainables.adapters import add_adapter
from trainables.batching import Batch
from trainables.first_tokens import end_at_first_tokens
from trainables.loss import TrainingLoss
from trainables.mesh import World
from trainables.meter import FlopWatch
from trainables.parallelize import parallelize, recompute

ENCODERS = {"bert", "roberta", "xlm-roberta", "camembert", "distilbert"}
# Around stacked experts PEFT's all-linear adds the whole product of its two matrices to the weight: an overhead, no model FLOPs.
STACKED = {"mixtral", "qwen3_moe"}
CLASSIFIERS = ("llama", "qwen2", "qwen3", "gemma2", "mixtral", "gpt2")


def task_of(family: str) -> str:
    return "sequence-classification" if family in ENCODERS else "causal-lm"


CASES = [
    (f, t, a)
    for f, t in [*((f, task_of(f)) for f in FAMILIES), *((f, "sequence-classification") for f in CLASSIFIERS)]
    for a in ("none", "all-linear", "some")
    if not (f in STACKED and a == "all-linear")
]


def targets_of(family: str, adapter: str) -> tuple[str, ...] | None:
    return {"none": None, "all-linear": ("all-linear",)}.get(adapter, SOME_TARGETS.get(family, ("q_proj", "v_proj")))


def trial(targets: tuple[str, ...] | None, recomputation: str = "none", method: str = "lora") -> TrialConfig:
    targets = {"ia3": (*IA3_RESULTS, *LAST_PRODUCTS), "bottleneck": LAST_PRODUCTS}.get(method, targets)
    own = None if method == "prefix" else targets
    recipe = Recipe(
        learning_rate=1,
        global_batch_size=1,
        dataset_fraction=1,
        epochs=1,
        warmup_fraction=0,
        weight_decay=0,
        precision="fp32",
        seed=0,
        adapter=method if targets else "none",  # type: ignore[arg-type]
        adapter_rank=None if method == "ia3" else 4,
        adapter_alpha=8,
        adapter_target_modules=own,
    )
    layout = Layout(world_size=1, strategy="ddp", micro_batch_size=1, recomputation=recomputation)  # type: ignore[arg-type]
    return TrialConfig(recipe=recipe, layout=layout)


def make_model(family: str, task: str) -> tuple[nn.Module, Blueprint]:
    """Return a model whose products the counter knows all, and its blueprint."""
    module: Any = make(family, task)
    if family in STACKED:
        module.set_experts_implementation("eager")  # the counter does not know grouped products
    return module, blueprint(config_of(module), task, NUM_LABELS)  # type: ignore[arg-type]


def make_batch(task: str, lengths: list[int], num_prompt: int = 1) -> Batch:
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    return batch_of(task, ids, lengths, num_prompt)


def flash_attention(query: list[int], key: list[int], value: list[int], *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def flash_attention_backward(grad: list[int], query: list[int], key: list[int], value: list[int], *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# What training really takes on a CPU, counted as torch counts the kernels of GPUs: five products backward, the scores once more.
FLASH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_attention_backward,
}


def counted(module: nn.Module, task: str, batch: Batch, config: TrialConfig, *, is_hardware: bool = False) -> tuple[float, StepFlops]:
    """Return torch's own count of one forward and backward pass, and what is seen of it.

    Args:
        module: without an adapter; it is changed.
        is_hardware: with the attention kernel that training takes, which computes its scores twice. It is not in the counter's
            table: else the mathematical one is taken, which computes the model's products and no more.
    """
    watch = FlopWatch(ModelShape.from_config(config_of(module)), num_prefix_tokens(config.recipe))
    if task == "sequence-classification":
        end_at_first_tokens(module)
    if config.recipe.adapter != "none":
        module = add_adapter(module, config.recipe, task, ())
    module = parallelize(module, config, World.alone())
    recompute(module, config.layout, watch.recomputation)
    module.train()
    counter = FlopCounterMode(display=False, custom_mapping=FLASH)
    with nullcontext() if is_hardware else sdpa_kernel(SDPBackend.MATH), counter:
        with watch.forward(batch):
            loss = TrainingLoss(task)(module, batch)
        loss.backward()
    return float(counter.get_total_flops()), watch.flops()


def total(flops: TrainingFlops, lengths: list[int], family: str, num_targets: int) -> float:
    """Return all FLOPs in torch's convention, which does not halve the causal attention of a decoder."""
    squares = sum(n**2 for n in lengths) * (1 if family in ENCODERS else 2)
    return flops.total(num_tokens=sum(lengths), num_targets=num_targets, sum_of_squared_lengths=squares)
