"""What a model's `config.json` tells before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from spaces.inputs import ModelSpec
from trainables.hub import ModelError, check_use

CAUSAL, CLASSIFIED = "causal-lm", "sequence-classification"


def check(config: dict[str, Any], task: str = CAUSAL) -> None:
    check_use(config, ModelSpec(name="org/name", task=task, max_length=16))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "task", "words"),
    [
        (
            {"model_type": "t5"},
            CAUSAL,
            r"model\.task: transformers has no causal-lm of org/name \(t5\); allowed: sequence-classification",
        ),
        ({"model_type": "qwen2_vl"}, CAUSAL, r"no causal-lm of org/name \(qwen2_vl\); allowed: a model that reads and writes text"),
        ({"model_type": "mamba"}, CLASSIFIED, r"no sequence-classification of org/name \(mamba\); allowed: causal-lm"),
        ({"model_type": "bert"}, CAUSAL, r"sees the tokens after a token too"),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            CAUSAL,
            r"model\.name: org/name holds weights in gptq, which cannot be trained; allowed: the model that it was made from",
        ),
        (
            {"model_type": "xlnet", "summary_type": "last"},
            CLASSIFIED,
            r"tells a class at the last position of a row, which is padding",
        ),
        (
            {"model_type": "llama", "pad_token_id": 97, "vocab_size": 97},
            CAUSAL,
            r"pad_token_id is 97, and vocab_size 97: there is none",
        ),
        ({"model_type": "llama", "max_position_embeddings": 8}, CAUSAL, r"model\.max_length: org/name has 8 positions, got 16"),
    ],
)
def test_what_cannot_be_used_is_one_line(config: dict[str, Any], task: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        check(config, task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "task"),
    [
        ({"model_type": "llama", "pad_token_id": 96, "vocab_size": 97}, CAUSAL),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, CAUSAL),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "max_position_embeddings": 32}}, CAUSAL),
        ({"model_type": "t5"}, CLASSIFIED),
        ({"model_type": "bert"}, CLASSIFIED),
        ({"model_type": "qwen3"}, CLASSIFIED),
    ],
)
def test_what_can_be_used_passes(config: dict[str, Any], task: str) -> None:
    check(config, task)
