"""`paretune plan`: what a search would do on this machine, without starting anything."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from search.cluster import is_submitted, local_capacity
from spaces.architecture import ShapeError
from spaces.blueprint import Blueprint, blueprint
from spaces.config import TrialConfig
from spaces.constraints import Limits, is_feasible, reason, violations
from spaces.loading import LoadedSpec, dump_spec
from spaces.memory import NoFormula, rank_memory
from spaces.space import SpaceSpec
from spaces.spec import SearchSpec


def make_plan(loaded: LoadedSpec) -> dict[str, Any]:
    """Return the resolved spec, where each non-default comes from, and every layout with the constraints that it violates.

    The cluster is this machine, or `resources.workers` where the spec names it; an address in RAY_ADDRESS is not contacted.
    """
    spec = loaded.spec
    capacity = spec.resources.workers if is_submitted() and spec.resources.workers else local_capacity(spec.resources)
    plan, unknown = _blueprint(spec)
    limits = Limits(num_workers=capacity, hidden_size=None if plan is None else plan.shape.hidden_size)
    rows = layout_rows(spec.space, spec.model.max_length, limits, plan)
    return {
        "spec": dump_spec(spec),
        "origins": _origins(loaded),
        "num_workers": capacity,
        "cluster": os.environ.get("RAY_ADDRESS", "this machine"),
        "searched": spec.space.names_searched(),
        "objectives": [f"{o.direction} {o.metric}" for o in spec.resolved_objectives()],
        "trials": spec.budget.trials,
        "layouts": rows,
        "num_feasible_layouts": sum(row["feasible"] for row in rows),
        "memory_unknown": unknown,
    }


def _origins(loaded: LoadedSpec) -> dict[str, str]:
    """Return where each given value comes from, without those that are what the default is."""
    kept = loaded.spec.model_dump(exclude_defaults=True)
    changed = {f"{section}.{name}" for section, value in kept.items() if isinstance(value, dict) for name in value} | set(kept)
    return {path: place for path, place in loaded.origins.items() if ".".join(path.split(".")[:2]) in changed}


def _blueprint(spec: SearchSpec) -> tuple[Blueprint | None, str]:
    """Return what the model is made of, or why that is not known here; nothing is fetched for it but a `config.json`."""
    from trainables.hub import ModelError, model_config

    try:
        return blueprint(model_config(spec.model.name, spec.model.revision), spec.model.task), ""
    except (ModelError, ShapeError) as error:
        return None, str(error)


def _memory(plan: Blueprint | None, config: TrialConfig, length: int) -> tuple[dict[str, int] | None, str]:
    """Return the predicted bytes by term of a rank that trains full rows, or why there are none."""
    if plan is None:
        return None, ""
    try:
        return asdict(rank_memory(plan, config, length)), ""
    except NoFormula as error:
        return None, str(error)


def layout_rows(space: SpaceSpec, max_length: int, limits: Limits, plan: Blueprint | None = None) -> list[dict[str, Any]]:
    """Return one row per world size, strategy and global batch size of the space.

    Each says whether it is feasible and by which constraint it is not, and what a rank is predicted to hold at its peak.
    """
    rows = []
    for params in space.corners():
        config = TrialConfig.from_params(params, max_length=max_length)
        values = violations(config, limits)
        memory, unknown = _memory(plan, config, max_length)
        rows.append(
            {
                "world_size": config.layout.world_size,
                "strategy": config.layout.strategy,
                "global_batch_size": config.recipe.global_batch_size,
                "micro_batch_size": config.layout.micro_batch_size,
                "num_grad_accum_steps": config.num_grad_accum_steps,
                "recomputation": config.layout.recomputation,
                "peak_memory_bytes": None if memory is None else sum(memory.values()),
                "memory": memory,
                "memory_unknown": unknown,
                "feasible": is_feasible(values),
                "violated": {name: reason(name, config, limits) for name, value in values.items() if value > 0},
            }
        )
    return rows


def render_plan(plan: Mapping[str, Any]) -> str:
    """Return the plan as text."""
    lines = ["# the resolved file", plan["spec"].rstrip(), "", "# where each value that is no default comes from"]
    lines += [f"{path}: {origin}" for path, origin in sorted(plan["origins"].items())]
    lines += [
        "",
        f"searched: {', '.join(plan['searched']) or 'nothing: every knob is fixed'}",
        f"objectives: {', '.join(plan['objectives'])}",
        f"{plan['trials']} trials on {plan['cluster']}, which holds {plan['num_workers']} workers at once",
        "",
        f"{'world size':>10}  {'strategy':8}  {'global batch':>12}  {'micro batch':>11}  {'accumulation':>12}  "
        f"{'recomputation':>13}  {'GiB a rank':>10}"
        "  runs here",
    ]
    for row in plan["layouts"]:
        broken = "; ".join(row["violated"].values())
        verdict = "yes" if row["feasible"] else f"no: {broken}"
        lines.append(
            f"{row['world_size']:>10}  {row['strategy']:8}  {row['global_batch_size']:>12}  {row['micro_batch_size']:>11}  "
            f"{row['num_grad_accum_steps']:>12}  {row['recomputation']:>13}  {_gib(row['peak_memory_bytes']):>10}  {verdict}"
        )
    unknown = sorted({row["memory_unknown"] for row in plan["layouts"]} | {plan["memory_unknown"]} - {""})
    lines += [
        "",
        "GiB a rank: predicted tensors at the peak, with rows of model.max_length tokens and the first value of every other knob; "
        "without the libraries and the data" + "".join(f"; {reason}" for reason in unknown if reason),
    ]
    lines += ["", f"{plan['num_feasible_layouts']} of {len(plan['layouts'])} can run"]
    return "\n".join(lines)


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"
