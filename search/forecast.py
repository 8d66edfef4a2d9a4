"""What a search would take on GPUs that are not here: time, hours and dollars, from an analytic estimate of every layout."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from search.budget import limits_of
from spaces.blueprint import Blueprint
from spaces.config import TrialConfig
from spaces.constraints import Limits, is_feasible, violations
from spaces.estimate import (
    ASSUMED_UTILISATION,
    MEMORY_KEPT_FREE,
    NETWORK_BYTES_PER_SECOND,
    GpuCluster,
    NoPeak,
    StepEstimate,
    estimate_step,
)
from spaces.memory import rank_memory
from spaces.spec import SearchSpec

# Proposals over which the mean trial is taken; its standard error is then a few percent.
NUM_DRAWS = 400
# The published rows that the share of the peak is from are of 7 and 8 billion; below one, nothing vouches for it.
PUBLISHED_PARAMS = 1e9
# As `spaces.estimate` has it.
OVERLAPS = {
    "ddp": "ddp exchanges gradients beside the backward pass of a step's last micro batch",
    "fsdp": "fsdp exchanges weights and gradients beside all of the computation",
    "tp": "tp computes nothing while its ranks sum activations",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecaster:
    """Holds every layout against a cluster of GPUs."""

    spec: SearchSpec
    plan: Blueprint
    cluster: GpuCluster
    limits: Limits
    num_rows: int | None
    """Training rows; None where they are not known here."""
    price: float | None
    """Dollars per GPU and hour."""

    def layout(self, config: TrialConfig) -> dict[str, Any]:
        """Return whether a layout fits, by how much it does not, and what a step of it takes."""
        try:
            missing = max(0, self._peak_bytes(config) - self.cluster.usable_bytes)
            step = estimate_step(self.plan, config, self.cluster, self.spec.model.max_length)
        except NoPeak as error:
            return {"fits": False, "missing_bytes": None, "step": None, "unknown": str(error)}
        parts = {**asdict(step), "seconds": step.seconds, "tokens_per_second": step.tokens_per_second}
        return {"fits": missing == 0, "missing_bytes": missing, "step": parts, "unknown": ""}

    def whole(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return hours and dollars of the whole search and of one run of the fastest layout on all the data.

        Args:
            rows: those of the plan.
        """
        fitting = [row for row in rows if row["feasible"] and row["fits"]]
        result: dict[str, Any] = {"num_rows": self.num_rows, "run": None, "search": None, "assumptions": self._assumptions()}
        if not fitting or self.num_rows is None:
            return result
        best = max(fitting, key=lambda row: row["step"]["tokens_per_second"])
        space = self.spec.space
        tokens = self._tokens(max(space.dataset_fraction.ends()), max(space.epochs.ends()))
        seconds = tokens / best["step"]["tokens_per_second"]
        shown = ("adapter", "quantization", "world_size", "strategy", "global_batch_size", "micro_batch_size", "recomputation")
        result["run"] = {**{k: best[k] for k in shown}, **self._cost(seconds / 3600, best["world_size"])}
        mean = self._mean_device_hours()
        device_hours = math.inf if mean is None else self._search_device_hours(mean)
        if math.isfinite(device_hours):
            result["search"] = self._cost(device_hours / self.limits.num_workers, self.limits.num_workers)
        return result

    def _search_device_hours(self, mean: float) -> float:
        """Return the device hours at which the first limit of the budget is reached, with trials of this mean."""
        limits, price = limits_of(self.spec.budget), self.price
        hours = {
            "trials": mean * limits.get("trials", math.inf),
            "minutes": self.limits.num_workers * limits.get("minutes", math.inf) / 60,
            "device_hours": limits.get("device_hours", math.inf),
            "dollars": limits.get("dollars", math.inf) / price if price else math.inf,
        }
        return min(hours.values())

    def _mean_device_hours(self) -> float | None:
        """Return the mean over proposals drawn evenly from the space, of those that can run; None if none can."""
        suggester, hours = _EvenSuggester(random.Random(0)), []
        for _ in range(NUM_DRAWS):
            config = TrialConfig.from_params(self.spec.space.suggest(suggester), max_length=self.spec.model.max_length)
            step = self._step_if_it_runs(config)
            if step is not None:
                tokens = self._tokens(config.recipe.dataset_fraction, config.recipe.epochs)
                hours.append(tokens / step.tokens_per_second / 3600 * config.layout.world_size)
        return sum(hours) / len(hours) if hours else None

    def _step_if_it_runs(self, config: TrialConfig) -> StepEstimate | None:
        if not is_feasible(violations(config, self.limits)):
            return None
        try:
            if self._peak_bytes(config) > self.cluster.usable_bytes:
                return None
            return estimate_step(self.plan, config, self.cluster, self.spec.model.max_length)
        except NoPeak:
            return None

    def _peak_bytes(self, config: TrialConfig) -> int:
        return rank_memory(self.plan, config, self.spec.model.max_length).peak_bytes

    def _tokens(self, fraction: float, epochs: float) -> float:
        assert self.num_rows is not None  # asked only where the rows are known
        return self.num_rows * fraction * epochs * self.spec.model.max_length

    def _cost(self, hours: float, num_devices: int) -> dict[str, Any]:
        device_hours = hours * num_devices
        dollars = None if self.price is None else device_hours * self.price
        return {"hours": hours, "device_hours": device_hours, "dollars": dollars}

    def _assumptions(self) -> list[str]:
        device = self.cluster.device
        lines = [
            f"the matrix units reach {ASSUMED_UTILISATION:.0%} of the dense peak of {device.name} ({device.source})",
            f"of a device's {device.memory_gigabytes:g} x 10^9 bytes, of which a driver may find a few percent more, "
            f"{MEMORY_KEPT_FREE:.0%} is kept free for the CUDA context, NCCL and fragments",
            f"all rows have model.max_length = {self.spec.model.max_length} tokens; evaluation and start-up are not in the hours",
            "all devices are busy until the search ends, and proposals are drawn evenly from the space",
        ]
        if not self.spec.resources.gpus_per_worker:
            lines.append("a worker has one GPU, which a search there wants as resources.gpus_per_worker: 1")
        if self.spec.scheduler.method != "none" or self.spec.budget.patience:
            lines.append("no trial is stopped early, and the search ends by its other limits")
        if max(self.spec.space.world_size.ends()) > 1:
            lines += [OVERLAPS[strategy] for strategy in self.spec.space.strategy.ends()]
        if self.plan.num_params < PUBLISHED_PARAMS:
            lines.append("a model this small is bound by kernel launches, and reaches less than the share of the peak above")
        if self.spec.space.quantization.ends() != ["none"]:
            lines.append("a quantised base is spread out before every product, at the bandwidth of the device's memory")
        if self.cluster.num_nodes > 1:
            lines.append(f"between nodes {NETWORK_BYTES_PER_SECOND / 1e9:g} GB/s per GPU, each way")
        return lines


@dataclass(frozen=True, slots=True)
class _EvenSuggester:
    """Draws evenly, for a mean over the space."""

    draw: random.Random

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return low * (high / low) ** self.draw.random() if log else self.draw.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return self.draw.randint(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self.draw.choice(choices)
