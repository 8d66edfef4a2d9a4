"""What is said of a trial without training it: the memory of a rank, the seconds, and the metrics under another layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from search.profiles import ProfileCache, fewest_nodes, profile_key
from spaces import metrics
from spaces.architecture import ModelShape
from spaces.config import TrialConfig
from spaces.estimate import MeasuredMachine, NoPeak, estimate_step
from spaces.memory import RankMemory, rank_memory
from spaces.packing import packing_of
from spaces.spec import SearchSpec
from trainables.batching import BatchPlan, StepSizes
from trainables.step_time import StepTime

if TYPE_CHECKING:
    from spaces.blueprint import Blueprint
    from trainables.data import TaskData


# Steps whose estimates are kept: of hundreds of points that are looked at for one proposal most have the same few.
MAX_STEPS = 4096


class Outlook:
    """Predicts trials of one search on one kind of device."""

    def __init__(
        self,
        spec: SearchSpec,
        data: TaskData,
        *,
        model: Mapping[str, Any],
        plan: Blueprint | None,
        device: Mapping[str, Any],
        profiles: ProfileCache,
    ) -> None:
        """Take what is known before the first trial.

        Args:
            spec: the search.
            data: its data.
            model: the `config.json`.
            plan: what the model is made of; None for a family without formulas.
            device: as `search.session.examine` found it.
            profiles: what was measured earlier.
        """
        self._spec, self._data, self._model, self._plan = spec, data, model, plan
        self._device, self._profiles = device, profiles
        self._shape = ModelShape.from_config(model)
        self._known: dict[TrialConfig, dict[str, Any] | None] = {}
        self._estimate = lru_cache(MAX_STEPS)(self._estimated_step)
        self._row_tokens = float(data.train.lengths.mean())
        self._row_targets = float(data.train.num_targets.mean())

    def __call__(self, config: TrialConfig) -> dict[str, Any]:
        """Return `memory` by term and `train_seconds` with `time_source`, as far as they can be said.

        `time_source` is `profile` where such a step was measured, and `estimate` where its time is one over an assumed share of the
        peak.
        """
        sizes = self._sizes(config)
        predicted: dict[str, Any] = {}
        memory = self._memory(config, sizes)
        if memory is not None:
            predicted["memory"] = memory
        profile = self._profile(config)
        if profile is not None:
            return {**predicted, metrics.TRAIN_SECONDS: sum(seconds_of(profile, sizes)), "time_source": "profile"}
        estimated = self._estimated_seconds(config, sizes)
        return predicted if estimated is None else {**predicted, metrics.TRAIN_SECONDS: estimated, "time_source": "estimate"}

    def rough_seconds(self, config: TrialConfig) -> tuple[float, str]:
        """Return about how long such a trial trains, as if all its rows were as long as the mean, and where that is from.

        Nothing is planned batch by batch, so that it takes some tenths of a millisecond however many rows there are. Where neither a
        step profile nor an estimate is there, it is the number of `rows` that are trained, which goes with the time.
        """
        recipe = config.recipe
        rows = max(1.0, recipe.dataset_fraction * recipe.epochs * self._data.train.num_rows)
        steps = math.ceil(rows / recipe.global_batch_size)
        profile = self._profile(config)
        if profile is not None:
            steady = steps * profile["fixed_seconds"] + rows * self._row_tokens * profile["seconds_per_token"]
            return float(steady + profile["compile_seconds"]), "profile"
        estimated = self._estimate(config.of_step(), self._row_tokens, self._row_targets)
        return (rows, "rows") if estimated is None else (steps * estimated, "estimate")

    def has_profile(self, config: TrialConfig) -> bool:
        """Return whether the steps of such a trial were timed."""
        return self._profile(config) is not None

    def keep_profile(self, config: TrialConfig, profile: Mapping[str, Any]) -> None:
        """Keep what was measured of the steps of such a trial, for this search: others may have trained beside it."""
        self._known[config.of_step()] = dict(profile)

    def values_under(self, config: TrialConfig, trained: TrialConfig, values: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of a trained recipe under another layout, whose steps were timed.

        Raises:
            KeyError: they were not.
        """
        profile = self._profile(config)
        if profile is None:
            raise KeyError(f"no step profile of {config}")
        return values_under(config, trained, values, profile, self._sizes(config))

    def _sizes(self, config: TrialConfig) -> StepSizes:
        packing = packing_of(self._model, self._spec.model.task, config, self._data.longest)
        return BatchPlan(config, self._data, packing, self._shape).sizes()

    def _profile(self, config: TrialConfig) -> dict[str, Any] | None:
        """Return the step profile of such a trial: measured alone before this search, or else in it."""
        step = config.of_step()
        if step not in self._known:
            self._known[step] = self._profiles.get(self.key(config))
        return self._known[step]

    def key(self, config: TrialConfig) -> dict[str, Any]:
        """Return under which key a trial's step profile is looked up: that on the fewest nodes that hold its ranks."""
        return profile_key(
            config,
            model=self._model,
            data_fingerprint=self._data.fingerprint,
            max_length=self._spec.model.max_length,
            device=self._device,
            num_nodes=fewest_nodes(config.layout.world_size, self._device["workers_per_node"]),
        )

    def _memory(self, config: TrialConfig, sizes: StepSizes) -> dict[str, int] | None:
        """Return the bytes of the step that holds the most, by term."""
        if self._plan is None:
            return None
        plan, is_on_gpu = self._plan, self._device["type"] == "cuda"

        def held(step: int) -> RankMemory:
            num_tokens = int(sizes.micro_tokens[step])
            return rank_memory(
                plan,
                config,
                # Rows of unequal length that are laid end to end hold what as many tokens in equal rows do.
                math.ceil(num_tokens / int(sizes.micro_rows[step])),
                int(sizes.micro_targets[step]),
                num_tokens=num_tokens,
                num_micro_batches=int(sizes.micro_batches[step]),
                is_on_gpu=is_on_gpu,
            )

        return asdict(max(map(held, sizes.fullest), key=lambda memory: memory.peak_bytes))

    def _estimated_seconds(self, config: TrialConfig, sizes: StepSizes) -> float | None:
        num_rows = sizes.rows.sum()
        step = self._estimated_step(config, float(sizes.padded_tokens.sum() / num_rows), float(sizes.targets.sum() / num_rows))
        return None if step is None else step * len(sizes.rows)

    def _estimated_step(self, config: TrialConfig, length: float, num_targets: float) -> float | None:
        """Return the seconds of a step with rows of this many tokens and targets."""
        device = self._device
        if self._plan is None or "bytes_per_second" not in device:
            return None
        machine = MeasuredMachine(
            name=device["name"],
            type=device["type"],
            peaks=device["peak_flops_per_second"],
            bytes_per_second=device["bytes_per_second"],
            link=device["link_bytes_per_second"],
        )
        try:
            return estimate_step(self._plan, config, machine, length, num_targets).seconds
        except NoPeak:
            return None


def seconds_of(profile: Mapping[str, Any], sizes: StepSizes) -> tuple[float, float]:
    """Return the seconds of a trial by its step profile: of all steps at their steady pace, and of compilation."""
    time = StepTime(fixed_seconds=profile["fixed_seconds"], seconds_per_token=profile["seconds_per_token"])
    return float(time.of(sizes.padded_tokens).sum()), float(profile["compile_seconds"])


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
    seconds, compiling = seconds_of(profile, sizes)
    result = {name: value for name, value in values.items() if metrics.is_learned(name)}
    result |= {
        metrics.TRAIN_SECONDS: seconds + compiling,
        metrics.DEVICE_SECONDS: (seconds + compiling) * config.layout.world_size,
        metrics.STEP_SECONDS: seconds / len(sizes.rows),
        metrics.TOKENS_PER_SECOND: float(sizes.tokens.sum()) / seconds,
        metrics.SAMPLES_PER_SECOND: float(sizes.rows.sum()) / seconds,
        metrics.PADDING_FRACTION: 1 - float(sizes.tokens.sum() / sizes.padded_tokens.sum()),
        metrics.PEAK_MEMORY_BYTES: float(profile["peak_memory_bytes"]),
    }
    result |= {metrics.PART_SECONDS[part]: seconds for part, seconds in profile["part_seconds"].items()}
    # The model FLOPs are the recipe's; what is computed again is the layout's.
    rates = [metrics.MFU, *([metrics.HFU] if config.layout.recomputation == trained.layout.recomputation else [])]
    faster = values[metrics.STEP_SECONDS] * trained.layout.world_size / (result[metrics.STEP_SECONDS] * config.layout.world_size)
    if compiling:
        result[metrics.COMPILE_SECONDS] = compiling
    result |= {rate: values[rate] * faster for rate in rates if rate in values}
    # Of the steps that were timed: they say whether those can be trusted.
    result |= {name: profile[name] for name in (metrics.TIME_DRIFT, metrics.RANK_SPREAD) if name in profile}
    return result | {name: values[name] for name in (metrics.FLOPS_PER_STEP,) if name in values}
