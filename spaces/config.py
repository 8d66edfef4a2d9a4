"""A trial config: a recipe (what is learned) times a layout (how fast and where)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Adapter = Literal["none", "lora", "rslora", "dora", "vera", "ia3", "oft", "bottleneck", "prefix"]
Precision = Literal["fp32", "bf16"]
Quantization = Literal["none", "nf4", "int8", "float8"]
Strategy = Literal["ddp", "fsdp", "tp"]
Recomputation = Literal["none", "half", "full"]
Offload = Literal["none", "cpu"]
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
# And with a strategy.
STRATEGY_KNOBS: dict[Strategy, tuple[str, ...]] = {"ddp": (), "fsdp": ("shard_size", "offload"), "tp": ("tp_size",)}
# Of which blocks the backward pass computes one again.
RECOMPUTED_EVERY: dict[Recomputation, int] = {"half": 2, "full": 1}
# What (IA)3 scales: what keys and values are, and what goes into the last product of a block, behind which bottlenecks are.
IA3_RESULTS = ("k_proj", "v_proj", "key_proj", "value_proj", "self.key", "self.value", "k_lin", "v_lin", "qkv_proj", "c_attn")
LAST_PRODUCTS = ("down_proj", "layer.*.output.dense", "ffn.lin2", "mlp.c_proj", "fc2")
# `micro_batch_size: auto` gives one forward pass at most this many tokens per rank. A GPU wants much work at once; a CPU wants
# activations that stay in its caches, and few passes. Measured on one core, as times the tokens per second of 16,384, with 4,096,
# 2,048 and 1,024: MiniLM, 512 rows of 16 tokens on average, 1.15, 1.15 and 1.16; stories260k, 16 rows of 339, 0.98, 0.96 and 0.86;
# with LoRA, 64 rows, 0.98 and 0.92 with the first two (medians of three or four runs, which differ by a tenth and more). So it is
# about as fast, and holds a quarter.
AUTO_MICRO_BATCH_TOKENS = {"cuda": 16_384, "cpu": 4_096}


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The part of a trial config that changes only how fast and where."""

    world_size: int
    strategy: Strategy
    micro_batch_size: int | None = None
    """Rows per rank and forward pass; None: as many as fit `micro_batch_tokens`."""
    micro_batch_tokens: int | None = None
    """Tokens per rank and forward pass, with padding where rows are padded: as many rows as fit, and one at least."""
    recomputation: Recomputation = "none"
    """`full` keeps the input of each block alone, and computes the block again in the backward pass; `half` of every other block."""
    compile: Compilation = "none"
    """`blocks` has torch.compile fuse the operations of each block, and those of the loss."""
    shard_size: int | None = None
    """Ranks that FSDP2 spreads one copy of the weights over (hybrid sharding); None: all."""
    tp_size: int | None = None
    """Ranks that tensor parallelism splits every matrix over, where there are several such groups; None: all."""
    offload: Offload = "none"
    """`cpu` has FSDP2 keep a rank's shards, their gradients and the optimizer's state in the host's memory, and update them there."""

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 spreads weights, or what a rank has of them, over ranks; one rank has nothing to spread but to the host."""
        if self.strategy == "fsdp":
            return self.world_size > 1 or self.offload != "none"
        return self.tp_size is not None

    @property
    def num_shards(self) -> int:
        """Ranks that FSDP2 spreads one copy of what it shards over: of the weights, or of one rank's pieces of them."""
        return (self.shard_size or self.data_parallel_size) if self.is_sharded else 1

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks over which every matrix of a block is split."""
        return (self.tp_size or self.world_size) if self.strategy == "tp" else 1

    @property
    def data_parallel_size(self) -> int:
        """Ranks, or groups of them, that rows are dealt to."""
        return self.world_size // self.tensor_parallel_size

    def recomputes(self, index: int) -> bool:
        """Return whether the backward pass computes this block again, counted from 0."""
        every = RECOMPUTED_EVERY.get(self.recomputation)
        return every is not None and index % every == 0

    def num_recomputed(self, num_layers: int) -> int:
        """Return of how many blocks it does."""
        return sum(map(self.recomputes, range(num_layers)))

    def num_grad_accum_steps(self, global_batch_size: int, length: float) -> int:
        """Return the forward passes per rank and optimizer step, rounded up, with rows that all have this many tokens."""
        rows = -(-global_batch_size // self.data_parallel_size)
        return -(-rows // (self.micro_batch_size or max(1, int(self._budget // length))))

    def most_tokens(self, global_batch_size: int, length: int) -> int:
        """Return the most tokens of a micro batch, with padding where there is any, of rows up to this length."""
        if self.micro_batch_size is not None:
            return self.micro_batch_size * length
        # However the rows are dealt, the ranks have about as many tokens.
        rows = -(-global_batch_size // self.data_parallel_size)
        return min(max(self._budget, length), rows * length)

    @property
    def _budget(self) -> int:
        assert self.micro_batch_tokens is not None  # one of the two is given
        return self.micro_batch_tokens

    def key(self) -> str:
        """Return a short, stable fingerprint of the layout: 12 hexadecimal digits."""
        return _fingerprint(asdict(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialConfig:
    """A recipe and the layout that trains it."""

    recipe: Recipe
    layout: Layout

    @classmethod
    def from_params(cls, params: Mapping[str, Any], *, is_on_gpu: bool = False) -> TrialConfig:
        """Translate the flat params of the user's space; the only place that does.

        With `recomputation: auto` nothing is computed again; `spaces.constraints.config_within` knows where that is needed.

        Args:
            params: one value for every name of `spaces.space.SpaceSpec`; those of adapters may be absent without one.
            is_on_gpu: whether ranks have GPUs, which sets what `micro_batch_size: auto` means.

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
            micro_batch_size=None if micro == "auto" else int(micro),
            micro_batch_tokens=AUTO_MICRO_BATCH_TOKENS["cuda" if is_on_gpu else "cpu"] if micro == "auto" else None,
            recomputation="none" if params["recomputation"] == "auto" else params["recomputation"],
            compile=params.get("compile", "none"),
        )
        if layout.strategy == "fsdp":
            shard_size = _part_of(layout.world_size, params.get("shard_size", "auto"))
            layout = replace(layout, shard_size=shard_size, offload=params.get("offload", "none"))
        elif layout.strategy == "tp":
            layout = replace(layout, tp_size=_part_of(layout.world_size, params.get("tp_size", "auto")))
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

    def num_grad_accum_steps(self, length: float) -> int:
        """See `Layout`."""
        return self.layout.num_grad_accum_steps(self.recipe.global_batch_size, length)

    def most_tokens(self, length: int) -> int:
        """See `Layout`."""
        return self.layout.most_tokens(self.recipe.global_batch_size, length)

    def trained_alike(self) -> TrialConfig:
        """Return one config for all that are trained alike: on one rank that keeps its weights, every strategy is `ddp`."""
        is_whole = self.layout.world_size == 1 and not self.layout.is_sharded
        return replace(self, layout=replace(self.layout, strategy="ddp")) if is_whole else self

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


def _part_of(world_size: int, given: int | str) -> int | None:
    """Return the ranks of one of several groups; None where all are one."""
    return None if given == "auto" or int(given) >= world_size else int(given)


def _fingerprint(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]
