"""The Optuna study behind the search: ask, and tell every end as what it is.

Ray's own `OptunaSearch` tells stopped trials as COMPLETE, leaves trials with a missing metric RUNNING for ever and knows no
constraints; so the study is asked and told here, and Ray Tune sees only params.

The study is held in memory and made again from the ledger on a resume: with trials in a database, Optuna reads every running one
again for every value that it proposes, which takes more than a second where a thousand run.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from spaces.metrics import METRICS
from spaces.space import SpaceSpec
from spaces.spec import Objective

Method = Literal["tpe", "gp", "nsga2", "random"]
SamplerName = Literal["auto"] | Method

# A Gaussian process makes the most of few trials, and what it costs grows with their square and more; TPE's cost grows by little.
MAX_GP_TRIALS = 64
# Of what is seen by its logarithm: a clock's resolution, in seconds.
SMALLEST = 1e-6

# Ended trials that the sampler learns from, the latest ones. TPE's cost grows with them: see `benchmarks/scale.py`.
MAX_REMEMBERED = 500


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """One trial of the study: its number and a value for every knob."""

    number: int
    params: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class PastTrial:
    """A complete trial of an earlier search."""

    params: Mapping[str, Any]
    values: Mapping[str, float]
    constraints: Mapping[str, float]


class Study:
    """A multi-objective Optuna study in memory."""

    def __init__(
        self,
        *,
        space: SpaceSpec,
        objectives: Sequence[Objective],
        sampler: SamplerName,
        seed: int,
        startup_trials: int,
        points_to_evaluate: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._objectives = tuple(objectives)
        self._method = sampler
        self._seed = seed
        self._startup_trials = startup_trials
        self._points = tuple(points_to_evaluate)
        self._samplers = self._new_samplers()
        # Optuna numbers all its trials; an earlier search's come first, and the numbers of this search begin after them.
        self._study = optuna.create_study(storage=_Memory(), directions=[o.direction for o in self._objectives])
        self._num_past = 0
        self._num_asked = self._num_proposed = 0
        self._num_ended = 0
        self._num_infeasible = 0
        self._worst: list[float] = []
        self._is_repeating = False
        self._running: dict[int, Trial] = {}

    def learn(self, past: Iterable[PastTrial]) -> None:
        """Show the sampler trials of an earlier search, before anything is asked; they have no numbers here.

        Raises:
            ValueError: the space does not hold the params of one.
            KeyError: an objective is missing.
        """
        self._study.sampler = self._samplers["random"]
        for known in past:
            self._study.enqueue_trial(self._space.encode(known.params))
            trial = self._study.ask()
            self._space.suggest(trial)
            self._running[-1] = trial  # no trial of this search has this number
            self.tell_complete(-1, known.values, known.constraints)
            self._num_past += 1

    def ask(self) -> Proposal:
        """Propose a trial; it is RUNNING until it is told."""
        if self._num_proposed < len(self._points):
            self._study.enqueue_trial(self._space.encode(self._points[self._num_proposed]))
        return self._ask()

    def reserve(self) -> int:
        """Return the number of a trial that the sampler learns nothing of."""
        self._pass_over()
        return self._num_asked - 1

    def restore(self, asked: Mapping[int, Mapping[str, Any] | None]) -> None:
        """Take up the trials that an earlier driver asked for, by number, and those whose numbers it reserved (None).

        Each that was asked for is RUNNING until it is told.

        A trial that the space holds no more, since the user changed it, teaches the sampler nothing.
        """
        for number in sorted(asked):
            while self._num_asked < number:
                self._pass_over()
            params = asked[number]
            if params is None:
                self._pass_over()
                continue
            try:
                self._study.enqueue_trial(self._space.encode(params))
            except ValueError:
                self._pass_over()
            else:
                self._ask()
        # A resumed study must not propose its first points again, so the seed moves on with the trials.
        self._seed += self._num_asked
        self._samplers = self._new_samplers()

    def tell_complete(self, number: int, values: Mapping[str, float], constraints: Mapping[str, float]) -> None:
        """End a trial with its objectives' values, and with its constraints: GP wants the same ones of every trial.

        Raises:
            KeyError: an objective is missing; the caller tells such a trial as failed.
        """
        reached = [_scaled(o.metric, values[o.metric]) for o in self._objectives]
        self._constrain(number, constraints)
        self._tell(number, OptunaState.COMPLETE, values=reached)
        worse = [max if o.direction == "minimize" else min for o in self._objectives]
        self._worst = [f(pair) for f, pair in zip(worse, zip(self._worst or reached, reached, strict=True), strict=True)]

    def tell_infeasible(self, number: int, constraints: Mapping[str, float]) -> None:
        """End a trial that cannot run, with its constraints, which the sampler learns from (feasible when <= 0).

        It is pruned. GP and NSGA-II see nothing but complete trials: for them it is one, as bad as the worst in each objective.
        """
        self._num_infeasible += number in self._running
        self.tell_pruned(number, constraints)

    def tell_pruned(self, number: int, constraints: Mapping[str, float]) -> None:
        """End a trial that was stopped early or diverged; values at a lower fidelity are no values of the trial."""
        self._constrain(number, constraints)
        if self._method in ("auto", "gp", "nsga2") and self._worst:
            self._tell(number, OptunaState.COMPLETE, values=self._worst)
        else:
            self._tell(number, OptunaState.PRUNED)

    def tell_failed(self, number: int) -> None:
        """End a trial whose failure says nothing about its params."""
        self._tell(number, OptunaState.FAIL)

    def _constrain(self, number: int, constraints: Mapping[str, float]) -> None:
        if number in self._running:
            for name, value in constraints.items():
                self._running[number].set_constraint(name, float(value))

    def _ask(self) -> Proposal:
        method = self._chosen_method()
        self._study.sampler = self._samplers[method]
        trial = self._study.ask()
        params = self._space.suggest(trial)
        number = trial.number - self._num_past
        self._running[number] = trial
        # A Gaussian process that has learned nothing new proposes the same again.
        others = (t for t in self._study.get_trials(deepcopy=False) if t.number != trial.number) if method == "gp" else ()
        self._is_repeating = any(other.params == trial.params for other in others)
        self._num_asked += 1
        self._num_proposed += 1
        return Proposal(number=number, params=params)

    def _pass_over(self) -> None:
        """Leave out a number."""
        self._study.add_trial(optuna.trial.create_trial(state=OptunaState.FAIL))
        self._num_asked += 1

    def _tell(self, number: int, state: OptunaState, values: Sequence[float] | None = None) -> None:
        # The first end counts; a trial that was passed over has none.
        trial = self._running.pop(number, None)
        if trial is not None:
            self._num_ended += state is not OptunaState.FAIL
            self._study.tell(trial, values=values, state=state)

    def _new_samplers(self) -> dict[Method, BaseSampler]:
        """Return the methods that were asked for and what stands in for them."""
        methods: tuple[Method, ...] = ("gp", "tpe") if self._method == "auto" else (self._method,)
        return {method: self._new_sampler(method) for method in ("random", *methods)}

    def _new_sampler(self, method: Method) -> BaseSampler:
        match method:
            case "tpe":
                # constant_liar: trials that still run count as bad, so that concurrent proposals spread out.
                return TPESampler(seed=self._seed, n_startup_trials=self._startup_trials, constant_liar=True)
            case "gp":
                # It takes running trials into account by itself.
                return GPSampler(seed=self._seed, n_startup_trials=self._startup_trials, warn_independent_sampling=False)
            case "nsga2":
                # Generations as large as the beginning; Optuna's fifty would be most of a search.
                return NSGAIISampler(seed=self._seed, population_size=max(self._startup_trials, 2))
            case "random":
                return RandomSampler(seed=self._seed)

    def _chosen_method(self) -> Method:
        """Return how to propose now.

        TPE takes the best tenth of what ended for good, what is infeasible too as long as there is little else, and what runs for
        bad. So on a large cluster, where hundreds run before one has ended, it would propose what is infeasible again and again.
        """
        num_trained = self._num_ended - self._num_infeasible
        is_misled = 10 * num_trained < self._num_ended and num_trained < len(self._running)
        num_seen = self._num_ended + len(self._running)
        method = self._method if self._method != "auto" else "gp" if num_seen < MAX_GP_TRIALS else "tpe"
        return "random" if is_misled or self._is_repeating else method


def _scaled(metric: str, value: float) -> float:
    """Return what the sampler sees: times, rates and sizes by their logarithm, since half as much is as good from any level."""
    is_ratio = metric in METRICS and METRICS[metric].unit in ("s", "1/s", "B", "FLOP")
    return math.log(max(value, SMALLEST)) if is_ratio else value


class _Memory(optuna.storages.InMemoryStorage):
    """Shows the sampler the trials that run and the latest that ended, so that its cost does not grow with the search."""

    def __init__(self) -> None:
        super().__init__()
        self._open: set[int] = set()
        self._ended: deque[int] = deque(maxlen=MAX_REMEMBERED)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Return the new trial's id."""
        trial_id = super().create_new_trial(study_id, template_trial)
        if template_trial is None or not template_trial.state.is_finished():
            self._open.add(trial_id)
        return trial_id

    def set_trial_state_values(self, trial_id: int, state: OptunaState, values: Sequence[float] | None = None) -> bool:
        """Return whether the state was the trial's to take."""
        if state.is_finished():
            self._open.discard(trial_id)
            self._ended.append(trial_id)
        return super().set_trial_state_values(trial_id, state, values)

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Container[OptunaState] | None = None) -> list[FrozenTrial]:
        """Return the trials by ascending number."""
        if states == (OptunaState.WAITING,):  # Optuna looks for enqueued trials at every `ask`, and has a short way to them
            return super().get_all_trials(study_id, deepcopy, states)
        shown = [self.get_trial(trial_id) for trial_id in sorted([*self._ended, *self._open])]
        trials = [trial for trial in shown if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials
