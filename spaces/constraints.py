"""What makes a trial config impossible before it is launched; each function is feasible when <= 0, as Optuna has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spaces.config import TrialConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a config is held against."""

    num_workers: int
    """Workers that the cluster holds at once."""
    hidden_size: int | None
    """Width of the model's layers; None if it is not known yet."""


def global_batch_divisible(config: TrialConfig, limits: Limits) -> float:
    """Rows left over when the global batch is dealt to ranks and accumulation steps."""
    layout = config.layout
    return config.recipe.global_batch_size % (layout.world_size * layout.micro_batch_size)


def world_size_within_cluster(config: TrialConfig, limits: Limits) -> float:
    """Workers that the cluster lacks."""
    return config.layout.world_size - limits.num_workers


def adapter_rank_within_width(config: TrialConfig, limits: Limits) -> float:
    """Rank beyond the layers' width, where a low-rank update is none."""
    if config.recipe.adapter_rank is None or limits.hidden_size is None:
        return 0.0
    return config.recipe.adapter_rank - limits.hidden_size


CONSTRAINTS = (global_batch_divisible, world_size_within_cluster, adapter_rank_within_width)


def reason(name: str, config: TrialConfig, limits: Limits) -> str:
    """Return in words why a config violates a constraint."""
    recipe, layout = config.recipe, config.layout
    words = {
        global_batch_divisible.__name__: f"a global batch of {recipe.global_batch_size} rows is not divisible by "
        f"{layout.world_size} ranks of {layout.micro_batch_size}",
        world_size_within_cluster.__name__: f"needs {layout.world_size} workers, and there are {limits.num_workers}",
        adapter_rank_within_width.__name__: f"rank {recipe.adapter_rank} exceeds the model's width of {limits.hidden_size}",
    }
    return words[name]


def violations(config: TrialConfig, limits: Limits) -> dict[str, float]:
    """Return the value of every constraint by its name."""
    return {constraint.__name__: float(constraint(config, limits)) for constraint in CONSTRAINTS}


def is_feasible(values: Mapping[str, float]) -> bool:
    """Return whether all constraints hold."""
    return all(value <= 0 for value in values.values())
