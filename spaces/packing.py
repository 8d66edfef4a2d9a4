"""Whether rows of unequal length are laid end to end, without padding: a function of model, task and layout, so that all agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spaces.adapters import num_prefix_tokens
from spaces.architecture import DECODERS, ENCODERS, window_of
from spaces.config import TrialConfig

# It caps its scores, so that its attention is written out.
NOT_PACKED = ("gemma2",)
# Their table of positions begins behind the padding token's number.
LATER_POSITIONS = ("roberta", "xlm-roberta", "camembert")


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """How the rows of a micro batch are laid end to end."""

    first_position: int
    """The position of every row's first token."""
    num_before: int = 0
    """Keys of a prefix, which every row has before its own."""


def can_pack(family: str) -> bool:
    """Return whether the attention of a family can be told where rows end."""
    return family in (*DECODERS, *ENCODERS) and family not in NOT_PACKED


def packing_of(model: Mapping[str, Any], task: str, config: TrialConfig, longest: int) -> Packing | None:
    """Return how rows are laid end to end; None where they are padded.

    A language model's loss is at single tokens, and an encoder's class is at the first token of a row. What decodes and classifies
    looks for the last token of a padded row.

    Args:
        model: its `config.json`.
        task: the task.
        config: the trial's.
        longest: tokens of the longest row of the data.
    """
    family = str(model.get("model_type"))
    is_of_task = family in (DECODERS if task == "causal-lm" else ENCODERS)
    window, num_before = window_of(model), num_prefix_tokens(config.recipe)
    is_windowed = window is not None and num_before + longest > window
    if not is_of_task or not can_pack(family) or is_windowed:
        return None
    first_position = int(model.get("pad_token_id") or 0) + 1 if family in LATER_POSITIONS else 0
    return Packing(first_position=first_position, num_before=num_before)
