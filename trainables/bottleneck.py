"""Bottleneck adapters: a narrow layer behind the last product of every block's feed-forward, added to what that gives.

h + W_up relu(W_down h) (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751, at the one place a block that Pfeiffer et al. 2021,
https://arxiv.org/abs/2005.00247, found to be enough). What is between is not linear, so that no weights stand for it. This file needs
torch and safetensors alone, and goes along with every export: `load` there puts the adapters into a model of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

WEIGHTS = "bottleneck.safetensors"


class Bottleneck(nn.Module):
    """A layer with a bottleneck behind it; at first it computes what the layer does."""

    def __init__(self, layer: nn.Module, width: int, size: int) -> None:
        super().__init__()
        self.base_layer = layer
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's result with what the bottleneck adds: (..., width)."""
        result: torch.Tensor = self.base_layer(x)
        return result + self.up(torch.relu(self.down(result)))


def parts(model: nn.Module) -> list[str]:
    """Return the names of the layers that bottlenecks are made of."""
    names = [name for name, part in model.named_modules() if isinstance(part, Bottleneck)]
    return [f"{name}.{part}" for name in names for part in ("down", "up")]


def load(model: Any, directory: str | Path) -> Any:
    """Put exported adapters, and what was trained whole beside them, into a model of transformers; return it.

    Args:
        model: the base, with a head of the adapters' size; changed in place.
        directory: where `bottleneck.safetensors` is.

    Raises:
        ValueError: the model is another one, or has the adapters; nothing was changed.
    """
    weights = load_file(Path(directory) / WEIGHTS)
    modules = dict(model.named_modules())
    names = [name.removesuffix(".down.weight") for name in weights if name.endswith(".down.weight")]
    for name in names:
        layer, width = modules.get(name), weights[f"{name}.down.weight"].shape[1]
        found = getattr(layer, "out_features", getattr(layer, "nf", None))
        if found != width:
            raise ValueError(f"the adapters are another model's: {name} should have {width} outputs, and has {found}")
    for name in names:
        size, width = weights[f"{name}.down.weight"].shape
        adapter = Bottleneck(model.get_submodule(name), width, size)
        adapter.down.to(model.device, model.dtype)
        adapter.up.to(model.device, model.dtype)
        model.set_submodule(name, adapter)
    model.load_state_dict(weights, strict=False)
    return model
