"""Recipes are timed compiled as long as that may pay."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from engines import Profiles, make, report

from search.engine import Engine
from spaces.config import TrialConfig

SPACE: dict[str, Any] = {"learning_rate": 1e-3, "dataset_fraction": 1.0, "lora_rank": 4, "compile": {"profile": ["none", "blocks"]}}


class Compiled(Profiles):
    """Compiling takes half a minute, and saves a share of what follows."""

    def __init__(self, saved: float) -> None:
        super().__init__()
        self.saved = saved

    def values_under(self, config: TrialConfig, trained: TrialConfig, values: Mapping[str, float]) -> dict[str, float]:
        assert config.layout.compile == "blocks"
        return {**values, "train_seconds": 30 + (1 - self.saved) * values["train_seconds"], "compile_seconds": 30.0}


def timed(engine: Engine, seconds: dict[int, float]) -> list[int]:
    """Train a recipe of each batch size for so long; return the batch sizes that were timed compiled."""
    found = []
    while (assignment := engine.next()) is not None:
        size = assignment.config.recipe.global_batch_size
        if assignment.is_trained:
            (engine._store.trial_path(assignment.number) / "final").mkdir(parents=True, exist_ok=True)
            engine.reported(assignment.number, report(0.5, seconds[size]))
            engine.ended(assignment.number, {"state": "complete"})
        else:
            found.append(size)
            engine.ended(assignment.number, {"state": "complete", "profile": {}})
    return found


def searched(directory: Path, saved: float, seconds: dict[int, float]) -> Engine:
    points = [{"global_batch_size": size} for size in seconds]
    sizes = {"choice": list(seconds)}
    return make(
        directory, trials=len(seconds), points=points, sampler="points", outlook=Compiled(saved), global_batch_size=sizes, **SPACE
    )[0]


@pytest.mark.parametrize(
    ("saved", "worth"),
    [
        # A tenth of 299 s is less than half a minute, and of 301 s more.
        (0.0, [8, 32]),
        # Up to 70 % of 42 s are less than half a minute, and of 44 s more.
        (0.3, [8, 24, 32, 48]),
    ],
)
def test_compiled_steps_are_timed_where_what_was_saved_before_would_pay_for_compiling(
    saved: float, worth: list[int], tmp_path: Path
) -> None:
    seconds = {8: 10.0, 16: 42.0, 24: 299.0, 32: 301.0, 48: 44.0}
    engine = searched(tmp_path, saved, seconds)
    assert timed(engine, seconds) == worth
    # A resume knows it too.
    assert timed(searched(tmp_path, saved, seconds), seconds) == []


def test_the_first_compilation_is_tried_however_short_the_training(tmp_path: Path) -> None:
    assert timed(searched(tmp_path, 0.5, {8: 0.1, 16: 0.1}), {8: 0.1, 16: 0.1}) == [8]
