"""When a search ends: by the first of several limits that is reached, as the file says it and as the command line does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict

from spaces.domains import Within

DEFAULT_TRIALS = 20

# The key of the file, and how many of it one of the command line's units is.
UNITS = {"trials": ("trials", 1), "m": ("minutes", 1), "h": ("minutes", 60), "gpu-hours": ("device_hours", 1), "usd": ("dollars", 1)}
_AMOUNT = re.compile(rf"([0-9]+(?:[.][0-9]+)?)({'|'.join(UNITS)})")

Amount = Annotated[float, Within(gt=0, le=1_000_000_000)]


class BudgetSpec(BaseModel):
    """When the search ends: by whichever comes first. What still trains when time, device hours or dollars are used up is stopped."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    trials: Annotated[int, Within(ge=1, le=1_000_000)] | None = None
    """Trials that are trained, with those that are stopped early; by default 20 where nothing else here is given."""
    minutes: Amount | None = None
    """Wall time; what lies between an interruption and `paretune resume` does not count, and `paretune confirm` does not either."""
    device_hours: Amount | None = None
    """Hours for which trials held their workers, every worker counted: GPU hours where a worker has a GPU."""
    dollars: Amount | None = None
    """Device hours times `resources.price_per_device_hour`."""
    patience: Annotated[int, Within(ge=1, le=1_000_000)] | None = None
    """Trials, with those that are stopped early, within which the hypervolume must grow, or no more are begun; by default it may stop
    growing."""
    min_growth: Annotated[float, Within(ge=0, le=1)] = 0.001
    """How much it must grow within them, relative."""

    @property
    def max_trials(self) -> int | None:
        """The limit in trials; None where others end the search."""
        others = (self.minutes, self.device_hours, self.dollars, self.patience)
        return DEFAULT_TRIALS if self.trials is None and not any(others) else self.trials


def budget_overrides(amounts: Iterable[str]) -> list[str]:
    """Return what `--budget 30m --budget 40usd` sets in the file: these limits, and none of the file's own.

    Raises:
        ValueError: an amount is not of the form, or a limit stands twice; the message is one line for the user.
    """
    given: dict[str, float] = {}
    for text in amounts:
        match = _AMOUNT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"--budget {text}: not a budget; allowed: 50trials, 30m, 2h, 8gpu-hours, 40usd")
        limit, factor = UNITS[match[2]]
        if limit in given:
            raise ValueError(f"--budget {text}: the budget in {limit.replace('_', ' ')} stands twice; allowed: each once")
        given[limit] = float(match[1]) * factor
    if not given:
        return []
    limits = dict.fromkeys(limit for limit, _ in UNITS.values())
    return [f"budget.{limit}={f'{given[limit]:.12g}' if limit in given else ''}" for limit in limits]
