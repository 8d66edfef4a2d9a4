"""`paretune profile`: measure the step of everything that a space can propose, one after the other, before a search."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from search import cluster
from search.formatting import aligned
from search.interruption import Interruption
from search.jobs import DispatcherSession, JobFailed, run_job
from search.layouts import STEP_KNOBS
from search.outlook import Outlook
from search.profiles import ProfileCache
from search.provenance import own_command
from search.record import noise_of
from search.session import check_fit, examine, prepare
from search.store import Store, make_searches
from spaces.config import ADAPTER_KNOBS, TrialConfig
from spaces.constraints import Limits, config_within, is_feasible, violations
from spaces.loading import LoadedSpec, check_local_data
from spaces.metrics import RANK_SPREAD, TIME_DRIFT
from spaces.space import SpaceSpec
from trainables.job import Job

# What else a machine does comes and goes: each layout is measured again when all others were.
NUM_ROUNDS = 2
# Of a profile, what is the mean of its rounds.
AVERAGED = ("compile_seconds", "fixed_seconds", "seconds_per_token", "step_seconds")
COLUMNS = (STEP_KNOBS[0], "adapter_rank", *STEP_KNOBS[1:])


def profile_space(loaded: LoadedSpec, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Measure what the cache does not have yet or only noisy, with nothing else running; return a row for each step of the space.

    Raises:
        UserError: no layout of the space can run here.
        search.interruption.Interrupted: a signal came; what was measured stays.
    """
    check_local_data(loaded)
    if cluster.is_submitted():
        cluster.check_reachable()
    prepared, spec, profiles = prepare(loaded), loaded.spec, ProfileCache()
    # Where the searches are, because all nodes of a cluster see it.
    searches = Path(spec.directory).absolute()
    make_searches(searches)
    with (
        tempfile.TemporaryDirectory(prefix=".profile-", dir=searches) as directory,
        Interruption(own_command()) as interruption,
        cluster.connected(spec.resources) as capacity,
        interruption.following_ray(),
    ):
        limits = check_fit(prepared, capacity)
        store = Store(root=Path(directory))
        with DispatcherSession(store, spec, prepared.data, capacity) as dispatcher:
            device = examine(dispatcher, store, spec, limits, interruption)
            limits = limits.on(device)
            outlook = Outlook(spec, prepared.data, model=prepared.model, plan=prepared.plan, device=device, profiles=profiles)
            configs = [c for c in timed_configs(spec.space, limits) if is_feasible(violations(c, limits))]
            kept = [(config, profiles.get(outlook.key(config))) for config in configs]
            known = {config: profile for config, profile in kept if profile is not None and not noise_of(profile)}
            parts: dict[TrialConfig, list[dict[str, Any]]] = {config: [] for config in configs if config not in known}
            for number, config in [(number, config) for number in range(1, NUM_ROUNDS + 1) for config in parts]:
                job = Job(job_id=f"profile-{config.key()}-{number}", kind="profile", config=config.to_dict(), directory=directory)
                parts[config].append(_measured(dispatcher, job, interruption))
                say(f"round {number} of {NUM_ROUNDS}: {_text({**_knobs(config), **parts[config][-1]})}")
            rows = []
            for config in configs:
                profile = known[config] if config in known else mean_profile(parts[config])
                if config in parts and "error" not in profile:
                    # Under where its ranks really were: a group may spread over more nodes than it must.
                    profiles.put({**outlook.key(config), "num_nodes": profile["num_nodes"]}, profile)
                rows.append({**_knobs(config), **profile, "noise": noise_of(profile), "is_new": config in parts})
    return rows


def mean_profile(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of what was measured at different times, with how far it changed; the error, if there was one."""
    errors = [part for part in parts if "error" in part]
    if errors:
        return dict(errors[0])
    mean = {name: sum(part[name] for part in parts) / len(parts) for name in AVERAGED}
    paces = [part["step_seconds"] for part in parts]
    changed = (max(paces) - min(paces)) / mean["step_seconds"]
    return {
        **mean,
        TIME_DRIFT: max(changed, *(part[TIME_DRIFT] for part in parts)),
        **({RANK_SPREAD: max(part[RANK_SPREAD] for part in parts)} if RANK_SPREAD in parts[0] else {}),
        "tokens_per_second": len(parts) / sum(1 / part["tokens_per_second"] for part in parts),
        "num_steps": sum(part["num_steps"] for part in parts),
        "part_seconds": {name: sum(part["part_seconds"][name] for part in parts) / len(parts) for name in parts[0]["part_seconds"]},
        "peak_memory_bytes": max(part["peak_memory_bytes"] for part in parts),
        "num_nodes": max(part["num_nodes"] for part in parts),
    }


def timed_configs(space: SpaceSpec, limits: Limits) -> Iterator[TrialConfig]:
    """Yield one config for each step of the space that takes a time of its own; of a range its two ends."""
    for corner in space.corners():
        own = ADAPTER_KNOBS[corner["adapter"]]
        knobs = [knob for knob in ("lora_rank", "lora_target_modules") if knob in own]
        for values in itertools.product(*(getattr(space, knob).ends() for knob in knobs)):
            yield config_within({**corner, **dict(zip(knobs, values, strict=True))}, limits)


def render_profiles(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table for people."""
    varied = [name for name in COLUMNS if len({row[name] for row in rows}) > 1]
    table = [[*(name.replace("_", " ") for name in varied), "s a step", "tokens/s", "waits", "measured"]]
    for row in rows:
        cells = ["-" if row[name] is None else str(row[name]) for name in varied]
        if "error" in row:
            table.append([*cells, "-", "-", "-", row["error"]])
            continue
        waits = row["part_seconds"].get("communication", 0.0) / row["step_seconds"]
        when = ("now" if row["is_new"] else "before") + (row["noise"] and f", NOISY: {row['noise']}")
        table.append([*cells, f"{row['step_seconds']:.3g}", f"{row['tokens_per_second']:,.0f}", f"{waits:.0%}", when])
    return "\n".join([*aligned(table), "waits: share of a step in which the computation waits for other ranks"])


def _measured(dispatcher: Any, job: Job, interruption: Interruption) -> dict[str, Any]:
    """Return the profile, or the error of a step that cannot be trained: others can."""
    try:
        return dict(run_job(dispatcher, job, interruption)["profile"])
    except JobFailed as error:
        return {"error": str(error)}


def _knobs(config: TrialConfig) -> dict[str, Any]:
    return {name: config.flat().get(name) for name in COLUMNS}


def _text(row: Mapping[str, Any]) -> str:
    knobs = " ".join(f"{name}={row[name]}" for name in COLUMNS if row[name] is not None)
    return f"{knobs}: {row['error'] if 'error' in row else format(row['step_seconds'], '.3g') + ' s a step'}"
