"""A trial config: a recipe (what is learned) times a layout (how fast and where)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Adapter = Literal["none", "lora", "rslora", "dora", "vera", "ia3", "oft", "bottleneck", "prefix"]
Precision = Literal["fp32", "bf16"]
Quantization = Literal["none", "nf4", "int8"]
Strategy = Literal["ddp", "fsdp", "tp"]
Recomputation = Literal["none", "full"]
Compilation = Literal["none", "blocks"]

# Which knobs say something with an adapter.
ADAPTER_KNOBS: dict[Adapter, tuple[str, ...]] = {
    "none": (),
    **dict.fromkeys(("lora", "rslora", "dora"), ("lora_rank", "lora_alpha", "lora_target_modules", "quantization")),
    "vera": ("lora_rank", "lora_target_modules"),
    "ia3": (),
    "oft": ("lora_rank", "lora_target_modules", "quantization"),
    **dict.fromkeys(("bottleneck", "prefix"), ("lora_rank", "quantization")),
}
# What (IA)3 scales: what keys and values are, and what goes into the last product of a block, behind which bottlenecks are.
IA3_RESULTS = ("k_proj", "v_proj", "key_proj", "value_proj", "self.key", "self.value", "k_lin", "v_lin", "qkv_proj", "c_attn")
LAST_PRODUCTS = ("down_proj", "layer.*.output.dense", "ffn.lin2", "mlp.c_proj", "fc2")
# `micro_batch_size: auto` keeps one forward pass to at most this many padded tokens per rank.
AUTO_MICRO_BATCH_TOKENS = 16_384


# What a recipe learns with and no step takes longer for, at one value.
LEARNED_WITH: dict[str, Any] = dict.fromkeys(("learning_rate", "dataset_fraction", "epochs", "warmup_fraction", "weight_decay"), 0.0)
LEARNED_WITH |= {"seed": 0, "adapter_alpha": None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The part of a trial config that changes what is learned."""

    learning_rate: float
    """Peak learning rate of AdamW."""
    global_batch_size: int
    """Rows per optimizer step, over all ranks and accumulation steps."""
    dataset_fraction: float
    """Share of the training rows in (0, 1]; smaller fractions are subsets of larger ones."""
    epochs: float
    """Passes over the chosen rows."""
    warmup_fraction: float
    """Share of the optimizer steps in which the learning rate rises linearly; it then falls linearly to zero."""
    weight_decay: float
    """AdamW's decoupled weight decay, on matrices only."""
    precision: Precision
    """`bf16`: products in bf16; weights that train and optimizer state stay fp32, frozen weights are held in bf16."""
    seed: int
    """Seeds the data order and every newly initialised weight."""
    adapter: Adapter
    """`none` trains every weight. LoRA (https://arxiv.org/abs/2106.09685) adds alpha / rank B A to a frozen matrix, rsLoRA
    (https://arxiv.org/abs/2312.03732) alpha / sqrt(rank) B A; DoRA (https://arxiv.org/abs/2402.09353) is LoRA that also trains the
    norms of the rows of the sum. VeRA (https://arxiv.org/abs/2310.11454) trains two vectors around random factors that all layers
    share; (IA)3 (https://arxiv.org/abs/2205.05638) scales keys, values and the inner width of the feed-forward. OFT
    (https://arxiv.org/abs/2506.19847) rotates what goes into a frozen matrix, block by block. A bottleneck
    (https://arxiv.org/abs/1902.00751) is a narrow layer behind the feed-forward of each block. A prefix
    (https://arxiv.org/abs/2101.00190) is keys and values of each attention, before those of every row."""
    adapter_rank: int | None = None
    """Of LoRA, its variants and VeRA; the size of OFT's blocks, and of bottlenecks; the tokens of a prefix."""
    adapter_alpha: float | None = None
    adapter_target_modules: tuple[str, ...] | None = None
    """Module name suffixes that an adapter wraps; `("all-linear",)` for every linear layer but the head."""
    quantization: Quantization = "none"
    """How the linear layers of a frozen base are held; always `none` without an adapter."""

    def key(self) -> str:
        """Return a short, stable fingerprint of the recipe: 12 hexadecimal digits."""
        return _fingerprint(asdict(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The part of a trial config that changes only how fast and where."""

    world_size: int
    strategy: Strategy
    micro_batch_size: int
    """Rows per rank and forward pass."""
    recomputation: Recomputation = "none"
    """`full` keeps the input of each block alone, and computes the block again in the backward pass."""
    compile: Compilation = "none"
    """`blocks` has torch.compile fuse the operations of each block, and those of the loss."""
    shard_size: int | None = None
    """Ranks that FSDP2 spreads one copy of the weights over (hybrid sharding); None: all."""

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 spreads weights over ranks; one rank has nothing to spread."""
        return self.strategy == "fsdp" and self.world_size > 1

    @property
    def num_shards(self) -> int:
        """Ranks that hold one copy of the weights together."""
        return (self.shard_size or self.world_size) if self.is_sharded else 1

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks over which every matrix of a block is split."""
        return self.world_size if self.strategy == "tp" else 1

    @property
    def data_parallel_size(self) -> int:
        """Ranks, or groups of them, that rows are dealt to."""
        return self.world_size // self.tensor_parallel_size

    def num_grad_accum_steps(self, global_batch_size: int) -> int:
        """Return the forward passes per rank and optimizer step, rounded up."""
        return -(-global_batch_size // (self.data_parallel_size * self.micro_batch_size))

    def key(self) -> str:
        """Return a short, stable fingerprint of the layout: 12 hexadecimal digits."""
        return _fingerprint(asdict(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialConfig:
    """A recipe and the layout that trains it."""

    recipe: Recipe
    layout: Layout

    @classmethod
    def from_params(cls, params: Mapping[str, Any], *, max_length: int) -> TrialConfig:
        """Translate the flat params of the user's space; the only place that does.

        Args:
            params: one value for every name of `spaces.space.SpaceSpec`; those of adapters may be absent without one.
            max_length: tokens per row, which sets what `micro_batch_size: auto` means.

        Raises:
            KeyError: a param is missing.
        """
        adapter: Adapter = params["adapter"]
        given = {knob: params[knob] for knob in ADAPTER_KNOBS[adapter] if knob in params}
        targets = given.get("lora_target_modules", "all-linear").split(",")
        recipe = Recipe(
            learning_rate=float(params["learning_rate"]),
            global_batch_size=int(params["global_batch_size"]),
            dataset_fraction=float(params["dataset_fraction"]),
            epochs=float(params["epochs"]),
            warmup_fraction=float(params["warmup_fraction"]),
            weight_decay=float(params["weight_decay"]),
            precision=params["precision"],
            seed=int(params["seed"]),
            adapter=adapter,
            adapter_rank=int(given["lora_rank"]) if "lora_rank" in ADAPTER_KNOBS[adapter] else None,
            adapter_alpha=float(given["lora_alpha"]) if "lora_alpha" in ADAPTER_KNOBS[adapter] else None,
            adapter_target_modules=_targets(adapter, targets),
            quantization=given.get("quantization", "none"),
        )
        micro = params["micro_batch_size"]
        layout = Layout(
            world_size=int(params["world_size"]),
            strategy=params["strategy"],
            micro_batch_size=1 if micro == "auto" else int(micro),
            recomputation=params["recomputation"],
            compile=params.get("compile", "none"),
        )
        shard_size = params.get("shard_size", "auto")
        if layout.is_sharded and shard_size != "auto" and int(shard_size) < layout.world_size:
            layout = replace(layout, shard_size=int(shard_size))
        if micro == "auto":
            micro = auto_micro_batch_size(recipe.global_batch_size, layout.data_parallel_size, max_length)
            layout = replace(layout, micro_batch_size=micro)
        return cls(recipe=recipe, layout=layout)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialConfig:
        """Read back what `to_dict` wrote."""
        recipe = dict(data["recipe"])
        if recipe.get("adapter_target_modules") is not None:
            recipe["adapter_target_modules"] = tuple(recipe["adapter_target_modules"])
        return cls(recipe=Recipe(**recipe), layout=Layout(**data["layout"]))

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain values, ready for JSON."""
        return asdict(self)

    def flat(self) -> dict[str, Any]:
        """Return `{knob: value}` over recipe and layout, without the absent ones; for tables and MLflow."""
        pairs = [(f.name, getattr(part, f.name)) for part in (self.recipe, self.layout) for f in fields(part)]
        return {k: ",".join(v) if isinstance(v, tuple) else v for k, v in pairs if v is not None}

    @property
    def num_grad_accum_steps(self) -> int:
        return self.layout.num_grad_accum_steps(self.recipe.global_batch_size)

    def of_step(self) -> TrialConfig:
        """Return what time and memory of a step depend on: the same for all rates, rows, epochs, decays, alphas and seeds."""
        return replace(self, recipe=replace(self.recipe, **LEARNED_WITH))

    def key(self) -> str:
        """Return a short, stable fingerprint of recipe and layout: 12 hexadecimal digits."""
        return _fingerprint(self.to_dict())


def _targets(adapter: Adapter, given: Sequence[str]) -> tuple[str, ...] | None:
    if adapter == "ia3":
        return (*IA3_RESULTS, *LAST_PRODUCTS)
    if adapter == "bottleneck":
        return LAST_PRODUCTS
    return None if adapter in ("none", "prefix") else tuple(target.strip() for target in given)


def auto_micro_batch_size(global_batch_size: int, data_parallel_size: int, max_length: int) -> int:
    """Return the largest divisor of the rows per rank whose padded tokens fit `AUTO_MICRO_BATCH_TOKENS`."""
    limit = max(1, AUTO_MICRO_BATCH_TOKENS // max_length)
    return next(size for size in micro_batch_sizes(global_batch_size, data_parallel_size) if size <= limit)


def micro_batch_sizes(global_batch_size: int, data_parallel_size: int) -> list[int]:
    """Return the divisors of the rows per rank, descending."""
    per_rank = max(1, global_batch_size // data_parallel_size)
    return [size for size in range(per_rank, 0, -1) if per_rank % size == 0]


def _fingerprint(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
