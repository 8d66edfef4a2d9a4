"""Laws of the form b phi + e over a grid of shapes phi: solved exactly, robustly, and on ever finer grids where they fit.

With d as a share of the largest number of rows, the law of `search.scaling` is L = b phi + e, where phi = (r + 1) / (r + d^beta) is 1
at the largest. Here are the pairs of beta and r, and the b and e that fit each best.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

EXPONENTS = (0.05, 3.0)
# In the logarithm of the loss: trials that differ in their seed alone are mostly nearer to each other.
HUBER_DELTA = 0.01
# Squares of relative deviations below this are rounding.
ROUNDING = 1e-12
_GRID = 44
# How much worse than the best a shape may be, relative, to be within the next grid: first for the intervals, which mostly go to about
# 0.6, and then to find the best one.
FOR_INTERVALS, FOR_BEST = (3.0, 1.0, 0.5), (0.1, 0.01, 0.001)


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


def search_shapes(d: Array, cost_of: Callable[[Array], Array]) -> Shapes:
    """Return shapes over all that is allowed, ever denser where the cost of their basis at d is low."""
    box, lowest = (math.log(EXPONENTS[0]), math.log(EXPONENTS[1]), 0.0, 1.0), math.inf
    found = []
    for margin in (*FOR_INTERVALS, *FOR_BEST):
        found.append(_grid(box, float(d.min())))
        costs = cost_of(found[-1].basis(d))
        lowest = min(lowest, float(costs.min()))
        box = _narrowed(box, costs <= max(ROUNDING, lowest) * (1 + margin))
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


def robust(phi: Array, y: Array) -> tuple[Array, Array]:
    """Fit b and e of every shape by the Huber cost of ln(fit / y), with reweighted least squares; return costs and fits."""
    z, weights = np.broadcast_to(y, phi.shape), 1 / y**2
    for _ in range(6):
        b, e, _ = solve(phi, z, weights).best
        fitted = b[:, None] * phi + e[:, None]
        deviation = np.log(fitted / y)
        z = tangent(fitted, deviation)
        weights = huber_weights(deviation) / fitted**2
    return _huber(deviation).sum(axis=1), fitted


def tangent(fitted: Array, deviation: Array) -> Array:
    """Return the losses whose relative deviation from a fit is the given one of the logarithm; far from the fit that leads astray."""
    return np.asarray(fitted * (1 - np.clip(deviation, -0.5, 0.5)))


def _huber(deviation: Array) -> Array:
    """Return squares, which grow linearly beyond `HUBER_DELTA`."""
    size = np.abs(deviation)
    return np.where(size <= HUBER_DELTA, size**2, HUBER_DELTA * (2 * size - HUBER_DELTA))


def huber_weights(deviation: Array, delta: float = HUBER_DELTA) -> Array:
    """Return what turns the Huber cost into weighted squares."""
    return np.asarray(delta / np.maximum(np.abs(deviation), delta))
