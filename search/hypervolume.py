"""Exact hypervolume of two or three objectives, all minimised."""

from __future__ import annotations

import numpy as np


def hypervolume(points: np.ndarray, reference: np.ndarray) -> float:
    """Return the volume that is dominated by the points and dominates the reference point.

    Args:
        points: float (n, d), d of 2 or 3, smaller is better; points that are not better than the reference everywhere add
            nothing.
        reference: float (d,)

    Raises:
        ValueError: d is neither 2 nor 3.

    The three-dimensional one slices along the last objective and adds up areas: O(n² log n).
    """
    dims = len(reference)
    if dims not in (2, 3):
        raise ValueError(f"hypervolume is computed for 2 or 3 objectives, got {dims}")
    points = points.reshape(-1, dims)
    points = points[(points < reference).all(axis=1)]
    return _area(points, reference) if dims == 2 else _volume(points, reference)


def _area(points: np.ndarray, reference: np.ndarray) -> float:
    area, height = 0.0, reference[1]
    for x, y in points[np.lexsort((points[:, 1], points[:, 0]))]:
        if y < height:
            area += (reference[0] - x) * (height - y)
            height = y
    return float(area)


def _volume(points: np.ndarray, reference: np.ndarray) -> float:
    points = points[np.argsort(points[:, 2])]
    tops = np.append(points[1:, 2], reference[2])
    slices = zip(points[:, 2], tops, strict=True) if len(points) else ()
    return sum(_area(points[:i, :2], reference[:2]) * (top - low) for i, (low, top) in enumerate(slices, start=1))
