"""Models that see or hear beside reading: a trial trains and holds what text goes through, and its files have the rest as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from trainables.quantize import is_head


def take_out(module: Any) -> dict[str, nn.Module]:
    """Take the parts of a model out that no text goes through, and return them by name; one that only reads has none.

    Left in, they would be held on every device, adapted, and waited for by DDP, which wants a gradient of all that trains.
    """
    if module.config.get_text_config() is module.config:
        return {}
    read = [part for part in (module.get_decoder(), module.get_output_embeddings()) if part is not None and part is not module]
    parts = {name: part for name, part in _beside(module, "", read) if not is_head(name)} if read else {}
    for name in parts:
        module.set_submodule(name, nn.Module())
    if parts and not _reads(module):  # Gemma 3n looks up its text's tokens in the towers' embeddings too
        put_back(module, parts)
        return {}
    return parts


def _reads(module: Any) -> bool:
    """Return whether a model computes two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    try:
        with torch.no_grad():
            module(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (AttributeError, NotImplementedError, TypeError, KeyError):
        return False
    return True


def put_back(module: Any, parts: Mapping[str, nn.Module]) -> None:
    """Put back what `take_out` has taken, into a model or PEFT's around it; an adapter of its names is none of these parts'."""
    settings = getattr(module, "peft_config", {}).get("default")
    whole = module if settings is None else module.get_base_model()
    for name, part in parts.items():
        whole.set_submodule(name, part)
    if settings is not None and parts:
        settings.exclude_modules = "|".join(rf"{name.replace('.', '[.]')}[.].*" for name in parts)


def _beside(module: nn.Module, prefix: str, read: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inside = list(child.modules())
        if any(child is part for part in read):
            continue
        if any(part is other for part in read for other in inside):
            yield from _beside(child, f"{prefix}{name}.", read)
        elif next(child.parameters(), None) is not None:
            yield prefix + name, child
