"""What is known of a proposal before it is tried: whether it can run, how long it holds devices, and where it stands in the space."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from search.acquisition import Features, Prospect
from search.known import Known
from search.layouts import Forecaster, layout_to_train, layouts_of
from search.record import TrialRecord
from spaces.config import TrialConfig
from spaces.constraints import Limits
from spaces.metrics import TRAIN_SECONDS
from spaces.presets import HIGHER_RATE, usual_rate
from spaces.spec import SearchSpec

# Trials by which predictions are corrected, the latest ones.
MAX_COMPARED = 32
# The best rate lies about the usual ones, most often within this factor.
RATE_FACTOR = 3.0
# What even a trial costs that trains nothing, in seconds: below it no order of two costs is to be trusted.
LEAST_SECONDS = 0.1


class Prospects:
    """Looks at proposals; learns from trials that ended how far the predicted seconds are off."""

    def __init__(self, spec: SearchSpec, outlook: Forecaster, known: Known, *, reuses: bool) -> None:
        """Take what does not change.

        Args:
            spec: the search.
            outlook: predicts trials.
            known: the trials of the search.
            reuses: whether what was trained is only timed under another layout.
        """
        self._spec, self._outlook, self._known, self._reuses = spec, outlook, known, reuses
        self._factors: deque[float] = deque(maxlen=MAX_COMPARED)
        self._others: deque[float] = deque(maxlen=MAX_COMPARED)

    def ended(self, record: TrialRecord) -> None:
        """Compare what a trial took with what was predicted."""
        took = record.values.get(TRAIN_SECONDS)
        if record.is_whole and took:
            self._factors.append(took / self._outlook.rough_seconds(record.trial_config))
            self._others.append(max(0.0, record.held_seconds - took))

    def of(self, params: Mapping[str, Any], limits: Limits, *, seconds_left: float = math.inf) -> Prospect:
        """Return what is known of a proposal.

        Args:
            params: the proposal.
            limits: what it is held against.
            seconds_left: until the search ends, and with it what still trains.
        """
        chosen = layout_to_train(layouts_of(params, self._spec, limits), self._outlook)
        config = chosen.config
        rough = self._outlook.rough_seconds(config)
        training = 0.0 if self._reuses and self._known.trained(config.recipe) is not None else rough
        seconds = training * self._median(self._factors, 1.0) + self._median(self._others, 0.0)
        is_known = self._known.trial_of(config) is not None
        learned, timed = features(config, limits.hidden_size)
        return Prospect(
            learned=learned,
            timed={**timed, "seconds": math.log(rough)},
            belief=belief(config, limits.hidden_size),
            device_seconds=max(seconds, LEAST_SECONDS) * config.layout.world_size,
            is_open=chosen.is_feasible and seconds <= seconds_left and not (self._spec.reuse and is_known),
        )

    @staticmethod
    def _median(values: deque[float], default: float) -> float:
        return statistics.median(values) if values else default


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
        "micro_batch_size": math.log(layout.micro_batch_size),
        f"strategy={layout.strategy}": 1.0,
        f"recomputation={layout.recomputation}": 1.0,
    }
    return learned, timed


def belief(config: TrialConfig, width: int | None) -> float:
    """Return the logarithm of how likely a config is held to be good, relative to the likeliest.

    A rate far from the usual ones learns nothing, or diverges; the two that are tried first are equally likely.
    """
    if not width:
        return 0.0
    middle = usual_rate(config.recipe.adapter, width) * math.sqrt(HIGHER_RATE)
    return -0.5 * (math.log(config.recipe.learning_rate / middle) / math.log(RATE_FACTOR)) ** 2
