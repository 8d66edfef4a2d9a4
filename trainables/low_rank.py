"""A linear layer and LoRA's two products around it as one operation, with its own backward pass.

Apart, the sum of both results, and that of both gradients of the input, are passes over memory of their own: here the second product
adds to the first. (Unsloth does the same, https://github.com/unslothai/unsloth.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary


def adapted_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, first: torch.Tensor, second: torch.Tensor, scale: float
) -> torch.Tensor:
    """Return x W' + bias + scale x A' B' (..., outputs); a function of its own, because `trainables.meter` sees it.

    Under autocast all is computed in its number format.

    Args:
        x: (..., inputs)
        weight: W, (outputs, inputs), which does not train
        bias: (outputs,), which does not train
        first: A, (rank, inputs)
        second: B, (outputs, rank)
        scale: of what the factors add
    """
    if has_torch_function_unary(x):
        return handle_torch_function(adapted_product, (x,), x, weight, bias, first, second, scale)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else first.dtype
    x, weight, first, second = (tensor.to(dtype) for tensor in (x, weight, first, second))
    result: torch.Tensor = _AdaptedProduct.apply(x, weight, None if bias is None else bias.to(dtype), first, second, scale)
    return result


class _AdaptedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        first: torch.Tensor,
        second: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # Not a view, which nobody after could change in place.
        result = rows.new_empty(*x.shape[:-1], weight.shape[0])
        sums = result.view(-1, weight.shape[0])
        if bias is None:
            torch.mm(rows, weight.t(), out=sums)
        else:
            torch.addmm(bias, rows, weight.t(), out=sums)
        between = rows @ first.t()
        context.save_for_backward(rows, weight, first, second, between)
        context.scale = scale
        torch.addmm(sums, between, second.t(), alpha=scale, out=sums)
        return result

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, first, second, between = context.saved_tensors
        gradient, of_x = gradients[0].reshape(-1, weight.shape[0]), None
        of_between = (gradient @ second).mul_(context.scale)
        if context.needs_input_grad[0]:
            of_rows = gradient @ weight
            of_x = torch.addmm(of_rows, of_between, first, out=of_rows).view(*gradients[0].shape[:-1], weight.shape[1])
        return of_x, None, None, of_between.t() @ rows, (gradient.t() @ between).mul_(context.scale), None
