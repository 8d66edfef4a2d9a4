"""Counts of weights against the models that transformers builds."""

from __future__ import annotations

import re

import pytest
import torch
from families import NUM_LABELS, config_of, make
from torch import nn
from transformers.pytorch_utils import Conv1D

from spaces.architecture import ModelShape, ShapeError
from spaces.blueprint import FAMILIES, blueprint

ENCODERS = {"bert", "roberta", "xlm-roberta", "camembert", "distilbert"}
CASES = [(f, t) for f in FAMILIES for t in ("causal-lm", "sequence-classification") if not (f in ENCODERS and t == "causal-lm")]


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_weight_is_known(family, task):
    with torch.device("meta"):
        module = make(family, task)
    plan = blueprint(config_of(module), task, NUM_LABELS)
    assert plan.num_params == sum(p.numel() for p in module.parameters())
    theirs = sorted(
        (re.sub(r"\b\d+\b", "*", name), *(reversed(part.weight.shape) if isinstance(part, nn.Linear) else part.weight.shape))
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | Conv1D)
    )
    ours = [*plan.block * plan.shape.num_layers, *plan.head]
    assert sorted((m.name, m.num_inputs, m.num_outputs) for m in ours if m.is_module) == theirs


@pytest.mark.parametrize(("family", "task"), CASES)
def test_attention_is_causal_where_the_first_token_does_not_see_the_last(family, task):
    """Whatever the head, and in a `config.json` that names none."""
    module = make(family, task).eval()
    ids = torch.arange(3, 11)[None]
    changed = ids.clone()
    changed[0, -1] = 90
    with torch.no_grad():
        first, other = (module(x, output_hidden_states=True).hidden_states[-1][0, 0] for x in (ids, changed))
    is_causal = torch.allclose(first, other, rtol=0, atol=1e-6)
    for heads in ([type(module).__name__], [f"{family}Model"], None):
        assert ModelShape.from_config(config_of(module) | {"architectures": heads}).causal == is_causal


def test_public_shapes_have_their_public_sizes():
    """Llama 3 8B: https://huggingface.co/meta-llama/Meta-Llama-3-8B; Mixtral 8x7B: https://arxiv.org/abs/2401.04088."""
    llama = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    }
    assert blueprint(llama, "causal-lm").num_params == 8_030_261_248
    mixtral = llama | {"model_type": "mixtral", "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}
    plan = blueprint(mixtral, "causal-lm")
    assert plan.num_params == pytest.approx(46.7e9, rel=1e-3)
    active = plan.shape.num_layers * sum(m.num_weights for m in plan.block)
    assert active + plan.num_embedding_params + plan.num_head_params == pytest.approx(12.9e9, rel=1e-2)


def test_an_unknown_family_is_one_line():
    with pytest.raises(ShapeError, match=r"no formulas for 'mamba'; there are some for: bert, camembert, distil") as caught:
        blueprint({"model_type": "mamba"}, "causal-lm")
    assert "\n" not in str(caught.value)
