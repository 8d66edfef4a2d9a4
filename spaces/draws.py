"""Points of a space that are drawn by chance: evenly, or near a point that is known."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Share of a point's values that are kept, and the standard deviation by which a number is then moved, of its range.
KEPT, SPREAD = 0.6, 0.1


@dataclass(frozen=True, slots=True)
class Draw:
    """Suggests every value of a range as likely, but keeps some of another point's.

    A number that is kept is moved a little, or else no point between those that are known would be tried.
    """

    rng: random.Random
    near: Mapping[str, Any] = field(default_factory=dict)
    """What `SpaceSpec.encode` returns of the point; nothing to draw evenly."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """Return a number in [low, high]."""
        inner, outer = (math.log, math.exp) if log else (float, float)
        start, end = inner(low), inner(high)
        if self._is_kept(name):
            value = inner(self.near[name]) + self.rng.gauss(0.0, SPREAD) * (end - start)
        else:
            value = self.rng.uniform(start, end)
        return min(max(outer(value), low), high)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        if not self._is_kept(name):
            return self.rng.randint(low, high)
        return min(max(self.near[name] + round(self.rng.gauss(0.0, SPREAD) * (high - low)), low), high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of the choices."""
        return self.near[name] if self._is_kept(name) else self.rng.choice(choices)

    def _is_kept(self, name: str) -> bool:
        return name in self.near and self.rng.random() < KEPT
