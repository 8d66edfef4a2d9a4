"""Small random models of every family that `spaces.blueprint` knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from trainables.batching import Batch

NUM_LABELS = 5
SOME_TARGETS = {
    "gpt2": ("c_attn",),
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "camembert": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "phi3": ("o_proj",),
}
_DECODER = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {k: _DECODER[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 97,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "distilbert": {"vocab_size": 97, "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 160},
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert"), _ENCODER),
    "falcon": {k: v for k, v in _DECODER.items() if k not in ("head_dim", "num_key_value_heads", "intermediate_size")},
    "mixtral": {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}
_CLASSES = {"causal-lm": AutoModelForCausalLM, "sequence-classification": AutoModelForSequenceClassification}


def make(family: str, task: str, **changes: Any) -> nn.Module:
    """Return a model with random weights."""
    set_seed(0)
    config = CONFIG_MAPPING[family](**{**_SIZES.get(family, _DECODER), **changes})
    config.num_labels = NUM_LABELS
    for key, value in config.to_dict().items():
        if ("drop" in key or key.endswith("_pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    return _CLASSES[task].from_config(config)


def config_of(module: Any) -> dict[str, Any]:
    """Return the `config.json` that the model would be saved with."""
    return {**module.config.to_dict(), "architectures": [type(module).__name__]}


def batch_of(task: str, ids: torch.Tensor, lengths: list[int] | None = None, num_prompt: int = 1) -> Batch:
    """Return rows as a batch: of text every token behind the prompt is a target, of a class every row.

    Args:
        ids: int64 (rows, length), padded at the right.
        lengths: real tokens of every row.
        num_prompt: tokens of a row that are given; at least one is.
    """
    real = torch.arange(ids.shape[1])[None] < torch.tensor(lengths or [ids.shape[1]] * len(ids))[:, None]
    if task == "causal-lm":
        counts = real.clone()
        counts[:, :num_prompt] = False
        positions, targets = counts.flatten().nonzero()[:, 0] - 1, ids[counts]
    else:
        positions = torch.arange(len(ids))
        targets = positions % NUM_LABELS
    return Batch(input_ids=ids, attention_mask=real.long(), positions=positions, targets=targets)
