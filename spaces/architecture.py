"""A model's shape from the `config.json` that Hugging Face models carry, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes that FLOPs and limits follow from."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    causal: bool
    """Whether a token sees only the tokens before it: attention then costs half."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the usual names (BERT, Llama, Qwen, Mistral) and GPT-2's.

        Raises:
            KeyError: a size is under none of the known names.
        """

        def size(*names: str) -> int:
            for name in names:
                if config.get(name) is not None:
                    return int(config[name])
            raise KeyError(f"config.json has none of {', '.join(names)}")

        hidden, heads = size("hidden_size", "n_embd", "d_model", "dim"), size("num_attention_heads", "n_head", "n_heads")
        kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
        architectures = config.get("architectures") or []
        return cls(
            hidden_size=hidden,
            num_layers=size("num_hidden_layers", "n_layer", "n_layers"),
            num_heads=heads,
            num_kv_heads=int(kv_heads) if kv_heads is not None else heads,
            head_dim=int(head_dim) if head_dim is not None else hidden // heads,
            vocab_size=size("vocab_size"),
            causal=config.get("model_type") in {"gpt2"} or any("CausalLM" in a or "LMHead" in a for a in architectures),
        )
