"""One recipe under several layouts: what is learned is the same, so what was trained once need only be timed again.

That a layout changes the loss curve by rounding alone is what `tests/equivalence/` holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spaces import constraints
from spaces.config import TrialConfig
from spaces.constraints import Limits
from spaces.spec import SearchSpec


class Forecaster(Protocol):
    """What can be said of a trial without training it; `search.outlook.Outlook` is one."""

    def __call__(self, config: TrialConfig) -> Mapping[str, Any]:
        """Return what is predicted: memory by term, `train_seconds`, `time_source`."""

    def rough_seconds(self, config: TrialConfig) -> tuple[float, str]:
        """Return about how long such a trial trains, cheaply enough for hundreds, and what says so: profile, estimate, or rows."""

    def has_profile(self, config: TrialConfig) -> bool:
        """Return whether the steps of such a trial were timed."""

    def keep_profile(self, config: TrialConfig, profile: Mapping[str, Any]) -> None:
        """Keep what was measured of the steps of such a trial."""

    def values_under(self, config: TrialConfig, trained: TrialConfig, values: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of a trained recipe under another layout, whose steps were timed."""


# What people are told of a layout and its recipe where the time of a step is the subject.
STEP_KNOBS = (
    "adapter",
    "quantization",
    "precision",
    "world_size",
    "strategy",
    "shard_size",
    "tp_size",
    "offload",
    "global_batch_size",
    "micro_batch_size",
    "micro_batch_tokens",
    "recomputation",
    "compile",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A recipe under one layout."""

    params: dict[str, Any]
    config: TrialConfig
    constraints: dict[str, float]

    @property
    def is_feasible(self) -> bool:
        return constraints.is_feasible(self.constraints)


def layouts_of(params: Mapping[str, Any], spec: SearchSpec, limits: Limits) -> list[Candidate]:
    """Return a proposed recipe under every layout that is to be measured; under its own, where none is."""
    candidates = []
    for each in spec.space.measured_layouts(params):
        config = constraints.config_within(each, limits)
        candidates.append(Candidate(params=each, config=config, constraints=constraints.violations(config, limits)))
    return candidates


def layout_to_train(candidates: Sequence[Candidate], outlook: Forecaster | None) -> Candidate:
    """Return the feasible layout that takes the least of the devices: the most recipes are then trained; else the first.

    Without a profile of each of them that is the smallest world size: an estimate tells layouts apart too badly.

    Args:
        candidates: a recipe under every layout that is to be measured.
        outlook: what was timed; None where nothing was.
    """
    feasible = sorted((c for c in candidates if c.is_feasible), key=lambda c: c.config.layout.world_size)
    if not feasible:
        return candidates[0]
    if len(feasible) == 1 or outlook is None or not all(outlook.has_profile(c.config) for c in feasible):
        return feasible[0]
    return min(feasible, key=lambda c: outlook.rough_seconds(c.config)[0] * c.config.layout.world_size)


def details_under(details: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a trained recipe's details holds under another layout: what was learned and, on the same device, MFU's peak."""
    shared = ("train_losses", "steps_per_loss", "peak_source", "mfu_convention")
    return {name: details[name] for name in shared if name in details}
