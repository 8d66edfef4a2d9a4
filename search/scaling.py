"""How the loss falls with more data: the rectified scaling law of fine-tuning, how sure it is, and where more data stops paying.

    L(D) = B / (D_l + D^beta) + E        Lin et al., ICML 2024, https://arxiv.org/abs/2402.02314

D is the number of distinct training rows, D_l what pre-training is worth: while D^beta is below it, the loss hardly falls. Without it
(D_l = 0) this is the power law of pre-training. The points are held against it by the logarithm of the loss, and one that is far off
counts linearly (Huber), as Hoffmann et al. fit theirs, https://arxiv.org/abs/2203.15556.

The law is linear in B and E, so both are solved exactly, and never negative, for every pair of beta and D_l on a grid, which is then
narrowed to the pairs that fit: what many starts of an optimizer are for, without a start that could be wrong.

Intervals are profile likelihoods: all that is said by any law, rectified or not, which fits the points nearly as well as the best
one, with Student's t for "nearly". A bootstrap over five points draws mostly samples that determine nothing, and one over
residuals begins with residuals that the fit itself has made small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import fdtri, stdtrit

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

MIN_SIZES = 4
# In the logarithm of the loss: trials that differ in their seed alone are mostly nearer to each other.
HUBER_DELTA = 0.01
# Of the standard deviation: 95 % efficient where nothing is far off. The median size of a normal deviation is this share of it.
HUBER_EFFICIENT, NORMAL_MEDIAN = 1.345, 0.6745
EXPONENTS = (0.05, 3.0)
# How sure it must be that the loss falls at all, and that it falls only after a flat phase.
SURE_OF_FALL, SURE_OF_FLAT_PHASE = 0.95, 0.9
LEVEL = 0.8
# Beyond so many times the data at hand, nothing is said.
MAX_TIMES = 1024.0
_GRID = 44
# How much worse than the best a shape may be, relative, to be within the next grid. The first three are for the intervals, which
# mostly go to about 0.6; the others find the best one.
NARROWING = (3.0, 1.0, 0.5, 0.1, 0.01, 0.001)
# Squares of relative deviations below this are rounding.
_ROUNDING = 1e-12


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
class Shapes:
    """Laws but for their two linear parameters: with d as a share of the largest number of rows, L = b (r + 1) / (r + d^beta) + e."""

    exponents: Array
    """beta (shapes,)"""
    offsets: Array
    """r (shapes,)"""

    def basis(self, d: Array) -> Array:
        """Return what b is multiplied with: (shapes, len(d)), 1 at d = 1."""
        return np.asarray((self.offsets[:, None] + 1) / (self.offsets[:, None] + d ** self.exponents[:, None]))

    def only(self, chosen: Mask) -> Shapes:
        """Return some of them."""
        return Shapes(exponents=self.exponents[chosen], offsets=self.offsets[chosen])


@dataclass(frozen=True, kw_only=True, slots=True)
class Solutions:
    """Weighted least squares of b and e for every shape: free, with e = 0, and with b = 0."""

    b: Array
    e: Array
    squares: Array
    """All three (3, shapes); squares is the weighted sum of the squared deviations."""
    moments: tuple[Array, ...]
    """Weighted sums of phi², phi and 1: each (shapes,)."""

    def only(self, chosen: Mask) -> Solutions:
        """Return those of some of the shapes."""
        b, e, squares = (x[:, chosen] for x in (self.b, self.e, self.squares))
        return Solutions(b=b, e=e, squares=squares, moments=tuple(m[chosen] for m in self.moments))

    @property
    def best(self) -> tuple[Array, Array, Array]:
        """b, e and squares of the best solution that is nowhere negative: each (shapes,)."""
        squares = np.where((self.b >= 0) & (self.e >= 0), self.squares, np.inf)
        which = squares.argmin(axis=0)[None]
        return tuple(np.take_along_axis(x, which, axis=0)[0] for x in (self.b, self.e, squares))


def solve(phi: Array, z: Array, weights: Array) -> Solutions:
    """Fit b phi + e to z; all (shapes, points), z and weights may be (points,)."""
    z, weights = np.broadcast_to(z, phi.shape), np.broadcast_to(weights, phi.shape)
    pp, p, one, pz, of_z = ((weights * x).sum(axis=1) for x in (phi * phi, phi, np.ones_like(phi), phi * z, z))
    determinant = np.maximum(pp * one - p * p, 1e-14 * pp * one)
    none = np.zeros_like(pp)
    b = np.stack([(pz * one - p * of_z) / determinant, pz / pp, none])
    e = np.stack([(pp * of_z - p * pz) / determinant, none, of_z / one])
    squares = (weights * (b[..., None] * phi + e[..., None] - z) ** 2).sum(axis=-1)
    return Solutions(b=b, e=e, squares=squares, moments=(pp, p, one))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingFit:
    """A law that was fitted, and all others that fit nearly as well."""

    law: Law
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
    """The squares of a law that fits nearly as well are at most this."""

    def loss(self, rows: float) -> Range:
        """Return the loss that the law says, with the interval for that of one trial on so many rows, its noise included."""
        phi = self.shapes.basis(np.array([rows / self.largest]))
        b, e, _ = self.solutions.best
        low, high = self._extremes(phi, np.ones_like(phi), noise=(b[:, None] * phi + e[:, None]) ** 2)
        return Range(value=self.law.loss(rows), low=max(0.0, float(low[0])), high=float(high[0]))

    def gain(self, rows: float) -> Range:
        """Return by how much twice the rows lower the loss, with its interval."""
        low, high = self._gains(np.array([rows]))
        return Range(value=self.law.loss(rows) - self.law.loss(2 * rows), low=float(low[0]), high=float(high[0]))

    def stops_paying(self, amount: float) -> Range:
        """Return the number of rows beyond which doubling them lowers the loss by less than an amount.

        Infinite where it still does at `MAX_TIMES` the largest number; the smallest number of rows where it nowhere does.
        """
        rows = np.geomspace(self.smallest, self.largest * MAX_TIMES, 120)
        value = np.array([self.law.loss(x) - self.law.loss(2 * x) for x in rows])
        low, high = self._gains(rows)
        return Range(value=_last_above(rows, value, amount), low=_last_above(rows, low, amount), high=_last_above(rows, high, amount))

    def _gains(self, rows: Array) -> tuple[Array, Array]:
        d = rows / self.largest
        phi = self.shapes.basis(d) - self.shapes.basis(2 * d)
        return self._extremes(phi, np.zeros_like(phi), noise=np.zeros_like(phi))

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
        NoLaw: fewer than `MIN_SIZES` different sizes, or a loss that does not fall by more than it varies.
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
    shapes = _search(d, lambda phi: _robust(phi, y)[0])
    costs, fitted = _robust(shapes.basis(d), y)
    first, num_parameters = _chosen(shapes, costs, num)
    deviation = np.log(fitted[first] / y)
    # The search was hardly moved by single points; with what it leaves over, what is an ordinary deviation can be told.
    left_over = np.sort(np.abs(deviation))[num_parameters - 1 :]
    delta = max(HUBER_DELTA, HUBER_EFFICIENT * float(np.median(left_over)) / NORMAL_MEDIAN)
    weights = _huber_weights(deviation, delta) / fitted[first] ** 2
    logs = fitted[first] * (1 - deviation)
    shapes = _search(d, lambda phi: solve(phi, logs, weights).best[2])
    solutions = solve(shapes.basis(d), logs, weights)
    best, num_parameters = _chosen(shapes, solutions.best[2], num)
    freedom = num - num_parameters
    b, e, squares = (values[best] for values in solutions.best)
    variance = max(squares / freedom, _ROUNDING)
    limit = squares + variance * stdtrit(freedom, (1 + level) / 2) ** 2
    near = solutions.best[2] <= limit
    beta, offset = float(shapes.exponents[best]), float(shapes.offsets[best])
    unit = float(x.max()) ** beta
    return ScalingFit(
        law=Law(scale=float(b) * (offset + 1) * unit, pre_learned=offset * unit, exponent=beta, floor=float(e)),
        num_points=num,
        level=level,
        noise=math.sqrt(variance),
        largest=float(x.max()),
        smallest=float(x.min()),
        shapes=shapes.only(near),
        solutions=solutions.only(near),
        limit=float(limit),
    )


def _search(d: Array, cost_of: Callable[[Array], Array]) -> Shapes:
    """Return shapes over all that is allowed, ever denser where the cost of their basis at d is low.

    Of the first passes all stay that fit nearly as well as the best, for the intervals; the later ones close in on the best.
    """
    box, lowest, found = (math.log(EXPONENTS[0]), math.log(EXPONENTS[1]), 0.0, 1.0), math.inf, []
    for margin in NARROWING:
        shapes = _grid(box, float(d.min()))
        costs = cost_of(shapes.basis(d))
        found.append(shapes)
        lowest = min(lowest, float(costs.min()))
        box = _narrowed(box, costs <= max(_ROUNDING, lowest) * (1 + margin))
    exponents, offsets = (np.concatenate([getattr(shapes, name) for shapes in found]) for name in ("exponents", "offsets"))
    return Shapes(exponents=exponents, offsets=offsets)


def _grid(box: tuple[float, float, float, float], smallest: float) -> Shapes:
    """Return the shapes of a box and its power laws: ln beta from box[0] to box[1], the place of ln r from box[2] to box[3].

    Place 0 is where the law is a power law even at the smallest d, place 1 where even d = 1 is in the flat phase.
    """
    beta = np.exp(np.linspace(box[0], box[1], _GRID))[:, None]
    places = np.linspace(box[2], box[3], _GRID)
    lowest, highest = beta * math.log(smallest) - math.log(30), math.log(30)
    offsets = np.concatenate([np.zeros_like(beta), np.exp(lowest * (1 - places) + highest * places)], axis=1)
    return Shapes(exponents=np.repeat(beta.ravel(), _GRID + 1), offsets=offsets.ravel())


def _narrowed(box: tuple[float, float, float, float], near: Mask) -> tuple[float, float, float, float]:
    """Return the part of the box in which the shapes are near the best, with a cell around it."""
    along_beta, along_r = np.nonzero(near.reshape(_GRID, _GRID + 1))
    if not len(along_beta):
        return box
    beta, places = np.linspace(box[0], box[1], _GRID), np.linspace(box[2], box[3], _GRID)
    ends = [
        max(0, along_beta.min() - 1),
        min(_GRID - 1, along_beta.max() + 1),
        max(0, along_r.min() - 2),
        min(_GRID - 1, along_r.max()),
    ]
    return float(beta[ends[0]]), float(beta[ends[1]]), float(places[ends[2]]), float(places[ends[3]])


def _robust(phi: Array, y: Array) -> tuple[Array, Array]:
    """Fit b and e of every shape by the Huber cost of ln(fit / y), with reweighted least squares; return costs and fits."""
    z, weights = np.broadcast_to(y, phi.shape), 1 / y**2
    for _ in range(6):
        b, e, _ = solve(phi, z, weights).best
        fitted = b[:, None] * phi + e[:, None]
        deviation = np.log(fitted / y)
        # Far from the points the tangent of the logarithm leads astray.
        z = fitted * (1 - np.clip(deviation, -0.5, 0.5))
        weights = _huber_weights(deviation) / fitted**2
    return _huber(deviation).sum(axis=1), fitted


def _huber(deviation: Array) -> Array:
    """Return squares, which grow linearly beyond `HUBER_DELTA`."""
    size = np.abs(deviation)
    return np.where(size <= HUBER_DELTA, size**2, HUBER_DELTA * (2 * size - HUBER_DELTA))


def _huber_weights(deviation: Array, delta: float = HUBER_DELTA) -> Array:
    return np.asarray(delta / np.maximum(np.abs(deviation), delta))


def _chosen(shapes: Shapes, costs: Array, num: int) -> tuple[int, int]:
    """Return the best power law, or the best law of all where it is significantly better, and the number of its parameters."""
    power, rectified = int(np.where(shapes.offsets == 0, costs, np.inf).argmin()), int(costs.argmin())
    freedom = num - 4
    if freedom < 1:
        return power, 3
    cost = max(float(costs[rectified]), _ROUNDING)
    is_better = costs[power] - cost > cost / freedom * fdtri(1, freedom, SURE_OF_FLAT_PHASE)
    return (rectified, 4) if is_better else (power, 3)


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
