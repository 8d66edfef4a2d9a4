"""Which of many points to try next: the one that is expected to add the most hypervolume for what it costs.

A Gaussian process for each objective, over features that know of each trial what it will learn from and how long it will take;
expected hypervolume by random scalarisations (Golovin and Zhang 2020, "Random Hypervolume Scalarizations for Provable Multi-Objective
Black Box Optimization", arXiv 2006.04655), which takes any number of objectives; divided by the cost to a power that falls from 1 to
0 with the budget (Lee et al. 2020, "Cost-aware Bayesian Optimization", arXiv 2003.10870), and multiplied by what is believed of the
point, to a power that falls as trials end (Hvarfner et al. 2022, "piBO: Augmenting Acquisition Functions with User Beliefs for
Bayesian Optimization", arXiv 2204.11051).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Draws of what a point would turn out as, and directions in which hypervolume is measured.
NUM_OUTCOMES, NUM_DIRECTIONS = 16, 96
# Trials after which a belief counts as it is; from then on less, by one over their number.
TRUST = 5.0

Features = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prospect:
    """What is known of one proposal."""

    learned: Features
    """What the objectives depend on that are learned: logarithms, and 1 for each name, as `adapter=lora`."""
    timed: Features
    """What all others depend on, with the logarithm of the predicted seconds."""
    belief: float
    """Logarithm of how likely it is held to be good before anything was tried, relative to the likeliest; 0 at most."""
    device_seconds: float
    """For which it is predicted to hold devices."""
    is_open: bool
    """Whether it can run, ends in time, and is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """A trial whose objectives are known."""

    prospect: Prospect
    costs: tuple[float, ...]
    """(num_objectives,), to be minimised; nan where one is not known."""


def choose(
    candidates: Sequence[Prospect],
    *,
    evaluated: Sequence[Evaluated],
    running: Sequence[Prospect],
    beside: Sequence[Sequence[float]] = (),
    reference: Sequence[float],
    is_learned: Sequence[bool],
    budget_left: float,
    rng: np.random.Generator,
) -> int:
    """Return the index of the candidate to try next.

    Trials that run count with what is expected of them, so that the next one goes elsewhere.

    Args:
        candidates: at least one.
        evaluated: at least one has every objective.
        running: what was begun and has not ended.
        beside: costs of further points of the front.
        reference: (num_objectives,), costs from which on nothing is gained.
        is_learned: (num_objectives,), whether an objective follows from the recipe alone.
        budget_left: share of the budget, from 0 to 1.
        rng: of the draws.
    """
    prospects = [*(e.prospect for e in evaluated), *running, *candidates]
    known = np.array([e.costs for e in evaluated])
    num_known, num_seen = len(evaluated), len(evaluated) + len(running)
    tables = {
        True: _table([p.learned for p in prospects]),
        False: _table([p.timed for p in prospects]),
    }
    outcomes, expected = [], []
    for column, learned in enumerate(is_learned):
        table = tables[learned]
        has = np.isfinite(known[:, column])
        process = _Process(table[:num_known][has], known[has, column])
        mean, _ = process.predict(table[num_known:num_seen])
        process.assume(table[num_known:num_seen], mean)
        middle, deviation = process.predict(table[num_seen:])
        outcomes.append(middle[:, None] + deviation[:, None] * rng.standard_normal(NUM_OUTCOMES))
        expected.append(np.concatenate([known[:, column], mean]))
    directions = np.abs(rng.standard_normal((NUM_DIRECTIONS, len(is_learned))))
    front = np.concatenate([np.stack(expected, axis=-1), np.reshape(np.asarray(beside, dtype=float), (-1, len(is_learned)))])
    front = front[np.isfinite(front).all(axis=1)]
    gained = gains(np.stack(outcomes, axis=-1), front, np.asarray(reference, dtype=float), directions)
    costs = np.array([p.device_seconds for p in candidates])
    beliefs = np.exp([p.belief * TRUST / num_known for p in candidates])
    gained = gained.mean(axis=1)
    # Where nothing is expected of any, the likeliest and cheapest is as good as another.
    worth = gained if gained.any() else np.ones(len(candidates))
    return int((worth / costs**budget_left * beliefs).argmax())


def gains(outcomes: Array, front: Array, reference: Array, directions: Array) -> Array:
    """Return how much each outcome adds to the hypervolume of a front, relative to the volume between reference and best values.

    The volume is the mean over directions on the positive sphere of the longest step from the reference that some point allows, to
    the power of the number of objectives, but for a constant.

    Args:
        outcomes: (..., num_objectives), to be minimised.
        front: (num_points, num_objectives).
        reference: (num_objectives,).
        directions: (num_directions, num_objectives), positive, of any length.

    Returns:
        (...,)
    """
    span = np.maximum(reference - front.min(axis=0), 1e-12)
    rays = directions / np.linalg.norm(directions, axis=1, keepdims=True)

    def reach(points: Array) -> Array:
        steps = np.maximum((reference - points) / span, 0.0)
        return np.asarray((steps[..., None, :] / rays).min(axis=-1) ** points.shape[-1])

    return np.asarray(np.maximum(reach(outcomes) - reach(front).max(axis=0), 0.0).mean(axis=-1))


class _Process:
    """A Gaussian process on standardised values, with a length scale for each feature."""

    def __init__(self, table: Array, values: Array) -> None:
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel

        self._mean, self._scale = float(values.mean()), float(values.std()) or 1.0
        self._table, self._values = table, values
        # A line, since more rows teach more also where nothing was tried yet, and what bends away from it. Lengths are in factors of
        # e, or from one name to another: shorter ones would explain a handful of trials by chance.
        line = ConstantKernel(0.3, (0.01, 3.0)) * DotProduct(1.0, "fixed")
        bend = ConstantKernel(1.0, (0.2, 5.0)) * RBF(np.full(table.shape[1], 2.0), (0.7, 12.0))
        kernel = line + bend + WhiteKernel(0.01, (1e-3, 0.1))
        self._regressor = GaussianProcessRegressor(kernel)
        self._fit(table, values)

    def assume(self, table: Array, values: Array) -> None:
        """Take points as if they had been seen, with the kernel as it is."""
        if len(table):
            self._regressor.set_params(kernel=self._regressor.kernel_, optimizer=None)
            self._fit(np.concatenate([self._table, table]), np.concatenate([self._values, values]))

    def predict(self, table: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation of what lies below the noise: (num_points,) each."""
        if not len(table):
            return np.empty(0), np.empty(0)
        mean, deviation = self._regressor.predict(table, return_std=True)
        # Luck is no gain: what is known would else be tried again and again where it costs little.
        variance = np.maximum(deviation**2 - self._regressor.kernel_.k2.noise_level, 0.0)
        return mean * self._scale + self._mean, np.sqrt(variance) * self._scale

    def _fit(self, table: Array, values: Array) -> None:
        with warnings.catch_warnings():
            # A length scale at its bound is what a feature without influence has.
            warnings.simplefilter("ignore")
            self._regressor.fit(table, (values - self._mean) / self._scale)


def _table(rows: Sequence[Features]) -> Array:
    """Return the features, centred: (num_rows, num_features); what a row has not is 0 for a name, and else the mean of the others.

    Of the names of one knob the last says nothing that the others do not.
    """
    names = sorted({name for row in rows for name in row})
    last = {name.partition("=")[0]: name for name in names if "=" in name}
    columns = []
    for name in names:
        missing = 0.0 if "=" in name else float(np.mean([row[name] for row in rows if name in row]))
        column = np.array([row.get(name, missing) for row in rows])
        if column.std() > 1e-9 and name not in last.values():
            columns.append(column - column.mean())
    return np.stack(columns, axis=1) if columns else np.zeros((len(rows), 1))
