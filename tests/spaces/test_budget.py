"""The budget as it is written."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from spaces.budget import BudgetSpec, budget_overrides
from spaces.spec import SearchSpec

MODEL, DATA = {"name": "m", "task": "sequence-classification"}, {"train": "t.csv"}


def test_without_any_limit_there_are_twenty_trials_and_with_one_there_is_no_other():
    assert BudgetSpec().max_trials == 20
    assert BudgetSpec(trials=7, minutes=3).max_trials == 7
    for limit in ("minutes", "device_hours", "dollars"):
        assert BudgetSpec(**{limit: 3}).max_trials is None


@pytest.mark.parametrize(
    ("amounts", "limits"),
    [
        ([], {}),
        (["50trials"], {"trials": "50"}),
        (["30m"], {"minutes": "30"}),
        (["1.5h", "40usd"], {"minutes": "90", "dollars": "40"}),
        (["8gpu-hours", "0.25usd"], {"device_hours": "8", "dollars": "0.25"}),
    ],
)
def test_amounts_of_the_command_line_replace_the_limits_of_the_file(amounts, limits):
    known = dict.fromkeys(("trials", "minutes", "device_hours", "dollars"), "") | limits
    assert budget_overrides(amounts) == ([f"budget.{k}={v}" for k, v in known.items()] if amounts else [])


@pytest.mark.parametrize("text", ["30", "m", "$40", "0", "-3m", "30 min", "2d", "1e3m", "50 trials", "30m,2h"])
def test_an_amount_without_a_known_unit_is_none(text):
    with pytest.raises(ValueError, match=r"--budget .*: not a budget; allowed: 50trials, 30m, 2h, 8gpu-hours, 40usd"):
        budget_overrides([text])


def test_a_limit_stands_once():
    with pytest.raises(ValueError, match="--budget 2h: the budget in minutes stands twice"):
        budget_overrides(["30m", "2h"])


def test_dollars_need_a_price():
    SearchSpec.model_validate({"model": MODEL, "data": DATA, "budget": {"dollars": 5}, "resources": {"price_per_device_hour": 2.5}})
    with pytest.raises(ValidationError, match="dollars without a price"):
        SearchSpec.model_validate({"model": MODEL, "data": DATA, "budget": {"dollars": 5}})
