"""Quantised bases against transformers' own loading, and against a plain model of the weights that they stand for."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from families import batch_of
from memory_grid import Case
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from spaces.quantization import is_quantized, packed_bytes
from trainables.first_tokens import end_at_first_tokens
from trainables.loss import TrainingLoss
from trainables.mesh import World
from trainables.meter import FlopWatch
from trainables.model import BaseModel, build, trainable
from trainables.optim import make_optimizer
from trainables.parallelize import autocast, recompute
from trainables.quantize import Float8Linear, Nf4Linear, QuantizedLinear, pack_linears

METHODS, PRECISIONS = ("nf4", "int8", "float8"), ("fp32", "bf16")
OF_BITSANDBYTES = ("nf4", "int8")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CLASSES = {"causal-lm": AutoModelForCausalLM, "sequence-classification": AutoModelForSequenceClassification}


def case(family: str, method: str, precision: str = "fp32", adapter: str = "all-linear", **changes: Any) -> Case:
    return Case(family=family, adapter=adapter, quantization=method, precision=precision, **changes)


def layers(module: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantised layers by their names without PEFT's."""
    found = {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt | Float8Linear)
    }
    return {name.removeprefix("base_model.model.").removesuffix(".base_layer"): part for name, part in found.items()}


def ids(rows: int = 4, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(1))


def loaded_by_transformers(directory: Path, trial: Case, module: nn.Module) -> nn.Module:
    """Return the model as users load it; the head is named, since transformers takes a classifier's for one more layer."""
    head = "lm_head" if trial.task == "causal-lm" else "classifier"
    dtype = DTYPES[trial.precision]
    if trial.quantization == "nf4":
        options: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    else:
        options = {"load_in_8bit": True}
    module.save_pretrained(directory)  # type: ignore[operator]
    quantization = BitsAndBytesConfig(**options, llm_int8_skip_modules=[head])
    return CLASSES[trial.task].from_pretrained(directory, dtype=dtype, quantization_config=quantization)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", OF_BITSANDBYTES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mixtral"])
def test_the_same_layers_hold_the_same_weights_and_give_the_same_results_as_transformers_own(
    tmp_path: Path, family: str, method: str, precision: str
) -> None:
    trial = case(family, method, precision)
    base = trial.base()
    theirs = loaded_by_transformers(tmp_path, trial, base.module)
    if trial.task == "sequence-classification":
        end_at_first_tokens(theirs)  # products of fewer rows are rounded otherwise
    ours = build(trial.config(1), base, World.alone())  # an adapter changes nothing before it is trained
    assert layers(ours).keys() == layers(theirs).keys()
    for name, layer in layers(theirs).items():
        assert torch.equal(layers(ours)[name].weight, layer.weight), name
    # In evaluation int8 multiplies int8, and their nf4 takes another kernel on some CPUs.
    for is_training in (True, False) if method == "int8" else (True,):
        results = []
        for model in (ours, theirs):
            model.train(is_training)
            with torch.no_grad(), autocast(trial.config(1), World.alone()):
                results.append(model(input_ids=ids()).logits)
        assert torch.equal(*results)


# What torchao 0.18 made of `WEIGHT` with `Float8WeightOnlyConfig()`: bytes by precision, and scales.
WEIGHT = [[0.75, -1.0, 0.3, 0.001, -0.0007, 0.0, 0.11, -0.62], [3.0, -0.2, 0.017, 5.5, -7.0, 1e-5, 0.9, 2.2]]
OF_TORCHAO = {
    "fp32": ([122, 254, 112, 46, 170, 0, 100, 249], 0.0022321429569274187),
    "bf16": ([123, 254, 112, 46, 170, 0, 100, 249], 0.002227783203125),
}
SECOND_ROW, SECOND_SCALE = [116, 213, 57, 123, 254, 0, 102, 113], 0.015625


@pytest.mark.parametrize("precision", PRECISIONS)
def test_float8_is_that_of_torchao(precision: str) -> None:
    module: Any = case("llama", "float8").base().module
    module.model.layers[0].mlp.up_proj.weight.data.zero_()[:2, :8] = torch.tensor(WEIGHT)
    packed = pack_linears(module, "float8", DTYPES[precision], torch.device("cpu"), ())["model.layers.0.mlp.up_proj"]
    first, scale = OF_TORCHAO[precision]
    assert packed.weight[:3, :8].tolist() == [first, SECOND_ROW, [0] * 8]
    assert not packed.weight[:, 8:].any()
    assert packed.scales.tolist()[:2] == [scale, SECOND_SCALE]


def test_float8_is_off_by_half_a_step_of_its_three_bits() -> None:
    """Below 2^-6 of the scale, steps are 2^-9 of it."""
    base = case("llama", "float8").base()
    for name, packed in pack_linears(base.module, "float8", torch.float32, torch.device("cpu"), ()).items():
        weight, scales = base.module.get_submodule(name).weight, packed.scales[:, None]
        error = (packed.weight.view(torch.float8_e4m3fn).float() * scales - weight).abs()
        assert (error <= torch.maximum(weight.abs() / 16, scales / 1024) * 1.0001).all(), name
        assert error.max() > 0


def test_a_product_in_float8_keeps_the_weight_as_it_is_held_and_no_input() -> None:
    module = build(case("llama", "float8").config(1), case("llama", "float8").base(), World.alone())
    layer = next(iter(layers(module).values()))
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(4, layer.in_features, requires_grad=True))
    assert {tensor.data_ptr() for tensor in kept} == {layer.weight.data_ptr(), layer.scales.data_ptr()}


def dequantized(trial: Case, base: BaseModel) -> BaseModel:
    """Return the base with plain layers of the weights that the quantised ones stand for."""
    module = copy.deepcopy(base.module)
    for name, layer in layers(build(trial.config(1), base, World.alone())).items():
        if isinstance(layer, Nf4Linear):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.quant_state)
        elif isinstance(layer, Float8Linear):
            weight = layer.weight.view(torch.float8_e4m3fn).float() * layer.scales[:, None]
        else:
            weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.scales)
        plain: Any = module.get_submodule(name)
        plain.weight.data = weight.float().T.contiguous() if isinstance(plain, Conv1D) else weight.float()
    return replace(base, module=module, _held={}, _packed={})


def trained(trial: Case, base: BaseModel, num_steps: int = 3) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses of some steps and the gradients of the last."""
    module = build(trial.config(1), base, World.alone())
    module.train()
    optimizer = make_optimizer(trainable(module), trial.config(1).recipe)
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        with autocast(trial.config(1), World.alone()):
            loss = TrainingLoss(trial.task)(module, batch_of(trial.task, ids()))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, {name: p.grad.clone() for name, p in trainable(module).items() if p.grad is not None}


def are_close(gradient: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(gradient, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("adapter", ["all-linear", "some"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt2", "bert"])
def test_losses_and_gradients_are_those_of_a_plain_model_of_the_dequantised_weights(family: str, adapter: str, method: str) -> None:
    trial = case(family, method, adapter=adapter)
    base = trial.base()
    losses, gradients = trained(trial, base)
    plain_losses, plain = trained(replace(trial, quantization="none"), dequantized(trial, base))
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-4), "nothing was learned"
    assert gradients.keys() == plain.keys()
    assert [name for name in gradients if not are_close(gradients[name], plain[name])] == []
    _, unquantised = trained(replace(trial, quantization="none"), base)
    assert not all(are_close(gradients[name], unquantised[name]) for name in gradients), "the comparison would be empty"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_bf16_and_recomputation_give_the_same_up_to_rounding(family: str, method: str) -> None:
    trial = case(family, method)
    losses, gradients = trained(trial, trial.base())
    again, gradients_again = trained(replace(trial, recomputation="full"), trial.base())
    assert again == losses
    assert all(torch.equal(gradient, gradients[name]) for name, gradient in gradients_again.items())
    rounded, _ = trained(replace(trial, precision="bf16"), trial.base())
    assert rounded == pytest.approx(losses, rel=1e-2)


def test_what_computes_in_bf16_is_held_so_and_what_trains_is_not() -> None:
    for precision, dtype in DTYPES.items():
        for method in METHODS:
            module = build(case("bert", method, precision).config(1), case("bert", method).base(), World.alone())
            frozen = {p.dtype for p in module.parameters() if not p.requires_grad}
            assert frozen == {dtype, torch.int8 if method == "int8" else torch.uint8}
            assert {p.dtype for p in trainable(module).values()} == {torch.float32}
            if method == "nf4":
                assert {layer.compute_dtype for layer in layers(module).values()} == {dtype}


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for layer in layers(module).values() for t in (layer.weight, layer.scales)}


@pytest.mark.parametrize("method", METHODS)
def test_trials_share_what_is_quantised_and_neither_training_nor_evaluation_changes_it(method: str) -> None:
    trial = case("llama", method)
    base = trial.base()
    first = build(trial.config(1), base, World.alone())
    before = {name: (layer.weight.clone(), layer.scales.clone()) for name, layer in layers(first).items()}
    for _ in range(2):
        losses, _ = trained(trial, base)
        first.eval()
        with torch.no_grad():
            first(input_ids=ids())
    assert trained(trial, base)[0] == losses, "the same seed gives the same trial"
    second = build(trial.config(1), base, World.alone())
    assert storages(first) == storages(second)
    for name, layer in layers(second).items():
        assert torch.equal(layer.weight, before[name][0])
        assert torch.equal(layer.scales, before[name][1])
    assert not {p.dtype for p in base.module.parameters()} - {torch.float32}, "the base is what it was"


def test_one_method_is_kept_at_a_time_and_full_fine_tuning_frees_it() -> None:
    base = case("llama", "nf4").base()
    for trial in (case("llama", "nf4"), case("llama", "int8"), case("llama", "int8", "bf16"), case("llama", "none")):
        build(trial.config(1), base, World.alone())
        assert [method for method, _, _ in base._packed] == [trial.quantization]
        assert len(base._held) == 1
    build(Case(family="llama").config(1), base, World.alone())
    assert not base._packed
    assert not base._held


def test_heads_and_what_the_pretrained_weights_lack_stay_as_they_are() -> None:
    trial = case("bert", "nf4")
    base = replace(trial.base(), new_parameters=("bert.pooler.dense.weight", "classifier.weight"))
    names = layers(build(trial.config(1), base, World.alone()))
    assert names
    assert not any("pooler" in name or "classifier" in name for name in names)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bert", "distilbert", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_a_blueprint_knows_which_layers_are_quantised_and_what_they_take(family: str, method: str) -> None:
    trial = case(family, method)
    found = layers(build(trial.config(1), trial.base(), World.alone()))
    plan, recipe = trial.blueprint(), trial.config(1).recipe
    matrices = [m for m in (*plan.block * plan.shape.num_layers, *plan.head) if is_quantized(m, recipe)]
    held = [layer.weight.nbytes + layer.scales.nbytes for layer in found.values()]
    assert sorted(held) == sorted(packed_bytes(m, recipe) for m in matrices)


@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize("adapter", ["all-linear", "some"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_model_flops_are_those_of_a_base_that_is_not_quantised(family: str, adapter: str, recomputation: str) -> None:
    counts = []
    for method in ("none", *METHODS):
        trial = case(family, method, adapter=adapter, recomputation=recomputation)
        base = trial.base()
        watch = FlopWatch(base.shape)
        module = build(trial.config(1), base, World.alone())
        recompute(module, trial.config(1).layout, watch.recomputation)
        module.train()
        batch = batch_of(trial.task, ids())
        with watch.forward(batch):
            loss = TrainingLoss(trial.task)(module, batch)
        loss.backward()
        counts.append(watch.flops())
    plain, *quantized = counts
    assert plain.model.per_token > 0
    # As one operation, LoRA's last product is computed again with the rest; apart, nothing needs it.
    plan, shape = trial.blueprint(), trial.blueprint().shape
    is_needed = recomputation == "none" or adapter == "some" or plan.is_last_result_needed or family == "gpt2"
    last = 0 if is_needed else 2 * 8 * shape.hidden_size * shape.num_layers
    for counted in quantized:
        assert counted.model == plain.model
        recomputed = replace(counted.recomputed, per_token=counted.recomputed.per_token + last)
        assert recomputed == plain.recomputed
