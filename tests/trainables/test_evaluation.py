"""Scores from closed forms; that they are those of rows one by one, at any world size, is in `equivalence`."""

from __future__ import annotations

import pytest
import torch

from trainables.evaluation import _macro_f1


def test_macro_f1_is_the_mean_over_the_classes_that_occur() -> None:
    # Class 0: 3 right of 4 targets and 4 predictions. Class 1: 1 of 2 and 1. Class 2 was only predicted, class 3 is nowhere.
    confusion = torch.tensor([[3, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    precision, recall = (3 / 4, 1 / 1, 0), (3 / 4, 1 / 2, 0)
    f1 = [2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(precision, recall, strict=True)]
    assert _macro_f1(confusion.double()) == pytest.approx(sum(f1) / 3)
