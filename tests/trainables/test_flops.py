"""FLOPs against `FlopCounterMode`, which counts what torch really dispatches."""

from __future__ import annotations

import pytest
import torch
from families import config_of, make
from flop_grid import CASES, ENCODERS, STACKED, counted, make_batch, make_model, targets_of, task_of, total, trial

from spaces.adapters import is_wrapped
from spaces.blueprint import FAMILIES, blueprint
from spaces.flops import (
    AttentionUse,
    LinearUse,
    StepFlops,
    attention_products,
    flops_of_blueprint,
    recomputed_flops_of_blueprint,
)
from spaces.hardware import DEVICES, device_of_cuda_name, peak_flops_per_second
from trainables.device import device_peak

ROWS, LENGTH = 3, 24


@pytest.mark.parametrize(("family", "task", "adapter"), CASES)
def test_the_formula_is_what_torch_computes(family: str, task: str, adapter: str) -> None:
    module, plan = make_model(family, task)
    lengths, config = [LENGTH] * ROWS, trial(targets_of(family, adapter))
    batch = make_batch(task, lengths)
    theirs, seen = counted(module, task, batch, config)
    for ours in (seen.model, flops_of_blueprint(plan, config.recipe)):
        assert total(ours, lengths, family, len(batch.targets)) == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("method", ["rslora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_variants_of_lora_cost_what_it_costs(family: str, method: str) -> None:
    """What DoRA multiplies out for its norms, once however many tokens there are, is no model FLOPs."""
    task = task_of(family)
    module, plan = make_model(family, task)
    lengths, config = [LENGTH] * ROWS, trial(("all-linear",), method=method)
    batch = make_batch(task, lengths)
    theirs, seen = counted(module, task, batch, config)
    rank = config.recipe.adapter_rank or 0
    wrapped = [m for m in (*plan.block * plan.shape.num_layers, *plan.head) if is_wrapped(m, config.recipe)]
    products = sum(2 * rank * m.num_inputs * m.num_outputs for m in wrapped) if method == "dora" else 0
    for ours in (seen.model, flops_of_blueprint(plan, config.recipe)):
        assert total(ours, lengths, family, len(batch.targets)) == pytest.approx(theirs - products, rel=0.01)


@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "distilbert", "phi3", "mixtral"])
def test_rotations_cost_what_their_blocks_cost(family: str, recomputation: str) -> None:
    """The series that OFT's rotations come from, once however many tokens there are, is no model FLOPs."""
    task = task_of(family)
    module, plan = make_model(family, task)
    lengths, config = [LENGTH] * ROWS, trial(("all-linear",), recomputation, "oft")
    batch = make_batch(task, lengths)
    theirs, seen = counted(module, task, batch, config, is_hardware=True)
    wrapped = [m for m in (*plan.block * plan.shape.num_layers, *plan.head) if is_wrapped(m, config.recipe)]
    size = config.recipe.adapter_rank or 0
    # Three products of blocks, each with two gradients.
    series = sum((9 + 3 * (recomputation == "full")) * 2 * m.num_inputs * size**2 for m in wrapped)
    planned = StepFlops(model=flops_of_blueprint(plan, config.recipe), recomputed=recomputed_flops_of_blueprint(plan, config))
    for ours in (seen, planned):
        parts = [total(part, lengths, family, len(batch.targets)) for part in (ours.model, ours.recomputed)]
        assert sum(parts) == pytest.approx(theirs - series, rel=0.01)


@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method)
        for family in ("llama", "qwen3", "gpt2", "bert", "distilbert", "phi3", "mixtral")
        for method in ("vera", "ia3", "bottleneck")
        if not (family in STACKED and method == "bottleneck")
    ],
)
def test_vectors_and_bottlenecks_need_no_gradients_of_matrices(family: str, method: str, recomputation: str) -> None:
    task = task_of(family)
    module, plan = make_model(family, task)
    lengths, config = [LENGTH] * ROWS, trial(("all-linear",), recomputation, method)
    batch = make_batch(task, lengths)
    theirs, seen = counted(module, task, batch, config, is_hardware=True)
    planned = StepFlops(model=flops_of_blueprint(plan, config.recipe), recomputed=recomputed_flops_of_blueprint(plan, config))
    for ours in (seen, planned):
        hardware = total(ours.model, lengths, family, len(batch.targets)) + total(
            ours.recomputed, lengths, family, len(batch.targets)
        )
        assert hardware == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize(
    ("family", "recomputation"),
    [
        *((f, r) for f in ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "mixtral") for r in ("none", "full")),
        ("gpt2", "none"),
    ],
)
def test_a_prefix_costs_its_scores_alone(family: str, recomputation: str) -> None:
    """Every token sees all of it, so that no mask halves its scores."""
    module, plan = make_model(family, "causal-lm")
    lengths, config = [LENGTH] * ROWS, trial(("all-linear",), recomputation, "prefix")
    batch = make_batch("causal-lm", lengths)
    theirs, seen = counted(module, "causal-lm", batch, config, is_hardware=True)
    planned = StepFlops(model=flops_of_blueprint(plan, config.recipe), recomputed=recomputed_flops_of_blueprint(plan, config))
    for ours in (seen, planned):
        parts = [total(part, lengths, family, len(batch.targets)) for part in (ours.model, ours.recomputed)]
        assert sum(parts) == pytest.approx(theirs, rel=0.01)


def checked_hardware_flops(family: str, task: str, adapter: str, recomputation: str) -> list[tuple[float, float]]:
    """Hold model and recomputed FLOPs, seen and planned, together against torch's count; return both, each apart."""
    module, plan = make_model(family, task)
    lengths, config = [LENGTH] * ROWS, trial(targets_of(family, adapter), recomputation)
    batch = make_batch(task, lengths)
    theirs, seen = counted(module, task, batch, config, is_hardware=True)
    planned = StepFlops(model=flops_of_blueprint(plan, config.recipe), recomputed=recomputed_flops_of_blueprint(plan, config))
    found = []
    for ours in (seen, planned):
        model, recomputed = (total(part, lengths, family, len(batch.targets)) for part in (ours.model, ours.recomputed))
        assert model + recomputed == pytest.approx(theirs, rel=0.01)
        found.append((model, recomputed))
    return found


@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize(("family", "task", "adapter"), CASES)
def test_hardware_flops_are_all_that_torch_computes(family: str, task: str, adapter: str, recomputation: str) -> None:
    for model, recomputed in checked_hardware_flops(family, task, adapter, recomputation):
        assert (recomputed > 0.1 * model) == (recomputation == "full")


@pytest.mark.parametrize(
    ("family", "adapter"),
    [*((f, a) for f in ("llama", "gemma2", "gpt2", "bert") for a in ("none", "all-linear")), ("mixtral", "none")],
)
def test_every_other_block_is_computed_again(family: str, adapter: str) -> None:
    """The first and the last of three."""
    half, full = (checked_hardware_flops(family, task_of(family), adapter, recomputation) for recomputation in ("half", "full"))
    for (_, of_two), (_, of_three) in zip(half, full, strict=True):
        assert of_two < 0.85 * of_three


@pytest.mark.parametrize("targets", [("down_proj",), ("o_proj",), ("k_proj", "up_proj")])
def test_nothing_below_the_first_trained_weight_is_differentiated(targets: tuple[str, ...]) -> None:
    module = make("llama", "causal-lm", tie_word_embeddings=True)
    plan = blueprint(config_of(module), "causal-lm")
    batch = make_batch("causal-lm", [LENGTH] * ROWS)
    config = trial(targets)
    theirs, seen = counted(module, "causal-lm", batch, config)
    for ours in (seen.model, flops_of_blueprint(plan, config.recipe)):
        assert total(ours, [LENGTH] * ROWS, "llama", len(batch.targets)) == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_grouped_experts_cost_what_experts_one_by_one_cost(family: str) -> None:
    counts = []
    for implementation in ("eager", "grouped_mm"):
        module = make(family, "causal-lm")
        module.set_experts_implementation(implementation)
        counts.append(counted(module, "causal-lm", make_batch("causal-lm", [LENGTH] * ROWS), trial(None))[1].model)
    assert counts[0].per_token == pytest.approx(counts[1].per_token, rel=1e-6)


@pytest.mark.parametrize("is_hardware", [False, True])
@pytest.mark.parametrize(
    ("family", "task"), [("llama", "causal-lm"), ("llama", "sequence-classification"), ("bert", "sequence-classification")]
)
def test_rows_of_unequal_length_cost_what_each_costs_alone(family: str, task: str, is_hardware: bool) -> None:
    """What is seen of a padded batch counts no padding; with it counted, it is what torch computes."""
    lengths = [24, 17, 6]
    module, _ = make_model(family, task)
    config = trial(None, "full" if is_hardware else "none")
    alone = sum(counted(module, task, make_batch(task, [n]), config, is_hardware=is_hardware)[0] for n in lengths)
    batch = make_batch(task, lengths)
    padded, seen = counted(module, task, batch, config, is_hardware=is_hardware)
    assert padded > 1.4 * alone
    for theirs, counts in ((alone, lengths), (padded, [24] * 3)):
        ours = sum(total(part, counts, family, len(batch.targets)) for part in (seen.model, seen.recomputed)[: 1 + is_hardware])
        assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ENCODERS | STACKED])
@pytest.mark.parametrize("targets", [None, ("all-linear",)])
def test_the_head_costs_what_its_targets_cost(family: str, targets: tuple[str, ...] | None) -> None:
    module = make(family, "causal-lm", vocab_size=500)
    plan = blueprint(config_of(module), "causal-lm")
    lengths, batch, config = [LENGTH] * ROWS, make_batch("causal-lm", [LENGTH] * ROWS, num_prompt=20), trial(targets)
    theirs, seen = counted(module, "causal-lm", batch, config)
    for ours in (seen.model, flops_of_blueprint(plan, config.recipe)):
        assert total(ours, lengths, family, 4 * ROWS) == pytest.approx(theirs, rel=0.01)


def test_products_that_a_model_writes_out_by_hand_are_counted() -> None:
    """Falcon's layers multiply with `@`."""
    module = make("falcon", "causal-lm")
    batch, config = make_batch("causal-lm", [LENGTH] * ROWS), trial(None)
    theirs, seen = counted(module, "causal-lm", batch, config)
    assert total(seen.model, [LENGTH] * ROWS, "falcon", len(batch.targets)) == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("targets", [None, ("all-linear",), ("q_b_proj",)])
@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_keys_and_values_of_other_widths_cost_what_each_is_wide(recomputation: str, targets: tuple[str, ...] | None) -> None:
    """DeepSeek's: its keys are compressed, with a part for the positions."""
    ranks = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "head_dim": 8, "qk_nope_head_dim": 32, "v_head_dim": 12}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 3}
    module = make("deepseek_v3", "causal-lm", num_attention_heads=4, num_key_value_heads=4, **ranks, **experts)
    lengths, batch = [LENGTH] * ROWS, make_batch("causal-lm", [LENGTH] * ROWS)
    theirs, seen = counted(module, "causal-lm", batch, trial(targets, recomputation), is_hardware=recomputation == "full")
    parts = [total(part, lengths, "deepseek_v3", len(batch.targets)) for part in (seen.model, seen.recomputed)]
    assert sum(parts[: 1 + (recomputation == "full")]) == pytest.approx(theirs, rel=0.01)
    assert seen.is_whole


def test_of_layers_that_keep_a_state_not_all_is_counted() -> None:
    module = make("mamba", "causal-lm")
    assert not counted(module, "causal-lm", make_batch("causal-lm", [LENGTH]), trial(None))[1].is_whole


def test_causal_attention_costs_half_and_a_frozen_weight_four() -> None:
    width = 2 * sum(attention_products(True, True, True)) * 8
    whole = AttentionUse(width=width, num_heads=4, causal=False)
    half = AttentionUse(width=width, num_heads=4, causal=True)
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
