"""Held-out rows."""

from __future__ import annotations

import numpy as np

from trainables.splits import held_out


def test_rows_that_are_alike_are_held_out_together() -> None:
    rows = [f"text {i % 60}" for i in range(600)]
    held = held_out(rows, ["a" if i % 60 < 30 else "b" for i in range(600)], 0.1)
    inside, outside = ({rows[i] for i in np.flatnonzero(mask)} for mask in (held, ~held))
    assert not inside & outside
    assert (len(inside), held.sum()) == (6, 60)
    assert not held_out(["same"] * 20, [""] * 20, 0.1).any(), "there is nothing else to learn from"


def test_a_text_under_several_labels_is_on_one_side() -> None:
    rows = [f"text {i // 2}" for i in range(400)]
    held = held_out(rows, ["a", "b"] * 200, 0.2)
    assert held.sum() == 80
    assert (held[::2] == held[1::2]).all()


def test_where_all_rows_differ_they_are_those_of_every_version() -> None:
    """Results of before are compared with those of today."""
    held = held_out([f"text {i}" for i in range(50)], ["a", "b"] * 25, 0.1)
    assert np.flatnonzero(held).tolist() == [11, 21, 36, 46]


def test_a_class_of_texts_that_stood_under_others_before_is_not_held_out_whole() -> None:
    """Whichever text it shares."""
    for k in range(60):
        rows, labels = [*(f"text {i}" for i in range(60)), f"text {k}"], [*("ab"[i % 2] for i in range(60)), "c"]
        held = held_out(rows, labels, 0.1)
        assert not held[60], "its only row"
        assert held[k] == held[60]
        assert 5 <= held.sum() <= 6
