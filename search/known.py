"""Which recipes were trained or are being trained, and which proposals wait for what that finds."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from search.compilations import Compilations
from search.proposals import Proposal
from search.record import LASTING, TrialRecord, TrialState
from spaces.config import Recipe, TrialConfig

# What a step fails by whenever it is tried: its model, its layout, or the memory; not workers that were lost, or did not come.
OF_STEPS = ("error", "out_of_memory")


class Known:
    """Trials by what they train and how.

    What waits is in memory alone: the ledger hears of a proposal when it becomes a trial; after a crash the sampler proposes anew.
    """

    def __init__(self, records: Mapping[int, TrialRecord], has_profile: Callable[[TrialConfig], bool] = lambda _: False) -> None:
        """Take up what is known.

        Args:
            records: the trials up to now by number, and later those to come.
            has_profile: whether such steps were timed after all, as by `paretune profile` once what they failed by was mended.
        """
        self._has_profile = has_profile
        self._trained: dict[Recipe, int] = {}
        self._diverged: dict[Recipe, int] = {}
        self._in_training: dict[Recipe, int] = {}
        self._by_config: dict[TrialConfig, int] = {}
        self._untimed: dict[TrialConfig, TrialRecord] = {}
        self._waiting: dict[int, list[Proposal]] = {}
        self._returned: deque[Proposal] = deque()
        self._compilations = Compilations(records)
        for record in records.values():
            if record.feasible_before_launch:
                self.started(record)
                if record.state is not TrialState.RUNNING:
                    self.ended(record)

    def trial_of(self, config: TrialConfig) -> int | None:
        """Return the trial with this very config that was begun last, but for those that were cut off."""
        return self._by_config.get(config)

    def trained(self, recipe: Recipe) -> int | None:
        """Return the trial that trained the recipe to the end."""
        return self._trained.get(recipe)

    def hopeless(self, config: TrialConfig, *, is_trained: bool) -> int | None:
        """Return the trial in which the recipe diverged, as it would under every layout.

        Of one that is trained already, that in which its steps failed to be timed, as they would with every recipe.
        """
        untimed = self._untimed.get(config.of_step()) if is_trained else None
        return untimed.number if untimed is not None else self._diverged.get(config.recipe)

    def in_training(self, recipe: Recipe) -> int | None:
        """Return the trial that trains the recipe now, or will."""
        return self._in_training.get(recipe)

    def why_untimed(self, config: TrialConfig) -> dict[str, str] | None:
        """Return the error that such steps failed to be timed by."""
        untimed = self._untimed.get(config.of_step())
        return None if untimed is None else untimed.error

    def may_time(self, config: TrialConfig, trained: TrialRecord) -> bool:
        """Return whether a trained recipe may be timed with this config: it was not, its steps did not fail, and it may pay."""
        if self.trial_of(config) is not None or self.why_untimed(config) is not None:
            return False
        return self._has_profile(config) or self._compilations.may_pay(config, trained)

    def started(self, record: TrialRecord) -> None:
        """Take note of a trial that is to run."""
        config = record.trial_config
        self._by_config[config] = record.number
        if record.source is None:
            self._in_training[config.recipe] = record.number

    def ended(self, record: TrialRecord) -> None:
        """Take note of a trial's end: what waited for it may be considered again."""
        recipe = record.trial_config.recipe
        self._compilations.ended(record)
        if self._in_training.get(recipe) == record.number:
            del self._in_training[recipe]
        if record.is_whole:
            self._trained[recipe] = record.number
        elif record.source is None and record.error is not None and record.error["kind"] == LASTING:
            self._diverged[recipe] = record.number
        elif _cannot_be_timed(record) and not self._has_profile(record.trial_config):
            self._untimed[record.trial_config.of_step()] = record
        if record.was_cut_off and self._by_config.get(record.trial_config) == record.number:
            del self._by_config[record.trial_config]
        self._returned.extend(self._waiting.pop(record.number, ()))

    def wait(self, number: int, proposal: Proposal) -> None:
        """Let a proposal wait for the end of a trial."""
        self._waiting.setdefault(number, []).append(proposal)

    def returned(self) -> Proposal | None:
        """Return and forget a proposal that has waited long enough."""
        return self._returned.popleft() if self._returned else None

    def put_back(self, proposal: Proposal) -> None:
        """Have a proposal considered before any other."""
        self._returned.appendleft(proposal)

    @property
    def has_returned(self) -> bool:
        return bool(self._returned)


def _cannot_be_timed(record: TrialRecord) -> bool:
    return record.source is not None and record.error is not None and record.error["kind"] in OF_STEPS
