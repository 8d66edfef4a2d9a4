from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from spaces.architecture import ModelShape, ShapeError

MINILM = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_attention_heads": 12,
    "num_hidden_layers": 6,
    "vocab_size": 30522,
}
QWEN3 = {  # its heads are wider than hidden_size / num_attention_heads
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 28,
    "vocab_size": 151936,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_inner": None,
    "vocab_size": 50257,
}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 768,
    "hidden_dim": 3072,
    "n_heads": 12,
    "n_layers": 6,
    "vocab_size": 30522,
}


def shape(config):
    s = ModelShape.from_config(config)
    return (
        s.hidden_size,
        s.num_layers,
        s.num_heads,
        s.num_kv_heads,
        s.head_dim,
        s.vocab_size,
        s.intermediate_size,
        s.causal,
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MINILM, (384, 6, 12, 12, 32, 30522, 1536, False)),
        (QWEN3, (1024, 28, 16, 8, 128, 151936, 3072, True)),
        (GPT2, (768, 12, 12, 12, 64, 50257, 3072, True)),
        (DISTILBERT, (768, 6, 12, 12, 64, 30522, 3072, False)),
        ({"architectures": ["GemmaForCausalLM"], "text_config": QWEN3}, (1024, 28, 16, 8, 128, 151936, 3072, True)),
        (QWEN3 | {"architectures": ["Qwen3ForSequenceClassification"]}, (1024, 28, 16, 8, 128, 151936, 3072, True)),
        (QWEN3 | {"model_type": "new", "architectures": ["NewForCausalLM"]}, (1024, 28, 16, 8, 128, 151936, 3072, True)),
        (MINILM | {"architectures": ["BertLMHeadModel"]}, (384, 6, 12, 12, 32, 30522, 1536, False)),
        (MINILM | {"model_type": "new", "architectures": ["NewModel"]}, (384, 6, 12, 12, 32, 30522, 1536, False)),
        (QWEN3 | {"head_dim": None}, (1024, 28, 16, 8, 64, 151936, 3072, True)),
    ],
)
def test_names_of_the_families(config, expected):
    assert shape(config) == expected


def test_stories260k(shared):
    config = json.loads((shared / "models/stories260k/hf/config.json").read_text())
    assert shape(config) == (64, 5, 8, 4, 8, 512, 172, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "none of the keys hidden_size, n_embd"),
        ({"vocab_size": "many"}, "vocab_size: not a size, got 'many'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: not a size, got 0"),
    ],
)
def test_a_config_without_sizes_is_refused_in_one_line(change, message):
    with pytest.raises(ShapeError, match=message) as caught:
        ModelShape.from_config(MINILM | change)
    assert "\n" not in str(caught.value)


SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 97}
FULL, WINDOWED = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("config", "num_windowed"),
    [
        ({"model_type": "llama"}, 0),
        ({"model_type": "mistral", "sliding_window": 16}, 4),
        ({"model_type": "mistral", "sliding_window": None}, 0),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False}, 0),
        ({"model_type": "gemma3_text", "sliding_window": 16, "layer_types": [WINDOWED, WINDOWED, WINDOWED, FULL]}, 3),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True, "layer_types": [FULL, FULL, FULL, WINDOWED]}, 1),
    ],
)
@pytest.mark.parametrize("length", [9, 16, 17, 100])
def test_attention_costs_what_the_tokens_in_sight_cost(config: dict, num_windowed: int, length: int) -> None:
    """Pair by pair, where a token counts itself half: so a triangle is half of its square."""
    shape = ModelShape.from_config({**SIZES, **config})
    pairs = 0.0
    for layer in range(4):
        window = 16 if layer < num_windowed else length
        pairs += sum(0.5 if key == query else 1.0 for query in range(length) for key in range(length) if 0 <= query - key < window)
        # At the far end of the window a token is counted half too: half of it is out of sight, on average.
        pairs -= 0.0 if window >= length else -0.5 * (length - window)
    assert shape.squared(length) * 4 / 2 == pytest.approx(pairs, abs=1e-6)
    assert shape.squared(np.array([length, length])).tolist() == [shape.squared(length)] * 2


def test_an_encoder_is_taken_without_windows() -> None:
    shape = ModelShape.from_config({**SIZES, "model_type": "modernbert", "sliding_window": 16, "layer_types": [WINDOWED] * 4})
    assert shape.squared(100) == 100**2


@pytest.mark.parametrize(
    ("config", "is_causal"),
    [
        ({"architectures": ["Gemma4ForConditionalGeneration"], "text_config": {**SIZES, "model_type": "gemma4_text"}}, True),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True, **SIZES, "model_type": "t5"}, False),
        ({"architectures": ["StableLmForCausalLM"], **SIZES, "model_type": "stablelm"}, True),
        ({"architectures": ["AlbertForMaskedLM"], **SIZES, "model_type": "albert"}, False),
        ({**SIZES, "model_type": "albert"}, False),
    ],
)
def test_of_a_family_that_is_not_known_the_head_tells_whether_it_is_a_decoder(config: dict, is_causal: bool) -> None:
    assert ModelShape.from_config(config).causal == is_causal


@pytest.mark.parametrize(
    ("layers", "is_counted"),
    [
        ({}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, True),
        ({"layer_types": ["full_attention", "linear_attention"]}, False),
        ({"layer_types": ["indexed_attention"]}, False),
        ({"layers_block_type": ["attention", "moe"]}, True),
        ({"layers_block_type": ["attention", "mamba"]}, False),
        ({"block_types": ["recurrent", "attention"]}, False),
        # Granite 4 without Mamba has its sizes all the same.
        ({"layer_types": ["attention"], "mamba_d_state": 64}, True),
        ({"mamba_d_state": 64}, False),
        ({"model_type": "xlstm"}, False),
    ],
)
def test_layers_that_keep_a_state_or_choose_what_they_attend_to_are_not_counted(layers: dict[str, Any], is_counted: bool) -> None:
    sizes = {"model_type": "some", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 9}
    assert ModelShape.from_config({**sizes, **layers}).is_counted is is_counted
