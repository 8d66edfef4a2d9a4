"""What one knob may be: a fixed value, a choice, an integer range, or a uniform or log-uniform range.

In the user's file a bare scalar is a fixed value; everything else is a mapping with one key:
`{choice: [4, 8]}`, `{int: [1, 3]}`, `{uniform: [0.1, 1.0]}`, `{log_uniform: [1e-5, 1e-3]}`, for the learning rate
`{by_adapter: {none: ..., lora: ...}}`, and for what only changes how fast a trial runs `{profile: [1, 2]}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    RootModel,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

T = TypeVar("T")
V = TypeVar("V")
N = TypeVar("N")

# Marks the union tags in pydantic's error locations, so that they can be left out of what the user reads.
TAG_PREFIX = "kind:"


class Suggester(Protocol):
    """What proposes values; an Optuna trial is one."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class Domain(Protocol):
    """What every domain answers."""

    @property
    def is_searched(self) -> bool:
        """Whether there is more than one value."""

    def suggest(self, name: str, suggester: Suggester) -> Any:
        """Return a value; a domain with one value asks the suggester nothing."""

    def encode(self, name: str, value: Any) -> dict[str, Any]:
        """Return the suggester's params that make `suggest` return this value.

        Raises:
            ValueError: the value is not in the domain.
        """

    def ends(self) -> list[Any]:
        """Return all values of a choice, or the two ends of a range; the first is the one to take when any will do."""


@dataclass(frozen=True)
class Within:
    """Annotates a number with the range that it must lie in; the error names the whole range, not the missed bound."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        bounds: dict[str, Any] = {k: v for k, v in vars(self).items() if v is not None}
        if source is int:
            schema: CoreSchema = core_schema.int_schema(strict=True, **bounds)
        else:
            schema = core_schema.float_schema(strict=True, allow_inf_nan=False, **bounds)
        return core_schema.no_info_before_validator_function(lambda value: self._check(value, source is int), schema)

    def _check(self, value: Any, whole: bool) -> Any:
        context = {"allowed": self.text(whole)}
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise PydanticCustomError("not_a_number", "not an integer" if whole else "not a number", context)
        if not math.isfinite(value):
            raise PydanticCustomError("not_finite", "not finite", context)
        low = (self.gt is None or value > self.gt) and (self.ge is None or value >= self.ge)
        high = (self.lt is None or value < self.lt) and (self.le is None or value <= self.le)
        if not (low and high):
            raise PydanticCustomError("out_of_range", "out of range", context)
        return value

    def text(self, whole: bool) -> str:
        """Return the range in words: `a number above 0 and at most 1`."""
        bounds = {"above": self.gt, "at least": self.ge, "below": self.lt, "at most": self.le}
        words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
        return f"{'an integer' if whole else 'a number'} {words}".rstrip()


def _title(model: type) -> str:
    """`Choice` rather than `Choice[Annotated[float, Within(...)]]`, for editors that show the JSON schema's titles."""
    return model.__name__.partition("[")[0]


class Fixed(RootModel[T], Generic[T]):
    """One value, written as itself."""

    model_config = ConfigDict(frozen=True, model_title_generator=_title)
    kind: ClassVar[str] = "fixed"

    @property
    def is_searched(self) -> bool:
        return False

    def suggest(self, name: str, suggester: Suggester) -> T:
        """Return the value."""
        return self.root

    def encode(self, name: str, value: T) -> dict[str, Any]:
        """Return nothing: nothing is asked."""
        if value != self.root:
            raise ValueError(f"{name} is fixed to {self.root!r}, got {value!r}")
        return {}

    def ends(self) -> list[T]:
        """Return the value."""
        return [self.root]


class OneKey(BaseModel):
    """A mapping with one key."""

    model_config = ConfigDict(extra="forbid", frozen=True, model_title_generator=_title)


class _Values(OneKey, Generic[T]):
    """Several values, each once."""

    @field_validator("*", mode="before")
    @classmethod
    def _is_list(cls, values: Any) -> Any:
        if not isinstance(values, list | tuple) or not values:
            raise PydanticCustomError("not_a_list", "not a list of values", {"allowed": "a list with at least one value"})
        return values

    @field_validator("*")
    @classmethod
    def _distinct(cls, values: tuple[T, ...]) -> tuple[T, ...]:
        if len(set(values)) < len(values):
            raise PydanticCustomError("repeated", "a value stands twice", {"allowed": "each value once"})
        return values


class Profile(_Values[T], Generic[T]):
    """Several values that are all measured, instead of one that is proposed."""

    kind: ClassVar[str] = "profile"
    profile: tuple[T, ...] = Field(min_length=1)
    """The values."""

    @property
    def is_searched(self) -> bool:
        return len(self.profile) > 1

    def suggest(self, name: str, suggester: Suggester) -> T:
        """Return the first value: nothing is asked, and each of the others gets its turn."""
        return self.profile[0]

    def encode(self, name: str, value: T) -> dict[str, Any]:
        """Return nothing: nothing is asked."""
        if value not in self.profile:
            raise ValueError(f"{name} is one of {list(self.profile)}, got {value!r}")
        return {}

    def ends(self) -> list[T]:
        """Return all values, in the user's order."""
        return list(self.profile)


class Choice(_Values[T], Generic[T]):
    """One of several values. Numbers stay ordered: the sampler is asked for an index into the ascending values."""

    kind: ClassVar[str] = "choice"
    choice: tuple[T, ...] = Field(min_length=1)
    """The values."""

    @property
    def is_searched(self) -> bool:
        return len(self.choice) > 1

    def suggest(self, name: str, suggester: Suggester) -> T:
        """Return one of the values."""
        if not self.is_searched:
            return self.choice[0]
        ordered = self._ascending()
        if ordered is None:
            chosen: T = suggester.suggest_categorical(name, self.choice)
            return chosen
        return ordered[suggester.suggest_int(f"{name}_index", 0, len(ordered) - 1)]

    def encode(self, name: str, value: T) -> dict[str, Any]:
        """Return the index of a number, or the value itself."""
        if value not in self.choice:
            raise ValueError(f"{name} is one of {list(self.choice)}, got {value!r}")
        if not self.is_searched:
            return {}
        ordered = self._ascending()
        return {name: value} if ordered is None else {f"{name}_index": ordered.index(value)}

    def ends(self) -> list[T]:
        """Return all values, in the user's order."""
        return list(self.choice)

    def _ascending(self) -> list[T] | None:
        """The values by size, or None where they have none."""
        if any(isinstance(value, str) for value in self.choice):
            return None
        return sorted(self.choice)  # type: ignore[type-var]


class _Range(OneKey, Generic[T]):
    """A low and a high end, both included."""

    kind: ClassVar[str]
    is_whole: ClassVar[bool] = False

    @field_validator("*", mode="before")
    @classmethod
    def _is_pair(cls, bounds: Any) -> Any:
        if not isinstance(bounds, list | tuple) or len(bounds) != 2:
            raise PydanticCustomError("not_a_pair", "not a range", {"allowed": "[low, high]"})
        return bounds

    @field_validator("*")
    @classmethod
    def _is_ascending(cls, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        context = {"allowed": "[low, high] with low < high"}
        if low > high:
            context["nearest"] = f"[{high:g}, {low:g}]"
            raise PydanticCustomError("reversed", "the range is reversed", context)
        if low == high:
            context["nearest"] = f"{low:g}"
            raise PydanticCustomError("empty_range", "the range holds one value", context)
        return bounds

    @property
    def is_searched(self) -> bool:
        return True

    @property
    def bounds(self) -> tuple[Any, Any]:
        """Low and high end."""
        low, high = getattr(self, self.kind)
        return low, high

    def encode(self, name: str, value: Any) -> dict[str, Any]:
        """Return the value itself, of an integer also where it is given as 2.0."""
        low, high = self.bounds
        if self.is_whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        number = int if self.is_whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, number) or not low <= value <= high:
            what = "is an integer" if self.is_whole else "lies"
            raise ValueError(f"{name} {what} in [{low:g}, {high:g}], got {value!r}")
        return {name: value}

    def ends(self) -> list[Any]:
        """Return the low and the high end."""
        return list(self.bounds)


class IntRange(_Range[T], Generic[T]):
    """An integer in `[low, high]`."""

    kind: ClassVar[str] = "int"
    is_whole: ClassVar[bool] = True
    int: tuple[T, T]
    """Low and high end, both included."""

    def suggest(self, name: str, suggester: Suggester) -> Any:
        """Return an integer."""
        low, high = self.bounds
        return suggester.suggest_int(name, low, high)


class Uniform(_Range[T], Generic[T]):
    """A number in `[low, high]`, every part of the range as likely."""

    kind: ClassVar[str] = "uniform"
    uniform: tuple[T, T]
    """Low and high end."""

    def suggest(self, name: str, suggester: Suggester) -> float:
        """Return a number."""
        low, high = self.bounds
        return suggester.suggest_float(name, low, high)


class LogUniform(_Range[T], Generic[T]):
    """A number in `[low, high]`, every order of magnitude as likely."""

    kind: ClassVar[str] = "log_uniform"
    log_uniform: tuple[T, T]
    """Low and high end, both above 0."""

    @field_validator("log_uniform")
    @classmethod
    def _is_positive(cls, bounds: tuple[T, T]) -> tuple[T, T]:
        if bounds[0] == 0:
            raise PydanticCustomError("log_of_zero", "a logarithm has no zero", {"allowed": "[low, high] with 0 < low < high"})
        return bounds

    def suggest(self, name: str, suggester: Suggester) -> float:
        """Return a number."""
        low, high = self.bounds
        return suggester.suggest_float(name, low, high, log=True)


@dataclass(frozen=True)
class Position:
    """A range of real numbers that is asked for by the position between its ends, from 0 to 1.

    Ranges that belong together then mean the same to whoever learns from them, wherever they lie.
    """

    range: Uniform[Any] | LogUniform[Any]

    @property
    def is_searched(self) -> bool:
        return True

    def suggest(self, name: str, suggester: Suggester) -> float:
        """Return a number of the range, to ten digits, so that the encoding of a number gives that number again."""
        low, high = self._ends()
        value = self._outer(low + suggester.suggest_float(f"{name}_position", 0.0, 1.0) * (high - low))
        least, most = self.range.bounds
        return min(max(float(f"{value:.10g}"), least), most)

    def encode(self, name: str, value: Any) -> dict[str, Any]:
        """Return the position of a number; ValueError where the range does not hold it."""
        self.range.encode(name, value)
        low, high = self._ends()
        return {f"{name}_position": min(max((self._inner(value) - low) / (high - low), 0.0), 1.0)}

    def ends(self) -> list[Any]:
        """Return the low and the high end of the range."""
        return self.range.ends()

    def _ends(self) -> tuple[float, float]:
        low, high = self.range.bounds
        return self._inner(low), self._inner(high)

    def _inner(self, value: float) -> float:
        return math.log(value) if isinstance(self.range, LogUniform) else value

    def _outer(self, value: float) -> float:
        return math.exp(value) if isinstance(self.range, LogUniform) else value
