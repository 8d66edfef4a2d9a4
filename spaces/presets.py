"""What a person who has done it before would try first, inside the user's space."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from spaces.config import ADAPTER_KNOBS, Adapter, TrialConfig
from spaces.constraints import Limits, config_within, is_feasible, rotated_in_whole_blocks, violations
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
# LoRA of 4 to 64 differ little where the data are few (Hu et al. 2021, arXiv 2106.09685, section 7.2).
LORA_RANK = 16
# Relative to full fine-tuning. rsLoRA's scale is larger by the square root of the rank (Kalajdzievski 2023, arXiv 2312.03732), and an
# update of Adam's is as large as the rate times the scale. DoRA's best rates are LoRA's or a little less (Liu et al. 2024, arXiv
# 2402.09353, appendix). VeRA was tuned with ten times LoRA's (Kopiczko et al. 2024, arXiv 2310.11454, instruction tuning: 4e-3 for
# 4e-4), (IA)3 with 3e-3 (Liu et al. 2022, arXiv 2205.05638, section 3.3). OFT as measured with MiniLM on an eighth of banking77:
# one to three passes were the best at 2 to 4 times LoRA's usual rate with blocks of 32, and at 8 times or more with blocks of 8; and
# bottlenecks of 16 there, in three passes, with 4 to 8 times LoRA's (0.77; 0.48 with
# LoRA's own, where LoRA has 0.67), which the first trainings reach from 3; 15 times LoRA's learned nothing. Prefixes of 16 tokens as
# measured with a Llama of 260,000 weights on 3 % of GSM8K: two passes bring the loss from 7.0 to 4.9 with 100 times LoRA's, 5.1 with
# 30, 5.7 with 10 and nowhere with LoRA's own, which brings LoRA to 3.2; from a tenth or a fiftieth of PEFT's initial values the same.
RATE_FACTORS: dict[Adapter, float] = {
    "none": 1.0,
    "lora": LORA_FACTOR,
    "rslora": LORA_FACTOR / LORA_RANK**0.5,
    "dora": LORA_FACTOR,
    "vera": 10 * LORA_FACTOR,
    "ia3": 60.0,
    "oft": 3 * LORA_FACTOR,
    "bottleneck": 3 * LORA_FACTOR,
    "prefix": 30 * LORA_FACTOR,
}
# On few ranks whole copies are the fastest; shards hold less, and any model has them.
STRATEGIES = ("ddp", "fsdp", "tp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A usual training."""

    passes: float
    """Over all rows of the data."""
    epochs: int
    """In which these are made; with more of them over fewer rows."""
    rate: float
    """Relative to the usual learning rate."""
    batch: int = 1
    """Relative to the usual batch."""


# The front is over time, so trainings of several lengths come first, each about twice as long as the one before: up to half a pass
# with every row once, as new rows teach the most; one pass and more in several epochs over fewer rows, which teach about as much up
# to the fourth (Muennighoff et al. 2023, arXiv 2305.16264). What is best for a length is not the same for another, and a model of the
# trials learns nothing of a knob that never changes: shorter ones have a higher rate, though less so than the best one rises, or
# rate and length could not be told apart; and two have a larger batch. What that makes of a search: docs/results.md.
TRAININGS = (
    Training(passes=0.1, epochs=1, rate=2.5, batch=2),
    Training(passes=0.25, epochs=1, rate=2.0),
    Training(passes=0.5, epochs=1, rate=2.0, batch=2),
    Training(passes=1.0, epochs=3, rate=1.5),
    Training(passes=2.4, epochs=4, rate=1.5),
)
# Of each further adapter, to see soon whether it may be better at all.
SHORT_TRAINING = Training(passes=0.1, epochs=1, rate=2.0)


def starting_points(space: SpaceSpec, *, width: int, limits: Limits) -> list[dict[str, Any]]:
    """Return what to try first: usual trainings of several lengths in full or else with one adapter, and a short one with each other.

    Full fine-tuning has the lengths where it can run: with much to train it learns the most (Biderman et al. 2024, arXiv 2405.09673).
    The shortest comes first, so that there is something to see; but where several can train at once, the longest does, which all
    would else wait for in the end (Graham 1969, "Bounds on Multiprocessing Timing Anomalies"). Values outside the user's ranges
    become the nearest inside, and points that are then the same are one.

    Args:
        space: the user's.
        width: of the model's layers.
        limits: what proposals are held against. Each takes the fewest workers with which a strategy of the space is feasible, and the
            first such strategy.
    """

    main, *others = _adapters(space, width, limits)
    points = [_point(space, main, training, width, limits) for training in TRAININGS]
    if limits.num_workers >= 2 * points[-1]["world_size"]:
        points = [points[-1], *points[:-1]]
    points += [_point(space, adapter, SHORT_TRAINING, width, limits) for adapter in others]
    return [each for i, each in enumerate(points) if each not in points[:i]]


def longer_points(space: SpaceSpec, *, width: int, limits: Limits) -> list[dict[str, Any]]:
    """Return further trainings of what has the lengths among the starting points, each twice as long, as far as the space goes.

    Where more passes are allowed and there is time for them, they are what the best of the front is made of; none where the space
    ends below twice the longest starting point. The arguments are those of `starting_points`.
    """
    main, *_ = _adapters(space, width, limits)
    fraction, most = (float(max(domain.ends())) for domain in (space.dataset_fraction, space.epochs))
    first = starting_points(space, width=width, limits=limits)
    points, passes = list(first), 2 * TRAININGS[-1].passes
    while passes <= fraction * most:
        training = replace(TRAININGS[-1], passes=passes, epochs=math.ceil(passes / fraction))
        points.append(_point(space, main, training, width, limits))
        passes *= 2
    return [each for i, each in enumerate(points) if each not in points[:i]][len(first) :]


def _adapters(space: SpaceSpec, width: int, limits: Limits) -> list[Adapter]:
    """Return the adapters of a space; first what has the lengths."""

    def can_run(adapter: Adapter) -> bool:
        config = config_within(space.first(**_point(space, adapter, SHORT_TRAINING, width, limits)), limits)
        return is_feasible(violations(config, limits))

    adapters = sorted(space.adapter.ends(), key=lambda adapter: (adapter != "none", adapter))
    main = next(filter(can_run, adapters), adapters[0])
    return [main, *(adapter for adapter in adapters if adapter != main)]


def _point(space: SpaceSpec, adapter: Adapter, training: Training, width: int, limits: Limits) -> dict[str, Any]:
    recipe = _recipe(space, adapter, training, width)
    if adapter == "oft":
        recipe["lora_rank"] = _block_size(space, recipe, limits)
    return recipe | _layout(space, recipe, limits)


def usual_rate(adapter: Adapter, width: int) -> float:
    """Return the peak learning rate that is usual for a model of this width."""
    return float(RATE_FACTORS[adapter] * FULL_RATE * (RATE_WIDTH / width) ** RATE_EXPONENT)


def _recipe(space: SpaceSpec, adapter: Adapter, training: Training, width: int) -> dict[str, Any]:
    """Return a training in the space, without a layout."""
    micro_batches = space.micro_batch_size.ends()
    micro_batch = "auto" if "auto" in micro_batches else min(micro_batches)
    batch, epochs = training.batch * BATCH_SIZE, nearest(space.epochs, training.epochs)
    point = {
        "adapter": adapter,
        "learning_rate": nearest(space.learning_rate_of(adapter), training.rate * usual_rate(adapter, width)),
        # A batch has at least one micro batch.
        "global_batch_size": nearest(space.global_batch_size, batch if micro_batch == "auto" else max(batch, micro_batch)),
        "micro_batch_size": micro_batch,
        "dataset_fraction": nearest(space.dataset_fraction, round(training.passes / epochs, 4)),
        "epochs": epochs,
    }
    targets, quantizations = space.lora_target_modules.ends(), space.quantization.ends()
    usual = {
        "lora_rank": nearest(space.lora_rank, LORA_RANK),
        "lora_alpha": nearest(space.lora_alpha, LORA_ALPHA),
        "lora_target_modules": ALL_LAYERS if ALL_LAYERS in targets else targets[0],
        # A quantised base is not for every layout.
        "quantization": "none" if "none" in quantizations else quantizations[0],
    }
    return point | {knob: usual[knob] for knob in ADAPTER_KNOBS[adapter]}


def _block_size(space: SpaceSpec, recipe: dict[str, Any], limits: Limits) -> int:
    """Return the size that is the nearest to the usual rank of those of which OFT's blocks are whole; failing that, of all."""
    domain = space.lora_rank
    sizes = range(domain.bounds[0], domain.bounds[1] + 1) if isinstance(domain, IntRange) else domain.ends()

    def is_whole(size: int) -> bool:
        config = TrialConfig.from_params(space.first(**{**recipe, "lora_rank": size}))
        return rotated_in_whole_blocks(config, limits) <= 0

    ordered = sorted(sizes, key=lambda size: (abs(math.log(size / LORA_RANK)), size))
    return next(filter(is_whole, ordered), ordered[0])


def _layout(space: SpaceSpec, point: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """Return the first layout with which the point is feasible, where the knobs that it leaves open have their first values.

    Failing that, the first of all.
    """
    strategies = [strategy for strategy in STRATEGIES if strategy in space.strategy.ends()]
    sizes = sorted({world_size for world_size, _ in space.layouts()})
    layouts = [{"world_size": world_size, "strategy": strategy} for world_size in sizes for strategy in strategies]

    def fits(layout: dict[str, Any]) -> bool:
        config = config_within(space.first(**point, **layout), limits)
        return is_feasible(violations(config, limits))

    return next(filter(fits, layouts), layouts[0])


def nearest(domain: Domain, wanted: float) -> Any:
    """Return the value of a domain of positive numbers that is the nearest by ratio, the smaller one of two."""
    if isinstance(domain, IntRange | Uniform | LogUniform):
        low, high = domain.bounds
        return min(max(wanted, low), high)
    return min(domain.ends(), key=lambda value: (abs(math.log(value / wanted)), value))
