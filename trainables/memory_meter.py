"""What a rank really holds while it trains: the tensors at the peak of a step, and the process around them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredMemory:
    """Bytes on one rank; the first three are its tensors at the peak of training."""

    weights_bytes: int
    optimizer_bytes: int
    working_bytes: int
    """Gradients, activations, logits and what communication takes: all that comes and goes."""
    around_bytes: int
    """At its own peak, what the process holds beside: on a CPU the libraries, the data and what the allocator keeps, on a GPU what
    the allocator has reserved and not given out."""

    @property
    def tensor_bytes(self) -> int:
        return self.weights_bytes + self.optimizer_bytes + self.working_bytes

    def to_dict(self) -> dict[str, int]:
        """Return plain values, ready for JSON."""
        return asdict(self)


class LiveBytes(TorchDispatchMode):
    """Follows storages from the operation that makes them to their end; what was there before is given to `hold`.

    Args:
        is_resized: whether storages change their sizes without an operation, as FSDP2 empties and refills them: all are then looked
            up after every operation, which takes the longer the more are there.
    """

    def __init__(self, *, is_resized: bool = False) -> None:
        super().__init__()
        self.peak = 0
        self._is_resized = is_resized
        self._held: dict[int, weakref.ref[Any]] = {}
        self._sizes: dict[int, int] = {}
        self._total = 0

    def hold(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage from now on, once, with the size that it has now."""
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._held:
            self._held[key] = weakref.ref(storage, lambda _: self._drop(key))
        self._weigh(key, storage)

    def _weigh(self, key: int, storage: Any) -> None:
        size = storage.nbytes()
        self._total += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _drop(self, key: int) -> None:
        del self._held[key]
        self._total -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor):
                self.hold(leaf)
        if self._is_resized:
            sizes = self._sizes
            for key, reference in list(self._held.items()):
                if (storage := reference()) is not None and storage.nbytes() != sizes[key]:
                    self._weigh(key, storage)
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        """Return the bytes of all storages that live."""
        return self._total


class MemoryMeter:
    """Measures one trial on one rank.

    A GPU's allocator knows its peak. On a CPU the tensors of one step are followed, which makes that step slow.
    """

    def __init__(self, device: torch.device, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Start to measure: the worker has trained other trials before."""
        self._device, self._module, self._optimizer = device, module, optimizer
        self._trained_peak = self._peak = 0
        self._weights_bytes = self._optimizer_bytes = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif (control := Path("/proc/self/clear_refs")).exists():
            control.write_text("5")

    @contextmanager
    def follow(self) -> Iterator[bool]:
        """Follow the tensors of a step on a CPU, and say whether it does; the optimizer's state must be there."""
        if self._device.type == "cuda":
            yield False
            return
        with LiveBytes(is_resized=isinstance(self._module, FSDPModule)) as tensors:
            gradients = [p.grad for p in self._module.parameters() if p.grad is not None]  # DDP's stay between steps
            for tensor in (*self._weights(), *self._optimizer_state(), *gradients):
                tensors.hold(tensor)
            yield True
        self._trained_peak = max(self._trained_peak, tensors.peak)
        self._weigh()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do something else than training: its memory is none of the step's."""
        if self._device.type == "cuda":
            self._trained_peak = max(self._trained_peak, torch.cuda.max_memory_allocated(self._device))
            self._weigh()
            self._peak = max(self._peak, self._trained_peak)
            yield
            self._peak = max(self._peak, torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            yield

    def peak_bytes(self) -> int:
        """Return the peak of the trial so far: of the allocator on a GPU, of the resident set on a CPU.

        Without Linux's high-water mark, the resident set of now.
        """
        if self._device.type == "cuda":
            return max(self._peak, torch.cuda.max_memory_allocated(self._device))
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return max(self._peak, int(line.split()[1]) * 1024)
        return max(self._peak, int(psutil.Process().memory_info().rss))

    @property
    def is_measured(self) -> bool:
        """Whether a step was followed, or a GPU's allocator asked."""
        return self._trained_peak > 0

    def measured(self) -> MeasuredMemory | None:
        """Return what was held; None on a CPU where no step was followed."""
        if not self.is_measured:
            return None
        weights, optimizer = self._weights_bytes, self._optimizer_bytes
        process = torch.cuda.memory_reserved(self._device) if self._device.type == "cuda" else self.peak_bytes()
        return MeasuredMemory(
            weights_bytes=weights,
            optimizer_bytes=optimizer,
            working_bytes=max(0, self._trained_peak - weights - optimizer),
            around_bytes=max(0, process - self._trained_peak),
        )

    def state(self) -> dict[str, int]:
        """Return what a trial that is cut off would lose of this rank's memory, ready for JSON."""
        return {
            "trained_peak": self._trained_peak,
            "peak": self.peak_bytes(),
            "weights_bytes": self._weights_bytes,
            "optimizer_bytes": self._optimizer_bytes,
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from what was measured before the trial was cut off."""
        self._trained_peak, self._peak = state["trained_peak"], state["peak"]
        self._weights_bytes, self._optimizer_bytes = state["weights_bytes"], state["optimizer_bytes"]

    def _weigh(self) -> None:
        """Note what is held all the time; later an evaluation may leave FSDP2's weights gathered."""
        self._weights_bytes, self._optimizer_bytes = _num_bytes(self._weights()), _num_bytes(self._optimizer_state())

    def _weights(self) -> list[torch.Tensor]:
        return [t for t in (*self._module.parameters(), *self._module.buffers()) if self._is_here(t)]

    def _optimizer_state(self) -> list[torch.Tensor]:
        values = [value for state in self._optimizer.state.values() for value in state.values()]
        return [value for value in values if isinstance(value, torch.Tensor) and self._is_here(value)]

    def _is_here(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is on the device, and not left to the host."""
        return tensor.device.type == self._device.type


def _storage(tensor: torch.Tensor) -> Any:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of all storages, each once."""
    storages = [_storage(tensor) for tensor in tensors]
    return sum({storage._cdata: int(storage.nbytes()) for storage in storages}.values())
