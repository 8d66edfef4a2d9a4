"""Classification by the first token of a row: what an encoder's last block need not compute of the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spaces.architecture import ENCODERS
from trainables.packed_rows import KEY, PackedRows
from trainables.parallelize import blocks_of


def end_at_first_tokens(module: Any) -> None:
    """Have the last block of a known encoder return the first token of each row alone, (rows, 1, width): its class is told by that.

    Behind its attention no token sees another. Where transformers has a module for what comes next (BERT, RoBERTa), all that follows
    is computed for the first tokens alone. Of a block's products that leaves queries, keys and values: with an inner width of four
    times the width, 3 of 12.
    """
    if module.config.model_type not in ENCODERS:
        return
    block: Any = blocks_of(module)[-1]
    given: dict[str, PackedRows | None] = {}

    def remember(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Of every forward pass, so of one that is computed again too.
        given[KEY] = kwargs.get(KEY)

    def first(x: torch.Tensor) -> torch.Tensor:
        rows = given[KEY]
        # A copy: a slice would keep all tokens for the backward pass.
        if rows is None:
            return x[:, :1].clone(memory_format=torch.contiguous_format)
        return x.index_select(1, rows.starts).transpose(0, 1)

    block.register_forward_pre_hook(remember, with_kwargs=True)
    if hasattr(block.attention, "output"):
        block.attention.output.register_forward_pre_hook(lambda _, inputs: tuple(first(x) for x in inputs))
    else:
        block.register_forward_hook(lambda _, __, output: first(output))
