"""Attention between rows that are laid end to end, without padding: every token sees its own row alone.

The model is one row of tokens long; what is between the attentions computes no padding. (Krell et al. 2021,
https://arxiv.org/abs/2107.02027; "padding-free" in transformers and TRL, where it takes flash attention's kernels.)
GPUs attend to all rows in one kernel, where it holds what it promises; others, and CPUs, to those of one length at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from torch.overrides import handle_torch_function, has_torch_function_unary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from spaces.adapters import num_prefix_tokens
from spaces.config import Recipe, TrialConfig
from spaces.packing import Packing, can_pack, packing_of
from trainables.batching import Batch
from trainables.data import TaskData
from trainables.packed_rows import PackedRows

logger = logging.getLogger(__name__)

# Under these names transformers finds what is below. Where rows are padded, it is `scaled_dot_product_attention` as ever.
BY_ROWS = ATTENTION, IN_ONE_KERNEL = "sdpa_of_rows", "varlen_of_rows"
# Of which torch has a kernel for rows of several lengths.
KERNEL_DEVICES, KERNEL_TYPES = ("cuda",), (torch.bfloat16, torch.float16)
# What transformers sees in the place of a module whose keys are there for every head: it asks a module for its groups of heads.
WITHOUT_GROUPS = nn.Identity()
# Of what it computes, relative: some times a rounding of bf16, 2^-9.
TOLERANCE = 0.02
# Torch 2.11 takes fewer heads of keys without being told.
TELLS_SHARED_KEYS = "enable_gqa" in signature(varlen_attn).parameters
# The mask is made without a look at whether there is anything to mask.
NO_SKIP = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
# Of others, as in generation, nothing is known.
_batch: ContextVar[Batch | None] = ContextVar("batch", default=None)


def packing_for(module: Any, config: TrialConfig, data: TaskData) -> Packing | None:
    """Return how a model's rows are laid end to end; None where they are padded.

    Args:
        module: transformers' model, or PEFT's around it.
        config: the trial's.
        data: its data.
    """
    text = module.config.get_text_config()
    if text._attn_implementation not in BY_ROWS:
        return None
    return packing_of(text.to_dict(), data.task, config, data.longest)


def attend_by_rows(module: Any) -> None:
    """Have a model of a known family, whose attention is `scaled_dot_product_attention`, know rows that are laid end to end."""
    text = module.config.get_text_config()
    if text._attn_implementation == "sdpa" and can_pack(text.model_type):
        module.set_attn_implementation(ATTENTION)


def attend_in_one_kernel(module: Any, recipe: Recipe, device: torch.device, head_dim: int) -> None:
    """Have a model attend to all rows in one kernel, where that holds what it promises; a prefix is not laid out for it.

    Decided when the model is built: what torch compiles has no choice in it then, and what is tried here nobody counts.

    Args:
        module: one that knows rows that are laid end to end, or another.
        recipe: the trial's.
        device: the rank's.
        head_dim: width of a head.
    """
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    is_known = module.config.get_text_config()._attn_implementation == ATTENTION and not num_prefix_tokens(recipe)
    if is_known and takes_all_rows(device, dtype, head_dim):
        module.set_attn_implementation(IN_ONE_KERNEL)


@contextmanager
def inputs_of(module: Any, batch: Batch) -> Iterator[dict[str, Any]]:
    """Yield what a model is called with for a batch, of which is known whether it is padded.

    Transformers would read that back from the device, in every forward pass: from a mask whether it masks anything, and without one
    from the positions whether rows are laid end to end.

    Args:
        module: transformers' model.
        batch: what it shall compute.
    """
    inputs = batch.inputs()
    # A prefix is a cache, behind which nobody looks; given a mask, PEFT would send what it masks of the prefix from the host.
    is_prefixed = batch.packed is not None and batch.packed.num_before > 0
    if module.config.get_text_config()._attn_implementation in BY_ROWS and batch.attention_mask is None and not is_prefixed:
        inputs["attention_mask"] = torch.ones_like(batch.input_ids)
    token = _batch.set(batch)
    try:
        yield inputs
    finally:
        _batch.reset(token)


def attention_by_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: PackedRows,
    *,
    is_causal: bool,
    scale: float | None,
    in_one_kernel: bool = False,
) -> torch.Tensor:
    """Return every row's attention to itself, (tokens, heads, head width); a function of its own, because `trainables.meter` sees it.

    Args:
        query: (1, heads, tokens, head width)
        key: the same, of fewer heads where queries share them, and with a prefix before
        value: the same
        rows: where each row is
        is_causal: whether a token sees none behind it
        scale: of the scores; one over the root of the head width by default
        in_one_kernel: to all rows at once, where `takes_all_rows`; else to those of one length
    """
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale}
    if has_torch_function_unary(query):
        return handle_torch_function(attention_by_rows, (query,), query, key, value, rows, **options, in_one_kernel=in_one_kernel)
    attention = _attention_to_all_rows if in_one_kernel else _attention_by_length
    return attention(query, key, value, rows, **options)


def _dtype(query: torch.Tensor) -> torch.dtype:
    """Return the type in which attention is computed; autocast does not know the kernel for all rows."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else query.dtype


@cache
def takes_all_rows(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Return whether torch's kernel for rows of several lengths computes here what those of one length do, forward and backward.

    Tried once in a process: which GPUs and widths of heads FlashAttention takes is another list in each version of it and of torch
    (https://github.com/Dao-AILab/flash-attention#nvidia-cuda-support).

    Args:
        device: of the model.
        dtype: in which attention is computed.
        width: of a head.
    """
    if device.type not in KERNEL_DEVICES or dtype not in KERNEL_TYPES:
        return False
    try:
        errors = list(_errors(device, dtype, width))
    except torch.OutOfMemoryError:  # which says nothing of the kernel, and is not remembered
        raise
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
    else:
        if all(error <= TOLERANCE for error in errors):
            return True
        reason = f"its results are off by {max(errors):.1%}"
    logger.warning("attention goes row by row: torch's kernel for all rows fails with %s on %s: %s", dtype, device, reason)
    return False


def _errors(device: torch.device, dtype: torch.dtype, width: int) -> Iterator[float]:
    """Yield how far, relative to its size, each result and gradient of the kernel is from that of attention by length."""
    generator = torch.Generator().manual_seed(0)
    rows = PackedRows.of(np.array([3, 5, 5, 16]), Packing(first_position=0)).to(device)
    *given, weights = (torch.randn(1, heads, 29, width, generator=generator).to(device, dtype) for heads in (4, 2, 2, 4))
    for is_causal in (True, False):
        found = []
        for attention in (_attention_by_length, _attention_to_all_rows):
            query, key, value = (part.clone().requires_grad_() for part in given)
            with torch.enable_grad(), torch.autocast(device.type, enabled=False):
                attended = attention(query, key, value, rows, is_causal=is_causal, scale=None)
                (attended * weights[0].transpose(0, 1)).sum().backward()
            found.append([attended.detach(), *(part.grad for part in (query, key, value) if part.grad is not None)])
        for expected, ours in zip(*found, strict=True):
            yield ((ours - expected).norm() / expected.norm()).item()


def _attention_to_all_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: PackedRows, *, is_causal: bool, scale: float | None
) -> torch.Tensor:
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0) if is_causal else (-1, -1)}
    if TELLS_SHARED_KEYS:
        options["enable_gqa"] = key.shape[1] != query.shape[1]
    q, k, v = (x.squeeze(0).transpose(0, 1).to(_dtype(query)) for x in (query, key, value))
    return cast("torch.Tensor", varlen_attn(q, k, v, rows.bounds, rows.bounds, rows.longest, rows.longest, **options))


# Every micro batch has other lengths, for which nothing is compiled anew.
@torch.compiler.disable
def _attention_by_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: PackedRows, *, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """Attend to the rows of one length together.

    A prefix is before all rows, and every row sees it. Its own queries are zeros, whose results are dropped: what is causal then
    stays so in a square, which fast kernels know.
    """
    key, value = _for_every_head(query, key, value)
    options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": key.shape[1] != query.shape[1]}
    # Split at once: the gradient of a slice is as long as what it was cut from, that of all parts together too.
    sizes = [num_rows * length for num_rows, length in rows.runs]
    num_before = rows.num_before
    query = functional.pad(query, (0, 0, num_before, 0)) if num_before else query
    before, *parts = zip(*(x.squeeze(0).split([num_before, *sizes], dim=1) for x in (query, key, value)), strict=True)
    results = []
    for run, part in zip(rows.runs, parts, strict=True):
        own = [x.unflatten(1, run).transpose(0, 1) for x in part]
        if num_before:
            own = [torch.cat([first.expand(run[0], -1, -1, -1), x], dim=2) for first, x in zip(before, own, strict=True)]
        attended = functional.scaled_dot_product_attention(*own, **options)
        results.append((attended[:, :, num_before:] if num_before else attended).transpose(1, 2).flatten(0, 1))
    return torch.cat(results)


def _for_every_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values; on a GPU in fp32 repeated for every head.

    None of torch's kernels that keep no scores knows shared heads there: FlashAttention and cuDNN's are for half precision, and the
    memory-efficient one has as many heads of keys as of queries (https://github.com/pytorch/pytorch/pull/181528).
    """
    if query.device.type not in KERNEL_DEVICES or _dtype(query) in KERNEL_TYPES or key.shape[1] == query.shape[1]:
        return key, value
    num_sharing = query.shape[1] // key.shape[1]
    return key.repeat_interleave(num_sharing, 1), value.repeat_interleave(num_sharing, 1)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packed_rows: PackedRows | None = None,
    in_one_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    if packed_rows is None:
        whole_key, whole_value = _for_every_head(query, key, value)
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module if whole_key is key else WITHOUT_GROUPS,
            query,
            whole_key,
            whole_value,
            attention_mask,
            scaling=scaling,
            is_causal=causal,
            **kwargs,
        )
        return found
    attended = attention_by_rows(query, key, value, packed_rows, is_causal=causal, scale=scaling, in_one_kernel=in_one_kernel)
    return attended[None], None


def _attention_in_one_kernel(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return _attention(*args, **kwargs, in_one_kernel=True)


def _mask(*, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    batch = _batch.get()
    if batch is None:
        return sdpa_mask(attention_mask=attention_mask, **options)
    if batch.packed is not None:
        return None
    if batch.attention_mask is None:
        return sdpa_mask(**options)
    return sdpa_mask(attention_mask=attention_mask, **options | NO_SKIP)


AttentionInterface.register(ATTENTION, _attention)
AttentionInterface.register(IN_ONE_KERNEL, _attention_in_one_kernel)
AttentionMaskInterface.register(ATTENTION, _mask)
AttentionMaskInterface.register(IN_ONE_KERNEL, _mask)
