"""How a model is spread over the ranks: one function, because the order matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

from spaces.config import TrialConfig
from trainables.mesh import World


def parallelize(
    module: nn.Module,
    config: TrialConfig,
    world: World,
    recompute_context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> nn.Module:
    """Switch recomputation on, then wrap in DDP or shard with FSDP2: every transformer block by itself, then what is left.

    Recomputation comes before sharding: what is computed again is the block without its gathering of weights. The blocks come
    before the root: what that then shards is only what no block holds (embeddings, head), so that no more than one block is
    gathered at a time. One process has nothing to share and is left as it is.

    Args:
        recompute_context: called in every block's forward pass; what it returns is entered around the block's recomputation.
    """
    if config.layout.recomputation == "full":
        # The reentrant form needs an input that requires a gradient, which a frozen embedding does not give.
        options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), recompute_context())}
        cast("Any", module).gradient_checkpointing_enable(options)
    if world.world_size == 1:
        return module
    if config.layout.strategy == "ddp":
        return DistributedDataParallel(module)
    mesh = world.mesh()
    policy = MixedPrecisionPolicy()
    if config.recipe.precision == "bf16":
        # Gradients are summed in fp32: a sum over many ranks in bf16 loses the small ones.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in module.modules():
        if isinstance(block, GradientCheckpointingLayer):
            fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    return module


def autocast(config: TrialConfig, world: World) -> AbstractContextManager[object]:
    """Return bf16 autocast where the recipe asks for it and FSDP2 does not already cast."""
    if config.recipe.precision != "bf16" or (config.layout.strategy == "fsdp" and world.world_size > 1):
        return nullcontext()
    return torch.autocast(world.device.type, dtype=torch.bfloat16)


@contextmanager
def gradient_sync(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Exchange gradients in this backward pass, or only accumulate them on this rank.

    FSDP2 reduces them every time: accumulated whole, they would take the memory that it is chosen to save.
    """
    if isinstance(module, DistributedDataParallel) and not enabled:
        with module.no_sync():
            yield
    else:
        yield
