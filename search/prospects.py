"""What is known of a proposal before it is tried: whether it can run, how long it holds devices, and where it stands in the space."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from search.acquisition import Features, Prospect
from search.layouts import Candidate, Forecaster, layout_to_train, layouts_of
from search.record import TrialRecord
from spaces.config import TrialConfig
from spaces.constraints import Limits, config_within, predicted_memory
from spaces.metrics import TRAIN_SECONDS
from spaces.presets import HIGHER_RATE, usual_rate
from spaces.spec import SearchSpec

# Trials by which predictions are corrected, the latest ones.
MAX_COMPARED = 32
# The best rate lies about the usual ones, most often within this factor.
RATE_FACTOR = 3.0
# What even a trial costs that trains nothing, in seconds: below it no order of two costs is to be trusted.
LEAST_SECONDS = 0.1

# Where a trial's estimate is from that was planned batch by batch; and the keys and words of one that was corrected.
PLANNED, CORRECTED, ESTIMATED = "planned", "corrected estimate", "estimated_seconds"


class Prospects:
    """Looks at proposals; learns from trials that ended how far the predicted seconds are off, and what memory does not hold."""

    def __init__(
        self,
        spec: SearchSpec,
        outlook: Forecaster,
        limits: Limits,
        *,
        records: Mapping[int, TrialRecord],
        is_known: Callable[[TrialConfig], bool],
        is_trained: Callable[[TrialConfig], bool],
        seconds_left: Callable[[], float],
        device_seconds_left: Callable[[], float],
    ) -> None:
        """Take what a search knows.

        Args:
            spec: the search.
            outlook: predicts trials.
            limits: what proposals are held against.
            records: its trials, which say what they train, whatever layout would be chosen for their params later.
            is_known: whether nothing would be trained for a config, or not now.
            is_trained: whether the recipe of a config was trained, so that it is only timed.
            seconds_left: until the search ends, and with it what still trains.
            device_seconds_left: for which trials may still hold devices.
        """
        self.limits = limits
        self._spec, self._outlook, self._records = spec, outlook, records
        self._is_known, self._is_trained = is_known, is_trained
        self._seconds_left, self._device_seconds_left = seconds_left, device_seconds_left
        # By where the prediction is from: an estimate, a profile and a number of rows are off by factors of their own.
        self._factors: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MAX_COMPARED))
        self._others: deque[float] = deque(maxlen=MAX_COMPARED)

    def restore(self, records: Iterable[TrialRecord]) -> None:
        """Take up the trials of an earlier driver."""
        ended = sorted((r for r in records if r.finished_at is not None), key=lambda r: r.finished_at or 0.0)
        whole = {record.number for record in [record for record in ended if record.is_whole][-2 * MAX_COMPARED :]}
        for record in ended:
            if record.number in whole or not record.is_whole:
                self.ended(record)

    def ended(self, record: TrialRecord) -> None:
        """Compare what a trial took with what was predicted."""
        self._exclude(record)
        took = record.values.get(TRAIN_SECONDS)
        if record.is_whole and took:
            seconds, source = self._outlook.rough_seconds(record.trial_config)
            self._factors[source].append(took / seconds)
            if (estimated := estimated_seconds(record.predicted)) is not None:
                self._factors[PLANNED].append(took / estimated)
            self._others.append(max(0.0, record.held_seconds - took))

    def candidates(self, params: Mapping[str, Any]) -> list[Candidate]:
        """Return a proposal under every layout that is to be measured; those that ran out of memory are not feasible."""
        return layouts_of(params, self._spec, self.limits)

    def fits_smaller(self, record: TrialRecord) -> bool:
        """Return whether what ran out of memory is held to fit with fewer rows at a time or blocks that are computed again.

        Where one of them is left open: it learns the same.
        """
        is_open = "auto" in (record.params.get("micro_batch_size"), record.params.get("recomputation"))
        if not record.ran_out_of_memory or record.source is not None or not is_open:
            return False
        return layout_to_train(self.candidates(record.params), self._outlook).is_feasible

    def point(self, params: Mapping[str, Any]) -> Prospect:
        """Return what is known of a point of the space, under the layout that would be trained."""
        return self._look(params)[1]

    def trial(self, number: int | None, params: Mapping[str, Any]) -> Prospect:
        """Return what is known of a trial, by its number; of one of an earlier search, which has none, by its params."""
        record = None if number is None else self._records.get(number)
        config = record.trial_config if record else config_within(params, self.limits)
        return self._prospect(config, is_open=False)

    def trains_within(self, params: Mapping[str, Any], seconds: float) -> bool:
        """Return whether a point can be tried and is expected to train in so many seconds; False as long as no time is known.

        A knob that it leaves open has its first value.
        """
        config, prospect = self._look(self._spec.space.first(**params))
        is_compared = self._factor(self._outlook.rough_seconds(config)[1]) is not None
        return prospect.is_open and is_compared and math.exp(prospect.timed["seconds"]) <= seconds

    def corrected(self, predicted: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the outlook predicts of a trial, an estimated time by how far those of the trials so far were off."""
        factor, estimated = self._factor(PLANNED), estimated_seconds(predicted)
        if factor is None or estimated is None:
            return dict(predicted)
        corrected = {TRAIN_SECONDS: estimated * factor, "time_source": CORRECTED, ESTIMATED: estimated}
        return {**predicted, **corrected}

    def _exclude(self, record: TrialRecord) -> None:
        """Where a trial ran out of memory, whatever is predicted to hold as much would too.

        Of a family without formulas nothing is predicted: it is the same steps, with as many tokens at once and more.
        """
        if not record.ran_out_of_memory:
            return
        predicted = predicted_memory(record.trial_config, self.limits)
        if predicted is None:
            self.limits = replace(self.limits, too_large=self.limits.too_large | {record.trial_config.of_step()})
            return
        known = self.limits.memory_bytes
        below = predicted.peak_bytes - 1
        self.limits = replace(self.limits, memory_bytes=below if known is None else min(known, below))

    def _factor(self, source: str) -> float | None:
        """Return what trials took of the seconds that were predicted from such a source; None where none has ended."""
        factors = self._factors.get(source)
        return statistics.median(factors) if factors else None

    def _look(self, params: Mapping[str, Any]) -> tuple[TrialConfig, Prospect]:
        """Return a point under the layout that would be trained, and what is known of it."""
        chosen = layout_to_train(self.candidates(params), self._outlook)
        is_open = chosen.is_feasible and not self._is_known(chosen.config)
        return chosen.config, self._prospect(chosen.config, is_open=is_open)

    def _prospect(self, config: TrialConfig, *, is_open: bool) -> Prospect:
        rough, source = self._outlook.rough_seconds(config)
        factor = self._factor(source)
        seconds = rough * (factor or 1.0)
        held = (0.0 if self._is_trained(config) else seconds) + (statistics.median(self._others) if self._others else 0.0)
        used = max(held, LEAST_SECONDS) * config.layout.world_size
        # What is no time yet cannot be late.
        is_time = factor is not None or source != "rows"
        learned, timed = features(config, self.limits.hidden_size)
        return Prospect(
            learned=learned,
            timed={**timed, "seconds": math.log(seconds)},
            belief=belief(config, self.limits.hidden_size),
            device_seconds=used,
            is_open=is_open and (not is_time or (held <= self._seconds_left() and used <= self._device_seconds_left())),
        )


def estimated_seconds(predicted: Mapping[str, Any]) -> float | None:
    """Return what was estimated of a trial before any correction; None where its time is not estimated."""
    return {"estimate": predicted.get(TRAIN_SECONDS), CORRECTED: predicted.get(ESTIMATED)}.get(predicted.get("time_source", ""))


def features(config: TrialConfig, width: int | None) -> tuple[Features, Features]:
    """Return the features that what is learned depends on, and those that the time of a step does.

    The learning rate is relative to the one that is usual for the adapter, so that what is learned of one adapter says something of
    the other; data are counted by the rows that are trained, and by those that are distinct.
    """
    recipe, layout = config.recipe, config.layout
    both = {
        "global_batch_size": math.log(recipe.global_batch_size),
        f"precision={recipe.precision}": 1.0,
        f"quantization={recipe.quantization}": 1.0,
        f"adapter={recipe.adapter}": 1.0,
    }
    if recipe.adapter_rank is not None:
        both |= {"adapter_rank": math.log(recipe.adapter_rank), f"adapter_target_modules={recipe.adapter_target_modules}": 1.0}
    learned = {
        **both,
        "learning_rate": math.log(recipe.learning_rate / (usual_rate(recipe.adapter, width) if width else 1.0)),
        "rows": math.log(recipe.dataset_fraction * recipe.epochs),
        "distinct_rows": math.log(recipe.dataset_fraction),
        # These may be 0, and count from about a hundredth on.
        "warmup_fraction": math.log1p(100 * recipe.warmup_fraction),
        "weight_decay": math.log1p(100 * recipe.weight_decay),
    }
    if recipe.adapter_alpha is not None:
        learned["adapter_alpha"] = math.log(recipe.adapter_alpha)
    timed = {
        **both,
        "world_size": math.log(layout.world_size),
        "num_shards": math.log(layout.num_shards),
        "tensor_parallel_size": math.log(layout.tensor_parallel_size),
        f"strategy={layout.strategy}": 1.0,
        f"offload={layout.offload}": 1.0,
        f"recomputation={layout.recomputation}": 1.0,
        f"compile={layout.compile}": 1.0,
    }
    for name in ("micro_batch_size", "micro_batch_tokens"):
        if (most := getattr(layout, name)) is not None:
            timed[name] = math.log(most)
    return learned, timed


def belief(config: TrialConfig, width: int | None) -> float:
    """Return the logarithm of how likely a config is held to be good, relative to the likeliest.

    A rate far from the usual ones learns nothing, or diverges; the usual one and that for a tenth of the tokens are alike.
    """
    if not width:
        return 0.0
    middle = usual_rate(config.recipe.adapter, width) * math.sqrt(HIGHER_RATE)
    return -0.5 * (math.log(config.recipe.learning_rate / middle) / math.log(RATE_FACTOR)) ** 2
