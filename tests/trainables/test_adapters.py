"""What LoRA and its variants compute, and what trains beside them."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import NUM_LABELS, config_of, make
from memory_grid import Case
from peft.tuners.ia3 import IA3Layer
from peft.tuners.lora import Linear, LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.oft import OFTLayer
from peft.tuners.oft.layer import OFTRotationModule
from peft.tuners.vera import VeraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from spaces.blueprint import blueprint
from spaces.config import Recipe
from spaces.memory import num_trained
from trainables.adapters import LeanLinear, add_adapter
from trainables.bottleneck import Bottleneck, parts
from trainables.mesh import World
from trainables.model import build, trainable
from trainables.optim import make_optimizer
from trainables.parallelize import autocast
from trainables.report import TrialError


def recipe(*targets: str) -> Recipe:
    return Recipe(
        learning_rate=1e-3,
        global_batch_size=1,
        dataset_fraction=1,
        epochs=1,
        warmup_fraction=0,
        weight_decay=0,
        precision="fp32",
        seed=0,
        adapter="lora",
        adapter_rank=4,
        adapter_alpha=8,
        adapter_target_modules=targets,
    )


@pytest.mark.parametrize(
    ("family", "new", "whole"),
    [
        ("bert", ("classifier.weight", "classifier.bias"), {"classifier"}),
        ("bert", ("bert.pooler.dense.weight", "classifier.weight"), {"bert.pooler.dense", "classifier"}),
        ("distilbert", ("pre_classifier.weight", "classifier.weight"), {"pre_classifier", "classifier"}),
        ("distilbert", (), {"pre_classifier", "classifier"}),
        ("roberta", ("classifier.dense.weight", "classifier.out_proj.weight"), {"classifier.dense", "classifier.out_proj"}),
        ("llama", ("score.weight",), {"score"}),
    ],
)
def test_heads_and_new_weights_train_whole_and_nothing_else_does(family: str, new: tuple[str, ...], whole: set[str]) -> None:
    module = add_adapter(make(family, "sequence-classification"), recipe("all-linear"), "sequence-classification", new)
    trained = {name for name, p in module.named_parameters() if p.requires_grad and "lora_" not in name}
    plain = {n.removeprefix("base_model.model.").replace("modules_to_save.default.", "").rpartition(".")[0] for n in trained}
    assert plain == whole
    wrapped = [name for name, part in module.named_modules() if isinstance(part, LoraLayer)]
    assert wrapped
    assert not any(name.removeprefix("base_model.model.").startswith(tuple(whole)) for name in wrapped)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("gpt2", ("attn.c_proj",)),
        ("gpt2", ("mlp.c_proj",)),
        ("gpt2", ("c_proj",)),
        ("gpt2", ("mlp.c_proj", "c_attn")),
        ("bert", ("dense",)),
        ("bert", ("output.dense",)),
        ("bert", ("attention.output.dense",)),
        ("distilbert", ("attention.q_lin", "ffn.lin2")),
        ("llama", ("self_attn.q_proj", "down_proj")),
        ("llama", tuple(f"model.layers.{i}.mlp.up_proj" for i in range(3))),
    ],
)
def test_the_blueprint_counts_what_peft_wraps(family: str, targets: tuple[str, ...]) -> None:
    task = "sequence-classification"
    module, trial = make(family, task), recipe(*targets)
    plan = blueprint(config_of(module), task, NUM_LABELS)
    module = add_adapter(module, trial, task, ())
    assert num_trained(plan, trial) == sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_a_target_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(TrialError, match=r"no module 'q_prj'; there are: .*; did you mean 'q_proj'\?"):
        add_adapter(make("llama", "causal-lm"), recipe("q_prj"), "causal-lm", ())


@pytest.mark.parametrize(("family", "quantization"), [("llama", "none"), ("llama", "nf4"), ("gpt2", "none"), ("bert", "none")])
def test_dora_computes_what_peft_computes(family: str, quantization: str) -> None:
    case = Case(family=family, adapter="all-linear", quantization=quantization, method="dora")
    module: Any = build(case.config(1), case.base(), World.alone()).eval()
    layers = [part for part in module.modules() if isinstance(part, LoraLayer)]
    for layer in (layers[0], layers[-1]):
        norms, a, b = (layer.lora_magnitude_vector["default"].weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        x = torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(0), requires_grad=True)
        torch.nn.init.normal_(b)
        with torch.no_grad():
            norms.mul_(1.5)
        if layer.base_layer.bias is not None:  # else zeros, which no scale would change
            torch.nn.init.normal_(layer.base_layer.bias)
        found = []
        for variant in (layer.lora_variant["default"], DoraLinearVariant()):
            layer.lora_variant["default"] = variant
            result = layer(x)
            found.append((result, *torch.autograd.grad(result.square().sum(), (x, norms, a, b))))
        for ours, peft in zip(*found, strict=True):
            torch.testing.assert_close(ours, peft, rtol=1e-3, atol=1e-4 * float(peft.abs().max()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("family", "shape"), [("llama", (2, 5)), ("bert", (7,)), ("llama", (0,))])
def test_lora_as_one_operation_computes_what_peft_computes(family: str, shape: tuple[int, ...], precision: str) -> None:
    case = Case(family=family, adapter="all-linear", precision=precision)
    config = case.config(1)
    module: Any = build(config, case.base(), World.alone()).eval()
    layers = [part for part in module.modules() if isinstance(part, LoraLayer)]
    assert {type(layer) for layer in layers} == {LeanLinear}
    for layer, needs_grad in ((layers[0], False), (layers[3], True), (layers[-1], True)):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.nn.init.normal_(b)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        x = torch.randn(*shape, a.shape[1], generator=torch.Generator().manual_seed(0), dtype=dtype, requires_grad=needs_grad)
        inputs = (x, a, b) if needs_grad else (a, b)
        found = []
        for kind in (LeanLinear, Linear):
            layer.__class__ = kind
            layer.lora_variant.clear()  # PEFT's own way
            with autocast(config, World.alone()):
                result = layer(x)
            found.append((result, *torch.autograd.grad(result.float().square().sum(), inputs)))
        for ours, peft in zip(*found, strict=True):
            assert (ours.shape, ours.dtype) == (peft.shape, peft.dtype)
            tolerance = 2e-2 if precision == "bf16" else 1e-5
            largest = float(peft.detach().abs().max()) if peft.numel() else 0.0
            torch.testing.assert_close(ours, peft, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_is_the_formula_of_its_paper_and_computes_what_peft_computes(family: str, quantization: str) -> None:
    """Equation 3 of arXiv 2106.09685: W x + (alpha / r) B A x; its gradients are those of PEFT, which scales the result."""
    case = Case(family=family, adapter="all-linear", quantization=quantization)
    module: Any = build(case.config(1), case.base(), World.alone()).eval()
    layers = [part for part in module.modules() if isinstance(part, LoraLayer)]
    for layer in (layers[0], layers[-1]):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        x = torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(b)
        scale = case.config(1).recipe.adapter_alpha / case.config(1).recipe.adapter_rank
        result = layer(x)
        torch.testing.assert_close(result, layer.base_layer(x) + scale * (x @ a.T @ b.T), rtol=1e-4, atol=1e-4)
        ours = torch.autograd.grad(result.square().sum(), (a, b))
        del layer.lora_variant["default"]
        peft = layer(x)
        torch.testing.assert_close(result, peft, rtol=1e-4, atol=1e-4)
        for gradient, expected in zip(ours, torch.autograd.grad(peft.square().sum(), (a, b)), strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("safe_merge", [False, True])
def test_what_lora_adds_can_be_merged_and_taken_out_again(safe_merge: bool) -> None:
    case = Case(family="llama", adapter="all-linear")
    module: Any = build(case.config(1), case.base(), World.alone()).eval()
    layer = next(part for part in module.modules() if isinstance(part, LoraLayer))
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    plain, expected = layer.base_layer(x).detach(), layer(x).detach()
    assert (expected - plain).norm() > 0.1
    layer.merge(safe_merge=safe_merge)
    torch.testing.assert_close(layer.base_layer(x).detach(), expected, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer(x).detach(), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_dora_is_the_formula_of_its_paper(quantization: str) -> None:
    """Equation 5 of arXiv 2402.09353: m (W + B A) / |W + B A|, row by row, which at first is W."""
    base = Case(family="llama", adapter="all-linear", quantization=quantization, method="dora")
    module: Any = build(base.config(1), base.base(), World.alone())
    layer = module.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    weight = dequantize_module_weight(layer.base_layer).detach().clone()
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ weight.T, **tolerance)
        layer.lora_B["default"].weight.normal_()
        layer.lora_magnitude_vector["default"].weight.mul_(1.5)
        summed = weight + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        norms = layer.lora_magnitude_vector["default"].weight
        expected = x @ (norms[:, None] * summed / summed.norm(dim=1, keepdim=True)).T
        torch.testing.assert_close(layer(x), expected, **tolerance)


def test_dora_over_a_quantised_base_stays_in_the_format_of_the_model_where_peft_leaves_it_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under CUDA's autocast, of which alone PEFT asks, nothing casts the result back."""
    case = Case(family="llama", adapter="all-linear", quantization="nf4", method="dora", precision="bf16")
    module: Any = build(case.config(1), case.base(), World.alone())
    layer = module.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: asked(*kind) if kind else True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 3, 64, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_rslora_is_lora_with_a_scale_of_alpha_over_the_root_of_the_rank() -> None:
    module: Any = add_adapter(make("llama", "causal-lm"), replace(recipe("up_proj"), adapter="rslora"), "causal-lm", ())
    layer = module.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert layer.scaling["default"] == pytest.approx(8 / 4**0.5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_vera_is_the_formula_of_its_paper(family: str) -> None:
    """Equation 2 of arXiv 2310.11454: W x + b * (B (d * (A x))) with factors that all layers share; at first that is W x."""
    case = Case(family=family, adapter="all-linear", method="vera")
    module: Any = build(case.config(1), case.base(), World.alone()).eval()
    layers = [part for part in module.modules() if isinstance(part, VeraLayer)]
    assert len({id(layer.vera_A["default"]) for layer in layers}) == 1
    for layer in (layers[0], layers[-1]):
        weight, bias = layer.get_base_layer().weight.detach(), layer.get_base_layer().bias
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
        plain = x @ weight.T + (0 if bias is None else bias.detach())
        with torch.no_grad():
            torch.testing.assert_close(layer(x), plain)
            layer.vera_lambda_b["default"].normal_()
            a = layer.vera_A["default"][:, : weight.shape[1]]
            b = layer.vera_B["default"][: weight.shape[0]]
            added = layer.vera_lambda_b["default"] * ((layer.vera_lambda_d["default"] * (x @ a.T)) @ b.T)
            torch.testing.assert_close(layer(x), plain + added)
            assert added.norm() > 0.1
    trained = {name.rsplit(".", 2)[-2] for name in trainable(module) if "vera" in name}
    assert trained == {"vera_lambda_b", "vera_lambda_d"}


@pytest.mark.parametrize(
    ("family", "scaled"),
    [
        ("llama", {"k_proj": False, "v_proj": False, "down_proj": True}),
        ("bert", {"key": False, "value": False, "dense": True}),
        ("distilbert", {"k_lin": False, "v_lin": False, "lin2": True}),
        ("gpt2", {"c_attn": False, "c_proj": True}),
        ("phi3", {"qkv_proj": False, "down_proj": True}),
    ],
)
def test_ia3_scales_keys_values_and_the_inner_width(family: str, scaled: dict[str, bool]) -> None:
    """Section 3.3 of arXiv 2205.05638; where keys and values come from one matrix with the queries, these too."""
    case = Case(family=family, adapter="all-linear", method="ia3")
    module: Any = build(case.config(1), case.base(), World.alone()).eval()
    layers = {name: part for name, part in module.named_modules() if isinstance(part, IA3Layer)}
    assert {name.rsplit(".", 1)[-1]: layer.is_feedforward for name, layer in layers.items()} == scaled
    assert len(layers) == len(scaled) * case.blueprint().shape.num_layers, "an attention's output is none of them"
    for layer in list(layers.values())[: len(scaled)]:
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            plain = layer.get_base_layer()(x)
            torch.testing.assert_close(layer(x), plain)
            vector = layer.ia3_l["default"].normal_().flatten()
            expected = layer.get_base_layer()(x * vector) if layer.is_feedforward else plain * vector
            torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_oft_is_the_formula_of_its_paper_and_computes_what_peft_computes(family: str, quantization: str) -> None:
    """Equation 2 of arXiv 2506.19847: W (R x) with R of blocks (I + Q)(I - Q)^-1, Q skew-symmetric; at first that is W x."""
    case = Case(family=family, adapter="all-linear", quantization=quantization, method="oft")
    module: Any = build(case.config(1), case.base(), World.alone()).eval()
    layers = [part for part in module.modules() if isinstance(part, OFTLayer)]
    for layer in (layers[0], layers[-1]):
        rotation, base = layer.oft_R["default"], layer.get_base_layer()
        num_blocks, size = layer.r["default"], layer.oft_block_size["default"]
        assert size == case.config(1).recipe.adapter_rank
        x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
        torch.testing.assert_close(layer(x), base(x), rtol=1e-4, atol=1e-5)
        torch.nn.init.normal_(rotation.weight, std=0.02)  # small: the series is cut off after five terms
        skew = torch.zeros(num_blocks, size, size)
        skew[:, *torch.triu_indices(size, size, 1)] = rotation.weight.detach()
        skew = skew - skew.mT
        exact = (torch.eye(size) + skew) @ torch.linalg.inv(torch.eye(size) - skew)
        torch.testing.assert_close(exact @ exact.mT, torch.eye(size).expand_as(exact))
        result = layer(x)
        torch.testing.assert_close(
            result, base(x @ torch.block_diag(*exact)), rtol=1e-3, atol=2e-2 if quantization == "int8" else 1e-3
        )
        assert (result - base(x)).norm() > 0.05 * base(x).norm()
        ours = (result, *torch.autograd.grad(result.square().sum(), (x, rotation.weight)))
        rotation.__class__ = OFTRotationModule
        theirs = layer(x)
        for mine, peft in zip(ours, (theirs, *torch.autograd.grad(theirs.square().sum(), (x, rotation.weight))), strict=True):
            torch.testing.assert_close(mine, peft, rtol=1e-3, atol=1e-3 * float(peft.detach().abs().max()))


@pytest.mark.parametrize(("family", "quantization"), [("llama", "none"), ("llama", "nf4"), ("gpt2", "none"), ("bert", "int8")])
def test_a_bottleneck_is_behind_the_feed_forward_of_every_block(family: str, quantization: str) -> None:
    """Equation of section 2.1 of arXiv 1902.00751, at the place of arXiv 2005.00247; at first the model is what it was."""
    case = Case(family=family, adapter="all-linear", quantization=quantization, method="bottleneck")
    base = case.base()
    module: Any = build(case.config(1), base, World.alone()).eval()
    adapters = {name: part for name, part in module.named_modules() if isinstance(part, Bottleneck)}
    assert len(adapters) == case.blueprint().shape.num_layers
    last = case.blueprint().feed_forward_out[0].name
    assert {re.sub(r"\.\d+\.", ".*.", name) for name in adapters} == {last}
    if quantization == "none":
        ids = torch.randint(3, 97, (2, 9))
        with torch.no_grad():
            torch.testing.assert_close(module(input_ids=ids).logits, base.module.eval()(input_ids=ids).logits)
    adapter = list(adapters.values())[-1]
    x = torch.randn(3, case.blueprint().feed_forward_out[0].num_inputs)
    with torch.no_grad():
        for parameter in (*adapter.down.parameters(), *adapter.up.parameters()):
            parameter.normal_()
        h = adapter.base_layer(x)
        inner = (h @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
        torch.testing.assert_close(adapter(x), h + inner @ adapter.up.weight.T + adapter.up.bias)
    heads = {"bert": {"classifier.weight", "classifier.bias"}}.get(family, set())
    assert trainable(module).keys() - {f"{part}.{p}" for part in parts(module) for p in ("weight", "bias")} == heads


def test_bottlenecks_of_a_seed_are_the_same() -> None:
    case = Case(family="llama", adapter="all-linear", method="bottleneck")
    first, again = (trainable(build(case.config(1), case.base(), World.alone())) for _ in range(2))
    assert all(torch.equal(p, again[name]) for name, p in first.items())


def test_scales_do_not_decay() -> None:
    case = Case(family="bert", adapter="all-linear", method="ia3")
    optimizer = make_optimizer(trainable(build(case.config(1), case.base(), World.alone())), case.config(1).recipe)
    decayed = [p.shape for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]]
    assert all(min(shape) > 1 for shape in decayed)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("ia3", "ia3 scales layers of these names, of which this model has none"),
        ("bottleneck", "bottlenecks are behind one layer a block of these names, which this model has not"),
    ],
)
def test_a_model_without_layers_that_an_adapter_knows_says_so(adapter: Any, words: str) -> None:
    module = nn.Sequential(nn.Linear(4, 4))
    trial = replace(recipe(), adapter=adapter, adapter_rank=None)
    with pytest.raises(TrialError, match=words):
        add_adapter(module, trial, "causal-lm", ())
