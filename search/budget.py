"""What a search has used of its budget: trials, wall time, and the time for which its trials held devices, which costs money."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from search.formatting import plain
from search.ledger import SearchState
from search.record import TrialRecord, TrialState
from spaces.budget import BudgetSpec
from spaces.spec import SearchSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """What was used of a budget."""

    trials: int
    """Trials that were trained and ended."""
    minutes: float | None
    """None where it is not known: MLflow alone does not tell."""
    device_hours: float
    dollars: float | None
    """None without a price."""

    def as_dict(self) -> dict[str, float]:
        """Return what is known, by the names of the limits."""
        known = {"trials": self.trials, "minutes": self.minutes, "device_hours": self.device_hours, "dollars": self.dollars}
        return {limit: value for limit, value in known.items() if value is not None}

    def text(self) -> str:
        """Return it in words."""
        return ", ".join(amount_text(limit, value) for limit, value in self.as_dict().items())


def amount_text(limit: str, value: float) -> str:
    """Return an amount of a budget for people."""
    amount = f"{value:,.2f}" if limit == "dollars" else plain(value)
    unit = limit.replace("_", " ")
    return f"{amount} {unit.removesuffix('s') if amount == '1' else unit}"


def limits_of(budget: BudgetSpec) -> dict[str, float]:
    """Return the limits of a search, those alone that there are."""
    limits = {
        "trials": budget.max_trials,
        "minutes": budget.minutes,
        "device_hours": budget.device_hours,
        "dollars": budget.dollars,
    }
    return {limit: most for limit, most in limits.items() if most is not None}


def budget_text(limits: Mapping[str, float]) -> str:
    """Return the limits in words; patience alone is none."""
    return " or ".join(amount_text(limit, most) for limit, most in limits.items()) or "until the hypervolume stops growing"


def counts(record: TrialRecord) -> bool:
    """Whether a trial takes from the budget of trials: it was launched and its recipe trained, for the first time."""
    return record.feasible_before_launch and record.source is None and record.again is None


def has_counted(record: TrialRecord) -> bool:
    """Whether a trial of the budget has ended by itself: in the place of one that another limit cut off a resume puts another."""
    return counts(record) and record.state is not TrialState.RUNNING and not record.was_cut_off


def num_ended(records: Iterable[TrialRecord]) -> int:
    """Return how many trials of the budget have ended."""
    return sum(map(has_counted, records))


def used(spec: SearchSpec, state: SearchState) -> Used:
    """Return what the events of a search say that it used; a trial that runs, up to its last report."""
    records = state.records.values()
    seconds = state.active_seconds if state.started else None
    return _used(spec, num_ended(records), seconds, sum(r.held_seconds * _world_size(r) for r in records))


def used_by_seeds(spec: SearchSpec, state: SearchState) -> dict[str, float]:
    """Return the device hours of further seeds, which are none of the search's, and the dollars where there is a price."""
    trained = ((r, c) for r in state.records.values() for c in r.confirmations)
    seconds = sum((c.finished_at - c.started_at) * _world_size(r) for r, c in trained)
    spent = _used(spec, 0, None, seconds).as_dict()
    return {limit: value for limit, value in spent.items() if value and limit != "trials"}


def used_up(spec: SearchSpec, state: SearchState) -> str:
    """Return in words which limit the events of a search have reached, or nothing."""
    return _reached(spec, used(spec, state).as_dict())


class Spending:
    """Follows a search that runs; times are wall seconds, each trial's from the moment that a worker group took it."""

    def __init__(self, spec: SearchSpec, state: SearchState, clock: Callable[[], float] = time.time) -> None:
        self._spec, self._state, self._clock = spec, state, clock
        self._num_ended = num_ended(state.records.values())
        self._device_seconds = sum(r.held_seconds * _world_size(r) for r in state.records.values())
        self._holding: dict[int, tuple[float, int]] = {}

    def began(self, number: int, at: float) -> None:
        """Take note that a group has the trial since then; one that takes it over from a group that was lost changes nothing."""
        self._holding.setdefault(number, (min(at, self._clock()), _world_size(self._state.records[number])))

    def held(self, number: int, until: float | None = None) -> float:
        """Return for how long the trial held its group since it began, or since this was last asked.

        Args:
            number: of the trial.
            until: when it ended, in Unix seconds, where that is known: it may have been told later. None: now.
        """
        if number not in self._holding:
            return 0.0
        since, world_size = self._holding[number]
        now = self._clock() if until is None else min(until, self._clock())
        seconds = max(0.0, now - since)
        self._holding[number] = (now, world_size)
        self._device_seconds += seconds * world_size
        return seconds

    def ended(self, record: TrialRecord) -> None:
        """Take note that a trial holds nothing any more."""
        self._holding.pop(record.number, None)
        self._num_ended += counts(record)

    def now(self) -> Used:
        """Return what was used up to now."""
        now = self._clock()
        running = sum(max(0.0, now - since) * world_size for since, world_size in self._holding.values())
        return _used(self._spec, self._num_ended, self._state.seconds_until(now), self._device_seconds + running)

    def share(self, live: Iterable[TrialRecord]) -> float:
        """Return the share of the budget that was used, of the limit that is the nearest; live trials count as trials.

        Patience is no limit of this kind: nobody knows when it ends a search.
        """
        spent = {**self.now().as_dict(), "trials": self._num_ended + sum(map(counts, live))}
        return min(1.0, max((spent[k] / most for k, most in limits_of(self._spec.budget).items()), default=0.0))

    def device_seconds_left(self) -> float:
        """Return the seconds for which trials may still hold devices; infinite where they are not limited."""
        hours, dollars, price = self._spec.budget.device_hours, self._spec.budget.dollars, self._spec.resources.price_per_device_hour
        most = min(math.inf if hours is None else hours, dollars / price if dollars is not None and price else math.inf)
        return max(0.0, 3600 * (most - self.now().device_hours))

    def seconds_left(self) -> float:
        """Return the wall seconds until what still trains is stopped; infinite where they are not limited."""
        most = self._spec.budget.minutes
        return math.inf if most is None else max(0.0, 60 * most - self._state.seconds_until(self._clock()))

    def reached(self) -> str:
        """Return in words which limit ends even what still trains, or nothing."""
        return _reached(self._spec, {k: value for k, value in self.now().as_dict().items() if k != "trials"})

    def num_left(self, live: Iterable[TrialRecord]) -> float:
        """Return how many trials may still be begun, where these are live."""
        most = self._spec.budget.max_trials
        if self.reached():
            return 0
        return math.inf if most is None else max(0, most - self._num_ended - sum(map(counts, live)))


def _reached(spec: SearchSpec, spent: Mapping[str, float]) -> str:
    limits = limits_of(spec.budget).items()
    return next((f"{amount_text(limit, most)} used up" for limit, most in limits if spent.get(limit, 0.0) >= most), "")


def _used(spec: SearchSpec, trials: int, seconds: float | None, device_seconds: float) -> Used:
    hours, price = device_seconds / 3600, spec.resources.price_per_device_hour
    return Used(
        trials=trials,
        minutes=None if seconds is None else seconds / 60,
        device_hours=hours,
        dollars=None if price is None else hours * price,
    )


def _world_size(record: TrialRecord) -> int:
    return record.trial_config.layout.world_size if record.config else 1
