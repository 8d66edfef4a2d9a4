"""The Optuna study behind the search: ask, and tell every end as what it is.

Ray's own `OptunaSearch` tells stopped trials as COMPLETE, leaves trials with a missing metric RUNNING for ever and knows no
constraints; so the study is asked and told here, and Ray Tune sees only params.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import Trial
from optuna.trial import TrialState as OptunaState

from spaces.space import SpaceSpec
from spaces.spec import Objective

SamplerName = Literal["tpe", "random"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """One trial of the study: its number and a value for every knob."""

    number: int
    params: dict[str, Any]


class Study:
    """A multi-objective Optuna study in one SQLite file, with a name of its own."""

    def __init__(
        self,
        *,
        path: Path,
        name: str,
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
        self._study = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name=name,
            directions=[o.direction for o in self._objectives],
            load_if_exists=True,
        )
        if not self._study.trials:
            for point in points_to_evaluate:
                self._study.enqueue_trial(space.encode(point))
        # A resumed study must not propose its first points again, so the seed moves on with the trials.
        seed += len(self._study.trials)
        if sampler == "random":
            self._study.sampler = optuna.samplers.RandomSampler(seed=seed)
        else:
            # constant_liar: trials that still run count as bad, so that concurrent proposals spread out.
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup_trials, constant_liar=True)

    def ask(self) -> Proposal:
        """Propose a trial; it is RUNNING until it is told."""
        trial = self._study.ask()
        return Proposal(number=trial.number, params=self._space.suggest(trial))

    def tell_complete(self, number: int, values: Mapping[str, float]) -> None:
        """End a trial with its objectives' values.

        Raises:
            KeyError: an objective is missing; the caller tells such a trial as failed.
        """
        self._tell(number, OptunaState.COMPLETE, values=[values[o.metric] for o in self._objectives])

    def tell_infeasible(self, number: int, constraints: Mapping[str, float]) -> None:
        """End a trial that cannot run: pruned, with its constraints, which the sampler learns from (feasible when <= 0)."""
        trial = self._trial(number)
        for name, value in constraints.items():
            trial.set_constraint(name, float(value))
        self._tell(number, OptunaState.PRUNED)

    def tell_pruned(self, number: int) -> None:
        """End a trial that was stopped early; values at a lower fidelity are no values of the trial."""
        self._tell(number, OptunaState.PRUNED)

    def tell_failed(self, number: int) -> None:
        """End a trial whose failure says nothing about its params."""
        self._tell(number, OptunaState.FAIL)

    def running(self) -> list[int]:
        """Return the numbers of the trials that were asked for and not told."""
        return [t.number for t in self._study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,))]

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)

    def _tell(self, number: int, state: OptunaState, values: Sequence[float] | None = None) -> None:
        # skip_if_finished: on resume the ledger is told again, and the study may already know.
        self._study.tell(number, values=values, state=state, skip_if_finished=True)
