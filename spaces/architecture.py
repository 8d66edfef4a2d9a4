"""A model's shape from the `config.json` that Hugging Face models carry, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# By `model_type`; whatever the head, a decoder's attention is causal and an encoder's is not.
DECODERS = (
    *("llama", "smollm3", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("mixtral", "qwen3_moe", "gpt2"),
)
# What transformers calls layers with keys and values, of all that a token sees; and those that have no attention and no state.
ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
OTHERS_COUNTED = {"mlp", "moe", "dense", "sparse"}
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")


class ShapeError(ValueError):
    """A `config.json` lacks a size; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """The sizes that FLOPs and limits follow from."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Heads of keys and values; fewer than `num_heads` where queries share them."""
    head_dim: int
    vocab_size: int
    intermediate_size: int
    """Width of the feed-forward layers."""
    causal: bool
    """Whether a token sees only the tokens before it: attention then costs half."""
    window: int | None = None
    """Of a decoder, how many tokens a token sees at most, itself among them, in layers that see no more."""
    windowed_share: float = 0.0
    """Share of the layers that see no more."""
    is_counted: bool = True
    """Whether all is counted that its layers compute: not where some keep a state, as Mamba's, or choose what they attend to."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the usual names (BERT, Llama, Qwen, Mistral), and those of GPT-2, DistilBERT and T5.

        The text part counts where a model also sees or hears.

        Raises:
            ShapeError: a size is under none of the known names, or is no positive integer.
        """
        text = config.get("text_config")
        sizes: Mapping[str, Any] = text if isinstance(text, Mapping) else config
        hidden_size = _size(sizes, "hidden_size", "n_embd", "d_model", "dim")
        num_heads = _size(sizes, "num_attention_heads", "n_head", "n_heads", "num_heads")
        return cls(
            hidden_size=hidden_size,
            num_layers=_size(sizes, "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
            num_heads=num_heads,
            num_kv_heads=_size(sizes, "num_key_value_heads", default=num_heads),
            head_dim=_size(sizes, "head_dim", "d_kv", default=hidden_size // num_heads),
            vocab_size=_size(sizes, "vocab_size"),
            # GPT-2 leaves its `n_inner` null for four times the width.
            intermediate_size=_size(sizes, "intermediate_size", "n_inner", "hidden_dim", "d_ff", "ffn_dim", default=4 * hidden_size),
            causal=_is_causal(str(sizes.get("model_type")), config),
            window=window_of(sizes),
            windowed_share=_windowed_share(sizes),
            is_counted=not unusual_layers(sizes),
        )

    def squared(self, lengths: Any) -> Any:
        """Return what attention's cost grows with, of rows of these lengths (a number or an array): in all, their squares.

        Beyond a window of w tokens a row of length L has (L - w)² less: causal attention's triangle L² / 2 lacks that of the tokens
        which are out of sight.
        """
        if self.window is None or not self.causal:
            return lengths**2
        beyond = (lengths - self.window) * (lengths > self.window)
        return lengths**2 - self.windowed_share * beyond**2


def window_of(sizes: Mapping[str, Any]) -> int | None:
    """Return how many tokens a token sees at most, in some layers at least; None: all before it."""
    window = sizes.get("sliding_window") if sizes.get("use_sliding_window", True) else None
    return window if isinstance(window, int) and window > 0 else None


def unusual_layers(sizes: Mapping[str, Any]) -> str:
    """Return the kinds of layers that keep a state or choose what they attend to, in words; nothing where all attend to all."""
    kinds = {kind for name in ("layer_types", "layers_block_type", "block_types") for kind in sizes.get(name) or ()}
    if kinds:
        return ", ".join(sorted(kinds - ATTENTIONS - OTHERS_COUNTED))
    is_recurrent = any(key.startswith(("mamba_", "ssm_")) or key == "state_size" for key in sizes)
    return "of Mamba" if is_recurrent else str(sizes["model_type"]) if sizes.get("model_type") in ("xlstm", "rwkv") else ""


def _windowed_share(sizes: Mapping[str, Any]) -> float:
    """Return the share of layers that see a window alone: all, unless the layers' kinds are listed."""
    kinds = sizes.get("layer_types") or ["sliding_attention"]
    return kinds.count("sliding_attention") / len(kinds) if window_of(sizes) is not None else 0.0


def _is_causal(family: str, config: Mapping[str, Any]) -> bool:
    """Return whether a family is a decoder; of one that is not known the heads tell that it was saved or is loaded with."""
    if family in DECODERS or family in ENCODERS:
        return family in DECODERS
    # Of a model that sees beside reading; one with an encoder of text too has the same name.
    heads = ("CausalLM", "LMHead") if config.get("is_encoder_decoder") else ("CausalLM", "LMHead", "ConditionalGeneration")
    return any(head in a for head in heads for a in config.get("architectures") or [])


def _size(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ShapeError(f"config.json: {name}: not a size, got {value!r}; allowed: an integer at least 1")
        return value
    if default is None:
        raise ShapeError(f"config.json: none of the keys {', '.join(names)} is there; got: {', '.join(sorted(config))}")
    return default
