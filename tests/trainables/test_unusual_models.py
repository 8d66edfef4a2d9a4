"""Models that cannot do what a trial wants are told so in one line, before a step is trained."""

from __future__ import annotations

from typing import Any

import pytest
from families import make
from memory_grid import Case
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

from spaces.architecture import ModelShape, ShapeError
from spaces.blueprint import blueprint
from trainables.mesh import World
from trainables.model import BaseModel, build
from trainables.report import TrialError

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
SHAPE = ModelShape.from_config(SIZES)


def base_of(family: str, kind: Any, task: str, **sizes: Any) -> BaseModel:
    module = kind.from_config(CONFIG_MAPPING[family](**SIZES | sizes))
    return BaseModel(name="", revision=None, task=task, module=module, new_parameters=(), shape=SHAPE)


def build_of(base: BaseModel, **how: Any) -> Any:
    return build(Case(family="bert" if base.task != "causal-lm" else "llama", **how).config(1), base, World.alone())


@pytest.mark.parametrize(
    ("family", "sizes", "words"),
    [
        (
            "qwen3_next",
            {"num_experts": 2, "num_experts_per_tok": 1, "layer_types": ["linear_attention", "full_attention"]},
            "keep a state",
        ),
        ("mamba2", {"num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1}, r"keep a state or .* \(of Mamba\)"),
        ("gemma4_text", {"head_dim": 16, "global_head_dim": 32, "num_key_value_heads": 2}, "are of several widths"),
        ("deepseek_v3", {"n_routed_experts": 8, "first_k_dense_replace": 2}, "compress them"),
    ],
)
def test_layers_without_keys_and_values_of_one_width_take_no_prefix(family: str, sizes: dict[str, Any], words: str) -> None:
    base = base_of(family, AutoModelForCausalLM, "causal-lm", **sizes)
    with pytest.raises(TrialError, match=rf"space\.adapter: a prefix is keys and values of every layer: this model's {words}"):
        build_of(base, adapter="all-linear", method="prefix")


def test_what_transformers_cannot_compute_again_is_refused() -> None:
    base = base_of("albert", AutoModelForSequenceClassification, "sequence-classification", embedding_size=16)
    with pytest.raises(TrialError, match=r"space\.recomputation: transformers computes nothing of this model again; allowed: none"):
        build_of(base, recomputation="full")


def test_layers_of_a_model_s_own_kind_are_not_quantised_silently() -> None:
    """Falcon's."""
    module = make("falcon", "causal-lm")
    base = BaseModel(name="", revision=None, task="causal-lm", module=module, new_parameters=(), shape=SHAPE)
    with pytest.raises(
        TrialError, match=r"space\.quantization: nf4 packs linear layers of torch's own, of which this model has none"
    ):
        build_of(base, adapter="all-linear", quantization="nf4")


def test_routers_are_not_wrapped_and_what_peft_refuses_is_one_line() -> None:
    module = build_of(base_of("phimoe", AutoModelForCausalLM, "causal-lm", num_local_experts=2), adapter="all-linear")
    wrapped = [name for name, _ in module.named_modules() if name.endswith("lora_A")]
    assert wrapped
    assert not [name for name in wrapped if "router" in name or name.endswith("mlp.gate.lora_A")]
    base = base_of("mamba2", AutoModelForCausalLM, "causal-lm", num_heads=4, head_dim=32, state_size=8, n_groups=1)
    with pytest.raises(TrialError, match=r"space\.adapter: lora: .*out_proj"):
        build_of(base, adapter="all-linear")


def test_what_a_formula_does_not_hold_for_has_none() -> None:
    sizes = {**SIZES, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    blueprint(sizes, "causal-lm")
    for key, value in (("mlp_only_layers", [0]), ("decoder_sparse_step", 2)):
        with pytest.raises(ShapeError, match="of which some layers have no experts"):
            blueprint({**sizes, key: value}, "causal-lm")
    untied = make("gpt2", "causal-lm", tie_word_embeddings=False)
    assert blueprint(untied.config.to_dict(), "causal-lm").num_params == sum(p.numel() for p in untied.parameters())
