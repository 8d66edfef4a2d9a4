"""Rows that are laid end to end, and what a model must be told of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch

from spaces.packing import Packing

# The argument that the model hands on to its blocks and their attention.
KEY = "packed_rows"


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Rows laid end to end, shorter ones first."""

    runs: tuple[tuple[int, int], ...]
    """(rows, length) of neighbours of one length"""
    bounds: torch.Tensor
    """int32 (rows + 1,): where each row begins, and where the last one ends"""
    longest: int
    """Tokens of the longest row; a field: what is compiled must not look at `runs`, of which every micro batch has others"""
    position_ids: torch.Tensor
    """int64 (1, tokens)"""
    num_before: int
    """Keys of a prefix, which every row has before its own."""

    @classmethod
    def of(cls, lengths: np.ndarray, packing: Packing) -> PackedRows:
        """Lay rows of these lengths end to end, in their order."""
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths) + packing.first_position
        return cls(
            runs=tuple((len(list(run)), int(length)) for length, run in groupby(lengths.tolist())),
            bounds=torch.from_numpy(bounds.astype(np.int32)),
            longest=int(lengths.max()),
            position_ids=torch.from_numpy(positions)[None],
            num_before=packing.num_before,
        )

    @property
    def num_rows(self) -> int:
        return len(self.bounds) - 1

    @property
    def starts(self) -> torch.Tensor:
        """int64 (rows,): where each row begins."""
        return self.bounds[:-1].long()

    def pin_memory(self) -> PackedRows:
        """Return it in memory from which a GPU copies by itself."""
        return replace(self, bounds=self.bounds.pin_memory(), position_ids=self.position_ids.pin_memory())

    def to(self, device: torch.device, *, non_blocking: bool = False) -> PackedRows:
        """Return it on a device."""
        bounds, positions = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.bounds, self.position_ids))
        return replace(self, bounds=bounds, position_ids=positions)

    def inputs(self) -> dict[str, Any]:
        """Return what the model is given beside its tokens."""
        return {"position_ids": self.position_ids, KEY: self}
