"""OFT's product: what goes into a linear layer, rotated in blocks (https://arxiv.org/abs/2506.19847, section 3)."""

from __future__ import annotations

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary


def rotate(x: torch.Tensor, rotations: torch.Tensor) -> torch.Tensor:
    """Return x with each block of its features multiplied by a matrix; a function of its own, because `trainables.meter` sees it.

    Args:
        x: (..., features)
        rotations: (blocks, features / blocks, features / blocks)
    """
    if has_torch_function_unary(x):
        return handle_torch_function(rotate, (x,), x, rotations)
    num_blocks, size, _ = rotations.shape
    blocks = x.reshape(-1, num_blocks, size).transpose(0, 1)
    return torch.bmm(blocks, rotations).transpose(0, 1).reshape(x.shape)
