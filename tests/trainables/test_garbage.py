"""Python searches for garbage between the steps of a training, and not in them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from memory_grid import Case

from trainables.loop import Trainer
from trainables.mesh import World


def test_no_garbage_is_searched_for_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(family="llama", adapter="all-linear")
    trainer = Trainer(case.config(1), case.data(4), case.base(), World.alone(), checkpoints=None)
    in_step, searches = False, []
    step = trainer._timer.step

    @contextmanager
    def watched(**how: Any) -> Iterator[Any]:
        nonlocal in_step
        with step(**how) as mark:
            in_step = True
            yield mark
            in_step = False

    def note(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            searches.append(in_step)

    monkeypatch.setattr(trainer._timer, "step", watched)
    thresholds = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(20, 5, 5)  # a step makes hundreds of objects
    try:
        for _ in range(trainer.num_steps):
            trainer.train_step()
        found = [[] for _ in range(100)]
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(note)
    assert len(found) == 100
    assert searches, "between the steps they come"
    assert not any(searches)
    assert gc.isenabled()
