"""FLOPs against `FlopCounterMode`, which counts what torch really dispatches."""

from __future__ import annotations

import pytest
import torch
from families import NUM_LABELS, SOME_TARGETS, batch_of, config_of, make
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from spaces.architecture import ModelShape
from spaces.blueprint import FAMILIES, blueprint
from spaces.config import Layout, Recipe, TrialConfig
from spaces.flops import (
    AttentionUse,
    LinearUse,
    StepFlops,
    TrainingFlops,
    attention_products,
    flops_of_blueprint,
    recomputed_flops_of_blueprint,
)
from spaces.hardware import DEVICES, device_of_cuda_name, peak_flops_per_second
from trainables.adapters import add_lora
from trainables.batching import Batch
from trainables.device import device_peak
from trainables.evaluation import summed_loss
from trainables.mesh import World
from trainables.meter import FlopWatch
from trainables.parallelize import parallelize

ROWS, LENGTH = 3, 24
ENCODERS = {"bert", "roberta", "xlm-roberta", "distilbert"}


def task_of(family: str) -> str:
    return "sequence-classification" if family in ENCODERS else "causal-lm"


def recipe(targets: tuple[str, ...] | None) -> Recipe:
    return Recipe(
        learning_rate=1,
        global_batch_size=1,
        dataset_fraction=1,
        epochs=1,
        warmup_fraction=0,
        weight_decay=0,
        precision="fp32",
        seed=0,
        adapter="lora" if targets else "none",
        adapter_rank=4,
        adapter_alpha=8,
        adapter_target_modules=targets,
    )


def make_batch(task: str, lengths: list[int], num_prompt: int = 1) -> Batch:
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    return batch_of(task, ids, lengths, num_prompt)


def counted(module: torch.nn.Module, task: str, batch: Batch) -> tuple[float, TrainingFlops]:
    """Return torch's own count of one forward and backward pass, and our model FLOPs."""
    # The default attention kernel of the CPU is not in the counter's table: the mathematical one is.
    with sdpa_kernel(SDPBackend.MATH):
        theirs, ours = one_step(module, task, batch, watch_of(module), FlopCounterMode(display=False))
    return theirs, ours.model


def watch_of(module: torch.nn.Module) -> FlopWatch:
    return FlopWatch(ModelShape.from_config(config_of(module.base_model.model if hasattr(module, "peft_config") else module)))


def one_step(module: torch.nn.Module, task: str, batch: Batch, watch: FlopWatch, counter: FlopCounterMode) -> tuple[float, StepFlops]:
    with counter:
        with watch.forward(batch):
            loss, _ = summed_loss(module, batch, task)
        loss.backward()
    return counter.get_total_flops(), watch.flops()


def total(flops: TrainingFlops, lengths: list[int], causal: bool, num_targets: int | None = None) -> float:
    """Return all FLOPs in torch's convention, which does not halve causal attention."""
    squares = sum(n**2 for n in lengths) * (2 if causal else 1)
    if num_targets is None:
        num_targets = sum(n - 1 for n in lengths) if causal else len(lengths)
    return flops.total(num_tokens=sum(lengths), num_targets=num_targets, sum_of_squared_lengths=squares)


# Around stacked experts PEFT's all-linear adds the whole product of its two matrices to the weight: an overhead, no model FLOPs.
STACKED = {"mixtral", "qwen3_moe"}
CASES = [(f, a) for f in FAMILIES for a in ("none", "all-linear", "some") if not (f in STACKED and a == "all-linear")]


@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_the_formula_is_what_torch_computes(family: str, adapter: str) -> None:
    task = task_of(family)
    targets = {"none": None, "all-linear": ("all-linear",)}.get(adapter, SOME_TARGETS.get(family, ("q_proj", "v_proj")))
    module = make(family, task)
    if hasattr(module.config, "num_experts_per_tok"):
        module.set_experts_implementation("eager")  # the counter does not know grouped products
    plan = blueprint(config_of(module), task, NUM_LABELS)  # type: ignore[arg-type]
    trial = recipe(targets)
    if targets:
        module = add_lora(module, trial, task, ())
    lengths = [LENGTH] * ROWS
    theirs, measured = counted(module, task, make_batch(task, lengths))
    for ours in (measured, flops_of_blueprint(plan, trial)):
        assert total(ours, lengths, plan.shape.causal) == pytest.approx(theirs, rel=0.01)


def flash_attention(query: list[int], key: list[int], value: list[int], *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def flash_attention_backward(grad: list[int], query: list[int], key: list[int], value: list[int], *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# What training really takes on a CPU, counted as torch counts the kernels of GPUs: five products backward, the scores once more.
FLASH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flash_attention_backward,
}


@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_hardware_flops_are_all_that_torch_computes(family: str, adapter: str, recomputation: str) -> None:
    task = task_of(family)
    targets = {"none": None, "all-linear": ("all-linear",)}.get(adapter, SOME_TARGETS.get(family, ("q_proj", "v_proj")))
    module = make(family, task)
    plan = blueprint(config_of(module), task, NUM_LABELS)  # type: ignore[arg-type]
    causal = plan.shape.causal
    if hasattr(module.config, "num_experts_per_tok"):
        module.set_experts_implementation("eager")
    if targets:
        module = add_lora(module, recipe(targets), task, ())
    watch = watch_of(module)
    layout = Layout(world_size=1, strategy="ddp", micro_batch_size=ROWS, recomputation=recomputation)  # type: ignore[arg-type]
    config = TrialConfig(recipe=recipe(targets), layout=layout)
    module = parallelize(module, config, World.alone(), watch.recomputation)
    module.train()
    lengths = [LENGTH] * ROWS
    counter = FlopCounterMode(display=False, custom_mapping=FLASH)
    theirs, ours = one_step(module, task, make_batch(task, lengths), watch, counter)
    model, recomputed = (total(part, lengths, causal) for part in (ours.model, ours.recomputed))
    assert model + recomputed == pytest.approx(theirs, rel=0.01)
    assert (recomputed > 0.1 * model) == (recomputation == "full")
    planned = total(recomputed_flops_of_blueprint(plan, config), lengths, causal)
    # On the scale of the whole: the last small product of an adapter is not always seen.
    assert model + planned == pytest.approx(theirs, rel=0.02)


@pytest.mark.parametrize("targets", [("down_proj",), ("o_proj",), ("k_proj", "up_proj")])
def test_nothing_below_the_first_trained_weight_is_differentiated(targets: tuple[str, ...]) -> None:
    module = make("llama", "causal-lm", tie_word_embeddings=True)
    plan = blueprint(config_of(module), "causal-lm")
    theirs, measured = counted(
        add_lora(module, recipe(targets), "causal-lm", ()), "causal-lm", make_batch("causal-lm", [LENGTH] * ROWS)
    )
    for ours in (measured, flops_of_blueprint(plan, recipe(targets))):
        assert total(ours, [LENGTH] * ROWS, causal=True) == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_grouped_experts_cost_what_experts_one_by_one_cost(family: str) -> None:
    counts = []
    for implementation in ("eager", "grouped_mm"):
        module = make(family, "causal-lm")
        module.set_experts_implementation(implementation)
        counts.append(counted(module, "causal-lm", make_batch("causal-lm", [LENGTH] * ROWS))[1])
    assert counts[0].per_token == pytest.approx(counts[1].per_token, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_rows_of_unequal_length_cost_what_each_costs_alone(family: str) -> None:
    task, lengths = task_of(family), [24, 17, 6]
    module = make(family, task)
    causal = task == "causal-lm"
    alone = sum(counted(module, task, make_batch(task, [n]))[0] for n in lengths)
    padded, ours = counted(module, task, make_batch(task, lengths))
    assert total(ours, lengths, causal) == pytest.approx(alone, rel=0.01)
    num_targets = len(make_batch(task, lengths).targets)
    costs = total(ours, [24] * 3, causal, num_targets)
    assert costs == pytest.approx(padded, rel=0.01), "the padded pass costs what padded rows cost, but for its targets"


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ENCODERS | STACKED])
@pytest.mark.parametrize("targets", [None, ("all-linear",)])
def test_the_head_costs_what_its_targets_cost(family: str, targets: tuple[str, ...] | None) -> None:
    module = make(family, "causal-lm", vocab_size=500)
    plan = blueprint(config_of(module), "causal-lm")
    if targets:
        module = add_lora(module, recipe(targets), "causal-lm", ())
    lengths, batch = [LENGTH] * ROWS, make_batch("causal-lm", [LENGTH] * ROWS, num_prompt=20)
    theirs, measured = counted(module, "causal-lm", batch)
    for ours in (measured, flops_of_blueprint(plan, recipe(targets))):
        assert total(ours, lengths, causal=True, num_targets=4 * ROWS) == pytest.approx(theirs, rel=0.01)


def test_causal_attention_costs_half_and_a_frozen_weight_four() -> None:
    products = 2 * attention_products(True, True, True)
    whole = AttentionUse(num_products=products, num_heads=4, head_dim=8, causal=False)
    half = AttentionUse(num_products=products, num_heads=4, head_dim=8, causal=True)
    assert half.flops == whole.flops / 2 == 12 * 2 * 4 * 8 / 2
    assert LinearUse(num_weights=10, per="token", input_needs_grad=True, weight_needs_grad=False).flops == 4 * 10


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756.0e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312.0e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA L4", 121.0e12),
        ("NVIDIA H20", 148.0e12),
        ("NVIDIA A100 80GB PCIe", 312.0e12),
        ("NVIDIA L40", 181.05e12),
        ("NVIDIA A10", 125.0e12),
        ("NVIDIA A10G", 70.0e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("AMD Instinct MI300X", 1307.4e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10-24Q", None),
        ("Tesla T4", None),
        ("NVIDIA GeForce RTX 9999", None),
    ],
)
def test_a_device_has_its_own_peak_or_none(name: str, bf16: float | None) -> None:
    assert peak_flops_per_second(name, "bf16") == bf16


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Tesla T4", "no bf16 peak known for Tesla T4"),
        ("Tesla V100-SXM2-16GB", "no bf16 peak known for Tesla V100-SXM2-16GB"),
        ("NVIDIA GeForce RTX 9999", "unknown device NVIDIA GeForce RTX 9999"),
    ],
)
def test_a_trial_without_a_peak_says_whether_the_device_is_unknown_or_only_its_peak(
    monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert device_peak(torch.device("cuda"), "bf16") == (None, reason)
    is_known = not reason.startswith("unknown")
    fp32, source = device_peak(torch.device("cuda"), "fp32")
    assert (fp32 is not None, source) == (is_known, "data_sheet" if is_known else reason)


@pytest.mark.parametrize(
    ("cuda_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb-pcie"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-32GB", "v100-32gb-sxm"),
        ("Tesla V100-SXM2-16GB", "v100-16gb-sxm"),
    ],
)
def test_one_marketing_name_is_several_devices(cuda_name: str, name: str) -> None:
    device = device_of_cuda_name(cuda_name)
    assert device is not None
    assert device.name == name


def test_a_row_of_the_table_is_in_itself_plausible() -> None:
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    for device in DEVICES:
        peaks = device.tera_flops_per_second
        assert peaks["fp32"] <= peaks["fp16"], device.name
        assert peaks.get("bf16", peaks["fp16"]) == peaks["fp16"], device.name
        if "fp8" in peaks:
            assert peaks["fp8"] == pytest.approx(2 * peaks["bf16"], rel=0.02), device.name
        if "tf32" in peaks:
            assert peaks["tf32"] == pytest.approx(peaks["bf16"] / 2, rel=0.02), device.name
        assert device.source.startswith("https://")
