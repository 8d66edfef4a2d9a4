"""What adapters wrap, and what they add: which matrices of a blueprint, and how many numbers."""

from __future__ import annotations

from spaces.blueprint import Blueprint, Matrix
from spaces.config import LAST_PRODUCTS, Recipe


def is_wrapped(matrix: Matrix, recipe: Recipe) -> bool:
    """Return whether an adapter wraps a matrix.

    Of LoRA and its variants `all-linear` finds the router and the stacked experts too, a name only the router.
    """
    targets = recipe.adapter_target_modules or ()
    if recipe.adapter == "none" or matrix.trains_with_adapter:
        return False
    if matrix.is_module or not trains_factors(recipe):
        return matrix.is_wrapped_by(targets)
    return targets == ("all-linear",) or (matrix.num_experts == 1 and matrix.is_named_by(targets))


def trains_factors(recipe: Recipe) -> bool:
    """Return whether an adapter trains two factors: LoRA and its variants. VeRA and (IA)3 train vectors, OFT rotations.

    A bottleneck's two matrices are no factors of an update.
    """
    return recipe.adapter in ("lora", "rslora", "dora")


def adds_in_place(plan: Blueprint, recipe: Recipe) -> bool:
    """Return whether LoRA's last product adds to the result of what it wraps, as one operation: around plain linear layers."""
    return recipe.adapter in ("lora", "rslora") and recipe.quantization == "none" and plan.family != "gpt2"


def casts_input(recipe: Recipe) -> bool:
    """Return whether an adapter casts what it is given to fp32, as PEFT's VeRA and (IA)3 do; see `trainables.adapters`."""
    return recipe.adapter in ("vera", "ia3")


def num_between(recipe: Recipe) -> int:
    """Return the numbers of a token between an adapter's two matrices."""
    return 0 if recipe.adapter == "oft" else recipe.adapter_rank or 0


def keeps_input(matrix: Matrix, recipe: Recipe) -> bool:
    """Return whether the backward pass of what an adapter does to a matrix needs the matrix' input."""
    is_read = trains_factors(recipe) or recipe.adapter == "oft" or (recipe.adapter == "ia3" and matrix.is_named_by(LAST_PRODUCTS))
    return is_read and is_wrapped(matrix, recipe)


def num_prefix_tokens(recipe: Recipe) -> int:
    """Return the keys that every row has before its own in each attention."""
    return (recipe.adapter_rank or 0) if recipe.adapter == "prefix" else 0


def prefix_params(plan: Blueprint, recipe: Recipe) -> int:
    """Return the numbers of a prefix: keys and values of all layers."""
    shape = plan.shape
    return num_prefix_tokens(recipe) * shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim


def adapter_params(matrices: tuple[Matrix, ...], recipe: Recipe) -> int:
    """Return the parameters that an adapter adds to matrices and trains.

    One pair of factors for each expert, and of twice the rank for gate and up in one; with DoRA a norm for each output. VeRA scales
    the rank and the outputs, (IA)3 the outputs or, before the last product of a block, the inputs. OFT has a skew matrix for every
    block of the inputs. A bottleneck has two matrices with biases.
    """
    rank, params = recipe.adapter_rank or 0, 0
    for m in matrices:
        if not is_wrapped(m, recipe):
            continue
        if recipe.adapter == "ia3":
            params += m.num_inputs if keeps_input(m, recipe) else m.num_outputs
        elif recipe.adapter == "vera":
            params += rank + m.num_outputs
        elif recipe.adapter == "oft":
            params += m.num_inputs * (rank - 1) // 2
        elif recipe.adapter == "bottleneck":
            params += 2 * rank * m.num_outputs + rank + m.num_outputs
        else:
            is_fused_pair = m.num_experts > 1 and m.name.endswith(".gate_up_proj")
            params += rank * m.num_experts * (m.num_inputs + m.num_outputs) * (2 if is_fused_pair else 1)
            params += m.num_outputs if recipe.adapter == "dora" else 0
    return params


def factor_params(matrices: tuple[Matrix, ...], recipe: Recipe) -> int:
    """Return the numbers of what is multiplied around matrices and cast, whether it trains or not; a rotation is none."""
    if trains_factors(recipe) or recipe.adapter == "bottleneck":
        return adapter_params(matrices, recipe)
    return num_between(recipe) * sum(m.num_inputs + m.num_outputs for m in matrices if is_wrapped(m, recipe))


def shared_params(plan: Blueprint, recipe: Recipe) -> int:
    """Return the numbers of VeRA's two factors, which no layer has of its own: fp32, whatever the precision."""
    wrapped = [m for m in (*plan.block, *plan.head) if is_wrapped(m, recipe)]
    if recipe.adapter != "vera" or not wrapped:
        return 0
    return (recipe.adapter_rank or 0) * (max(m.num_inputs for m in wrapped) + max(m.num_outputs for m in wrapped))


def rotation_numbers(matrix: Matrix, recipe: Recipe) -> int:
    """Return the numbers of a matrix' rotations, which OFT makes anew in every step."""
    return matrix.num_inputs * (recipe.adapter_rank or 0) if recipe.adapter == "oft" and is_wrapped(matrix, recipe) else 0
