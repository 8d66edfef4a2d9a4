"""Rows that are laid end to end, and what a model must be told of it."""

from __future__ import annotations

from dataclasses import dataclass
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
    starts: torch.Tensor
    """int64 (rows,): where each row begins"""
    position_ids: torch.Tensor
    """int64 (1, tokens)"""

    @classmethod
    def of(cls, lengths: np.ndarray, packing: Packing) -> PackedRows:
        """Lay rows of these lengths end to end, in their order."""
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(lengths.sum()) - np.repeat(starts, lengths) + packing.first_position
        return cls(
            runs=tuple((len(list(run)), int(length)) for length, run in groupby(lengths.tolist())),
            starts=torch.from_numpy(starts),
            position_ids=torch.from_numpy(positions)[None],
        )

    @property
    def num_rows(self) -> int:
        return len(self.starts)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> PackedRows:
        """Return it on a device."""
        starts, positions = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.starts, self.position_ids))
        return PackedRows(runs=self.runs, starts=starts, position_ids=positions)

    def inputs(self) -> dict[str, Any]:
        """Return what the model is given beside its tokens."""
        return {"position_ids": self.position_ids, KEY: self}
