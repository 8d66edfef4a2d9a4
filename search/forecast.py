"""What a search would take on GPUs that are not here: time, hours and dollars, from an analytic estimate of every layout."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from search.budget import limits_of
from search.layouts import STEP_KNOBS, layout_to_train, layouts_of
from spaces.blueprint import Blueprint
from spaces.config import TrialConfig
from spaces.constraints import Limits, config_within
from spaces.draws import Draw
from spaces.estimate import (
    HOST_LINK_BYTES_PER_SECOND,
    HOST_MEMORY_BYTES_PER_SECOND,
    MEMORY_KEPT_FREE,
    NETWORK_BYTES_PER_SECOND,
    GpuCluster,
    NoPeak,
    estimate_step,
)
from spaces.fidelity import PROFILE_STEPS
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
    "tp": "tp computes nothing while its ranks sum activations; several groups of them exchange weights and gradients as fsdp does",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Device hours that a proposal takes."""

    train: float
    """Of its training."""
    others: dict[TrialConfig, float]
    """Of the timed steps of its other layouts, by what these steps depend on: recipes that agree in that share them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterForecast:
    """Holds every layout against a cluster of GPUs."""

    spec: SearchSpec
    plan: Blueprint
    cluster: GpuCluster
    limits: Limits
    num_rows: int | None
    """Training rows; None where they are not known here."""

    @property
    def device_limits(self) -> Limits:
        """What a config is held against, the memory of the cluster's GPUs too."""
        return replace(self.limits, memory_bytes=self.cluster.usable_bytes, max_length=self.spec.model.max_length)

    @property
    def price(self) -> float | None:
        """Dollars per GPU and hour."""
        return self.spec.resources.price_per_device_hour

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
        """Return hours and dollars of one run of the fastest layout on the space's most data, and of the whole search, or why not.

        Args:
            rows: those of the plan.
        """
        fitting = [row for row in rows if row["feasible"] and row["fits"]]
        result: dict[str, Any] = {"num_rows": self.num_rows, "run": None, "search": None, "no_search": ""}
        result["assumptions"] = self._assumptions()
        if not fitting or self.num_rows is None:
            return result
        best = max(fitting, key=lambda row: row["step"]["tokens_per_second"])
        space = self.spec.space
        most = max(space.dataset_fraction.ends())
        tokens = self._tokens(most, max(space.epochs.ends()))
        seconds = tokens / best["step"]["tokens_per_second"]
        result["run"] = {
            "dataset_fraction": most,
            **{knob: best[knob] for knob in STEP_KNOBS},
            **self._cost(seconds / 3600, best["world_size"]),
        }
        drawn = self._drawn()
        device_hours = self._search_device_hours(drawn) if drawn else math.inf
        if not drawn:
            result["no_search"] = f"none of {NUM_DRAWS} proposals drawn evenly from the space can run there"
        elif math.isinf(device_hours):
            result["no_search"] = "nothing tells beforehand when its budget is used up"
        else:
            result["search"] = self._cost(device_hours / self.limits.num_workers, self.limits.num_workers)
        return result

    def _search_device_hours(self, drawn: Sequence[Drawn]) -> float:
        """Return the device hours at which the first limit of the budget is reached, with trials such as these."""
        limits, price = limits_of(self.spec.budget), self.price
        hours = {
            "trials": _device_hours_of(drawn, limits["trials"]) if "trials" in limits else math.inf,
            "minutes": self.limits.num_workers * limits.get("minutes", math.inf) / 60,
            "device_hours": limits.get("device_hours", math.inf),
            "dollars": limits.get("dollars", math.inf) / price if price else math.inf,
        }
        return min(hours.values())

    def _drawn(self) -> list[Drawn]:
        """Return proposals drawn evenly from the space, those that can run, each under the layout that a search would train."""
        length = self.spec.model.max_length
        suggester, drawn = Draw(random.Random(0)), []
        known: dict[TrialConfig, dict[TrialConfig, float]] = {}
        for _ in range(NUM_DRAWS):
            params = self.spec.space.suggest(suggester)
            config = config_within(params, self.device_limits)
            step = config.of_step()
            if step not in known:
                known[step] = self._hours_of_steps(params)
            if known[step]:
                trained, *others = known[step].items()
                recipe = config.recipe
                num_steps = self._tokens(recipe.dataset_fraction, recipe.epochs) / (recipe.global_batch_size * length)
                timed = {layout: PROFILE_STEPS * hours for layout, hours in others}
                drawn.append(Drawn(train=num_steps * trained[1], others=timed))
        return drawn

    def _hours_of_steps(self, params: Mapping[str, Any]) -> dict[TrialConfig, float]:
        """Return the device hours of a step under every layout that a search has of a proposal; the one that it trains first."""
        length = self.spec.model.max_length
        candidates = layouts_of(params, self.spec, self.device_limits)
        trained = layout_to_train(candidates, None)
        hours = {}
        for each in (trained, *candidates):
            if each.is_feasible:
                try:
                    step = estimate_step(self.plan, each.config, self.cluster, length)
                except NoPeak:
                    return {}
                hours[each.config.of_step()] = step.seconds / 3600 * each.config.layout.world_size
        return hours

    def _peak_bytes(self, config: TrialConfig) -> int:
        return rank_memory(self.plan, config, self.spec.model.max_length, is_on_gpu=True).peak_bytes

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
            f"the matrix units reach {self.cluster.utilisation:.0%} of the dense peak of {device.name} ({device.source})",
            f"of a device's {device.memory_gigabytes:g} x 10^9 bytes, of which a driver may find a few percent more, "
            f"{MEMORY_KEPT_FREE:.0%} is kept free for the CUDA context, NCCL and fragments",
            f"all rows have model.max_length = {self.spec.model.max_length} tokens; evaluation and start-up are not in the hours",
            f"all devices are busy until the search ends, and {NUM_DRAWS} proposals are drawn evenly from the space",
        ]
        if self.spec.space.profiled_knobs():
            lines.append(
                "a recipe is trained at the smallest world size that can run it, and every other layout that can is timed for "
                f"{PROFILE_STEPS} steps, once for all recipes whose steps cost the same"
            )
        if not self.spec.resources.gpus_per_worker:
            lines.append("a worker has one GPU, which a search there wants as resources.gpus_per_worker: 1")
        if self.spec.scheduler.method != "none" or self.spec.budget.patience:
            lines.append("no trial is stopped early, and the search ends by its other limits")
        if max(self.spec.space.world_size.ends()) > 1:
            lines += [OVERLAPS[strategy] for strategy in self.spec.space.strategy.ends()]
        if "cpu" in self.spec.space.offload.ends() and "fsdp" in self.spec.space.strategy.ends():
            lines.append(
                f"what is left to the host moves at {HOST_LINK_BYTES_PER_SECOND / 1e9:g} GB/s each way (PCIe 4.0), and is updated at "
                f"{HOST_MEMORY_BYTES_PER_SECOND / 1e9:.0f} GB/s; whether it has the memory a search checks"
            )
        if self.plan.num_params < PUBLISHED_PARAMS:
            lines.append("a model this small is bound by kernel launches, and reaches less than the share of the peak above")
        if self.spec.space.quantization.ends() != ["none"]:
            lines.append("a quantised base is spread out before every product, at the bandwidth of the device's memory")
        if self.cluster.num_nodes > 1:
            lines.append(f"between nodes {NETWORK_BYTES_PER_SECOND / 1e9:g} GB/s per GPU, each way")
        return lines


def _device_hours_of(drawn: Sequence[Drawn], num_trials: float) -> float:
    """Return the device hours of so many trials: of their mean training, and of other layouts' steps, each of which is timed once."""
    mean = sum(each.train for each in drawn) / len(drawn)
    timed = {knobs: hours for each in drawn[: int(num_trials)] for knobs, hours in each.others.items()}
    return mean * num_trials + sum(timed.values())
