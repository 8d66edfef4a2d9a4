"""What really lives: the bytes of all tensors' storages, followed through every operation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows storages from the operation that makes them to their end; what was there before is given to `hold`.

    Sizes are looked up anew after every operation: FSDP2 empties and refills storages without one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on, once."""
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._held[key] = weakref.ref(storage)
            weakref.finalize(storage, self._held.pop, key, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                self.hold(leaf)
        storages = [reference() for reference in list(self._held.values())]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in storages if storage is not None))
        return out
