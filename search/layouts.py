"""One recipe under several layouts: what is learned is the same, so what was trained once need only be timed again.

That a layout changes the loss curve by rounding alone is what `tests/equivalence/` holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from spaces import constraints, metrics
from spaces.config import TrialConfig
from spaces.constraints import Limits
from spaces.spec import SearchSpec
from trainables.batching import StepSizes
from trainables.step_time import StepTime

LEARNED = frozenset(name for name, metric in metrics.METRICS.items() if metric.section in ("eval", "train"))


class Forecaster(Protocol):
    """What can be said of a trial without training it; `search.outlook.Outlook` is one."""

    def __call__(self, config: TrialConfig) -> Mapping[str, Any]:
        """Return what is predicted: memory by term, `train_seconds`, `time_source`."""

    def has_profile(self, config: TrialConfig) -> bool:
        """Return whether the steps of such a trial were timed."""

    def keep_profile(self, config: TrialConfig, profile: Mapping[str, Any]) -> None:
        """Keep what was measured of the steps of such a trial."""

    def values_under(self, config: TrialConfig, trained: TrialConfig, values: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of a trained recipe under another layout, whose steps were timed."""


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
        config = TrialConfig.from_params(each, max_length=spec.model.max_length)
        candidates.append(Candidate(params=each, config=config, constraints=constraints.violations(config, limits)))
    return candidates


def layout_to_train(candidates: Sequence[Candidate], outlook: Forecaster) -> Candidate:
    """Return the feasible layout that takes the least of the devices: the most recipes are then trained; else the first.

    Without a profile of each of them that is the smallest world size: an estimate tells layouts apart too badly.
    """
    feasible = sorted((c for c in candidates if c.is_feasible), key=lambda c: c.config.layout.world_size)
    if not feasible:
        return candidates[0]
    if len(feasible) == 1 or not all(outlook.has_profile(c.config) for c in feasible):
        return feasible[0]
    return min(feasible, key=lambda c: outlook(c.config)[metrics.TRAIN_SECONDS] * c.config.layout.world_size)


def seconds_of(profile: Mapping[str, Any], sizes: StepSizes) -> float:
    """Return the seconds of all steps of a trial, from the line that a step profile fitted."""
    time = StepTime(fixed_seconds=profile["fixed_seconds"], seconds_per_token=profile["seconds_per_token"])
    return float(time.of(sizes.padded_tokens).sum())


def values_under(
    config: TrialConfig, trained: TrialConfig, values: Mapping[str, float], profile: Mapping[str, Any], sizes: StepSizes
) -> dict[str, float]:
    """Return the metrics of a trained recipe under another layout.

    Args:
        config: the recipe under the other layout.
        trained: as it was trained.
        values: what that trial reported.
        profile: what `trainables.step_profile.measure_step` found of the other layout.
        sizes: the steps of the other layout.
    """
    seconds = seconds_of(profile, sizes)
    device_seconds = seconds * config.layout.world_size
    result = {name: value for name, value in values.items() if name in LEARNED}
    result |= {
        metrics.TRAIN_SECONDS: seconds,
        metrics.DEVICE_SECONDS: device_seconds,
        metrics.STEP_SECONDS: seconds / len(sizes.rows),
        metrics.TOKENS_PER_SECOND: float(sizes.tokens.sum()) / seconds,
        metrics.SAMPLES_PER_SECOND: float(sizes.rows.sum()) / seconds,
        metrics.PADDING_FRACTION: 1 - float(sizes.tokens.sum() / sizes.padded_tokens.sum()),
        metrics.PEAK_MEMORY_BYTES: float(profile["peak_memory_bytes"]),
    }
    result |= {metrics.PART_SECONDS[part]: seconds for part, seconds in profile["part_seconds"].items()}
    # The model FLOPs are the recipe's; what is computed again is the layout's.
    rates = [metrics.MFU, *([metrics.HFU] if config.layout.recomputation == trained.layout.recomputation else [])]
    faster = values[metrics.DEVICE_SECONDS] / device_seconds
    result |= {rate: values[rate] * faster for rate in rates if rate in values}
    return result | {name: values[name] for name in (metrics.FLOPS_PER_STEP,) if name in values}
