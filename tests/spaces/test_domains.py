from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from spaces.domains import Choice, Fixed, IntRange, LogUniform, Uniform, Within
from spaces.forms import FloatDomain, IntDomain

Positive = Annotated[float, Within(gt=0, le=10)]
Count = Annotated[int, Within(ge=1, le=1000)]
FLOATS: TypeAdapter[Any] = TypeAdapter(FloatDomain[Positive])
INTS: TypeAdapter[Any] = TypeAdapter(IntDomain[Count])


class Replay:
    """A suggester that answers from given params, and fails where something else is asked."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.params = params
        self.asked: list[str] = []

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        self.asked.append(name)
        assert low <= self.params[name] <= high
        assert not log or low > 0
        return float(self.params[name])

    def suggest_int(self, name: str, low: int, high: int) -> int:
        self.asked.append(name)
        assert low <= self.params[name] <= high
        return int(self.params[name])

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        self.asked.append(name)
        assert self.params[name] in choices
        return self.params[name]


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        (0.5, Fixed),
        (2, Fixed),
        ({"choice": [1.0, 2.0]}, Choice),
        ({"uniform": [0.1, 1]}, Uniform),
        ({"log_uniform": [1e-5, 1e-3]}, LogUniform),
    ],
)
def test_forms_of_a_number_are_told_apart_and_written_back_as_they_were(written, kind):
    domain = FLOATS.validate_python(written)
    assert isinstance(domain, kind)
    assert FLOATS.dump_python(domain, mode="json") == written


@pytest.mark.parametrize(
    "written",
    [
        "0.5",
        True,
        None,
        math.nan,
        math.inf,
        0,
        10.5,
        [0.1, 0.2],
        {},
        {"int": [1, 2]},
        {"uniform": [0.1, 0.2], "choice": [1.0]},
        {"choice": []},
        {"choice": 3},
        {"choice": [1, 1.0]},
        {"uniform": [0.2, 0.1]},
        {"uniform": [0.1, 0.1]},
        {"uniform": [0.1]},
        {"uniform": [0.1, 0.2, 0.3]},
        {"uniform": ["0.1", "0.2"]},
        {"log_uniform": [0, 1]},
    ],
)
def test_what_is_no_domain_of_a_positive_number_is_refused(written):
    with pytest.raises(ValidationError):
        FLOATS.validate_python(written)


def test_log_of_zero_is_refused_where_zero_itself_is_allowed():
    with pytest.raises(ValidationError, match="logarithm"):
        LogUniform[Annotated[float, Within(ge=0)]](log_uniform=(0.0, 1.0))


@pytest.mark.parametrize("written", [4.0, 1.5, {"choice": [4, 8.0]}, {"int": [1, 2.5]}, {"uniform": [1, 2]}])
def test_an_integer_is_nothing_else(written):
    with pytest.raises(ValidationError):
        INTS.validate_python(written)


def test_one_value_asks_nothing():
    silent = Replay({})
    assert INTS.validate_python(4).suggest("k", silent) == 4
    assert INTS.validate_python({"choice": [4]}).suggest("k", silent) == 4
    assert silent.asked == []


def test_numbers_are_suggested_by_their_place_in_ascending_order():
    domain = INTS.validate_python({"choice": [16, 4, 8]})
    assert [domain.suggest("k", Replay({"k_index": i})) for i in range(3)] == [4, 8, 16]
    assert domain.ends() == [16, 4, 8]


def test_names_are_suggested_as_they_are():
    domain = Choice[str](choice=("ddp", "fsdp"))
    assert domain.suggest("k", Replay({"k": "fsdp"})) == "fsdp"


DOMAINS = st.one_of(
    st.integers(1, 1000).map(INTS.validate_python),
    st.lists(st.integers(1, 1000), min_size=1, max_size=6, unique=True).map(lambda v: INTS.validate_python({"choice": v})),
    st.tuples(st.integers(1, 500), st.integers(501, 1000)).map(lambda v: INTS.validate_python({"int": v})),
    st.tuples(st.floats(0.01, 1), st.floats(1.5, 10)).map(lambda v: FLOATS.validate_python({"uniform": v})),
    st.tuples(st.floats(0.01, 1), st.floats(1.5, 10)).map(lambda v: FLOATS.validate_python({"log_uniform": v})),
    st.permutations(["a", "b", "c"]).map(lambda v: Choice[str](choice=tuple(v))),
)


@given(DOMAINS)
def test_encode_is_what_suggest_reads_back(domain):
    for value in domain.ends():
        assert domain.suggest("k", Replay(domain.encode("k", value))) == value


@given(DOMAINS)
def test_a_value_outside_is_not_encoded(domain):
    with pytest.raises(ValueError, match="k "):
        domain.encode("k", "zzz" if isinstance(domain.ends()[0], str) else 2000)


def test_optuna_is_a_suggester_and_reaches_every_value():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    choice, integers = INTS.validate_python({"choice": [4, 8, 16]}), INTS.validate_python({"int": [1, 3]})
    logs = LogUniform[Positive](log_uniform=(1e-4, 1.0))
    seen: Counter[tuple[str, Any]] = Counter()
    small = 0
    for _ in range(200):
        trial = study.ask()
        seen["choice", choice.suggest("a", trial)] += 1
        seen["int", integers.suggest("b", trial)] += 1
        small += logs.suggest("c", trial) < 1e-2
    assert set(seen) == {("choice", 4), ("choice", 8), ("choice", 16), ("int", 1), ("int", 2), ("int", 3)}
    # Half of the orders of magnitude lie below 1e-2, and a hundredth of a uniform range.
    assert 70 < small < 130


@pytest.mark.parametrize("value", [2, 2.0])
def test_an_integer_of_a_range_may_be_given_as_a_float(value: float) -> None:
    """As earlier searches have it, whose space had a choice of floats."""
    encoded = INTS.validate_python({"int": [1, 3]}).encode("epochs", value)
    assert encoded == {"epochs": 2}
    assert type(encoded["epochs"]) is int


def test_int_range_stands_beside_floats_only_where_it_is_meant():
    assert isinstance(INTS.validate_python({"int": [1, 3]}), IntRange)
