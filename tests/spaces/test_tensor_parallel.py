"""Which models are split how: the table against transformers' configurations, sizes against closed forms."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import CONFIG_MAPPING

from spaces.blueprint import FAMILIES, blueprint
from spaces.tensor_parallel import PLANS, left_over, local_blueprint

KNOWN_STYLES = {"colwise", "rowwise", "replicated_with_grad_allreduce"}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 160,
    "vocab_size": 97,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_transformers_plans(family):
    theirs = CONFIG_MAPPING[family].base_model_tp_plan
    if theirs is None or not set(theirs.values()) <= KNOWN_STYLES:
        assert family not in PLANS
    else:
        assert theirs == {f"layers.*.{part}": style for part, style in PLANS[family].items()}


def test_a_rank_has_its_share_of_every_matrix_and_all_of_the_rest():
    whole = blueprint({"model_type": "qwen3", **SIZES}, "causal-lm")
    local = local_blueprint(whole, 4)
    # Per layer: four projections of attention and three of the feed-forward, over four; normalisation of layers and heads.
    split = (2 * 64 * 8 * 16 + 2 * 64 * 4 * 16 + 3 * 64 * 160) // 4
    replicated = 2 * 64 + 2 * 16
    assert local.num_params == 3 * (split + replicated) + 64 + 2 * 97 * 64
    assert (local.shape.num_heads, local.shape.num_kv_heads, local.shape.hidden_size) == (2, 1, 64)
    assert local_blueprint(whole, 1) == whole
    without_plan = replace(whole, family="phi3")
    assert local_blueprint(without_plan, 4) == without_plan


def test_what_does_not_divide_is_named_with_its_size():
    whole = blueprint({"model_type": "llama", **SIZES}, "causal-lm")
    assert [left_over(whole, n) for n in (1, 2, 4)] == [{}] * 3
    assert left_over(whole, 8) == {"4 key-value heads": 4}
    assert left_over(whole, 3) == {"8 heads": 2, "4 key-value heads": 1, "160 inner features": 1}
