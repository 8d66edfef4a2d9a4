"""How the loss falls with more data: the rectified scaling law of fine-tuning, how sure it is, and where more data stops paying.

    L(D) = B / (D_l + D^beta) + E        Lin et al., ICML 2024, https://arxiv.org/abs/2402.02314

D is the number of distinct training rows, D_l what pre-training is worth: while D^beta is below it, the loss hardly falls. Without it
(D_l = 0) this is the power law of pre-training. The points are held against it by the logarithm of the loss, and one that is far off
counts linearly (Huber), as Hoffmann et al. fit theirs, https://arxiv.org/abs/2203.15556.

The law is linear in B and E, so both are solved exactly, and never negative, for every pair of beta and D_l on a grid, which is then
narrowed to the pairs that fit: what many starts of an optimizer are for, without a start that could be wrong.

Intervals are profile likelihoods: all that is said by any law, rectified or not, which fits the points nearly as well as the best
one, with Student's t for "nearly". A bootstrap over five points draws mostly samples that determine nothing, and one over residuals
begins with residuals that the fit itself has made small. They hold as far as the law does: no interval knows of a law that breaks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import fdtri, stdtrit

from search.law_grid import HUBER_DELTA, ROUNDING, Array, Shapes, Solutions, huber_weights, robust, search_shapes, solve, tangent

MIN_SIZES = 4
# Of the standard deviation: 95 % efficient where nothing is far off. The median size of a normal deviation is this share of it.
HUBER_EFFICIENT, NORMAL_MEDIAN = 1.345, 0.6745
# How sure it must be that the loss falls at all, and that it falls only after a flat phase.
SURE_OF_FALL, SURE_OF_FLAT_PHASE = 0.95, 0.9
LEVEL = 0.8
# A law that misses the losses of more than this share of the sizes by more than this factor says nothing of the next one; one trial
# that all but diverged may be as far off as it likes.
MOST_OFF, SHARE_OFF = 2.0, 0.2
# Beyond so many times the data at hand, nothing is said.
MAX_TIMES = 1024.0


class NoLaw(ValueError):
    """The points do not determine a law; the message says why, in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """A number and the interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """`B / (D_l + D^beta) + E`."""

    scale: float
    """B"""
    pre_learned: float
    """D_l; 0: a power law."""
    exponent: float
    """beta"""
    floor: float
    """E: the loss that no amount of this data goes below."""

    @property
    def kind(self) -> Literal["rectified", "power"]:
        return "rectified" if self.pre_learned else "power"

    def loss(self, rows: float) -> float:
        """Return the loss after training on so many distinct rows."""
        return self.scale / (self.pre_learned + rows**self.exponent) + self.floor


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingFit:
    """What the points say about the loss with more rows."""

    law: Law
    """The best of the kind that was chosen."""
    num_points: int
    level: float
    """How often the intervals hold what they are for."""
    noise: float
    """Standard deviation of the points around the law, relative."""
    largest: float
    """Rows of the largest point."""
    smallest: float
    shapes: Shapes
    solutions: Solutions
    limit: float
    """The squares of a law that fits nearly as well as the best are at most this; shapes and solutions are those."""

    def loss(self, rows: float) -> Range:
        """Return the loss after training on so many rows, with the interval for one trial's, noise included."""
        phi = self.shapes.basis(np.array([rows / self.largest]))
        b, e, _ = self.solutions.best
        low, high = self._extremes(phi, np.ones_like(phi), noise=(b[:, None] * phi + e[:, None]) ** 2)
        return Range(value=self.law.loss(rows), low=max(0.0, float(low[0])), high=float(high[0]))

    def gain(self, rows: float) -> Range:
        """Return by how much twice the rows lower the loss, with its interval."""
        value, low, high = (float(gains[0]) for gains in self._gains(np.array([rows])))
        return Range(value=value, low=low, high=high)

    def stops_paying(self, amount: float) -> Range:
        """Return the number of rows beyond which doubling them lowers the loss by less than an amount.

        Infinite where it still does at `MAX_TIMES` the largest number; the smallest number of rows where it nowhere does.
        """
        rows = np.geomspace(self.smallest, self.largest * MAX_TIMES, 120)
        value, low, high = (_last_above(rows, gains, amount) for gains in self._gains(rows))
        return Range(value=value, low=low, high=high)

    def _gains(self, rows: Array) -> tuple[Array, Array, Array]:
        """Return what doubling the rows gains by the law, and at least and at most: each (len(rows),)."""
        d = rows / self.largest
        phi = self.shapes.basis(d) - self.shapes.basis(2 * d)
        low, high = self._extremes(phi, np.zeros_like(phi), noise=np.zeros_like(phi))
        return np.array([self.law.loss(x) - self.law.loss(2 * x) for x in rows]), low, high

    def _extremes(self, of_b: Array, of_e: Array, noise: Array) -> tuple[Array, Array]:
        """Return the smallest and the largest `of_b b + of_e e`, plus a noise of so much variance, within the limit: (queries,).

        All arguments are (shapes, queries). A law within the limit lies in an ellipse of (b, e) cut by b >= 0 and e >= 0: a linear
        function is largest inside, where the free solution's ellipse has its end, or on one of the two cuts.
        """
        pp, p, one = (x[:, None] for x in self.solutions.moments)
        determinant = np.maximum(pp * one - p * p, 1e-14 * pp * one)
        nothing = np.zeros_like(of_b)
        directions = [
            ((one * of_b - p * of_e) / determinant, (pp * of_e - p * of_b) / determinant),
            (of_b / pp, nothing),
            (nothing, of_e / one),
        ]
        low, high = np.full(of_b.shape[1], np.inf), np.full(of_b.shape[1], -np.inf)
        for i, (along_b, along_e) in enumerate(directions):
            b, e, slack = (x[:, None] for x in (self.solutions.b[i], self.solutions.e[i], self.limit - self.solutions.squares[i]))
            variance = of_b * along_b + of_e * along_e
            half = np.sqrt(np.maximum(slack, 0) * (variance + noise))
            step = half / np.maximum(variance + noise, np.finfo(float).tiny)
            for sign in (-1.0, 1.0):
                there = (slack >= 0) & (b + sign * step * along_b >= 0) & (e + sign * step * along_e >= 0)
                ends = of_b * b + of_e * e + sign * half
                low = np.minimum(low, np.where(there, ends, np.inf).min(axis=0))
                high = np.maximum(high, np.where(there, ends, -np.inf).max(axis=0))
        return low, high


def fit_law(rows: Sequence[float], losses: Sequence[float], *, level: float = LEVEL) -> ScalingFit:
    """Fit the law to the losses of trials on so many distinct rows.

    The rectified law is taken where it fits significantly better than the power law (F test), which AICc would never allow with
    less than seven points.

    Raises:
        NoLaw: fewer than `MIN_SIZES` different sizes, a loss that falls by no more than it varies, or one that no law comes near.
        ValueError: a size or a loss is not positive and finite.
    """
    x, y = np.asarray(rows, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError(f"sizes and losses must be positive and finite, but got {rows} and {losses}")
    num_sizes = len(np.unique(x))
    if num_sizes < MIN_SIZES:
        raise NoLaw(f"{num_sizes} of at least {MIN_SIZES} different sizes")
    d, num = x / x.max(), len(x)
    if _chance_of_fall(x, y) > 1 - SURE_OF_FALL:
        raise NoLaw(f"the loss does not fall by more than it varies from {x.min():.0f} to {x.max():.0f} rows")
    shapes = search_shapes(d, lambda phi: robust(phi, y)[0])
    costs, fitted = robust(shapes.basis(d), y)
    first, num_parameters = _chosen(shapes, costs, num)
    deviation = np.log(fitted[first] / y)
    # The search was hardly moved by single points; with what it leaves over, what is an ordinary deviation can be told.
    left_over = np.sort(np.abs(deviation))[num_parameters - 1 :]
    delta = max(HUBER_DELTA, HUBER_EFFICIENT * float(np.median(left_over)) / NORMAL_MEDIAN)
    weights = huber_weights(deviation, delta) / fitted[first] ** 2
    z = tangent(fitted[first], deviation)
    shapes = search_shapes(d, lambda phi: solve(phi, z, weights).best[2])
    solutions = solve(shapes.basis(d), z, weights)
    best, num_parameters = _chosen(shapes, solutions.best[2], num)
    freedom = num - num_parameters
    b, e, squares = (values[best] for values in solutions.best)
    variance = max(squares / freedom, ROUNDING)
    limit = squares + variance * student_t(freedom, level) ** 2
    near = solutions.best[2] <= limit
    beta, offset = float(shapes.exponents[best]), float(shapes.offsets[best])
    unit = float(x.max()) ** beta
    law = Law(scale=float(b) * (offset + 1) * unit, pre_learned=offset * unit, exponent=beta, floor=float(e))
    _check_nearness(law, x, y)
    return ScalingFit(
        law=law,
        num_points=num,
        level=level,
        noise=math.sqrt(variance),
        largest=float(x.max()),
        smallest=float(x.min()),
        shapes=shapes.only(near),
        solutions=solutions.only(near),
        limit=float(limit),
    )


def _check_nearness(law: Law, x: Array, y: Array) -> None:
    """Check that the law comes near to some loss of nearly every size.

    Raises:
        NoLaw: it does not.
    """
    predicted = {float(size): max(law.loss(float(size)), np.finfo(float).tiny) for size in np.unique(x)}
    off = {size: float(np.exp(np.abs(np.log(loss / y[x == size])).min())) for size, loss in predicted.items()}
    if sum(times > MOST_OFF for times in off.values()) > SHARE_OFF * len(off):
        worst = max(off, key=lambda size: off[size])
        raise NoLaw(f"the best law is {off[worst]:.2g} times off at {worst:.0f} rows")


def _chosen(shapes: Shapes, costs: Array, num: int) -> tuple[int, int]:
    """Return the best power law, or the best law of all where it is significantly better, and the number of its parameters."""
    power, rectified = int(np.where(shapes.offsets == 0, costs, np.inf).argmin()), int(costs.argmin())
    freedom = num - 4
    if freedom < 1:
        return power, 3
    cost = max(float(costs[rectified]), ROUNDING)
    is_better = costs[power] - cost > cost / freedom * fdtri(1, freedom, SURE_OF_FLAT_PHASE)
    return (rectified, 4) if is_better else (power, 3)


def student_t(freedom: float, level: float) -> float:
    """Return how many standard errors around a mean hold it at a level, by Student's t."""
    return float(stdtrit(freedom, (1 + level) / 2))


def _chance_of_fall(x: Array, y: Array) -> float:
    """Return how often losses in random order would fall from size to size as often as these do: Kendall's test, exact."""
    order = np.argsort(x, kind="stable")
    later = np.triu(np.ones((len(x), len(x)), dtype=bool), 1)
    rises = int((later & ((y[order][None] >= y[order][:, None]) | (x[order][None] == x[order][:, None]))).sum())
    ways = np.ones(1)
    for i in range(2, len(x) + 1):  # number of orders of i losses by their rises
        ways = np.convolve(ways, np.ones(i))
    return float(ways[: rises + 1].sum() / ways.sum())


def _last_above(rows: Array, gains: Array, amount: float) -> float:
    """Return where the gains fall below the amount for good, between the rows on a logarithmic scale."""
    above = np.flatnonzero(gains >= amount)
    if not len(above):
        return float(rows[0])
    i = int(above[-1])
    if i == len(rows) - 1:
        return math.inf
    share = (gains[i] - amount) / (gains[i] - gains[i + 1])
    return float(rows[i] * (rows[i + 1] / rows[i]) ** share)
