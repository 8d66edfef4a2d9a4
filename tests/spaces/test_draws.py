"""Points that are drawn by chance."""

from __future__ import annotations

import random

import numpy as np
import pytest

from spaces.draws import Draw
from spaces.space import SpaceSpec

SPACE = SpaceSpec.model_validate(
    {"adapter": {"choice": ["none", "lora"]}, "epochs": {"int": [1, 9]}, "dataset_fraction": {"log_uniform": [0.01, 1.0]}}
)


def test_an_even_draw_spreads_over_the_whole_space() -> None:
    rng = random.Random(0)
    points = [SPACE.suggest(Draw(rng)) for _ in range(2000)]
    assert sum(p["adapter"] == "lora" for p in points) / 2000 == pytest.approx(0.5, abs=0.05)
    assert np.mean([p["epochs"] for p in points]) == pytest.approx(5.0, abs=0.3)
    assert np.mean(np.log10([p["dataset_fraction"] for p in points])) == pytest.approx(-1.0, abs=0.06)


def test_a_draw_near_a_point_keeps_a_share_of_its_values_and_moves_numbers_a_little_inside_the_range() -> None:
    rng = random.Random(0)
    point = SPACE.first(adapter="none", epochs=9, dataset_fraction=0.1)
    near = [SPACE.suggest(Draw(rng, near=SPACE.encode(point))) for _ in range(2000)]
    assert all(SPACE.holds(each) for each in near)
    # 0.6 are kept, and half of the others come to the same by chance.
    assert sum(p["adapter"] == "none" for p in near) / 2000 == pytest.approx(0.8, abs=0.04)
    # Kept ones lie within a tenth of the range's logarithm, as standard deviation.
    logs = np.log10([p["dataset_fraction"] for p in near]) + 1
    assert np.mean(np.abs(logs) < 0.2) == pytest.approx(0.6 * 0.683 + 0.4 * 0.2, abs=0.04)
    assert {8, 9} <= {p["epochs"] for p in near}
    assert sum(p["epochs"] == 8 for p in near) > 0.4 * 2000 / 9 * 1.2, "integers are moved too"
