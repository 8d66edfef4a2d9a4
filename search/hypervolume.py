"""Exact hypervolume of two or three minimised objectives: what a set of points dominates, up to a reference point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Return the volume between the points and the reference that at least one point dominates.

    Args:
        points: (num_points, num_objectives), to be minimised; dominated and repeated points change nothing, and points
            that are not better than the reference in every objective contribute nothing.
        reference: (num_objectives,).

    Raises:
        ValueError: the number of objectives is not 2 or 3, the shapes differ, or a value is not finite.
    """
    corner = np.asarray(reference, dtype=np.float64)
    if corner.shape not in ((2,), (3,)):
        raise ValueError(f"the reference has shape {corner.shape}; allowed: (2,) or (3,)")
    rows = np.asarray(points, dtype=np.float64).reshape(-1, corner.size) if np.size(points) == 0 else np.asarray(points, float)
    if rows.ndim != 2 or rows.shape[1] != corner.size:
        raise ValueError(f"the points have shape {rows.shape}; allowed: (any, {corner.size})")
    if not (np.isfinite(rows).all() and np.isfinite(corner).all()):
        raise ValueError("points and reference must be finite")
    inside = rows[(rows < corner).all(axis=1)]
    return _area(inside, corner) if corner.size == 2 else _volume(inside, corner)


def _area(points: Points, corner: Points) -> float:
    """Sweep by ascending x: each point that lowers y adds the rectangle between its y and the lowest y so far."""
    area, lowest = 0.0, float(corner[1])
    for x, y in points[np.lexsort((points[:, 1], points[:, 0]))]:
        if y < lowest:
            area += (float(corner[0]) - float(x)) * (lowest - float(y))
            lowest = float(y)
    return area


def _volume(points: Points, corner: Points) -> float:
    """Sweep by ascending z: between two points' z, the cross-section is the area that the points below it dominate.

    O(n^2 log n), which is milliseconds for the hundreds of trials of a search.
    """
    ordered = points[np.argsort(points[:, 2], kind="stable")]
    tops = np.append(ordered[:, 2], corner[2])[1:]
    volume = 0.0
    for count, (bottom, top) in enumerate(zip(ordered[:, 2], tops, strict=True), start=1):
        if top > bottom:
            volume += _area(ordered[:count, :2], corner[:2]) * float(top - bottom)
    return volume
