"""`paretune plan`: what a search would do on this machine, without starting anything."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from search.budget import budget_text, limits_of
from search.cluster import is_submitted, local_capacity
from search.forecast import ClusterForecast
from search.formatting import aligned, plain
from search.layouts import STEP_KNOBS
from spaces.architecture import ShapeError
from spaces.blueprint import Blueprint, blueprint
from spaces.constraints import Limits, config_within, is_feasible, reason, violations
from spaces.domains import Profile
from spaces.estimate import GpuCluster
from spaces.loading import LoadedSpec, SpecError, dump_spec
from spaces.memory import RankMemory, host_bytes, rank_memory
from spaces.space import SpaceSpec
from spaces.spec import SearchSpec
from trainables.columns import detect
from trainables.formats import DataError, read_rows

# Of English text, for an estimate only: https://help.openai.com/en/articles/4936856
CHARACTERS_PER_TOKEN = 4
# Bytes of a file of rows that a plan takes the time to read.
LARGEST_LOOKED_AT = 64 * 2**20
# Device hours below which costs are told in seconds.
LEAST_HOURS = 0.01
_AT = STEP_KNOBS.index("recomputation")
KNOB_COLUMNS = (*STEP_KNOBS[:_AT], "num_grad_accum_steps", *STEP_KNOBS[_AT:])


@dataclass(frozen=True, kw_only=True, slots=True)
class Rental:
    """GPUs that are not here, and what they cost."""

    cluster: GpuCluster
    num_rows: int | None = None
    """Training rows, where the data are not on this machine."""


def make_plan(loaded: LoadedSpec, rental: Rental | None = None) -> dict[str, Any]:
    """Return the resolved spec, where each non-default comes from, and every layout with the constraints that it violates.

    The cluster is the rented one, this machine, or `resources.workers` where the spec names it; an address in RAY_ADDRESS is not
    contacted. On rented GPUs every layout has its estimated time too, and the search its hours and dollars.

    Raises:
        SpecError: a model that is to be here is not, the data have no known columns, or, on rented GPUs, the model's shape is not
            known, from which all of an estimate follows.
    """
    spec = loaded.spec
    if rental is not None:
        capacity = min(rental.cluster.num_workers, spec.resources.workers or rental.cluster.num_workers)
        where = _rental_text(rental.cluster)
    else:
        capacity = spec.resources.workers if is_submitted() and spec.resources.workers else local_capacity(spec.resources)
        where = os.environ.get("RAY_ADDRESS", "this machine")
    check_columns(loaded)
    plan, unknown = _blueprint(loaded)
    limits = Limits(
        num_workers=capacity,
        hidden_size=None if plan is None else plan.shape.hidden_size,
        plan=plan,
        max_length=spec.model.max_length,
        is_on_gpu=rental is not None or spec.resources.gpus_per_worker > 0,
    )
    forecast = None
    if rental is not None:
        if plan is None:
            raise SpecError([loaded.locate(unknown)])
        num_rows = rental.num_rows or _num_rows(spec)
        forecast = ClusterForecast(spec=spec, plan=plan, cluster=rental.cluster, limits=limits, num_rows=num_rows)
    rows = layout_rows(spec.space, spec.model.max_length, limits, plan, forecast)
    return {
        "spec": dump_spec(spec),
        "origins": _origins(loaded),
        "num_workers": capacity,
        "cluster": where,
        "searched": spec.space.names_searched(),
        "objectives": [f"{o.direction} {o.metric}" for o in spec.resolved_objectives()],
        "budget": limits_of(spec.budget),
        "layouts": rows,
        "num_feasible_layouts": sum(row["feasible"] and row.get("fits", True) for row in rows),
        "forecast": None if forecast is None else forecast.whole(rows),
        "memory_unknown": unknown,
    }


def _origins(loaded: LoadedSpec) -> dict[str, str]:
    """Return where each given value comes from, without those that are what the default is."""
    kept = loaded.spec.model_dump(exclude_defaults=True)
    changed = {f"{section}.{name}" for section, value in kept.items() if isinstance(value, dict) for name in value} | set(kept)
    return {path: place for path, place in loaded.origins.items() if ".".join(path.split(".")[:2]) in changed}


def check_columns(loaded: LoadedSpec) -> None:
    """Check that the columns of the local training rows are known, of files that are not too large to look.

    Raises:
        SpecError: they are not.
    """
    for source in loaded.spec.data.sources.values():
        path = Path(source.train)
        if path.is_file() and path.stat().st_size <= LARGEST_LOOKED_AT:
            try:
                detect(read_rows(source.train, split="train"), source, source.train, loaded.spec.model.task)
            except DataError as error:
                raise SpecError([loaded.locate(str(error))]) from error


def _blueprint(loaded: LoadedSpec) -> tuple[Blueprint | None, str]:
    """Return what the model is made of, or why that is not known here; nothing is fetched for it but a `config.json`."""
    from trainables.hub import ModelError, is_local, model_config

    model = loaded.spec.model
    try:
        return blueprint(model_config(model.name, model.revision), model.task), ""
    except ShapeError as error:
        return None, str(error)
    except ModelError as error:
        if is_local(model.name):
            raise SpecError([loaded.locate(str(error))]) from error
        return None, str(error)


def _rental_text(cluster: GpuCluster) -> str:
    return f"{cluster.num_nodes} x {cluster.gpus_per_node} {cluster.device.name}"


def _num_rows(spec: SearchSpec) -> int | None:
    """Return the training rows of local data, or None; of plain text, those that four characters a token make."""
    total = 0
    for source in spec.data.sources.values():
        if source.train.startswith(("hf:", "embedded:")):
            return None
        try:
            rows = read_rows(source.train, split="train")
        except DataError:
            return None
        num_rows = len(rows)
        if source.train.endswith(".txt"):
            num_rows = max(1, len(rows[0]["text"]) // (CHARACTERS_PER_TOKEN * spec.model.max_length))
        total += num_rows if source.evaluation else round(num_rows * (1 - spec.data.holdout))
    return total


def layout_rows(
    space: SpaceSpec, max_length: int, limits: Limits, plan: Blueprint | None = None, forecast: ClusterForecast | None = None
) -> list[dict[str, Any]]:
    """Return one row per world size, strategy and global batch size of the space.

    Each says whether it is feasible and by which constraint it is not, what a rank is predicted to hold at its peak, and with a
    forecast whether that fits and what a step takes.
    """
    rows = []
    for params in space.corners():
        config = config_within(params, limits if forecast is None else forecast.device_limits)
        values = violations(config, limits)
        memory = None if plan is None else asdict(rank_memory(plan, config, max_length, is_on_gpu=limits.is_on_gpu))
        rows.append(
            {
                "adapter": config.recipe.adapter,
                "quantization": config.recipe.quantization,
                "precision": config.recipe.precision,
                "world_size": config.layout.world_size,
                "strategy": config.layout.strategy,
                "shard_size": config.layout.shard_size
                or ("all" if config.layout.is_sharded and config.layout.tp_size is None else "-"),
                "tp_size": config.layout.tp_size or ("all" if config.layout.tensor_parallel_size > 1 else "-"),
                "offload": config.layout.offload if config.layout.strategy == "fsdp" else "-",
                "global_batch_size": config.recipe.global_batch_size,
                "micro_batch_size": config.layout.micro_batch_size or "-",
                "micro_batch_tokens": config.layout.micro_batch_tokens or "-",
                "num_grad_accum_steps": config.num_grad_accum_steps(max_length),
                "recomputation": config.layout.recomputation,
                "compile": config.layout.compile,
                "peak_memory_bytes": None if memory is None else sum(memory.values()),
                "memory": memory,
                "host_bytes": None if plan is None else host_bytes(plan, config),
                "feasible": is_feasible(values),
                "violated": {name: reason(name, config, limits) for name, value in values.items() if value > 0},
                **({} if forecast is None else forecast.layout(config)),
            }
        )
    # Of those that `profile` names, a search takes what the cluster holds, if that is any.
    held = [row for row in rows if not isinstance(space.world_size, Profile) or row["world_size"] <= limits.num_workers]
    return held or rows


def render_plan(plan: Mapping[str, Any]) -> str:
    """Return the plan as text."""
    lines = ["# the resolved file", plan["spec"].rstrip(), "", "# where each value that is no default comes from"]
    lines += [f"{path}: {origin}" for path, origin in sorted(plan["origins"].items())]
    lines += [
        "",
        f"searched: {', '.join(plan['searched']) or 'nothing: every knob is fixed'}",
        f"objectives: {', '.join(plan['objectives'])}",
        f"{budget_text(plan['budget'])} on {plan['cluster']}, "
        f"which holds {plan['num_workers']} {'worker' if plan['num_workers'] == 1 else 'workers'} at once",
        "",
        *_layout_table(plan["layouts"]),
    ]
    lines += [
        "",
        "GiB a rank: predicted tensors at the peak, with rows of model.max_length tokens and the first value of every other knob; "
        "without the libraries and the data" + (f"; {plan['memory_unknown']}" if plan["memory_unknown"] else ""),
    ]
    lines += ["", f"{plan['num_feasible_layouts']} of {len(plan['layouts'])} can run"]
    if plan["forecast"] is not None:
        lines += ["", *_memory_table(plan["layouts"]), "", *_forecast_lines(plan["forecast"])]
    return "\n".join(lines)


def _differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the knobs that tell the rows apart."""
    return [knob for knob in KNOB_COLUMNS if len({row[knob] for row in rows}) > 1]


def _layout_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    knobs = _differing(rows)
    table = [[*(knob.replace("_", " ") for knob in knobs), "GiB a rank"]]
    is_forecast = "fits" in rows[0]
    if is_forecast:
        table[0] += ["s a step", "tokens/s", "MFU"]
    for row in rows:
        cells = [*(str(row[knob]) for knob in knobs), _gib(row["peak_memory_bytes"])]
        if is_forecast:
            cells += _step_cells(row["step"] if row["feasible"] else None)
        table.append(cells)
    verdicts = ["runs there" if is_forecast else "runs here", *(_verdict(row) for row in rows)]
    lines = [f"{line}  {verdict}" for line, verdict in zip(aligned(table), verdicts, strict=True)]
    told = [f"{knob.replace('_', ' ')} {rows[0][knob]}" for knob in KNOB_COLUMNS if knob not in knobs and rows[0][knob] != "-"]
    return [*lines, "all with " + ", ".join(told)] if told else lines


def _step_cells(step: Mapping[str, Any] | None) -> list[str]:
    if step is None:
        return ["-", "-", "-"]
    return [f"{step['seconds']:.3g}", f"{step['tokens_per_second']:,.0f}", f"{step['mfu']:.1%}"]


def _verdict(row: Mapping[str, Any]) -> str:
    reasons = list(row["violated"].values())
    if row.get("missing_bytes"):
        reasons.append(f"{_gib(row['missing_bytes'])} GiB too much")
    if row.get("unknown"):
        reasons.append(row["unknown"])
    return f"no: {'; '.join(reasons)}" if reasons else "yes"


def _memory_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the predicted memory of a rank by term, once for all layouts that agree in it."""
    terms = [f.name for f in fields(RankMemory)]
    columns = [knob for knob in _differing(rows) if knob != "num_grad_accum_steps"]
    on_host = ["host_bytes"] if any(row["host_bytes"] for row in rows) else []
    table = [[name.removesuffix("_bytes").replace("_", " ") for name in (*columns, *terms, *on_host)]]
    for row in rows:
        if row["memory"]:
            held = {**row["memory"], "host_bytes": row["host_bytes"]}
            table.append([*(str(row[c]) for c in columns), *(_gib(held[t]) for t in (*terms, *on_host))])
    return ["# GiB a rank by term, at the moment of its peak", *dict.fromkeys(aligned(table))]


def _forecast_lines(forecast: Mapping[str, Any]) -> list[str]:
    lines = []
    run, search = forecast["run"], forecast["search"]
    if forecast["num_rows"] is None:
        lines.append("no hours: how many training rows there are is not known here; say it with --rows")
    if run:
        layout = ", ".join(f"{knob.replace('_', ' ')} {run[knob]}" for knob in KNOB_COLUMNS if run.get(knob, "-") != "-")
        share = (
            "all the data" if run["dataset_fraction"] == 1 else f"{run['dataset_fraction']:.3g} of the data, the most of the space"
        )
        lines.append(f"one run of the fastest layout on {share}: {_cost_text(run)} ({layout})")
    if search:
        lines.append(f"the whole search: {_cost_text(search)}")
    if forecast["no_search"]:
        lines.append(f"no hours of the whole search: {forecast['no_search']}")
    return [*lines, "assumed, not measured: " + "; ".join(forecast["assumptions"])]


def _cost_text(cost: Mapping[str, Any]) -> str:
    dollars = "" if cost["dollars"] is None else f", {cost['dollars']:,.2f} dollars"
    if cost["device_hours"] < LEAST_HOURS:
        return f"{plain(3600 * cost['hours'], 3)} s, {plain(3600 * cost['device_hours'], 3)} GPU seconds{dollars}"
    return f"{plain(cost['hours'], 3)} h, {plain(cost['device_hours'], 3)} GPU hours{dollars}"


def _gib(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 2**30:.2f}"
