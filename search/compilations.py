"""Whether it may pay to time a recipe compiled, by what compiling has cost and saved in a search up to now."""

from __future__ import annotations

from collections.abc import Mapping

from search.record import TrialRecord
from spaces.config import TrialConfig
from spaces.metrics import COMPILE_SECONDS, TRAIN_SECONDS

# Another step may save more of its time than any that was timed: up to twice as much, and a tenth more.
TIMES, BEYOND = 2.0, 0.1


class Compilations:
    """What is known of compiled steps; until one was timed, nothing."""

    def __init__(self, records: Mapping[int, TrialRecord]) -> None:
        self._records = records
        self._seconds: float | None = None
        self._saved = 0.0

    def ended(self, record: TrialRecord) -> None:
        """Take note of what a trial was timed to take compiled, beside the training that it repeats."""
        if record.source is None or COMPILE_SECONDS not in record.values or TRAIN_SECONDS not in record.values:
            return
        seconds, source = record.values[COMPILE_SECONDS], self._records[record.source]
        self._seconds = seconds if self._seconds is None else min(seconds, self._seconds)
        is_alike = record.trial_config.layout.world_size == source.trial_config.layout.world_size
        if is_alike and COMPILE_SECONDS not in source.values:
            self._saved = max(self._saved, 1 - (record.values[TRAIN_SECONDS] - seconds) / source.values[TRAIN_SECONDS])

    def may_pay(self, config: TrialConfig, trained: TrialRecord) -> bool:
        """Return whether a trained recipe may be done sooner with this config, its compilation counted.

        Args:
            config: another layout of what was trained.
            trained: the trial.
        """
        if config.layout.compile == "none" or self._seconds is None or COMPILE_SECONDS in trained.values:
            return True
        share = min(1.0, TIMES * self._saved + BEYOND)
        return share * trained.values[TRAIN_SECONDS] > self._seconds
