"""Values as people read them, the same in the live table, the front and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from spaces.metrics import metric_of


def number_text(metric: str, value: float | None) -> str:
    """Return a metric's value for people: percent for MFU, GiB for bytes, separators for rates."""
    if value is None:
        return "-"
    if metric in ("mfu", "hfu"):
        return f"{value:.1%}"
    match metric_of(metric).unit:
        case "B":
            return f"{value / 2**30:.2f} GiB"
        case "1/s":
            return f"{plain(value)}/s"
        case "s":
            return f"{plain(value)} s"
    return f"{value:.4g}"


def interval_text(metric: str, mean: float, half_width: float | None) -> str:
    """Return `mean ± half width` for people, both to the second digit of the half width; without one, the mean alone."""
    if half_width is None:
        return number_text(metric, mean)
    if half_width == 0:
        return f"{number_text(metric, mean)} ± 0"
    units = {"B": (2**-30, " GiB"), "1/s": (1, "/s"), "s": (1, " s")}
    factor, unit = (100, "%") if metric in ("mfu", "hfu") else units.get(metric_of(metric).unit, (1, ""))
    decimals = min(6, max(0, 1 - math.floor(math.log10(half_width * factor))))
    return f"{mean * factor:,.{decimals}f} ± {half_width * factor:,.{decimals}f}{unit}"


def plain(value: float, digits: int = 4) -> str:
    """Return an amount to so many digits, without an exponent; from 1,000 on whole."""
    return f"{value:,.0f}" if value >= 1000 else np.format_float_positional(value, digits, fractional=False, trim="-")


def short_text(value: Any) -> str:
    """Return a knob's value for people."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
