"""Torch's operation for rows of several lengths, for CPUs, which have none: scores and gradients written out, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.nn.attention import varlen

from trainables import packed


@contextmanager
def varlen_on_cpu(width: int, dtype: torch.dtype = torch.float32) -> Iterator[list[str]]:
    """Give torch's own operations, which only GPUs have kernels of, such for CPUs; yield what is then called, in its order.

    Args:
        width: of a head; of this it is found out that the kernel is right.
        dtype: the same.
    """
    called: list[str] = []

    def forward(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        scale: float | None = None,
        window_size: list[int] | None = None,
        enable_gqa: bool = False,
        *_: object,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        called.append("forward")
        assert cu_seq_q.dtype is cu_seq_k.dtype is torch.int32
        assert torch.equal(cu_seq_q, cu_seq_k)
        assert enable_gqa == (key.shape[1] != query.shape[1])
        assert is_causal == (window_size == [-1, 0])
        assert max_q == max_k == cu_seq_q.diff().max()
        attended = torch.empty_like(query)
        for rows, _, shares, v in _rows(query, key, value, cu_seq_q, is_causal, scale):
            attended[rows] = (shares @ v).transpose(0, 1)
        return attended, query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)

    def backward(
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool,
        rng_state: torch.Tensor,
        scale: float | None = None,
        *_: object,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        called.append("backward")
        gradients = tuple(torch.zeros_like(x) for x in (query, key, value))
        num_sharing = query.shape[1] // key.shape[1]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        for rows, k, shares, v in _rows(query, key, value, cu_seq_q, is_causal, scale):
            of_result, q = grad_out[rows].transpose(0, 1), query[rows].transpose(0, 1)
            of_shares = of_result @ v.mT
            of_scores = factor * shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True))
            found = of_scores @ k, of_scores.mT @ q, shares.mT @ of_result
            for gradient, own, fold in zip(gradients, found, (1, num_sharing, num_sharing), strict=True):
                gradient[rows] = own.unflatten(0, (-1, fold)).sum(1).transpose(0, 1)
        return gradients

    with ExitStack() as kernels:
        for operation, kernel in ((varlen._varlen_attn, forward), (varlen._varlen_attn_backward, backward)):
            operation.register_kernel("cpu", kernel)
            kernels.enter_context(operation.set_kernel_enabled("cpu"))
        kernels.enter_context(kernels_of("cpu", dtype))
        assert packed.takes_all_rows(torch.device("cpu"), dtype, width)
        called.clear()
        yield called


@contextmanager
def kernels_of(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Have it believed that there are such kernels of a device and a type."""
    with patch.multiple(packed, KERNEL_DEVICES=(device,), KERNEL_TYPES=(dtype,)):
        packed.takes_all_rows.cache_clear()
        yield
    packed.takes_all_rows.cache_clear()


def _rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, is_causal: bool, scale: float | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield of every row where it is, its keys, what share every query takes of every value, and its values, heads first."""
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
        yield slice(start, end), k, scores.softmax(-1), v
