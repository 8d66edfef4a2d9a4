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
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from search.pareto import sign_of
from search.proposals import PastTrial, Proposal
from search.proposer import Look, Params, Proposer, Seen
from spaces.metrics import METRICS, TRAIN_SECONDS, is_learned
from spaces.space import SpaceSpec
from spaces.spec import Objective

Method = Literal["model", "tpe", "gp", "nsga2", "random"]
SamplerName = Literal["auto", "tpe", "gp", "nsga2", "random", "points"]

# A Gaussian process makes the most of few trials, and what it costs grows with their square and more; TPE's cost grows by little.
MAX_MODEL_TRIALS = 64
# Of what is seen by its logarithm: a clock's resolution, in seconds.
SMALLEST = 1e-6

# Ended trials that the sampler learns from, the latest ones. TPE's cost grows with them: see `benchmarks/scale.py`.
MAX_REMEMBERED = 500


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
        longer_points: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._objectives = tuple(objectives)
        self._is_list = sampler == "points"
        self._method: Method | Literal["auto"] = "random" if sampler == "points" else sampler
        self._seed = seed
        self._startup_trials = startup_trials
        self._points = list(points_to_evaluate)
        """Those that were not proposed yet."""
        self._longer = list(longer_points)
        """What is proposed after these as far as it trains within the user's limit of `train_seconds`, the shortest first."""
        self._reseed()
        # Optuna numbers all its trials, an earlier search's too; the numbers of this search are its own.
        self._study = optuna.create_study(storage=_Memory(), directions=[o.direction for o in self._objectives])
        self._seen: dict[int, Seen] = {}
        self._bad: set[int] = set()
        self._reserved: set[int] = set()
        self._beside: list[tuple[float, ...]] = []
        self._is_closed = False
        self._num_asked = 0
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
        for known in past:
            trial, _ = self._candidate("random", known.params)
            self._seen[trial.number] = Seen(number=None, params=dict(known.params))
            self._running[-1] = trial  # no trial of this search has this number
            self.tell_complete(-1, known.values, known.constraints)

    def ask(self, look: Look | None = None, *, budget_left: float = 1.0) -> Proposal:
        """Propose a trial; it is RUNNING until it is told.

        The model divides what it expects of a point by its cost to the power of `budget_left`: what costs little is tried first, and
        towards the end it does not matter any more. Optuna's samplers do not tell what they expect, and their proposals are taken.

        Args:
            look: tells what is known of any point of the space; without it there is no model.
            budget_left: share of the search's budget, from 0 to 1.
        """
        if self._points:
            return self._take(*self._candidate("random", self._points.pop(0)))
        limit = next((o.reference for o in self._objectives if o.metric == TRAIN_SECONDS and o.is_limit), None)
        if look is not None and limit is not None:
            longer = next((point for point in self._longer if look.trains_within(point, limit)), None)
            if longer is not None:
                self._longer.remove(longer)
                return self._take(*self._candidate("random", longer))
        method = self._chosen_method()
        if look is not None and method == "model" and not self._is_closed:
            params = self._modelled(look, budget_left)
            if params is not None:
                return self._take(*self._candidate("random", params))
        return self._take(*self._candidate(method))

    def again(self, number: int, params: Mapping[str, Any]) -> Proposal:
        """Propose what a trial was proposed with: a trial of its own, RUNNING until it is told.

        Raises:
            ValueError: the space does not hold it any more.
        """
        return self._take(*self._candidate("random", params), again=number)

    @property
    def is_over(self) -> bool:
        """Whether all points were proposed, and nothing else is to be."""
        return self._is_list and not self._points

    def judge(self, objectives: Sequence[Objective]) -> None:
        """Take the objectives with references that were not known at the beginning."""
        self._objectives = tuple(objectives)

    def reserve(self) -> int:
        """Return the number of a trial that the sampler learns nothing of, but that there is such a point on the front."""
        self._reserved.add(self._num_asked)
        self._num_asked += 1
        return self._num_asked - 1

    @property
    def learns_from_repeats(self) -> bool:
        """Whether a proposal of what is known is told as a trial of its own: so Optuna's samplers come to leave it alone."""
        return self._method != "auto"

    def drop(self, number: int) -> None:
        """Forget a proposal of what is known."""
        trial = self._running.pop(number, None)
        if trial is not None:
            self._study.tell(trial, state=OptunaState.FAIL)

    def restore(
        self,
        asked: Mapping[int, Mapping[str, Any] | None],
        again: Mapping[int, int | None] | None = None,
        cut_off: Container[int] = (),
    ) -> None:
        """Take up the trials that an earlier driver asked for, by number, and those whose numbers it reserved (None).

        Each that was asked for is RUNNING until it is told. One that the space holds no more teaches the sampler nothing.

        Args:
            asked: the params of each.
            again: of those that were proposed again, the trial that ran out of memory.
            cut_off: those that a limit ended; of the points that the user gave they are to be proposed again.
        """
        for number in sorted(asked):
            self._num_asked = number
            params = asked[number]
            try:
                candidate = None if params is None else self._candidate("random", params)
            except ValueError:
                candidate = None
            if candidate is None:
                self.reserve()
            else:
                proposal = self._take(*candidate, again=(again or {}).get(number))
                if proposal.again is None and number not in cut_off:
                    self._strike(proposal.params)
        # A resumed study must not propose its first points again, so the seed moves on with the trials.
        self._seed += self._num_asked
        self._reseed()

    def _strike(self, params: Mapping[str, Any]) -> None:
        """Take what was proposed off the points that are to come; of several that it may be, the first."""
        for points in (self._points, self._longer):
            place = next((n for n, point in enumerate(points) if _is_at(params, point, self._space.profiled_knobs())), None)
            if place is not None:
                del points[place]
                return

    def tell_complete(self, number: int, values: Mapping[str, float], constraints: Mapping[str, float]) -> None:
        """End a trial with its objectives' values, and with its constraints: GP wants the same ones of every trial.

        Raises:
            KeyError: an objective is missing; the caller tells such a trial as failed.
        """
        reached = [_scaled(o.metric, values[o.metric]) for o in self._objectives]
        if number in self._reserved:
            self._reserved.discard(number)
            self._beside.append(self._costs(reached))
            return
        self._constrain(number, constraints)
        self._is_closed = False
        self._tell(number, OptunaState.COMPLETE, values=reached)
        worse = [max if o.direction == "minimize" else min for o in self._objectives]
        self._worst = [f(pair) for f, pair in zip(worse, zip(self._worst or reached, reached, strict=True), strict=True)]

    def tell_infeasible(self, number: int, constraints: Mapping[str, float]) -> None:
        """End a trial that cannot run, with its constraints, which the sampler learns from (feasible when <= 0).

        It is pruned. GP and NSGA-II see nothing but complete trials: for them it is one, as bad as the worst in each objective.
        """
        self._num_infeasible += number in self._running
        self._tell_bad(number, constraints)

    def tell_pruned(self, number: int, constraints: Mapping[str, float]) -> None:
        """End a trial that was stopped early or diverged; values at a lower fidelity are no values of the trial."""
        if number in self._running and self._method == "auto":
            self._bad.add(self._running[number].number)
        self._is_closed = False
        self._tell_bad(number, constraints)

    def tell_failed(self, number: int) -> None:
        """End a trial whose failure says nothing about its params."""
        self._is_closed = False
        self._tell(number, OptunaState.FAIL)

    def _tell_bad(self, number: int, constraints: Mapping[str, float]) -> None:
        self._constrain(number, constraints)
        if self._method in ("gp", "nsga2") and self._worst:
            self._tell(number, OptunaState.COMPLETE, values=self._worst)
        else:
            self._tell(number, OptunaState.PRUNED)

    def _constrain(self, number: int, constraints: Mapping[str, float]) -> None:
        if number in self._running:
            for name, value in constraints.items():
                self._running[number].set_constraint(name, float(value))

    def _candidate(self, method: Method, params: Params | None = None) -> tuple[Trial, dict[str, Any]]:
        """Return a new trial; with these params, of which the method fills in what is missing.

        Raises:
            ValueError: the space does not hold them.
        """
        if params is not None:
            self._study.enqueue_trial(self._space.encode(params))
        self._study.sampler = self._samplers[method]
        trial = self._study.ask()
        params = self._space.suggest(trial)
        # A Gaussian process that has learned nothing new proposes the same again.
        others = (t for t in self._study.get_trials(deepcopy=False) if t.number != trial.number) if method == "gp" else ()
        self._is_repeating = any(other.params == trial.params for other in others)
        return trial, params

    def _take(self, trial: Trial, params: dict[str, Any], *, again: int | None = None) -> Proposal:
        """Make a candidate the proposal."""
        number, self._num_asked = self._num_asked, self._num_asked + 1
        self._running[number] = trial
        if self._method == "auto":
            self._seen[trial.number] = Seen(number=number, params=params)
        return Proposal(number=number, params=params, again=again)

    def _modelled(self, look: Look, budget_left: float) -> dict[str, Any] | None:
        """Return what the model proposes; nothing as long as it knows too little, or where it finds nothing to try."""
        ended = self._known()
        if len(ended) < max(1, self._startup_trials):
            return None
        running = [self._seen[trial.number] for trial in self._running.values()]
        references = [None if o.reference is None else sign_of(o) * _scaled(o.metric, o.reference) for o in self._objectives]
        params = self._proposer.propose(
            ended=ended, running=running, beside=self._beside, references=references, look=look, budget_left=budget_left
        )
        # Until a trial ends: a space of few points may have none left, of which hundreds of proposals come.
        self._is_closed = params is None
        return params

    def _known(self) -> list[Seen]:
        """Return complete trials with their costs, and those that diverged or were stopped.

        Of these it is known that they learned badly, as badly as the worst so far; how long they would have taken is not.
        """
        if not self._worst:
            return []
        worst = [v if is_learned(o.metric) else math.nan for o, v in zip(self._objectives, self._worst, strict=True)]
        known = []
        for trial in self._study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE, OptunaState.PRUNED)):
            is_complete = trial.state is OptunaState.COMPLETE
            if is_complete or trial.number in self._bad:
                known.append(replace(self._seen[trial.number], costs=self._costs(trial.values if is_complete else worst)))
        return known

    def _costs(self, values: Sequence[float]) -> tuple[float, ...]:
        return tuple(sign_of(o) * value for o, value in zip(self._objectives, values, strict=True))

    def _tell(self, number: int, state: OptunaState, values: Sequence[float] | None = None) -> None:
        # The first end counts; a trial that was passed over has none.
        trial = self._running.pop(number, None)
        if trial is not None:
            self._num_ended += state is not OptunaState.FAIL
            self._study.tell(trial, values=values, state=state)

    def _reseed(self) -> None:
        """Make the methods that were asked for, and what stands in for them."""
        chance = self._new_sampler("random")
        # What a model leaves open is left to chance.
        self._samplers: dict[Method, BaseSampler] = {"random": chance, "model": chance}
        if self._method != "random":
            method: Method = "tpe" if self._method == "auto" else self._method
            self._samplers[method] = self._new_sampler(method)
        self._proposer = Proposer(self._space, self._objectives, self._seed)

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
            case "random" | "model":
                return RandomSampler(seed=self._seed)

    def _chosen_method(self) -> Method:
        """Return how to propose now.

        TPE takes the best tenth of what ended for good, what is infeasible too as long as there is little else, and what runs for
        bad. So on a large cluster, where hundreds run before one has ended, it would propose what is infeasible again and again.
        """
        num_trained = self._num_ended - self._num_infeasible
        if self._method == "auto" and num_trained + len(self._running) < MAX_MODEL_TRIALS:
            return "model"
        is_misled = 10 * num_trained < self._num_ended and num_trained < len(self._running)
        method: Method = "tpe" if self._method == "auto" else self._method
        return "random" if is_misled or self._is_repeating else method


def _scaled(metric: str, value: float) -> float:
    """Return what the sampler sees: times, rates and sizes by their logarithm, since half as much is as good from any level."""
    is_ratio = metric in METRICS and METRICS[metric].unit in ("s", "1/s", "B", "FLOP")
    return math.log(max(value, SMALLEST)) if is_ratio else value


def _is_at(params: Mapping[str, Any], point: Mapping[str, Any], measured: Collection[str]) -> bool:
    """Return whether params have the values of a point; what a sampler sees by its logarithm comes back with another last digit.

    Of knobs that are measured, params have the first value, whatever the point has.
    """
    pairs = [(params.get(knob), value) for knob, value in point.items() if knob not in measured]
    return all(math.isclose(a, b, rel_tol=1e-9) if isinstance(b, float) and isinstance(a, float) else a == b for a, b in pairs)


class _Memory(optuna.storages.InMemoryStorage):
    """Shows the sampler the trials that run and the latest that ended, so that its cost does not grow with the search."""

    def __init__(self) -> None:
        super().__init__()
        self._open: set[int] = set()
        self._ended: deque[int] = deque(maxlen=MAX_REMEMBERED)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Return the new trial's id."""
        trial_id = super().create_new_trial(study_id, template_trial)
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
