"""What of a model's configuration is not as its files have it while it trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Parts of the names of settings that draw at random: dropout, and the noise on the choice of experts.
NOISE = ("drop", "jitter")


def switch_off(config: Any) -> None:
    """Switch off caches and what draws at random: each layout draws otherwise, and a recipe's curve must not depend on it."""
    for part in _parts(config):
        for key in _noisy(part):
            setattr(part, key, 0.0)
        if hasattr(part, "use_cache"):
            part.use_cache = False


def restore(config: Any, original: Any) -> None:
    """Give a configuration back what `switch_off` has taken; the original may be that of a model of which this is the text's part."""
    if type(original) is not type(config):
        original = original.get_text_config()
    for part, own in zip(_parts(config), _parts(original), strict=True):
        for key in (*_noisy(own), *(["use_cache"] if hasattr(own, "use_cache") else [])):
            setattr(part, key, getattr(own, key))


def _parts(config: Any) -> Iterator[Any]:
    """Yield a configuration and those inside it: of text, pictures and sound."""
    yield config
    for name in sorted(config.sub_configs):
        if (part := getattr(config, name, None)) is not None:
            yield from _parts(part)


def _noisy(config: Any) -> list[str]:
    return [key for key, value in vars(config).items() if isinstance(value, float) and any(part in key for part in NOISE)]
