"""What a person who has done it before would try first, inside the user's space."""

from __future__ import annotations

import math
from typing import Any

from spaces.config import Adapter, TrialConfig
from spaces.constraints import Limits, is_feasible, violations
from spaces.domains import Domain, IntRange, LogUniform, Uniform
from spaces.space import SpaceSpec

# Schulman et al. 2025, "LoRA Without Regret" (thinkingmachines.ai/blog/lora): the best rate of LoRA is ten times that of full
# fine-tuning, whatever its rank; alpha is 32, and every linear layer is wrapped.
FULL_RATE, LORA_FACTOR, LORA_ALPHA, ALL_LAYERS = 5e-5, 10.0, 32.0, "all-linear"
# The same authors' fit over Llama models of several widths (`get_lr` of tinker-cookbook): the rates are those of a model that is 2000
# wide, and fall with the width by this power.
RATE_WIDTH, RATE_EXPONENT = 2000, 0.781
# The best rate falls with the tokens that are trained, by the power 0.32 (Bjorck et al. 2024, arXiv 2409.19913): with a tenth of the
# tokens it is twice as high.
HIGHER_RATE = 2.0
# From as many rows small batches learn as much or more, down to the smallest that keeps the device busy, and forgive a wrong rate
# (Marek et al. 2025, arXiv 2507.07101). With MiniLM on 1,232 short rows of banking77 three epochs with 16 rows instead of 32 give
# 0.73 instead of 0.63 in full, 0.71 instead of 0.59 with LoRA; with 8 they give 0.81 and 0.74 in 1.4 and 1.2 times the seconds.
BATCH_SIZE = 16
# New rows teach more than rows that are seen again (Muennighoff et al. 2023, arXiv 2305.16264), so the short training is one pass
# over all of them; so are 29 of the 34 on the fronts of a random grid (benchmarks/results/learning_curves.json). For the long one
# Devlin et al. 2019 (arXiv 1810.04805, appendix A.3) found 2 to 4 epochs good.
SHORT_EPOCHS, LONG_EPOCHS = 1, 3
# LoRA of 4 to 64 differ little where the data are few (Hu et al. 2021, arXiv 2106.09685, section 7.2).
LORA_RANK = 16
# On few ranks whole copies are the fastest; shards hold less, and any model has them.
STRATEGIES = ("ddp", "fsdp", "tp")


def starting_points(space: SpaceSpec, *, width: int, limits: Limits, max_length: int) -> list[dict[str, Any]]:
    """Return up to six points to try first: a short and a long training with each adapter, and a higher rate for each.

    What trains side by side on two workers is a short one in full, which learns more from few steps, and a long one with LoRA.
    Values outside the user's ranges become the nearest inside; knobs that nothing is known about are left to the sampler, and all
    but the rate of the last ones.

    Args:
        space: the user's.
        width: of the model's layers.
        limits: what proposals are held against. The long trainings take as many workers as there are and the space and the batch
            allow, the short ones as few as the space has; every one of them the first strategy that is feasible.
        max_length: tokens per row.
    """
    adapters = sorted(space.adapter.ends())  # LoRA, then none
    known = {adapter: _point(space, adapter, usual_rate(adapter, width)) for adapter in adapters}
    short = [{**known[adapter], **_short(space), "world_size": min(_world_sizes(space))} for adapter in reversed(adapters)]
    long = [_on_most_workers(space, known[adapter], limits, max_length) for adapter in adapters]
    points = [point for pair in zip(short, long, strict=True) for point in pair]
    points = [{**point, "strategy": _strategy(space, point, limits, max_length)} for point in points]
    for adapter in adapters:
        rate = _nearest(space.learning_rate_of(adapter), HIGHER_RATE * usual_rate(adapter, width))
        if rate != known[adapter]["learning_rate"]:
            points.append({"adapter": adapter, "learning_rate": rate})
    return [point for n, point in enumerate(points) if point not in points[:n]]


def _on_most_workers(space: SpaceSpec, point: dict[str, Any], limits: Limits, max_length: int) -> dict[str, Any]:
    sizes = [{**point, "world_size": world_size} for world_size in sorted(_world_sizes(space), reverse=True)]
    return next((p for p in sizes if _fitting(space, p, limits, max_length)), sizes[-1])


def usual_rate(adapter: Adapter, width: int) -> float:
    """Return the peak learning rate that is usual for a model of this width."""
    factor = LORA_FACTOR if adapter == "lora" else 1.0
    return float(factor * FULL_RATE * (RATE_WIDTH / width) ** RATE_EXPONENT)


def _point(space: SpaceSpec, adapter: Adapter, rate: float) -> dict[str, Any]:
    """Return the long training, without a layout."""
    micro_batches = space.micro_batch_size.ends()
    micro_batch = "auto" if "auto" in micro_batches else min(micro_batches)
    point = {
        "adapter": adapter,
        "learning_rate": _nearest(space.learning_rate_of(adapter), rate),
        # A batch has at least one micro batch.
        "global_batch_size": _nearest(space.global_batch_size, BATCH_SIZE if micro_batch == "auto" else max(BATCH_SIZE, micro_batch)),
        "micro_batch_size": micro_batch,
        "dataset_fraction": max(space.dataset_fraction.ends()),
        "epochs": _nearest(space.epochs, LONG_EPOCHS),
    }
    if adapter == "lora":
        targets, quantizations = space.lora_target_modules.ends(), space.quantization.ends()
        point |= {
            "lora_rank": _nearest(space.lora_rank, LORA_RANK),
            "lora_alpha": _nearest(space.lora_alpha, LORA_ALPHA),
            "lora_target_modules": ALL_LAYERS if ALL_LAYERS in targets else targets[0],
            # A quantised base is not for every layout.
            "quantization": "none" if "none" in quantizations else quantizations[0],
        }
    return point


def _short(space: SpaceSpec) -> dict[str, Any]:
    """Return what makes the training short: fewer passes, or as much less of the data where the space fixes the passes."""
    epochs = _nearest(space.epochs, SHORT_EPOCHS)
    if epochs < _nearest(space.epochs, LONG_EPOCHS):
        return {"epochs": epochs}
    share = max(space.dataset_fraction.ends()) * SHORT_EPOCHS / LONG_EPOCHS
    return {"dataset_fraction": _nearest(space.dataset_fraction, share)}


def _strategy(space: SpaceSpec, point: dict[str, Any], limits: Limits, max_length: int) -> str:
    """Return the first strategy with which the point is feasible; failing that, the first."""
    known = [strategy for strategy in STRATEGIES if strategy in space.strategy.ends()]
    return next(iter(_fitting(space, point, limits, max_length)), known[0])


def _fitting(space: SpaceSpec, point: dict[str, Any], limits: Limits, max_length: int) -> list[str]:
    """Return the strategies with which the point is feasible, where the knobs that it leaves open have their first values."""
    known = [strategy for strategy in STRATEGIES if strategy in space.strategy.ends()]
    configs = {s: TrialConfig.from_params(space.first(**point, strategy=s), max_length=max_length) for s in known}
    return [strategy for strategy, config in configs.items() if is_feasible(violations(config, limits))]


def _nearest(domain: Domain, wanted: float) -> Any:
    """Return the value of a domain of positive numbers that is the nearest by ratio, the smaller one of two."""
    if isinstance(domain, IntRange | Uniform | LogUniform):
        low, high = domain.bounds
        return min(max(wanted, low), high)
    return min(domain.ends(), key=lambda value: (abs(math.log(value / wanted)), value))


def _world_sizes(space: SpaceSpec) -> list[int]:
    return [world_size for world_size, _ in space.layouts()]
