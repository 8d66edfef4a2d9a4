"""What each knob accepts: unions of domains, told apart by the one key that they are written with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Discriminator, Tag, model_serializer
from typing_extensions import TypeAliasType

from spaces.domains import TAG_PREFIX, Choice, Domain, Fixed, IntRange, LogUniform, OneKey, Profile, Uniform, Within

V = TypeVar("V")
N = TypeVar("N")


def kind_of(value: Any) -> str:
    """Return the union tag of a domain as the user wrote it; one that no union knows where the form itself is wrong."""
    if isinstance(value, Mapping):
        return TAG_PREFIX + (str(next(iter(value))) if len(value) == 1 else "several")
    if isinstance(value, list | tuple):
        return f"{TAG_PREFIX}list"
    return TAG_PREFIX + str(getattr(value, "kind", "fixed"))


# `TypeAliasType`, since typing puts no type argument into a pydantic class inside `Annotated`.
NameDomain = TypeAliasType(
    "NameDomain",
    Annotated[Annotated[Fixed[V], Tag("kind:fixed")] | Annotated[Choice[V], Tag("kind:choice")], Discriminator(kind_of)],
    type_params=(V,),
)
"""Unordered values."""
IntDomain = TypeAliasType(
    "IntDomain",
    Annotated[
        Annotated[Fixed[V], Tag("kind:fixed")] | Annotated[Choice[V], Tag("kind:choice")] | Annotated[IntRange[V], Tag("kind:int")],
        Discriminator(kind_of),
    ],
    type_params=(V,),
)
"""Whole numbers."""
LayoutNameDomain = TypeAliasType(
    "LayoutNameDomain",
    Annotated[
        Annotated[Fixed[V], Tag("kind:fixed")]
        | Annotated[Choice[V], Tag("kind:choice")]
        | Annotated[Profile[V], Tag("kind:profile")],
        Discriminator(kind_of),
    ],
    type_params=(V,),
)
"""Unordered values that only change how fast a trial runs."""
LayoutIntDomain = TypeAliasType(
    "LayoutIntDomain",
    Annotated[
        Annotated[Fixed[V], Tag("kind:fixed")]
        | Annotated[Choice[V], Tag("kind:choice")]
        | Annotated[IntRange[V], Tag("kind:int")]
        | Annotated[Profile[V], Tag("kind:profile")],
        Discriminator(kind_of),
    ],
    type_params=(V,),
)
"""Whole numbers that only change how fast a trial runs."""
FloatDomain = TypeAliasType(
    "FloatDomain",
    Annotated[
        Annotated[Fixed[V], Tag("kind:fixed")]
        | Annotated[Choice[V], Tag("kind:choice")]
        | Annotated[Uniform[V], Tag("kind:uniform")]
        | Annotated[LogUniform[V], Tag("kind:log_uniform")],
        Discriminator(kind_of),
    ],
    type_params=(V,),
)
"""Real numbers."""
NumberDomain = TypeAliasType(
    "NumberDomain",
    Annotated[
        Annotated[Fixed[V], Tag("kind:fixed")]
        | Annotated[Choice[V], Tag("kind:choice")]
        | Annotated[IntRange[N], Tag("kind:int")]
        | Annotated[Uniform[V], Tag("kind:uniform")]
        | Annotated[LogUniform[V], Tag("kind:log_uniform")],
        Discriminator(kind_of),
    ],
    type_params=(V, N),
)
"""Real numbers `V` of which whole ones `N` make a sensible range too."""

HIGHEST_RATE = 10
LearningRate = Annotated[float, Within(gt=0, le=HIGHEST_RATE)]


class PerAdapter(OneKey):
    """A domain for each adapter that the space holds."""

    none: FloatDomain[LearningRate] | None = None
    """Full fine-tuning."""
    lora: FloatDomain[LearningRate] | None = None
    """LoRA, whose best learning rate is about ten times that of full fine-tuning."""
    rslora: FloatDomain[LearningRate] | None = None
    """rsLoRA, whose update is larger by the square root of the rank, and whose best learning rate is as much smaller."""
    dora: FloatDomain[LearningRate] | None = None
    """DoRA, whose best learning rate is about LoRA's."""
    vera: FloatDomain[LearningRate] | None = None
    """VeRA, whose best learning rate is about ten times LoRA's."""
    ia3: FloatDomain[LearningRate] | None = None
    """(IA)3, whose vectors begin at one."""
    oft: FloatDomain[LearningRate] | None = None
    """OFT, whose best learning rate is some times LoRA's, and higher for smaller blocks."""
    bottleneck: FloatDomain[LearningRate] | None = None
    """Bottlenecks, whose best learning rate is some times LoRA's."""
    prefix: FloatDomain[LearningRate] | None = None
    """Prefixes, whose best learning rate is some tens of times LoRA's, and which begin as random keys and values."""

    @model_serializer
    def _without_absent(self) -> dict[str, Any]:
        domains = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: domain.model_dump() for name, domain in domains.items() if domain is not None}


class ByAdapter(OneKey):
    """A domain that depends on the adapter."""

    kind: ClassVar[str] = "by_adapter"
    by_adapter: PerAdapter
    """The domain for each adapter."""

    def of(self, adapter: str) -> Domain:
        """Return the domain for an adapter.

        Raises:
            KeyError: there is none.
        """
        domain: Domain | None = getattr(self.by_adapter, adapter)
        if domain is None:
            raise KeyError(adapter)
        return domain


LearningRateDomain = Annotated[
    Annotated[Fixed[LearningRate], Tag("kind:fixed")]
    | Annotated[Choice[LearningRate], Tag("kind:choice")]
    | Annotated[Uniform[LearningRate], Tag("kind:uniform")]
    | Annotated[LogUniform[LearningRate], Tag("kind:log_uniform")]
    | Annotated[ByAdapter, Tag("kind:by_adapter")],
    Discriminator(kind_of),
]
"""The learning rate, which may depend on the adapter."""
