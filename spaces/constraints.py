"""What makes a trial config impossible before it is launched; each function is feasible when <= 0, as Optuna has it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from spaces.adapters import is_wrapped, num_prefix_tokens, trains_factors
from spaces.blueprint import Blueprint
from spaces.config import RECOMPUTED_EVERY, TrialConfig
from spaces.memory import RankMemory, host_bytes, rank_memory
from spaces.tensor_parallel import PLANS, left_over


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a config is held against."""

    num_workers: int
    """Workers that the cluster holds at once."""
    hidden_size: int | None
    """Width of the model's layers; None if it is not known yet."""
    plan: Blueprint | None = None
    """What the model is made of; None for a family without formulas."""
    max_length: int = 0
    """Tokens of the longest row."""
    max_targets: int | None = None
    """Positions that the loss counts in the row that has the most; by default those of plain text or of a class."""
    targets_per_token: float | None = None
    """Of these in the row that has the most for its length."""
    memory_bytes: int | None = None
    """What the tensors of one rank may take; None where it is not known."""
    host_bytes: int | None = None
    """What a rank may leave to its host; None where it is not known."""
    is_on_gpu: bool = False
    """Whether workers have GPUs, between which nothing is copied to be exchanged."""
    too_large: frozenset[TrialConfig] = frozenset()
    """What ran out of memory of a family without formulas, as `TrialConfig.of_step`"""

    def on(self, device: Mapping[str, Any]) -> Limits:
        """Return these limits with what a worker has, as `search.session.examine` found it."""
        return replace(self, memory_bytes=device["usable_bytes"], host_bytes=device["host_bytes"])


Constraint = Callable[[TrialConfig, Limits], float]


def global_batch_divisible(config: TrialConfig, limits: Limits) -> float:
    """Rows left over when the global batch is dealt to ranks and accumulation steps; by a budget of tokens, ranks without a row."""
    layout = config.layout
    if layout.micro_batch_size is None:
        return max(0, layout.data_parallel_size - config.recipe.global_batch_size)
    return config.recipe.global_batch_size % (layout.data_parallel_size * layout.micro_batch_size)


def world_size_within_cluster(config: TrialConfig, limits: Limits) -> float:
    """Workers that the cluster lacks."""
    return config.layout.world_size - limits.num_workers


def matrices_split_evenly(config: TrialConfig, limits: Limits) -> float:
    """What is left over when heads and widths are dealt to tensor-parallel ranks; 1 for a model that has no plan for it."""
    num_ranks = config.layout.tensor_parallel_size
    if num_ranks == 1 or limits.hidden_size is None:
        return 0.0
    if limits.plan is None or limits.plan.family not in PLANS:
        return 1.0
    return sum(left_over(limits.plan, num_ranks).values())


def shards_of_equal_size(config: TrialConfig, limits: Limits) -> float:
    """Ranks left over when copies of the weights, or groups that split matrices, are made of as many ranks each."""
    layout = config.layout
    return layout.world_size % (layout.shard_size or layout.tensor_parallel_size)


def adapter_rank_within_width(config: TrialConfig, limits: Limits) -> float:
    """Rank beyond the layers' width, where a low-rank update is none; the tokens of a prefix are no rank."""
    if config.recipe.adapter_rank is None or limits.hidden_size is None or config.recipe.adapter == "prefix":
        return 0.0
    return config.recipe.adapter_rank - limits.hidden_size


def quantized_base_whole(config: TrialConfig, limits: Limits) -> float:
    """1 where a quantised base would be spread over ranks.

    A shard of an int8 weight has lost the scales that bitsandbytes hangs on it; of nf4 and float8, every rank would hold all scales
    beside its shard of the weights, and there is no formula for that.
    """
    is_spread = config.layout.is_sharded or config.layout.tensor_parallel_size > 1
    return float(config.recipe.quantization != "none" and is_spread)


def int8_as_written(config: TrialConfig, limits: Limits) -> float:
    """1 where LLM.int8() would be compiled for a GPU: how many columns are outliers only the data tell, at every layer."""
    return float(config.recipe.quantization == "int8" and config.layout.compile != "none" and limits.is_on_gpu)


def offloaded_from_gpu(config: TrialConfig, limits: Limits) -> float:
    """1 where weights would be left to the host by a worker that is on it."""
    return float(config.layout.offload != "none" and not limits.is_on_gpu)


def norms_whole(config: TrialConfig, limits: Limits) -> float:
    """1 where DoRA could not take the norms of rows: tensor parallelism splits them, of int8 and float8 PEFT has no scales.

    Nor does PEFT know norms of experts in one stacked weight.
    """
    is_hidden = config.layout.tensor_parallel_size > 1 or config.recipe.quantization in ("int8", "float8")
    stacked = [] if limits.plan is None else [m for m in limits.plan.block if m.num_experts > 1 and is_wrapped(m, config.recipe)]
    is_hidden = is_hidden or bool(stacked)
    return float(config.recipe.adapter == "dora" and is_hidden)


def vectors_whole(config: TrialConfig, limits: Limits) -> float:
    """1 where vectors (VeRA, (IA)3), rotations (OFT), bottlenecks or prefixes would be cut as tensor parallelism cuts matrices.

    And where FSDP2 would cast VeRA's vectors and not its factors, which are no parameters.
    """
    recipe, layout = config.recipe, config.layout
    is_cut = layout.tensor_parallel_size > 1 and recipe.adapter != "none" and not trains_factors(recipe)
    is_half_cast = layout.is_sharded and recipe.adapter == "vera" and recipe.precision != "fp32"
    return float(is_cut or is_half_cast)


def layers_adaptable(config: TrialConfig, limits: Limits) -> float:
    """1 where an adapter has no layers to change.

    OFT, of GPT-2, whose layers are no `nn.Linear`: PEFT has nothing for them, nor has torchao a float8. A bottleneck, of experts in
    one stacked weight. A prefix, of classifiers, to which PEFT 0.21 cannot hand one.
    """
    recipe, plan = config.recipe, limits.plan
    if plan is None:
        return 0.0
    is_without = {
        "oft": plan.family == "gpt2",
        "bottleneck": plan.feed_forward_out[-1].num_experts > 1,
        "prefix": not plan.head[-1].is_output,
    }
    is_no_linear = plan.family == "gpt2" and recipe.quantization == "float8"
    return float(is_without.get(recipe.adapter, False) or is_no_linear)


def prefix_kept(config: TrialConfig, limits: Limits) -> float:
    """1 where a prefix would be lost, or cost more than it is worth.

    GPT-2 drops what is before a row where its blocks are computed again. Every block has a prefix of its own, so that torch would
    compile each of them anew.
    """
    is_lost = config.layout.recomputation != "none" and limits.plan is not None and limits.plan.family == "gpt2"
    return float(config.recipe.adapter == "prefix" and (is_lost or config.layout.compile != "none"))


def prefix_within_positions(config: TrialConfig, limits: Limits) -> float:
    """Tokens of prefix and longest row beyond the model's positions."""
    num_before = num_prefix_tokens(config.recipe)
    if not num_before or limits.plan is None or limits.plan.num_positions is None:
        return 0.0
    return num_before + limits.max_length - limits.plan.num_positions


def rotated_in_whole_blocks(config: TrialConfig, limits: Limits) -> float:
    """Inputs left over where OFT cuts them into blocks; 1 for blocks of one number, which nothing rotates."""
    recipe = config.recipe
    if recipe.adapter != "oft" or recipe.adapter_rank is None:
        return 0.0
    if recipe.adapter_rank < 2:
        return 1.0
    matrices = () if limits.plan is None else (*limits.plan.block, *limits.plan.head)
    return sum(m.num_inputs % recipe.adapter_rank for m in matrices if is_wrapped(m, recipe))


def memory_within_device(config: TrialConfig, limits: Limits) -> float:
    """Bytes that a rank lacks at its peak; of a family without formulas only what ran tells, and then it is 1 or 0."""
    if limits.plan is None:
        return float(any(_holds_as_much(config, known, limits.max_length) for known in limits.too_large))
    predicted = None if limits.memory_bytes is None else predicted_memory(config, limits)
    return 0.0 if predicted is None or limits.memory_bytes is None else predicted.peak_bytes - limits.memory_bytes


def memory_within_host(config: TrialConfig, limits: Limits) -> float:
    """Bytes that a rank leaves to its host beyond its share of what is there: the system would end the process, or others."""
    if limits.plan is None or limits.host_bytes is None or config.layout.offload == "none":
        return 0.0
    return host_bytes(limits.plan, config) - limits.host_bytes


def _holds_as_much(config: TrialConfig, known: TrialConfig, longest: int) -> bool:
    """Return whether a step is held to take at least what a known one does: no fewer tokens at once, nor of them in blocks kept."""
    same = {name: getattr(known.layout, name) for name in ("micro_batch_size", "micro_batch_tokens", "recomputation")}
    if replace(config, layout=replace(config.layout, **same)).of_step() != known:
        return False
    kept, known_kept = (2 - each.layout.num_recomputed(2) for each in (config, known))
    tokens, known_tokens = config.most_tokens(longest), known.most_tokens(longest)
    return tokens >= known_tokens and tokens * kept >= known_tokens * known_kept


def predicted_memory(config: TrialConfig, limits: Limits) -> RankMemory | None:
    """Return what a rank would hold with the longest rows, or None for a family without formulas."""
    if limits.plan is None:
        return None
    return _memory_of_step(limits.plan, config.of_step(), limits.max_length, _most_targets(config, limits), limits.is_on_gpu)


def _most_targets(config: TrialConfig, limits: Limits) -> int | None:
    """Return the most positions of a micro batch that the loss counts."""
    if limits.max_targets is None:
        return None
    if config.layout.micro_batch_size is not None:
        return limits.max_targets * config.layout.micro_batch_size
    most = limits.max_targets * config.recipe.global_batch_size
    # As many short rows as fit a budget of tokens may count more than the longest ones do.
    per_token = 1.0 if limits.targets_per_token is None else limits.targets_per_token
    return min(most, math.ceil(per_token * config.most_tokens(limits.max_length)))


# Of hundreds of points that are looked at for one proposal most have the same few steps.
@lru_cache(4096)
def _memory_of_step(plan: Blueprint, config: TrialConfig, length: int, num_targets: int | None, is_on_gpu: bool) -> RankMemory:
    return rank_memory(plan, config, length, num_targets, is_on_gpu=is_on_gpu)


# With as many at once an H100 computes seven times as long with a bf16 weight as it takes to read it (989e12 FLOP/s, 3.35e12 B/s),
# and a CPU is as fast as with more (`spaces.config.AUTO_MICRO_BATCH_TOKENS`): less at a time is better than anything twice.
BUSY_TOKENS = 2048


def config_within(params: Mapping[str, Any], limits: Limits) -> TrialConfig:
    """Translate the params of a space as `TrialConfig.from_params` does; what is `auto` also fits the device.

    Where more is predicted to be held than fits, the budget of tokens is halved down to `BUSY_TOKENS`, then half of the blocks are
    computed again, then all, and then the budget is halved down to the longest row: the global batch stays, and what is learned.

    Raises:
        KeyError: a param is missing.
    """
    config = TrialConfig.from_params(params, is_on_gpu=limits.is_on_gpu)
    steps = [config]
    if params["recomputation"] == "auto":
        others = [replace(config, layout=replace(config.layout, recomputation=each)) for each in RECOMPUTED_EVERY]
        steps += [each for each in others if prefix_kept(each, limits) <= 0]
    for each in steps:
        found = _within_memory(each, limits, least_tokens=max(BUSY_TOKENS, limits.max_length))
        if memory_within_device(found, limits) <= 0:
            return found
    return _within_memory(steps[-1], limits, least_tokens=limits.max_length)


def _within_memory(config: TrialConfig, limits: Limits, *, least_tokens: int) -> TrialConfig:
    """Halve a budget of tokens until a rank holds what fits, down to a least one."""
    tokens = config.layout.micro_batch_tokens
    while tokens is not None and tokens > least_tokens and memory_within_device(config, limits) > 0:
        tokens = max(tokens // 2, least_tokens)
        config = replace(config, layout=replace(config.layout, micro_batch_tokens=tokens))
    return config


CONSTRAINTS = (
    global_batch_divisible,
    world_size_within_cluster,
    matrices_split_evenly,
    shards_of_equal_size,
    adapter_rank_within_width,
    quantized_base_whole,
    int8_as_written,
    offloaded_from_gpu,
    norms_whole,
    vectors_whole,
    layers_adaptable,
    prefix_kept,
    prefix_within_positions,
    rotated_in_whole_blocks,
    memory_within_device,
    memory_within_host,
)
# Those between a method and a strategy or a model, whatever the ranges of the space, with the knob that is the first to look at.
OF_METHODS: dict[Constraint, str] = {
    matrices_split_evenly: "strategy",
    quantized_base_whole: "quantization",
    int8_as_written: "compile",
    offloaded_from_gpu: "offload",
    norms_whole: "adapter",
    vectors_whole: "adapter",
    layers_adaptable: "adapter",
    prefix_kept: "adapter",
}
OF_BATCHES: dict[Constraint, str] = {global_batch_divisible: "micro_batch_size"}


def reason(name: str, config: TrialConfig, limits: Limits) -> str:
    """Return in words why a config violates a constraint."""
    recipe, layout = config.recipe, config.layout
    words = {
        global_batch_divisible.__name__: f"a global batch of {recipe.global_batch_size} rows "
        + (
            f"leaves {layout.data_parallel_size - recipe.global_batch_size} of {layout.data_parallel_size} ranks without a row"
            if layout.micro_batch_size is None
            else f"is no whole number of micro batches of {layout.micro_batch_size} rows on {layout.data_parallel_size} "
            + ("rank" if layout.data_parallel_size == 1 else "ranks")
        ),
        world_size_within_cluster.__name__: f"needs {layout.world_size} workers, and there are {limits.num_workers}",
        matrices_split_evenly.__name__: _why_not_split(config, limits),
        shards_of_equal_size.__name__: f"{layout.world_size} ranks are no multiple of "
        + (f"a shard size of {layout.shard_size}" if layout.tp_size is None else f"a tp size of {layout.tp_size}"),
        adapter_rank_within_width.__name__: f"rank {recipe.adapter_rank} exceeds the model's width of {limits.hidden_size}",
        quantized_base_whole.__name__: f"a base in {recipe.quantization} is neither spread over ranks nor left to the host: ddp",
        int8_as_written.__name__: "int8 on a GPU is not compiled: how many columns are outliers only the data tell (compile none)",
        offloaded_from_gpu.__name__: "offload cpu moves weights from a GPU, and the workers have none (resources.gpus_per_worker)",
        norms_whole.__name__: "dora trains the norms of whole rows: not of what tp splits, int8 or float8 holds, or experts share",
        vectors_whole.__name__: f"{recipe.adapter} trains what tp would cut"
        if layout.tensor_parallel_size > 1
        else "fsdp in bf16 would cast vera's vectors, and not its factors",
        layers_adaptable.__name__: _why_not_adaptable(config, limits),
        prefix_kept.__name__: "prefix: each layer has its own, and compile blocks would compile every layer anew"
        if layout.compile != "none"
        else f"prefix: GPT-2 loses it with recomputation {layout.recomputation}",
        prefix_within_positions.__name__: f"a prefix of {recipe.adapter_rank} tokens and rows of {limits.max_length} exceed the "
        f"model's {limits.plan.num_positions if limits.plan else None} positions",
        rotated_in_whole_blocks.__name__: f"oft: blocks of {recipe.adapter_rank} do not divide the widths of the layers",
        memory_within_device.__name__: "no more tokens at once ran out of memory in this search"
        if limits.plan is None
        else f"holds {memory_within_device(config, limits) / 2**30:.2f} GiB a rank beyond what fits",
        memory_within_host.__name__: f"leaves {memory_within_host(config, limits) / 2**30:.2f} GiB a rank too much to the host",
    }
    return words[name]


def _why_not_adaptable(config: TrialConfig, limits: Limits) -> str:
    if config.recipe.adapter == "prefix" and limits.plan is not None and not limits.plan.head[-1].is_output:
        return "prefix is for causal-lm: PEFT cannot hand one to a classifier"
    if limits.plan is not None and limits.plan.family == "gpt2":
        return "oft and float8 are of nn.Linear, and GPT-2's layers are none"
    return "bottlenecks are behind a feed-forward, and these experts are one stacked weight"


def _why_not_split(config: TrialConfig, limits: Limits) -> str:
    if limits.plan is None or limits.plan.family not in PLANS:
        return f"strategy tp splits models of these families: {', '.join(sorted(PLANS))}; this is none"
    num_ranks = config.layout.tensor_parallel_size
    return f"strategy tp: not divisible by {num_ranks} ranks: {', '.join(left_over(limits.plan, num_ranks))}"


def violations(config: TrialConfig, limits: Limits) -> dict[str, float]:
    """Return the value of every constraint by its name."""
    return {constraint.__name__: float(constraint(config, limits)) for constraint in CONSTRAINTS}


def why_not(config: TrialConfig, limits: Limits) -> list[str]:
    """Return in words all that makes a config infeasible."""
    return [reason(name, config, limits) for name, value in violations(config, limits).items() if value > 0]


def why_none_trains(configs: Iterable[TrialConfig], limits: Limits, *, has_all_batches: bool = False) -> str:
    """Return why no layout that the cluster holds can train the model, with the knob in front; empty where one can.

    Args:
        configs: the corners of a space; between the ends of its ranges nothing changes that.
        limits: what they are held against.
        has_all_batches: whether the corners have all world sizes and global batches, so that these decide too.
    """
    constraints = {**OF_METHODS, **(OF_BATCHES if has_all_batches else {})}
    words = ""
    for config in configs:
        if world_size_within_cluster(config, limits) <= 0:
            against = [constraint for constraint in constraints if constraint(config, limits) > 0]
            if not against:
                return ""
            why = (
                f"space.{constraints[against[0]]}: nothing in the space can be trained: {reason(against[0].__name__, config, limits)}"
            )
            words = words or why
    return words


def is_feasible(values: Mapping[str, float]) -> bool:
    """Return whether all constraints hold."""
    return all(value <= 0 for value in values.values())
