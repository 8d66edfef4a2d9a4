"""Step time before any step was measured: FLOPs over an assumed share of the peak, bytes over bandwidths.

What is assumed, and stands beside every number that follows from it:

- the matrix units reach `ASSUMED_UTILISATION` of their dense peak, of a CPU of what it was measured to reach, recomputation counted;
- the exchange of gradients overlaps with the backward pass of the last micro batch under DDP, and with all of the computation
  under FSDP2 (https://pytorch.org/blog/introducing-pytorch-fully-sharded-data-parallel-api/);
- where groups of tensor-parallel ranks share their pieces by FSDP2, each of the two exchanges goes as it goes alone;
- tensor-parallel ranks wait for every sum: of activations in each half of a block one forward and one backward, and one more where
  its recomputation needs the sum; of an adapter's gradients one a step; and each computes all of the head and of the uncut factors;
- a ring moves 2 (N - 1) / N of the bytes to sum them on N ranks, half of that to gather or to reduce them
  (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md);
- a quantised base is read, and written spread out, once for the forward and once for the backward pass of every micro batch, and once
  more where the forward pass is computed again; none of that overlaps with the matrix units' work;
- ranks that hold a copy of the weights together, or split matrices, are in one node, where a node holds as many;
- what is left to the host comes and goes over PCIe 4.0 with 16 lanes, 32 GB/s each way (5.0 has twice that;
  https://pcisig.com/specifications), beside the computation as FSDP2's exchange does, but that a single rank fetches nothing ahead
  (torch 2.13), and is updated at a GPU's share of its host's memory bandwidth: an eighth of two sockets with eight channels of
  DDR5-4800, as a DGX H100 has;
- over NVLink the rings send what was measured of it (`spaces.hardware.MEASURED_LINK_SHARE`); sums through its switches, NCCL's choice
  within a node of Hopper GPUs, are faster;
- between nodes every GPU has one adapter of 400 Gbit/s, as in https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html,
  of which NCCL makes 46 to 48 GB/s (its maintainers; https://github.com/NVIDIA/nccl-tests/issues/290).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from spaces.blueprint import Blueprint
from spaces.config import TrialConfig
from spaces.flops import TrainingFlops, flops_of_blueprint, recomputed_flops_of_blueprint
from spaces.hardware import Device
from spaces.memory import num_adapter_params, num_trained_of_block, num_updated
from spaces.quantization import spread_bytes
from spaces.tensor_parallel import local_blueprint, num_partial_params
from spaces.widths import FP32_BYTES, widths

# By device type. Of a GPU's dense peak, between published rows on H100, as counted here: Llama-3 8B with LoRA on one at 4,096 tokens,
# 12,473 tokens/s (42 %; https://github.com/NVIDIA-NeMo/Automodel/blob/main/docs/performance-summary.mdx), in full on eight at 8,192,
# 6,667 tokens/s each (35 %, compiled and with selective recomputation;
# https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md).
# Of a CPU's measured peak, what MiniLM reaches under DDP on one rank and two (0.34 to 0.69, median 0.46: `hfu` of
# benchmarks/results/banking77_knobs/trials.csv); models whose matrices are very small stay far below.
ASSUMED_UTILISATION = {"cuda": 0.38, "cpu": 0.5}
NETWORK_BYTES_PER_SECOND = 47e9
HOST_LINK_BYTES_PER_SECOND = 32e9
HOST_MEMORY_BYTES_PER_SECOND = 2 * 8 * 38.4e9 / 8
# AdamW reads weight, gradient and two moments, and writes all but the gradient, in fp32.
UPDATE_BYTES_PER_PARAM = 7 * FP32_BYTES
# Of a device's memory, for the CUDA context, NCCL's buffers, workspaces and what the allocator cannot use: an assumption.
MEMORY_KEPT_FREE = 0.08


class Machine(Protocol):
    """What the time of a step follows from."""

    def peak_flops_per_second(self, precision: str) -> float:
        """Return the dense peak of one rank's device.

        Raises:
            NoPeak: it is not known at this precision.
        """

    def memory_bytes_per_second(self) -> float:
        """Return what a device reads and writes of its own memory."""

    def link_bytes_per_second(self, world_size: int) -> float:
        """Return what a rank sends to the next, each way."""

    @property
    def utilisation(self) -> float:
        """The share of the peak that is assumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredMachine:
    """The device of a worker as `trainables.device.examine` found it; all ranks are taken to be alike."""

    name: str
    type: str
    """`cpu` or `cuda`"""
    peaks: Mapping[str, float]
    """FLOP/s by precision."""
    bytes_per_second: float
    link: float
    """Bytes per second from a rank to the next."""

    def peak_flops_per_second(self, precision: str) -> float:
        """See `Machine`."""
        if precision not in self.peaks:
            raise NoPeak(f"{self.name} has no known peak at {precision}")
        return self.peaks[precision]

    def memory_bytes_per_second(self) -> float:
        """See `Machine`."""
        return self.bytes_per_second

    def link_bytes_per_second(self, world_size: int) -> float:
        """See `Machine`."""
        return self.link

    @property
    def utilisation(self) -> float:
        return ASSUMED_UTILISATION[self.type]


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuCluster:
    """Equal GPUs in equal nodes."""

    device: Device
    num_nodes: int
    gpus_per_node: int

    @property
    def num_workers(self) -> int:
        return self.num_nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> int:
        """Memory of one GPU that tensors may take."""
        return int(self.device.memory_bytes * (1 - MEMORY_KEPT_FREE))

    def peak_flops_per_second(self, precision: str) -> float:
        """See `Machine`."""
        peak = self.device.tera_flops_per_second.get(precision)
        if peak is None:
            raise NoPeak(f"{self.device.name} has no {precision} units")
        return peak * 1e12

    def memory_bytes_per_second(self) -> float:
        """See `Machine`."""
        return self.device.gigabytes_per_second * 1e9

    def link_bytes_per_second(self, world_size: int) -> float:
        """See `Machine`: within a node the link, across nodes the network."""
        link = self.device.link_bytes_per_second
        return link if world_size <= self.gpus_per_node else min(link, NETWORK_BYTES_PER_SECOND)

    @property
    def utilisation(self) -> float:
        return ASSUMED_UTILISATION["cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepEstimate:
    """Seconds of one optimizer step of full rows, by part, and what follows."""

    compute_seconds: float
    """Forward, backward and recomputation of all micro batches, with the spreading out of a quantised base."""
    communication_seconds: float
    """What of the exchange does not overlap with the computation."""
    update_seconds: float
    num_tokens: int
    """Of the global batch."""
    mfu: float

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.communication_seconds + self.update_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def usable_bytes(device: Mapping[str, Any], capacity_bytes: int) -> int:
    """Return what the tensors of one rank may take: of a GPU what is left of its memory, of a host what the process leaves.

    Args:
        device: as `trainables.device.examine` found it.
        capacity_bytes: the GPU's memory, or a worker's share of its node's.
    """
    if device["type"] == "cuda":
        return int(capacity_bytes * (1 - MEMORY_KEPT_FREE))
    return max(0, capacity_bytes - int(device["process_bytes"]))


class NoPeak(ValueError):
    """The device has no peak at the recipe's precision; the message says which."""


def estimate_step(
    plan: Blueprint, config: TrialConfig, machine: Machine, length: float, targets_per_row: float | None = None
) -> StepEstimate:
    """Return the estimated time of one optimizer step.

    Args:
        plan: the model.
        config: recipe and layout.
        machine: where it would run.
        length: tokens per row; all rows are taken to be equal.
        targets_per_row: positions that the loss counts; by default those of plain text or of a class.

    Raises:
        NoPeak: the device's data sheet has no figure for the precision.
    """
    recipe, layout = config.recipe, config.layout
    targets = plan.targets_per_row(length) if targets_per_row is None else targets_per_row
    rows, num_ranks = recipe.global_batch_size, layout.world_size

    def total(flops: TrainingFlops) -> float:
        return flops.total(
            num_tokens=rows * length, num_targets=rows * targets, sum_of_squared_lengths=rows * plan.shape.squared(length)
        )

    # What one rank has of the model, or the ranks among whom the rows are dealt.
    local = local_blueprint(plan, layout.tensor_parallel_size)
    computed = total(flops_of_blueprint(local, recipe)) + total(recomputed_flops_of_blueprint(local, config))
    peak = machine.peak_flops_per_second(recipe.precision)
    compute = computed / layout.data_parallel_size / (peak * machine.utilisation)
    trained = num_updated(local, config)
    num_micro_batches = config.num_grad_accum_steps(length)
    num_layers = plan.shape.num_layers
    num_spreads = num_micro_batches * (2 + layout.num_recomputed(num_layers) / num_layers)
    compute += num_spreads * spread_bytes(local, recipe, widths(config).products) / machine.memory_bytes_per_second()
    parts = exchanges(plan, config, rows * length)
    waiting, beside = (sum(p.seconds(machine) for p in parts if p.is_beside == flag) for flag in (False, True))
    fetched, returned = _moved_to_and_from_host(plan, config, rows * length)
    beside += returned / HOST_LINK_BYTES_PER_SECOND
    if layout.num_shards > 1:
        beside += fetched / HOST_LINK_BYTES_PER_SECOND
    else:
        waiting += fetched / HOST_LINK_BYTES_PER_SECOND
    # Two thirds of the work are the backward pass.
    overlap = compute * 2 / 3 / num_micro_batches if layout.strategy == "ddp" else compute
    communication = waiting + max(0.0, beside - overlap)
    update_rate = machine.memory_bytes_per_second() if layout.offload == "none" else HOST_MEMORY_BYTES_PER_SECOND
    update = UPDATE_BYTES_PER_PARAM * trained / layout.num_shards / update_rate
    return StepEstimate(
        compute_seconds=compute,
        communication_seconds=communication,
        update_seconds=update,
        num_tokens=round(rows * length),
        mfu=total(flops_of_blueprint(plan, recipe)) / (compute + communication + update) / (peak * num_ranks),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A step's collectives among groups of ranks of one size."""

    num_bytes: float
    """Of all of them, before the share that every rank sends: what is summed counts twice."""
    num_ranks: int
    """Of one group."""
    span: int
    """Ranks among which a group's are the first to meet: neighbours span as many as they are, one of every copy all."""
    is_beside: bool = True
    """Whether the computation goes on beside it."""

    def seconds(self, machine: Machine) -> float:
        """Return the time of the rings."""
        return self.num_bytes * (self.num_ranks - 1) / self.num_ranks / machine.link_bytes_per_second(self.span)


def exchanges(plan: Blueprint, config: TrialConfig, num_tokens: float) -> list[Exchange]:
    """Return a step's collectives: those of all ranks, or of those that hold a copy together and then those between the copies.

    Or of those that split matrices, and then those between the ranks that hold the same pieces.

    Args:
        plan: the model.
        config: recipe and layout.
        num_tokens: padded tokens of the global batch.
    """
    layout, num_ranks = config.layout, config.layout.world_size
    found = []
    if layout.strategy == "ddp":
        found.append(Exchange(num_bytes=2 * FP32_BYTES * num_updated(plan, config), num_ranks=num_ranks, span=num_ranks))
    if layout.tensor_parallel_size > 1:
        size = layout.tensor_parallel_size
        activations = _summed_activations(plan, config) * num_tokens / layout.data_parallel_size
        gradients = FP32_BYTES * num_partial_params(plan, config.recipe) / layout.num_shards
        found.append(Exchange(num_bytes=2 * (activations + gradients), num_ranks=size, span=size, is_beside=False))
    if layout.is_sharded:
        size, local = layout.num_shards, local_blueprint(plan, layout.tensor_parallel_size)
        span = size if layout.tp_size is None else num_ranks
        found.append(Exchange(num_bytes=_gathered_and_reduced(local, config, num_tokens), num_ranks=size, span=span))
    if layout.shard_size is not None:
        # Every micro batch's, as FSDP2 reduces them; of a rank's own shard.
        shard = FP32_BYTES * num_updated(plan, config) / layout.shard_size * _num_micro_batches(config, num_tokens)
        found.append(Exchange(num_bytes=2 * shard, num_ranks=num_ranks // layout.shard_size, span=num_ranks))
    return found


def _gathered_and_reduced(plan: Blueprint, config: TrialConfig, num_tokens: float) -> float:
    """Return the bytes of weights that FSDP2 gathers in a step and of gradients that it reduces."""
    held = plan.num_params + num_adapter_params(plan, config.recipe)
    blocks = plan.shape.num_layers * plan.num_block_params
    # Blocks are gathered for the forward and again for the backward pass, what no block holds once.
    gathered = widths(config).products * (held + blocks)
    return float(_num_micro_batches(config, num_tokens) * (gathered + FP32_BYTES * num_updated(plan, config)))


def _moved_to_and_from_host(plan: Blueprint, config: TrialConfig, num_tokens: float) -> tuple[float, float]:
    """Return the bytes of shards that a rank gets from its host in a step, and of gradients that it returns, as they are held."""
    if config.layout.offload == "none":
        return 0.0, 0.0
    recipe, num_layers = config.recipe, plan.shape.num_layers
    trained = num_updated(plan, config)
    # Blocks come for the forward and again for the backward pass, what no block holds once.
    fetched = FP32_BYTES * (trained + num_layers * num_trained_of_block(plan, recipe))
    if recipe.adapter != "none":
        fetched += widths(config).frozen * (plan.num_params + num_layers * plan.num_block_params)
    share = _num_micro_batches(config, num_tokens) / config.layout.num_shards
    return share * fetched, share * FP32_BYTES * trained


def _num_micro_batches(config: TrialConfig, num_tokens: float) -> int:
    return config.num_grad_accum_steps(num_tokens / config.recipe.global_batch_size)


def _summed_activations(plan: Blueprint, config: TrialConfig) -> int:
    """Return the bytes per token that tensor-parallel ranks sum: results forward and again, gradients of their inputs backward."""
    width = widths(config)
    # Recomputation ends before the last sum, where nothing after it in the block needs that.
    num_layers = plan.shape.num_layers
    again = (1 + plan.is_last_result_needed) * config.layout.num_recomputed(num_layers)
    # Where nothing before the blocks trains, the first one's input needs no gradient.
    backward = 2 * num_layers - (config.recipe.adapter != "none")
    return plan.shape.hidden_size * ((2 * num_layers + again) * width.products + backward * width.stream)
