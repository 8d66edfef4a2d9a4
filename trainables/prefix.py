"""Prefix tuning: keys and values of each attention that train, before those of every row.

(Li and Liang 2021, https://arxiv.org/abs/2101.00190, without the network that makes a prefix while it trains.) The parameter, its
initial values, its files, and the positions behind it are PEFT's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import Cache, DynamicLayer

from spaces.architecture import unusual_layers
from trainables.parallelize import blocks_of
from trainables.report import TrialError

# isort: split
# First what tells the logger of bitsandbytes, which PEFT imports.
import trainables.quantize  # noqa: F401, I001
from peft import PeftModelForCausalLM, PrefixTuningConfig, TaskType, get_peft_model

# As PEFT calls the cache, and transformers did.
warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)


class PrefixedModel(PeftModelForCausalLM):
    """PEFT's model, whose blocks can be computed again, and whose prefix generation does not lose."""

    def get_prompt(self, batch_size: int, task_ids: torch.Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """Return the prefix as a cache that is only read, for any number of rows; PEFT's grows, and has a copy for each row."""
        config: Any = self.active_peft_config
        encoder: Any = self.prompt_encoder[self.active_adapter]
        weight = encoder.embedding.weight.to(self.base_model_torch_dtype)
        # A key and a value for each layer: (1, heads, tokens, head width).
        parts = weight.unflatten(1, (2 * config.num_layers, config.num_attention_heads, -1)).permute(1, 2, 0, 3)[:, None].unbind()
        return Cache(layers=[_LayerPrefix(*parts[i : i + 2]) for i in range(0, len(parts), 2)])

    def generate(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any) -> Any:
        """Generate behind the prefix, which PEFT 0.21 loses where transformers calls a model's cache by its new name."""
        config: Any = self.active_peft_config
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = super().get_prompt(len(input_ids))
        mask = functional.pad(mask, (config.num_virtual_tokens, 0), value=1)
        base: Any = self.get_base_model()
        return base.generate(input_ids=input_ids, attention_mask=mask, past_key_values=cache, **options)


class _LayerPrefix(DynamicLayer):
    """What a layer has before every row: nothing is added to it, so that it is the same when a block is computed again."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = self._before = keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values with the prefix before them: (rows, heads, tokens, head width)."""
        before = (part.expand(len(key_states), -1, -1, -1) for part in self._before)
        keys, values = (torch.cat(pair, dim=2) for pair in zip(before, (key_states, value_states), strict=True))
        return keys, values


def add_prefix(module: Any, num_tokens: int) -> PrefixedModel:
    """Freeze a language model and give each of its layers a prefix that trains.

    Raises:
        TrialError: its layers have no keys and values of one width, or are not found to have.
    """
    if why := _why_not(module.config.get_text_config().to_dict()):
        raise TrialError(f"space.adapter: a prefix is keys and values of every layer: {why}")
    config = PrefixTuningConfig(num_virtual_tokens=num_tokens, task_type=TaskType.CAUSAL_LM)
    try:
        model: Any = get_peft_model(module, config)
    except ValueError as error:
        raise TrialError(f"space.adapter: a prefix of this model's layers cannot be made: {error}") from error
    model.__class__ = PrefixedModel
    block: Any
    for block in blocks_of(module):
        # Transformers takes a cache away from a block that it computes again, as that would be added to twice.
        block._can_checkpoint_with_cache = True
    return model


def _why_not(sizes: Mapping[str, Any]) -> str:
    """Return in words why not all layers of a model have keys and values of one width; nothing where they have."""
    if others := unusual_layers(sizes):
        return f"this model's keep a state or choose what they attend to ({others})"
    if sizes.get("kv_lora_rank"):
        return "this model's compress them"
    if any({"head_dim", "num_key_value_heads"} & own.keys() for own in (sizes.get("per_layer_config") or {}).values()):
        return "this model's are of several widths"
    return ""
