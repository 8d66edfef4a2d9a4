"""A trial's tensors as one process without sharding would have them, which is what checkpoints hold: any layout reads them."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from trainables.tensor_parallel import piece_of
from trainables.trained_rows import rows_of

Parameters = dict[str, torch.nn.Parameter]


def whole_weights(parameters: Parameters, *, is_kept: bool = True) -> dict[str, torch.Tensor]:
    """Return the parameters whole, on the CPU; every rank must call it, because shards are gathered.

    Args:
        parameters: by name.
        is_kept: whether this rank wants them; to the others nothing is returned. All ranks of a node together would hold many copies.
    """
    found = {name: _whole(parameter, parameter, is_kept=is_kept) for name, parameter in parameters.items()}
    return {name: whole for name, whole in found.items() if whole is not None}


def whole_state(optimizer: Optimizer, parameters: Parameters, *, is_kept: bool = True) -> dict[str, torch.Tensor]:
    """Return what the optimizer keeps, whole, on the CPU, by `<parameter>/<state>`; as `whole_weights` does."""
    pairs = ((f"{n}/{key}", value, p) for n, p in parameters.items() for key, value in optimizer.state[p].items())
    found = {name: _whole(value, p, is_kept=is_kept) for name, value, p in pairs}
    return {name: whole for name, whole in found.items() if whole is not None}


@torch.no_grad()
def load_weights(parameters: Parameters, weights: dict[str, torch.Tensor]) -> None:
    """Put whole tensors into parameters, sharded or not.

    Raises:
        KeyError: a parameter is not among the weights.
    """
    for name, parameter in parameters.items():
        parameter.copy_(_like(weights[name], parameter))


def load_state(optimizer: Optimizer, parameters: Parameters, state: dict[str, torch.Tensor]) -> None:
    """Have an optimizer go on from what `whole_state` returned; a parameter of which it has nothing begins anew."""
    for name, parameter in parameters.items():
        prefix = f"{name}/"
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        optimizer.state[parameter] = {
            # AdamW's step count is a scalar, which the fused kernel wants beside the parameter.
            key: value.to(parameter.device, copy=True) if value.dim() == 0 and parameter.dim() else _like(value, parameter)
            for key, value in own.items()
        }


def _whole(tensor: torch.Tensor, parameter: torch.Tensor, *, is_kept: bool) -> torch.Tensor | None:
    """Gather a parameter, or what the optimizer keeps of it; on the CPU, apart from the original. None where it is not kept."""
    piece, rows = piece_of(parameter), rows_of(parameter)
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    if whole.dim() and piece is not None:  # a count of steps is no tensor of the parameter's shape
        whole = piece.gathered(whole.detach())
    if not is_kept:
        return None
    if whole.dim() and rows is not None:
        return rows.whole(whole, is_weight=tensor is parameter)
    return whole.detach().to("cpu", copy=True).contiguous()


def _like(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Put a whole tensor where a parameter is, sharded, split or chosen from as it is."""
    part = piece_of(parameter) or rows_of(parameter)
    whole = (whole if part is None else part.of(whole)).to(parameter.device)
    if isinstance(parameter, DTensor):
        # A mesh of GPUs takes it there, also where the parameter is left to the host.
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements).to(parameter.device)
    return whole
