"""How a model is spread over the ranks: one function, because the order matters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from spaces.config import Layout, TrialConfig
from trainables.compilation import Compilation
from trainables.mesh import World
from trainables.meter import StepTimer
from trainables.report import TrialError
from trainables.tensor_parallel import Exchange, mark, marks_of, split


def parallelize(
    module: nn.Module,
    config: TrialConfig,
    world: World,
    timer: StepTimer | None = None,
    compilation: Compilation | None = None,
) -> nn.Module:
    """Split matrices, switch recomputation on, compile, then wrap in DDP or shard with FSDP2: each block, then what is left.

    Splitting comes first: what is computed again is a block as this rank has it, with its sums over the ranks. Recomputation and
    compilation come before sharding: what is computed again, or compiled, is the block without its gathering of weights. One
    compilation serves all blocks, which are alike. They come before the root: what that then shards is only what no block holds
    (embeddings, head), so that no more than one block is gathered at a time. Where groups of ranks split the matrices, a rank's
    pieces are sharded over the ranks that hold the same ones. One process has nothing to share and is left as it is, unless it
    leaves its weights to the host, which FSDP2 does too.

    Args:
        timer: is told where the computation waits for other ranks.
        compilation: how blocks are compiled; without one they are not.
    """
    if config.layout.tensor_parallel_size > 1:
        splitting = world.tensor_parallel(config.layout)
        module = split(module, splitting, summing(splitting, timer))
    recompute(module, config.layout)
    if compilation is not None:
        compilation.blocks(blocks_of(module))
    if not config.layout.is_sharded:
        own_in_fp32(module, world.device)
        module.to(world.device)
    if config.layout.data_parallel_size == 1 and not config.layout.is_sharded:
        return module
    if config.layout.strategy == "ddp":
        # Buffers are tables that all ranks compute alike: without this they would be sent in every forward pass. And gradients would
        # be there twice, as such and in the buckets that are exchanged.
        replica = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
        if timer is not None:
            # A lambda: DDP refuses annotations that are strings.
            replica.register_comm_hook(timer, lambda timer, bucket: _timed_all_reduce(timer, bucket))  # noqa: PLW0108
        return replica
    mesh, marks = world.sharding(config.layout), marks_of(module)
    policy = MixedPrecisionPolicy()
    if config.recipe.precision == "bf16":
        # Gradients are summed in fp32: a sum over many ranks in bf16 loses the small ones.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = OffloadPolicy()
    if config.layout.offload == "cpu":
        # From pinned memory a block comes while the one before computes.
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    for part in (*blocks_of(module), module):
        own_in_fp32(part, world.device)
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=offload)
    mark(module, marks)
    # On a GPU the exchange is on streams of its own, and what the computation waits for it is not to be seen from here.
    if timer is not None and world.device.type == "cpu":
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_custom_all_gather(cast("Any", _TimedExchange(timer, dist.all_gather_into_tensor)))
                part.set_custom_reduce_scatter(cast("Any", _TimedExchange(timer, dist.reduce_scatter_tensor)))
    return module


def own_in_fp32(part: nn.Module, device: torch.device) -> None:
    """Give what trains, and was not sharded before, values of its own on a device: until then they are the base's, as that is stored.

    Block by block, so that no host holds a whole copy for each rank.
    """
    for parameter in part.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device).to(torch.float32, copy=True)


def recompute(module: nn.Module, layout: Layout, watch: Callable[[], AbstractContextManager[object]] | None = None) -> None:
    """Have the backward pass compute blocks again, those that the layout says.

    Args:
        module: not wrapped in DDP.
        layout: says of each block whether it is.
        watch: called in every block's forward pass; what it returns is entered around the block's recomputation. No block that is
            compiled can run with it.
    """
    if layout.recomputation == "none":
        return
    if not cast("Any", module).supports_gradient_checkpointing:
        raise TrialError("space.recomputation: transformers computes nothing of this model again; allowed: none")
    # The reentrant form needs an input that requires a gradient, which a frozen embedding does not give.
    options: dict[str, Any] = {"use_reentrant": False}
    if watch is not None:
        options["context_fn"] = lambda: (nullcontext(), watch())
    cast("Any", module).gradient_checkpointing_enable(options)
    # Beside an adapter transformers makes the look-up require one, and the first block then computes gradients of nothing.
    cast("Any", module).disable_input_require_grads()
    for index, block in enumerate(blocks_of(module)):
        cast("Any", block).gradient_checkpointing = layout.recomputes(index)


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return a model's equal blocks, in their order."""
    return [part for part in module.modules() if isinstance(part, GradientCheckpointingLayer)]


def summing(world: World, timer: StepTimer | None) -> Exchange:
    """Return what sums a tensor over the ranks, in place; the computation waits for it, which the timer is told."""

    def exchange(tensor: torch.Tensor) -> torch.Tensor:
        if timer is not None:
            timer.begin_exchange()
        dist.all_reduce(tensor, group=world.group)
        if timer is not None:
            timer.end_exchange()
        return tensor

    return exchange


def _timed_all_reduce(timer: StepTimer, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    """Exchange a bucket of gradients as DDP does by itself; behind the last one nothing is left to compute."""
    if bucket.is_last():
        timer.begin_exchange()
    return allreduce_hook(cast("dist.ProcessGroup", dist.group.WORLD), bucket)


class _TimedExchange:
    """What FSDP2 calls for a collective: its default, timed; the computation waits for it."""

    def __init__(self, timer: StepTimer, collective: Callable[..., dist.Work | None]) -> None:
        self._timer, self._collective = timer, collective

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, **options: Any) -> dist.Work | None:
        self._timer.begin_exchange()
        work = self._collective(output_tensor, input_tensor, **options)
        self._timer.end_exchange()
        return work


def autocast(config: TrialConfig, world: World) -> AbstractContextManager[object]:
    """Return bf16 autocast where the recipe asks for it and FSDP2 does not already cast."""
    if config.recipe.precision != "bf16" or config.layout.is_sharded:
        return nullcontext()
    return torch.autocast(world.device.type, dtype=torch.bfloat16)


# In the second, DDP makes its buckets anew.
BUCKET_STEPS = 2


class GradientExchange:
    """Which passes of a step exchange gradients between ranks, and what is left of them behind it.

    DDP makes its buckets anew, by the order of the first backward pass, in the next forward pass that exchanges. Its gradients are
    views of buckets: if there were any then, all would be there twice, beside the optimizer's state. So none are left of the first
    step, and until the second is over every pass exchanges; the last exchange adds what it has to the mean of those before. FSDP2
    reduces gradients in every pass: accumulated whole, they would take the memory that it is chosen to save.
    """

    def __init__(self, module: nn.Module) -> None:
        self._ddp = module if isinstance(module, DistributedDataParallel) else None
        self._num_steps = 0

    def passing(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Return what is to be entered around a forward and backward pass; the last one of a step always exchanges."""
        return nullcontext() if self._ddp is None or is_last or self._num_steps < BUCKET_STEPS else self._ddp.no_sync()

    def end_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave no gradients: DDP's stay where they are exchanged, as zeros, others are made anew."""
        optimizer.zero_grad(set_to_none=self._ddp is None or self._num_steps == 0)
        self._num_steps += 1
