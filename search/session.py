"""A search from its first check to its last artifact: `start` a new one, or `resume` one that was cut off."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search import cluster
from search.budget import num_ended
from search.endpoint import check_no_credentials, redacted, tracking_uri
from search.engine import Engine, SearchExhausted
from search.errors import NoResult, UserError
from search.interruption import Interrupted, Interruption
from search.jobs import DispatcherSession, JobFailed, run_job
from search.ledger import TOLD, Ledger, SearchState, objectives_of, replay
from search.placement import num_handed_out
from search.preflight import check_room, check_targets
from search.provenance import flat_params, git_commit, machine, own_command, versions
from search.publication import LEAVING_FLUSH_SECONDS, publish
from search.results import Results, why_nothing
from search.rungs import Rungs
from search.store import Store
from search.tracking import Tracker, TrackingError
from search.warm_start import earlier_trials, new_study, on_device
from spaces.architecture import ModelShape, ShapeError
from spaces.blueprint import Blueprint, blueprint, with_idle_rows
from spaces.config import TrialConfig
from spaces.constraints import Limits, config_within, is_feasible, violations, why_none_trains
from spaces.loading import OPTIONS, LoadedSpec, SpecError, check_local_data
from spaces.metrics import FLOPS_PER_STEP, HFU, MFU
from spaces.spec import SearchSpec
from trainables.job import Job

if TYPE_CHECKING:
    from trainables.data import TaskData

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What is known before anything is started: the data, the model's shape, and the tracking server that answered."""

    loaded: LoadedSpec
    data: TaskData
    model: dict[str, Any]
    """Its `config.json`."""
    shape: ModelShape
    plan: Blueprint | None
    """What the model is made of; None for a family without formulas."""
    tracker: Tracker

    @property
    def spec(self) -> SearchSpec:
        return self.loaded.spec


def prepare(loaded: LoadedSpec) -> Prepared:
    """Check everything that can be checked without a worker: model, data, tracking server.

    Raises:
        SpecError: with one line for the user.
    """
    from trainables import preparation
    from trainables.formats import DataError
    from trainables.hub import ModelError

    config, shape = checked_model(loaded)
    tracker = connected_tracker(loaded)
    try:
        data = preparation.prepare(loaded.spec.model, loaded.spec.data, {o.metric for o in loaded.spec.resolved_objectives()})
    except (DataError, ModelError) as error:
        raise SpecError([loaded.locate(str(error))]) from error
    plan = None
    with suppress(ShapeError):  # a family without formulas
        plan = blueprint(config, loaded.spec.model.task, len(data.label_names))
        plan = with_idle_rows(plan, len(data.tokens()))
    return Prepared(loaded=loaded, data=data, model=config, shape=shape, plan=plan, tracker=tracker)


def checked_model(loaded: LoadedSpec) -> tuple[dict[str, Any], ModelShape]:
    """Return the `config.json` of a search's model and its sizes.

    Raises:
        SpecError: there is no such model, or it cannot be used as the spec says.
    """
    from trainables.hub import ModelError, check_use, model_config

    model = loaded.spec.model
    try:
        config = model_config(model.name, model.revision)
        check_use(config, model)
        shape = ModelShape.from_config(config)
        if not shape.is_counted and {o.metric for o in loaded.spec.resolved_objectives()} & {MFU, HFU, FLOPS_PER_STEP}:
            raise SpecError([loaded.locate(f"objectives: not all FLOPs are counted that the layers of {model.name} compute")])
        return config, shape
    except ShapeError as error:
        raise SpecError([loaded.locate(f"model.name: {model.name}: {error}")]) from error
    except ModelError as error:
        raise SpecError([loaded.locate(str(error))]) from error


def connected_tracker(loaded: LoadedSpec) -> Tracker:
    """Return the tracker of a search, whose server has answered.

    Raises:
        SpecError: it does not.
    """
    tracker = Tracker(tracking_uri(loaded.spec), loaded.spec.tracking.experiment, artifact_root=artifact_root(loaded.spec))
    try:
        tracker.connect(timeout_seconds=10)
    except TrackingError as error:
        raise SpecError([loaded.locate(str(error))]) from error
    return tracker


def artifact_root(spec: SearchSpec) -> Path:
    """Return where a SQLite tracking store keeps its artifacts."""
    return Path(spec.directory).absolute() / "artifacts"


def start(loaded: LoadedSpec, emit: Emit, command: str | None = None) -> Store:
    """Run a new search to its end and return where it is; after an interruption `command`, by default `resume`, goes on with it.

    Raises:
        UserError: no layout of the space can run here.
        NoResult: no trial succeeded.
        search.interruption.Interrupted: a signal came; what was in flight is saved.
    """
    check_local_data(loaded)
    check_no_credentials(loaded)
    if cluster.is_submitted():
        cluster.check_reachable()
    if loaded.spec.name is not None:
        Store(root=Path(loaded.spec.directory).absolute() / loaded.spec.name).check_free()
    prepared = prepare(loaded)
    check_targets(loaded, prepared.plan)
    check_room(loaded.spec, prepared.plan)
    past = _past(prepared)
    # A local cluster's size is known before it is started, so a space that cannot run starts nothing.
    if not cluster.is_submitted():
        check_fit(prepared, cluster.local_capacity(loaded.spec.resources))
    store = Store.create(loaded)
    return _drive(store, prepared, emit, past, command)


def resume(store: Store, emit: Emit, command: str | None = None) -> Store:
    """Go on with a search that was cut off: the same study, the same MLflow run, and the trials in flight first.

    Raises:
        UserError: its data are others than they were, or no layout of the space can run here.
    """
    prepared, state = prepare(store.load_spec_here()), store.state()
    if state.started is not None:
        check_same_data(prepared.data.fingerprint, store, state)
    return _drive(store, prepared, emit, _past(prepared) if state.warm_start is None else None, command)


def _past(prepared: Prepared) -> dict[str, Any] | None:
    """Return what an earlier search taught, where the spec names one."""
    loaded = prepared.loaded
    return None if loaded.spec.sampler.warm_start is None else earlier_trials(loaded, prepared.data.fingerprint)


def _drive(store: Store, prepared: Prepared, emit: Emit, past: Mapping[str, Any] | None, command: str | None) -> Store:
    from search.outlook import Outlook
    from search.profiles import ProfileCache

    spec, command = prepared.spec, command or store.command("resume", store.name)
    with (
        store.lock(),
        Interruption(command) as interruption,
        cluster.connected(spec.resources) as capacity,
        interruption.following_ray(),
    ):
        limits = check_fit(prepared, capacity)
        ledger = Ledger(store.ledger_path)

        def on_event(event: dict[str, Any]) -> None:
            prepared.tracker.submit(event)
            emit(event)

        engines: list[Engine] = []
        with (
            _cut_short(ledger, on_event, prepared.tracker, engines),
            DispatcherSession(store, spec, prepared.data, capacity) as dispatcher,
        ):
            # Workers take seconds to start, and so does MLflow: at the same time.
            dispatcher.expect.remote(*_first_jobs(spec, limits, replay(ledger.events())))
            _open_record(ledger, store, prepared, limits)
            *told, last = ledger.events()
            for event in told:
                prepared.tracker.submit(event)
                emit({**event, TOLD: True})
            on_event(last)
            device = examine(dispatcher, store, spec, limits, interruption)
            was = next((event["device"]["name"] for event in reversed(told) if event["event"] == "device_examined"), device["name"])
            on_event(ledger.append("device_examined", device=device, **({} if was == device["name"] else {"before": was})))
            limits = limits.on(device)
            if past is not None:
                on_event(ledger.append("warm_started", **on_device(past, device["name"], spec)))
            state = replay(ledger.events())
            engine = Engine(
                store=store,
                spec=spec,
                ledger=ledger,
                study=new_study(spec, state, limits, objectives_of(spec, state), width=prepared.shape.hidden_size),
                limits=limits,
                outlook=Outlook(
                    spec, prepared.data, model=prepared.model, plan=prepared.plan, device=device, profiles=ProfileCache()
                ),
                on_event=on_event,
            )
            engines.append(engine)
            reason = _search(engine, dispatcher, store, spec, limits, interruption)
            if prepared.data.test is not None:
                _score_on_test(engine, dispatcher, store, interruption)
        engine.finished(reason)
        publish(Results.of(store, engine.state), prepared.tracker, command_for_rest=command)
    if not engine.front():
        raise NoResult(why_nothing(engine.state.records.values()))
    return store


def check_fit(prepared: Prepared, capacity: int) -> Limits:
    """Return the limits that proposals are held against, if anything at all is feasible within them."""
    limits = Limits(
        num_workers=capacity,
        hidden_size=prepared.shape.hidden_size,
        plan=prepared.plan,
        max_length=max(int(table.lengths.max()) for table in (prepared.data.train, prepared.data.evaluation)),
        max_targets=int(prepared.data.train.num_targets.max()),
        targets_per_token=float((prepared.data.train.num_targets / prepared.data.train.lengths).max()),
        is_on_gpu=prepared.spec.resources.gpus_per_worker > 0,
    )
    sizes = sorted({world_size for world_size, _ in prepared.spec.space.layouts()})
    if min(sizes) > capacity:
        raise UserError(prepared.loaded.locate(cluster.why_too_small(prepared.spec.resources, capacity, sizes)))
    if why := why_none_trains(_corners(prepared.spec, limits), limits, has_all_batches=prepared.spec.space.has_all_batches):
        raise UserError(prepared.loaded.locate(why))
    return limits


def _open_record(ledger: Ledger, store: Store, prepared: Prepared, limits: Limits) -> None:
    """Write the search's first line, or that it was resumed, and open its run in MLflow."""
    state = replay(ledger.events())
    if state.started is None:
        run_id = prepared.tracker.start_search(
            store.name,
            params=flat_params(prepared.spec),
            tags={"paretune.directory": str(store.root)},
            spec_path=store.spec_path,
        )
        ledger.append(
            "search_started",
            name=store.name,
            mlflow_run_id=run_id,
            mlflow_url=prepared.tracker.url(_ui_base(prepared.tracker.uri)),
            command=own_command(),
            overrides=sorted(path for path, origin in prepared.loaded.origins.items() if origin in OPTIONS),
            data=prepared.data.summary,
            data_name=prepared.spec.data.name,
            data_fingerprint=prepared.data.fingerprint,
            num_workers=limits.num_workers,
            machine=machine(),
            versions=versions(),
            git_commit=git_commit(),
        )
        return
    prepared.tracker.reopen_search(store.name, state.started["mlflow_run_id"], spec_path=store.spec_path)
    ledger.append("resumed", in_flight=sorted(state.in_flight))


def check_same_data(fingerprint: str, store: Store, state: SearchState) -> None:
    """Check that the data are those that a search began with.

    Raises:
        UserError: they are not.
    """
    began = (state.started or {})["data_fingerprint"]
    if began != fingerprint:
        raise UserError(
            f"{store.spec_path}: data.train: the data changed since the search began, or how this version of paretune splits and "
            f"numbers them (fingerprint {fingerprint[:12]}, then {began[:12]}): its trials would not compare"
        )


@contextmanager
def _cut_short(ledger: Ledger, on_event: Emit, tracker: Tracker, engines: Sequence[Engine]) -> Iterator[None]:
    """Record why a search leaves before its end, with its trials in flight: its MLflow run must not look as if it went on.

    What they held since their last reports is recorded too, once `engines` has the engine: it was used, and costs money.
    A search without a run yet has nothing that could look so.
    """
    try:
        yield
    except BaseException as error:
        if not tracker.is_open:
            raise
        # A disk that is full may be why it ends.
        why = error.why if isinstance(error, Interrupted) else f"{type(error).__name__}: {error}"
        with suppress(UserError):
            held = {number: seconds for engine in engines for number, seconds in engine.held_seconds().items()}
            on_event(ledger.append("search_cut_short", reason=why, held_seconds=held))
        tracker.leave("KILLED" if isinstance(error, Interrupted) else "FAILED", LEAVING_FLUSH_SECONDS)
        raise


def _search(engine: Engine, dispatcher: Any, store: Store, spec: SearchSpec, limits: Limits, interruption: Interruption) -> str:
    """Run the trials of the budget; return why the search ended."""
    from search import tuner

    if engine.state.reference is None:
        try:
            engine.referenced(run_job(dispatcher, _first_job("reference", store, spec, limits), interruption)["metrics"])
        except JobFailed as error:
            raise NoResult(f"the untrained model cannot be evaluated: {error}") from error
    try:
        tuner.run(
            engine,
            dispatcher,
            rungs=Rungs(spec, engine.state.records.values()),
            max_concurrent=num_handed_out(limits.num_workers, _trained_sizes(spec, limits), engine.num_left),
            storage=store.root,
            interrupted=lambda: interruption.is_asked,
        )
    except SearchExhausted as exhausted:
        return str(exhausted)
    interruption.check()
    return engine.why_over


def _first_jobs(spec: SearchSpec, limits: Limits, state: SearchState) -> tuple[int, float]:
    """Return the world size of the jobs that come first, and how many of them; where the space has several, trials choose later."""
    most = math.inf if spec.budget.max_trials is None else spec.budget.max_trials - num_ended(state.records.values())
    return _first_config(spec, limits).layout.world_size, max(1, most) if len(_trained_sizes(spec, limits)) == 1 else 1


def _trained_sizes(spec: SearchSpec, limits: Limits) -> set[int]:
    """Return the world sizes at which recipes are trained; where they are measured, that is the smallest, and others are timed."""
    if "world_size" in spec.space.profiled_knobs():
        return {_first_config(spec, limits).layout.world_size}
    return {world_size for world_size, _ in spec.space.layouts()}


def examine(dispatcher: Any, store: Store, spec: SearchSpec, limits: Limits, interruption: Interruption) -> dict[str, Any]:
    """Return what a worker's device can do, and how many workers each node holds; nothing trains yet: the time to see it."""
    try:
        device = run_job(dispatcher, _first_job("device", store, spec, limits), interruption)["device"]
    except JobFailed as error:
        raise NoResult(f"the workers' device cannot be examined: {error}") from error
    return {**device, **cluster.share_of_worker(spec.resources, device)}


def _first_config(spec: SearchSpec, limits: Limits) -> TrialConfig:
    """Return the smallest layout that is feasible, with the first value of every other knob."""
    configs = sorted(_corners(spec, limits), key=lambda config: config.layout.world_size)
    return next((config for config in configs if is_feasible(violations(config, limits))), configs[0])


def _first_job(kind: str, store: Store, spec: SearchSpec, limits: Limits) -> Job:
    config = _first_config(spec, limits)
    return Job(job_id=f"{store.name}/{kind}", kind=kind, config=config.to_dict(), directory=str(store.root))


def _corners(spec: SearchSpec, limits: Limits) -> Iterator[TrialConfig]:
    return (config_within(params, limits) for params in spec.space.corners())


def _score_on_test(engine: Engine, dispatcher: Any, store: Store, interruption: Interruption) -> None:
    """Score the members of the front on the test file, which the search never saw."""
    for record in engine.front():
        if record.test:
            continue
        # Whoever shares the weights shares the score.
        owner = engine.state.records[record.root]
        job = Job(
            job_id=f"{store.name}/test-{owner.number:04d}",
            kind="test",
            config=dict(owner.config or {}),
            directory=str(store.trial_path(owner.number)),
        )
        try:
            score = owner.test or run_job(dispatcher, job, interruption)["metrics"]
        except JobFailed as error:
            print(f"trial {record.number:04d} has no score on the test file: {error}", file=sys.stderr)
            continue
        for number in {owner.number, record.number}:
            engine.test_scored(number, score)


def _ui_base(uri: str) -> str:
    """Return where the tracking server's pages are; for a database, where `paretune ui` will put them."""
    return redacted(uri) if uri.startswith("http") else "http://127.0.0.1:5000"
