"""Which rows are held out, in which order fractions of the others grow, and in which classes stand."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

import numpy as np

# Holding out must not depend on the search's seed: two searches on the same data then compare.
SPLIT_SEED = 20_240_901


def held_out(rows: Sequence[Hashable], labels: Sequence[str], share: float) -> np.ndarray:
    """Return a mask of the held-out rows, bool (num_rows,): the share of every class, and never its last row.

    Rows that are alike are held out together, or a score would tell what was learned by heart. Of classes too small for a row of
    their own, the largest give one, until all of them together have given their share.

    Args:
        rows: what a model sees of each; of a text under several labels the first one counts.
        labels: their classes.
        share: of the rows that differ.
    """
    places: dict[Hashable, int] = {}
    of_row = np.array([places.setdefault(row, len(places)) for row in rows])
    _, first = np.unique(of_row, return_index=True)
    classes = [labels[i] for i in first]
    members: dict[str, list[int]] = {}
    for place in np.random.default_rng(SPLIT_SEED).permutation(len(places)):
        members.setdefault(classes[place], []).append(int(place))
    held = np.zeros(len(places), dtype=bool)
    for of_class in members.values():
        held[of_class[: round(len(of_class) * share)]] = True
    small = sorted((own for own in members.values() if len(own) > 1 and round(len(own) * share) == 0), key=len, reverse=True)
    held[[own[0] for own in small[: round(share * sum(map(len, small)))]]] = True
    mask = held[of_row]
    # A class of which every row has a text that stood under another one before keeps them.
    lost = set(labels) - {label for label, is_held in zip(labels, mask, strict=True) if not is_held}
    if lost:
        held[of_row[[label in lost for label in labels]]] = False
    return held[of_row]


def stratified_key(classes: Sequence[Hashable]) -> np.ndarray:
    """Return each row's place in a random order of its class, as a share of the class: float64 (num_rows,).

    Rows with a key below f are then f of every class, rounded up, and every class keeps a row.
    """
    members: dict[Hashable, list[int]] = {}
    for row in np.random.default_rng(SPLIT_SEED).permutation(len(classes)):
        members.setdefault(classes[row], []).append(int(row))
    key = np.empty(len(classes))
    for rows in members.values():
        key[rows] = np.arange(len(rows)) / len(rows)
    return key


def class_order(name: str) -> tuple[list[str | int], str]:
    """Return what puts class 2 before class 10, as whoever numbers classes does."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))], name
