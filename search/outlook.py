"""What is said of a trial without training it: the memory of a rank, the seconds, and the metrics under another layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from search.layouts import seconds_of, values_under
from search.profiles import ProfileCache, profile_key
from spaces.config import TrialConfig
from spaces.estimate import MeasuredMachine, NoPeak, estimate_step
from spaces.memory import rank_memory
from spaces.metrics import TRAIN_SECONDS
from spaces.spec import SearchSpec
from trainables.batching import BatchPlan, StepSizes

if TYPE_CHECKING:
    from spaces.blueprint import Blueprint
    from trainables.data import TaskData


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
            device: as `trainables.device.examine` found it.
            profiles: what was measured earlier.
        """
        self._spec, self._data, self._model, self._plan = spec, data, model, plan
        self._device, self._profiles = device, profiles

    def __call__(self, config: TrialConfig) -> dict[str, Any]:
        """Return `memory` by term and `train_seconds` with `time_source`, as far as they can be said.

        `time_source` is `profile` where such a step was measured, and `estimate` where its time is one over an assumed share of the
        peak.
        """
        sizes = BatchPlan(config, self._data).sizes()
        predicted: dict[str, Any] = {}
        memory = self._memory(config, sizes)
        if memory is not None:
            predicted["memory"] = memory
        profile = self._profiles.get(self.key(config))
        if profile is not None:
            return {**predicted, TRAIN_SECONDS: seconds_of(profile, sizes), "time_source": "profile"}
        estimated = self._estimated_seconds(config, sizes)
        return predicted if estimated is None else {**predicted, TRAIN_SECONDS: estimated, "time_source": "estimate"}

    def has_profile(self, config: TrialConfig) -> bool:
        """Return whether the steps of such a trial were timed."""
        return self._profiles.get(self.key(config)) is not None

    def keep_profile(self, config: TrialConfig, profile: Mapping[str, Any]) -> None:
        """Keep what was measured of the steps of such a trial."""
        self._profiles.put(self.key(config), profile)

    def values_under(self, config: TrialConfig, trained: TrialConfig, values: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics of a trained recipe under another layout, whose steps were timed.

        Raises:
            KeyError: they were not.
        """
        profile = self._profiles.get(self.key(config))
        if profile is None:
            raise KeyError(f"no step profile of {config}")
        return values_under(config, trained, values, profile, BatchPlan(config, self._data).sizes())

    def key(self, config: TrialConfig) -> dict[str, Any]:
        """Return under which key a trial's step profile is kept."""
        return profile_key(
            config,
            model=self._model,
            data_fingerprint=self._data.fingerprint,
            max_length=self._spec.model.max_length,
            device=self._device,
        )

    def _memory(self, config: TrialConfig, sizes: StepSizes) -> dict[str, int] | None:
        """Return the bytes of the step with the most padded tokens, by term."""
        if self._plan is None:
            return None
        largest = sizes.padded_tokens.argmax()
        return asdict(rank_memory(self._plan, config, int(sizes.longest[largest]), int(sizes.micro_targets[largest])))

    def _estimated_seconds(self, config: TrialConfig, sizes: StepSizes) -> float | None:
        device = self._device
        if self._plan is None or "bytes_per_second" not in device:
            return None
        machine = MeasuredMachine(
            name=device["name"],
            peaks=device["peak_flops_per_second"],
            bytes_per_second=device["bytes_per_second"],
            link=device["link_bytes_per_second"],
        )
        length = float(sizes.padded_tokens.sum() / sizes.rows.sum())
        try:
            step = estimate_step(self._plan, config, machine, length, float(sizes.targets.sum() / sizes.rows.sum()))
        except NoPeak:
            return None
        return step.seconds * len(sizes.rows)
