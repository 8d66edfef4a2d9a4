"""The space that is searched: every knob with its domain, its default, and the condition that it stands under."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictStr,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from spaces.config import (
    ADAPTER_KNOBS,
    STRATEGY_KNOBS,
    Adapter,
    Compilation,
    Offload,
    Precision,
    Quantization,
    Strategy,
    TrialConfig,
)
from spaces.domains import Choice, Domain, Fixed, IntRange, LogUniform, Position, Profile, Suggester, Uniform, Within
from spaces.forms import (
    ByAdapter,
    FloatDomain,
    IntDomain,
    LayoutIntDomain,
    LayoutNameDomain,
    LearningRate,
    LearningRateDomain,
    NameDomain,
    NumberDomain,
    PerAdapter,
)

Count = Annotated[int, Within(ge=1, le=1_000_000)]
WorldSize = Annotated[int, Within(ge=1, le=4096)]
Rank = Annotated[int, Within(ge=1, le=16_384)]
Seed = Annotated[int, Within(ge=0, le=2**32 - 1)]
Fraction = Annotated[float, Within(gt=0, le=1)]
WarmupFraction = Annotated[float, Within(ge=0, lt=1)]
Epochs = Annotated[float, Within(gt=0, le=1000)]
WholeEpochs = Annotated[int, Within(ge=1, le=1000)]
Alpha = Annotated[float, Within(gt=0, le=100_000)]
WeightDecay = Annotated[float, Within(ge=0, le=100)]

# What says nothing with some adapters.
CONDITIONAL = frozenset(knob for knobs in ADAPTER_KNOBS.values() for knob in knobs)
LAYOUT_KNOBS = ("world_size", "strategy", "shard_size", "tp_size", "offload", "micro_batch_size", "recomputation", "compile")
# What `profile` alone stands for.
EVERY: dict[str, list[Any]] = {
    "world_size": [2**i for i in range(13)],
    "strategy": ["ddp", "fsdp", "tp"],
    "offload": ["none", "cpu"],
    "recomputation": ["none", "half", "full"],
    "compile": ["none", "blocks"],
}


_MODULE_NAMES = re.compile(r"[A-Za-z0-9_.-]+( *, *[A-Za-z0-9_.-]+)*")


def _module_names(value: str) -> str:
    if not _MODULE_NAMES.fullmatch(value):
        allowed = {"allowed": "all-linear, or module names with commas between: q_proj,v_proj", "names": ["all-linear"]}
        raise PydanticCustomError("module_names", "not names of modules", allowed)
    return value


def _auto_or(what: str, least: int) -> BeforeValidator:
    """Return what lets `auto` and integers from a least one on pass."""

    def check(value: Any) -> Any:
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 1_000_000):
            allowed = {"allowed": f"auto, or an integer at least {least}", "names": ["auto"]}
            raise PydanticCustomError(what.replace(" ", "_"), f"not a {what}", allowed)
        return value

    return BeforeValidator(check)


RecomputationOrAuto = Literal["auto", "none", "half", "full"]
ModuleNames = Annotated[StrictStr, AfterValidator(_module_names)]
MicroBatch = Annotated[Literal["auto"] | Annotated[int, Field(ge=1)], _auto_or("micro batch size", 1)]
ShardSize = Annotated[Literal["auto"] | Annotated[int, Field(ge=2)], _auto_or("shard size", 2)]
TensorParallelSize = Annotated[Literal["auto"] | Annotated[int, Field(ge=2)], _auto_or("tensor-parallel size", 2)]


def _with_profile_alone(schema: dict[str, Any]) -> None:
    """Let the JSON schema take `profile` where the file does."""
    for knob in EVERY:
        known = schema["properties"][knob]
        known["anyOf"] = [{"$ref": known.pop("$ref")}, {"const": "profile"}]


class SpaceSpec(BaseModel):
    """The knobs of a trial. Each is a fixed value, `{choice: [...]}`, or a range where the knob is a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, json_schema_extra=_with_profile_alone)

    adapter: NameDomain[Adapter] = Fixed[Adapter]("lora")
    """What trains: every weight, or an adapter and the head of a classifier, of which docs/spec.md has a table."""
    learning_rate: LearningRateDomain = ByAdapter(
        by_adapter=PerAdapter(
            none=LogUniform[LearningRate](log_uniform=(1e-5, 1e-3)),
            lora=LogUniform[LearningRate](log_uniform=(1e-4, 1e-2)),
            rslora=LogUniform[LearningRate](log_uniform=(3e-5, 3e-3)),
            dora=LogUniform[LearningRate](log_uniform=(1e-4, 1e-2)),
            vera=LogUniform[LearningRate](log_uniform=(1e-3, 1e-1)),
            ia3=LogUniform[LearningRate](log_uniform=(5e-4, 5e-2)),
            oft=LogUniform[LearningRate](log_uniform=(3e-4, 3e-2)),
            bottleneck=LogUniform[LearningRate](log_uniform=(3e-4, 3e-2)),
            prefix=LogUniform[LearningRate](log_uniform=(3e-3, 3e-1)),
        )
    )
    """Peak learning rate of AdamW; `{by_adapter: {none: ..., lora: ...}}` where it depends on the adapter."""
    global_batch_size: IntDomain[Count] = Choice[Count](choice=(16, 32, 64))
    """Rows per optimizer step, over all ranks."""
    dataset_fraction: FloatDomain[Fraction] = Uniform[Fraction](uniform=(0.1, 1.0))
    """Share of the training rows; smaller fractions are subsets of larger ones."""
    epochs: NumberDomain[Epochs, WholeEpochs] = Fixed[Epochs](1.0)
    """Passes over the chosen rows."""
    lora_rank: IntDomain[Rank] = Choice[Rank](choice=(4, 8, 16, 32))
    """Width of the matrices of LoRA, its variants and VeRA, and of bottlenecks; size of OFT's blocks, which divides the layers'
    widths; tokens of a prefix."""
    lora_alpha: FloatDomain[Alpha] = Fixed[Alpha](32.0)
    """LoRA's scale is alpha / rank, rsLoRA's alpha / sqrt(rank)."""
    lora_target_modules: NameDomain[ModuleNames] = Fixed[ModuleNames]("all-linear")
    """Module name suffixes that LoRA, its variants, VeRA and OFT wrap, with commas between."""
    quantization: NameDomain[Quantization] = Fixed[Quantization]("none")
    """How the blocks' frozen linear layers are held: `nf4` in 4.5 bits a weight (QLoRA), `int8` in 8 (LLM.int8()), `float8` in
    8 (e4m3), `none` in the precision; only with LoRA, its variants, OFT, bottlenecks and prefixes, and on one rank or with `ddp`."""
    warmup_fraction: FloatDomain[WarmupFraction] = Fixed[WarmupFraction](0.1)
    """Share of the optimizer steps in which the learning rate rises."""
    weight_decay: FloatDomain[WeightDecay] = Fixed[WeightDecay](0.0)
    """AdamW's decoupled weight decay."""
    precision: NameDomain[Precision] = Fixed[Precision]("fp32")
    """`bf16`: products in bf16; weights that train stay fp32, frozen ones are held in bf16."""
    seed: IntDomain[Seed] = Fixed[Seed](0)
    """Seeds the data order and new weights."""
    world_size: LayoutIntDomain[WorldSize] = Fixed[WorldSize](1)
    """Ranks that train one trial together; `profile`: 1, 2, 4 and so on, of which those that the cluster holds are used."""
    strategy: LayoutNameDomain[Strategy] = Fixed[Strategy]("ddp")
    """`ddp` replicates the weights, `fsdp` shards them, `tp` splits the matrices of every block; `profile`: all three."""
    shard_size: LayoutNameDomain[ShardSize] = Fixed[ShardSize]("auto")
    """Ranks that `fsdp` spreads one copy of the weights over; `auto`: all. Where there are more ranks they hold copies (hybrid
    sharding): with the GPUs of a node, weights are gathered inside it, and gradients alone go to other nodes."""
    tp_size: LayoutNameDomain[TensorParallelSize] = Fixed[TensorParallelSize]("auto")
    """Ranks that `tp` splits the matrices over; `auto`: all. Where there are more ranks they are several such groups, each with rows
    of its own, over which FSDP2 shards the pieces: with the GPUs of a node, activations are summed inside it."""
    offload: LayoutNameDomain[Offload] = Fixed[Offload]("none")
    """Where `fsdp` keeps what it shards (other strategies: nothing): `cpu` in the host's memory, gradients and optimizer state too,
    which is updated there; the GPU, also a single one, then holds activations and one to three blocks. For models that do not fit
    otherwise: it is slower. Only with GPUs (`resources.gpus_per_worker`)."""
    micro_batch_size: LayoutNameDomain[MicroBatch] = Fixed[MicroBatch]("auto")
    """Rows per rank and forward pass. `auto`: as many as fit a budget of tokens, 16,384 on a GPU and 4,096 on a CPU, halved until the
    device has the memory, also after a trial ran out of it: the rows of a step stay. Ranks need not divide them."""
    recomputation: LayoutNameDomain[RecomputationOrAuto] = Fixed[RecomputationOrAuto]("auto")
    """`full` computes the activations of each block again in the backward pass: less memory, about a third more work; `half` those of
    every other block. `auto`: `none` where the device has the memory for 2,048 tokens at once, else `half`, else `full`; also
    after a trial ran out of it, which is all that is known of a family without formulas."""
    compile: LayoutNameDomain[Compilation] = Fixed[Compilation]("none")
    """`blocks` has torch.compile fuse the operations of each block, and those of the loss: on GPUs faster steps, after some ten
    seconds at the trial's start, which count in `train_seconds`: with `profile` a search finds from which length on it pays."""

    @field_validator(*EVERY, mode="before")
    @classmethod
    def _profile_alone_is_all_values(cls, value: Any, info: ValidationInfo) -> Any:
        return {"profile": EVERY[info.field_name or ""]} if value == "profile" else value

    @field_validator("learning_rate")
    @classmethod
    def _covers_adapters(cls, domain: Any, info: ValidationInfo) -> Any:
        # `adapter` is absent from the data when it is itself wrong, and then has its own error.
        if isinstance(domain, ByAdapter) and "adapter" in info.data:
            missing = [a for a in info.data["adapter"].ends() if getattr(domain.by_adapter, a) is None]
            if missing:
                raise PydanticCustomError(
                    "adapter_without_range",
                    "by_adapter has nothing for {missing}",
                    {"missing": ", ".join(missing), "allowed": "an entry for each adapter of the space"},
                )
        return domain

    @field_validator("quantization")
    @classmethod
    def _is_of_an_adapter(cls, domain: Any, info: ValidationInfo) -> Any:
        adapters = info.data["adapter"].ends() if "adapter" in info.data else []
        if adapters and "none" not in domain.ends() and not any("quantization" in ADAPTER_KNOBS[each] for each in adapters):
            able = ", ".join(adapter for adapter, knobs in ADAPTER_KNOBS.items() if "quantization" in knobs)
            context = {"adapters": ", ".join(adapters), "allowed": f"none, or with one of these adapters: {able}"}
            raise PydanticCustomError("quantization_without_adapter", "says nothing with adapter {adapters}", context)
        return domain

    @field_validator("offload")
    @classmethod
    def _is_of_fsdp(cls, domain: Any, info: ValidationInfo) -> Any:
        if domain.ends() == ["cpu"] and "strategy" in info.data and "fsdp" not in info.data["strategy"].ends():
            allowed = {"allowed": "with strategy: fsdp, on one rank too; else none"}
            raise PydanticCustomError("offload_without_fsdp", "cpu says nothing without strategy fsdp", allowed)
        return domain

    def suggest(self, suggester: Suggester) -> dict[str, Any]:
        """Ask for every knob, conditions before what they decide; return flat params for `TrialConfig.from_params`."""
        params: dict[str, Any] = {}
        for knob, name, domain in self._active(params):
            params[knob] = domain.suggest(name, suggester)
        return params

    def encode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the suggester's params that make `suggest` return these params, and choose the others freely.

        Args:
            params: values for some knobs; without the adapter where that is searched, what depends on it cannot be among them.

        Raises:
            ValueError: a value is not in its domain.
        """
        known = {"adapter": self.adapter.ends()[0], **params}
        encoded: dict[str, Any] = {}
        for knob, name, domain in self._active(known):
            if knob in params:
                encoded |= domain.encode(name, params[knob])
        return encoded

    def holds(self, params: Mapping[str, Any]) -> bool:
        """Return whether `suggest` may return these params."""
        if "adapter" not in params or self.problem_with_point(params) is not None:
            return False
        return set(params) == {knob for knob, _, _ in self._active(params)}

    def with_defaults(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the params of a trial from before some knobs existed with these knobs as they were then: at their defaults."""
        known = dict(params)
        if known["adapter"] not in self.adapter.ends():  # nor need there be learning rates for it; it is outside of the space
            return known
        for knob, _, _ in self._active(known):
            default = type(self).model_fields[knob].default
            if isinstance(default, Fixed):
                known.setdefault(knob, default.root)
        return known

    def problem_with_point(self, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what is wrong with some knobs' values, what is allowed and the nearest name; None if they are in the space."""
        knobs = list(type(self).model_fields)
        unknown = [knob for knob in params if knob not in knobs]
        if unknown:
            close = difflib.get_close_matches(unknown[0], knobs, n=1)
            return {"what": f"there is no knob '{unknown[0]}'", "allowed": ", ".join(knobs), "nearest": close[0] if close else None}
        if params.get("adapter", self.adapter.ends()[0]) not in self.adapter.ends():
            return {"what": f"adapter is {params['adapter']!r}", "allowed": ", ".join(self.adapter.ends())}
        adapter = params.get("adapter", self.adapter.ends()[0])
        try:
            active = {knob for knob, _, _ in self._active({"adapter": adapter})}
            self.encode(params)
        except (ValueError, TypeError) as error:
            return {"what": str(error), "allowed": "values that the space holds"}
        idle = sorted(set(params) - active)
        if idle:
            return {"what": f"{idle[0]} says nothing with adapter {adapter}", "allowed": "adapter: lora beside it"}
        is_open = "adapter" not in params and self.adapter.is_searched
        if is_open and "learning_rate" in params and isinstance(self.learning_rate, ByAdapter):
            return {"what": "learning_rate depends on the adapter, which is not given", "allowed": "adapter beside it"}
        return None

    def first(self, **given: Any) -> dict[str, Any]:
        """Return params with the first value of every knob that is not given: the first of a choice, the low end of a range."""
        params: dict[str, Any] = {}
        for knob, _, domain in self._active(params):
            params[knob] = given.get(knob, domain.ends()[0])
        return params

    def corners(self) -> Iterator[dict[str, Any]]:
        """Yield params for every layout and what its memory and time depend on: a range's ends, and the first value elsewhere.

        Of those that are trained alike, as all strategies on one rank, the first stands for all.
        """
        knobs = ("adapter", "quantization", "precision", "global_batch_size", "micro_batch_size", "recomputation", "compile")
        seen: set[tuple[TrialConfig, bool]] = set()
        for world_size, strategy in self.layouts():
            varied = (*knobs, *STRATEGY_KNOBS[strategy])
            for values in itertools.product(*(getattr(self, knob).ends() for knob in varied)):
                params = self.first(world_size=world_size, strategy=strategy, **dict(zip(varied, values, strict=True)))
                kind = self._trained_alike(params)
                if kind not in seen:
                    seen.add(kind)
                    yield params

    @property
    def has_all_batches(self) -> bool:
        """Whether `corners` has every world size and global batch: where these are listed, and no range."""
        return not isinstance(self.world_size, IntRange) and not isinstance(self.global_batch_size, IntRange)

    def layouts(self) -> list[tuple[int, Strategy]]:
        """Return every combination of world size and strategy."""
        ends = self.world_size.ends()
        sizes = range(ends[0], ends[1] + 1) if isinstance(self.world_size, IntRange) else sorted(ends)
        return list(itertools.product(sizes, self.strategy.ends()))

    def learning_rate_of(self, adapter: str) -> Domain:
        """Return the learning rates of trials with this adapter."""
        return self.learning_rate.of(adapter) if isinstance(self.learning_rate, ByAdapter) else self.learning_rate

    def profiled_knobs(self) -> list[str]:
        """Return the knobs of the layout whose values are all measured."""
        return [knob for knob in LAYOUT_KNOBS if isinstance(getattr(self, knob), Profile)]

    def measured_layouts(self, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the params under every layout that is to be measured for them; of those that are trained alike, the first."""
        knobs, found = self.profiled_knobs(), dict[tuple[TrialConfig, bool], dict[str, Any]]()
        for values in itertools.product(*(getattr(self, knob).ends() for knob in knobs)):
            each = {**params, **dict(zip(knobs, values, strict=True))}
            found.setdefault(self._trained_alike(each), each)
        return list(found.values())

    @staticmethod
    def _trained_alike(params: Mapping[str, Any]) -> tuple[TrialConfig, bool]:
        """Return the same of all params that are trained alike; what `auto` computes again only the device's memory tells."""
        return TrialConfig.from_params(params).trained_alike(), params["recomputation"] == "auto"

    def names_searched(self) -> list[str]:
        """Return the knobs that have more than one value."""
        return [knob for knob in type(self).model_fields if self._is_searched(knob)]

    def fixed_to(self, params: Mapping[str, Any]) -> list[str]:
        """Return the overrides that pin every knob of these params: `space.learning_rate=0.002`.

        Knobs of the layout, and a quantised base, that say nothing with the strategy and the adapter are at their defaults.
        """
        strategy, adapter = params.get("strategy", self.strategy.ends()[0]), params.get("adapter", self.adapter.ends()[0])
        values = {**params, **self.idle_defaults(strategy, adapter, params)}
        return [f"space.{knob}={values[knob]}" for knob in type(self).model_fields if knob in values]

    def idle_defaults(self, strategy: Strategy, adapter: Adapter, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the defaults of what says nothing with a strategy and an adapter, where the params or the file have other values."""
        every = {
            "quantization": ADAPTER_KNOBS[adapter],
            **{k: STRATEGY_KNOBS[strategy] for ks in STRATEGY_KNOBS.values() for k in ks},
        }
        defaults = {knob: type(self).model_fields[knob].default.root for knob, own in every.items() if knob not in own}
        return {knob: value for knob, value in defaults.items() if knob in params or value not in getattr(self, knob).ends()}

    def _is_searched(self, knob: str) -> bool:
        if knob in CONDITIONAL and not any(knob in ADAPTER_KNOBS[adapter] for adapter in self.adapter.ends()):
            return False
        domain = getattr(self, knob)
        if isinstance(domain, ByAdapter):
            domains = [domain.of(adapter) for adapter in self.adapter.ends()]
            return any(d.is_searched or d != domains[0] for d in domains)
        return bool(domain.is_searched)

    def _active(self, params: Mapping[str, Any]) -> Iterator[tuple[str, str, Domain]]:
        """Yield knob, name for the suggester, and domain, of every knob whose condition holds.

        `params` may be filled while iterating: the adapter comes first, and all conditions are on it.
        """
        for knob in type(self).model_fields:
            if knob in CONDITIONAL and knob not in ADAPTER_KNOBS[params["adapter"]]:
                continue
            domain = getattr(self, knob)
            if isinstance(domain, ByAdapter):
                own, domains = domain.of(params["adapter"]), [domain.of(adapter) for adapter in self.adapter.ends()]
                if isinstance(own, Uniform | LogUniform) and all(isinstance(d, Uniform | LogUniform) for d in domains):
                    yield knob, knob, Position(own)
                else:
                    # One name per adapter: under one name the sampler would take two ranges for one.
                    yield knob, f"{knob}_{params['adapter']}", own
            else:
                yield knob, knob, domain
