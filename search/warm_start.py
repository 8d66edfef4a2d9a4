"""A study that begins with what is known: the trials of an earlier search, or else the points that are usual for such a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.endpoint import redacted, tracking_uri
from search.errors import UserError
from search.ledger import SearchState
from search.pareto import eligible
from search.proposals import PastTrial
from search.record import TrialRecord, TrialState
from search.store import Store
from search.study import MAX_REMEMBERED, Study
from search.tracked import load_search
from search.tracking import TrackingError
from spaces import constraints
from spaces.config import TrialConfig
from spaces.constraints import Limits
from spaces.loading import LoadedSpec, SpecError, parse_spec
from spaces.metrics import CUSTOM, EXACT_MATCH, metric_of
from spaces.presets import longer_points, starting_points
from spaces.spec import Objective, SearchSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class _Earlier:
    """An earlier search, from its directory or from MLflow."""

    name: str
    spec: SearchSpec
    records: list[TrialRecord]
    data_fingerprint: str | None
    device: str | None
    """The name of its workers' device."""


def earlier_trials(loaded: LoadedSpec, data_fingerprint: str) -> dict[str, Any]:
    """Return what the sampler can learn from the search that `sampler.warm_start` names.

    To be asked before this search has a directory and a run: its own name may be that of the earlier one.

    Args:
        loaded: this search.
        data_fingerprint: of its data.

    Returns:
        `trials` with `params` and `values`, at most as many as the sampler remembers; `num_outside`, how many this space does not
        hold; `device`, the name of what its workers ran on, if it is known; `unusable`, in words why none is used, or nothing.

    Raises:
        SpecError: there is no such search, or its results would not compare.
    """
    spec = loaded.spec
    try:
        earlier = _found(str(spec.sampler.warm_start), spec)
    except (UserError, SpecError) as error:
        raise SpecError([loaded.locate(f"sampler.warm_start: {error}")]) from error
    problem = _difference(spec, earlier, data_fingerprint)
    if problem:
        raise SpecError(
            [loaded.locate(f"sampler.warm_start: the search '{earlier.name}' has {problem}: its results would not compare")]
        )
    objectives = spec.resolved_objectives()
    proposed = [record for record in eligible(earlier.records, objectives) if record.was_proposed]
    known = [_brief(spec.space.with_defaults(record.params), record, objectives) for record in proposed]
    held = [trial for trial in known if spec.space.holds(trial["params"])]
    unusable = _other_workers(spec, earlier.spec)
    return {
        "name": earlier.name,
        "trials": [] if unusable else held[-MAX_REMEMBERED:],
        "num_outside": len(known) - len(held),
        "device": earlier.device,
        "unusable": unusable,
    }


def on_device(past: Mapping[str, Any], device: str, spec: SearchSpec) -> dict[str, Any]:
    """Return what can be learned where this search's workers run on a device of this name: times of another one are not its times."""
    if past["unusable"] or past["device"] in (None, device) or not _has_times(spec):
        return dict(past)
    return {**past, "trials": [], "unusable": f"its times are those of {past['device']}"}


def _found(name: str, spec: SearchSpec) -> _Earlier:
    """Return an earlier search from its directory; failing that, from the MLflow that this search writes to."""
    try:
        store = Store.open(name, Path(spec.directory))
    except UserError as nowhere:
        return _in_mlflow(name, tracking_uri(spec), nowhere)
    state = store.state()
    return _Earlier(
        name=name,
        spec=store.load_spec().spec,
        records=list(state.records.values()),
        data_fingerprint=(state.started or {}).get("data_fingerprint"),
        device=(state.device or {}).get("name"),
    )


def _in_mlflow(name: str, uri: str, nowhere: UserError) -> _Earlier:
    try:
        found = load_search(uri, name)
    except TrackingError as error:
        raise UserError(f"{nowhere}; and in MLflow: {error}") from error
    return _Earlier(
        name=name,
        spec=parse_spec(found.spec_yaml, f"{redacted(uri)}: {name}/spec.yaml"),
        records=list(found.records),
        data_fingerprint=found.data_fingerprint,
        device=(found.device or {}).get("name"),
    )


def warm_start_text(event: Mapping[str, Any]) -> str:
    """Return in words what an earlier search gave to this one."""
    text = f"warm start: {len(event['trials'])} trials of {event['name']}"
    if event["unusable"]:
        return f"{text}: {event['unusable']}"
    return text + (f"; {event['num_outside']} are outside this space" if event["num_outside"] else "")


def new_study(spec: SearchSpec, state: SearchState, limits: Limits, objectives: Sequence[Objective], *, width: int) -> Study:
    """Return the study of a search, which knows nothing yet of the search's own trials.

    Args:
        spec: the search.
        state: its ledger, in which the earlier search's trials are too.
        limits: what proposals are held against.
        objectives: those of the search.
        width: of the model's layers, for the usual points.
    """
    sampler, written = spec.sampler, (state.warm_start or {}).get("trials", ())
    past = [{**trial, "params": spec.space.with_defaults(trial["params"])} for trial in written]
    points, longer = sampler.points_to_evaluate, list[dict[str, Any]]()
    if points is None:
        points = () if past else tuple(starting_points(spec.space, width=width, limits=limits))
        longer = longer_points(spec.space, width=width, limits=limits)
    study = Study(
        space=spec.space,
        objectives=objectives,
        sampler=sampler.method,
        seed=sampler.seed,
        startup_trials=sampler.startup_trials,
        points_to_evaluate=points,
        longer_points=longer,
    )
    # The user may have changed the space since they were written down.
    study.learn([_past(trial, limits) for trial in past if spec.space.holds(trial["params"])])
    return study


def _past(trial: Mapping[str, Any], limits: Limits) -> PastTrial:
    config = TrialConfig.from_params(trial["params"])
    # It ran, whatever the limits are here.
    known = {name: min(0.0, value) for name, value in constraints.violations(config, limits).items()}
    return PastTrial(params=trial["params"], values=trial["values"], constraints=known)


def _brief(params: dict[str, Any], record: TrialRecord, objectives: Sequence[Objective]) -> dict[str, Any]:
    return {"params": params, "values": {o.metric: record.values[o.metric] for o in objectives}}


def _difference(spec: SearchSpec, earlier: _Earlier, data_fingerprint: str) -> str:
    """Return in words what of an earlier search is another than here, so that no result compares; nothing where none is."""
    for name, value in earlier.spec.model:
        if getattr(spec.model, name) != value:
            return f"another model.{name} ({value})"
    if earlier.data_fingerprint != data_fingerprint:
        return "other data"
    judged = {o.metric for o in spec.resolved_objectives()}
    of_completions = {CUSTOM, EXACT_MATCH} if spec.model.task == "causal-lm" else set()
    for key, of in {"metric": {CUSTOM}, "answer_pattern": {EXACT_MATCH}, "exact_match_rows": of_completions}.items():
        if judged & of and getattr(spec.data, key) != getattr(earlier.spec.data, key):
            return f"another data.{key}"
    wanted, there = ({o.metric: o.direction for o in s.resolved_objectives()} for s in (spec, earlier.spec))
    turned = [metric for metric, direction in wanted.items() if there.get(metric, direction) != direction]
    if turned:
        return f"{turned[0]} with another direction"
    # Whatever its own objectives were: a trial measures more.
    known = [set(record.values) for record in earlier.records if record.state is TrialState.COMPLETE]
    missing = [metric for metric in wanted if known and not any(metric in values for values in known)]
    return f"no {missing[0]}" if missing else ""


def _has_times(spec: SearchSpec) -> bool:
    """Return whether an objective is one of time or bytes."""
    return any(metric_of(o.metric).section in ("perf", "cost") for o in spec.resolved_objectives())


def _other_workers(spec: SearchSpec, other: SearchSpec) -> str:
    """Return why an earlier search's times and bytes are not those of such workers, in words; nothing where no objective is one."""
    here, there = ((s.resources.cpus_per_worker, s.resources.gpus_per_worker) for s in (spec, other))
    return "" if here == there or not _has_times(spec) else f"its workers had {there[0]} CPU cores and {there[1]} GPUs"
