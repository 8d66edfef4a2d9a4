"""Tensor parallelism: every rank has some of the heads and some of the inner width of every block, and sees every row.

The model's own plan (transformers' `base_model_tp_plan`) says which matrices are cut how. A parameter is this rank's piece, a plain
tensor: adapters, the optimizer and autocast know nothing of it. In each half of a block there is one sum over the ranks in the
forward pass, of its results, and one in the backward pass, of the gradient of its input (section 3 of
https://arxiv.org/abs/1909.08053).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from trainables.mesh import World
from trainables.report import TrialError

Exchange = Callable[[torch.Tensor], torch.Tensor]
"""Sums a tensor over the ranks, in place, and returns it."""
# Names of attributes of parameters.
_PIECE, _IS_PARTIAL = _MARKS = "piece", "is_partial"


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Which part of a whole tensor a rank holds."""

    dim: int
    rank: int
    num_pieces: int
    group: Any
    """The process group of those that hold the pieces; None: all processes."""

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """Return a copy of this rank's part."""
        return whole.chunk(self.num_pieces, self.dim)[self.rank].clone(memory_format=torch.contiguous_format)

    def gathered(self, part: torch.Tensor) -> torch.Tensor:
        """Return the whole tensor; every rank must call it."""
        parts = [torch.empty_like(part) for _ in range(self.num_pieces)]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, self.dim)


def piece_of(parameter: torch.Tensor) -> Piece | None:
    """Return which part of a parameter this rank holds; None where it is all of it."""
    piece: Piece | None = getattr(parameter, _PIECE, None)
    return piece


def split(module: nn.Module, world: World, exchange: Exchange) -> nn.Module:
    """Keep this rank's pieces, and have the ranks' results summed where they meet.

    The whole model is on the CPU, and the weights that it shares with other trials stay as they are: a piece is a copy.

    Args:
        module: as it was loaded, with its adapter; changed in place.
        world: the ranks that split it.
        exchange: sums over these ranks.

    Raises:
        TrialError: there is no plan of the model, or it has parts that this does not know; a matrix cannot be cut evenly.
    """
    entered = set()
    planned = list(_planned(module))
    if not planned:
        raise TrialError("strategy tp: transformers has no plan for this model")
    for name, part, style in planned:
        base, factors = getattr(part, "base_layer", part), _adapter_factors(part)
        if style == "replicated_with_grad_allreduce":
            _mark_partial(base.parameters())
        elif style == "colwise":
            entered.add(name.rpartition(".")[0])
            _cut((base.weight, base.bias, *factors["lora_B"]), 0, world)
            _mark_partial(factors["lora_A"])
            base.out_features //= world.world_size
        elif style == "rowwise":
            _cut((base.weight, *factors["lora_A"]), 1, world)
            _mark_partial((base.bias, *factors["lora_B"]))
            base.in_features //= world.world_size
            if base.bias is not None and world.rank > 0:
                base.forward = _without_bias(base)
            part.register_forward_hook(lambda _, args, out: _Leave.apply(out, exchange))
        else:
            raise TrialError(f"strategy tp: the model's plan wants '{style}' for {name}, which is not supported")
    for name in entered:
        module.get_submodule(name).register_forward_pre_hook(_entering(exchange), with_kwargs=True)
    return module


def marks_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return by a parameter's name what `split` noted on it."""
    return {name: marks for name, p in module.named_parameters() if (marks := {k: v for k, v in vars(p).items() if k in _MARKS})}


def mark(module: nn.Module, marks: Mapping[str, Mapping[str, Any]]) -> None:
    """Note on the parameters what `split` noted on those that were there before: FSDP2 puts shards in their place."""
    for name, parameter in module.named_parameters():
        vars(parameter).update(marks.get(name, {}))


@contextmanager
def marked_while_gathered(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Have what FSDP2 gathers of its blocks, which are parameters of their own, say which pieces they are; they then keep it."""

    def marking(block: nn.Module) -> Any:
        marks = marks_of(block)
        return block.register_forward_pre_hook(lambda block, _: mark(block, marks))

    hooks = [marking(block) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sum_partial_gradients(parameters: Iterable[nn.Parameter], exchange: Exchange) -> None:
    """Sum the gradients of which every rank has its own summand, in one exchange; every rank must call it after the backward pass."""
    gradients = [_local(p.grad) for p in parameters if getattr(p, _IS_PARTIAL, False) and p.grad is not None]
    if not gradients:
        return
    flat = exchange(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def total_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """Return the norm of all gradients, of every whole parameter once: float32 (), the same on every rank, and each must call it."""
    cut: list[torch.Tensor] = []
    whole: list[torch.Tensor] = []
    group = None
    for parameter in parameters:
        piece = piece_of(parameter)
        group = group if piece is None else piece.group
        if parameter.grad is not None:
            (whole if piece is None else cut).append(parameter.grad)
    squared = _squared_norm(cut)
    dist.all_reduce(squared, group=group)
    return (squared + _squared_norm(whole).to(squared)).sqrt()


def _squared_norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).square()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor, in place."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _planned(module: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield name, module and style of everything in the model's plan."""
    plan: dict[str, str] = module.config.get_text_config().base_model_tp_plan or {}
    patterns = {re.compile(rf"(.*\.)?{re.escape(pattern)}".replace(r"\*", r"\d+")): style for pattern, style in plan.items()}
    for name, part in module.named_modules():
        for pattern, style in patterns.items():
            if pattern.fullmatch(name):
                yield name, part, style


def _adapter_factors(part: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the factors of LoRA around a linear layer; empty lists without."""
    names = ("lora_A", "lora_B")
    return {name: list(part.get_submodule(name).parameters()) if hasattr(part, name) else [] for name in names}


def _cut(parameters: Iterable[nn.Parameter | None], dim: int, world: World) -> None:
    piece = Piece(dim=dim, rank=world.rank, num_pieces=world.world_size, group=world.group)
    for parameter in parameters:
        if parameter is not None:
            if not parameter.is_floating_point() or parameter.shape[dim] % world.world_size:
                what = f"{parameter.dtype} of shape {tuple(parameter.shape)}"
                raise TrialError(f"strategy tp: {what} cannot be cut in {world.world_size} along dim {dim}")
            parameter.data = piece.of(parameter.data)
            setattr(parameter, _PIECE, piece)


def _mark_partial(parameters: Iterable[nn.Parameter | None]) -> None:
    for parameter in parameters:
        if parameter is not None:
            setattr(parameter, _IS_PARTIAL, True)


def _without_bias(base: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the forward pass of a rank that leaves the bias to the first one: it must be in the sum once.

    Its gradient here is zero, and there: the sum over the ranks is right.
    """
    return lambda x: functional.linear(x, base.weight, 0 * base.bias)


def _entering(exchange: Exchange) -> Callable[..., Any]:
    """Return the hook of a half of a block, whose one input all of the first matrices get."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (_Enter.apply(args[0], exchange), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": _Enter.apply(kwargs["hidden_states"], exchange)}

    return hook


class _Enter(torch.autograd.Function):
    """All ranks compute with the same tensor; its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        context.exchange = exchange
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        # In place: several matrices have added to it, so that it is nobody else's.
        return context.exchange(gradients[0].contiguous()), None


class _Leave(torch.autograd.Function):
    """Every rank has a summand; the gradient of the sum is that of each."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor, exchange: Exchange) -> torch.Tensor:
        context.mark_dirty(tensor)
        return exchange(tensor)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
