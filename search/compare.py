"""`paretune compare-methods`: which way to fine-tune is the best for how much data, and at which cost.

A search over a grid: every method at every share of the training rows with a few learning rates, since each has another best one,
and with further rates as long as the best of them is the lowest or the highest: what was not looked for would count against a method.
The best of each pair is then confirmed with further seeds on the test rows, and these are what is compared: the search chose by the
evaluation rows. A comparison that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from search.comparison import FILES, METHODS, Comparison, Method, comparison_of, configs_of, pair_of, pairs_of
from search.confirm import confirm
from search.errors import NoResult, UserError
from search.ledger import Ledger
from search.lengthening import lengthen
from search.provenance import own_command
from search.record import LASTING, TrialState
from search.results import Results
from search.session import Emit, checked_model, resume, start
from search.store import Store
from spaces.architecture import ShapeError
from spaces.blueprint import blueprint
from spaces.config import ADAPTER_KNOBS, TrialConfig
from spaces.constraints import Limits, reason, violations
from spaces.forms import HIGHEST_RATE
from spaces.loading import LoadedSpec, load_spec
from spaces.metrics import metric_of
from spaces.presets import BATCH_SIZE, LORA_ALPHA, nearest, usual_rate
from spaces.space import SpaceSpec
from spaces.spec import SearchSpec

FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
# Times the usual one for all rows, once: with fewer tokens the best rate is higher (`spaces.presets.HIGHER_RATE`).
RATES = (1.0, 2.0, 4.0)
# All that may be tried, where the best one is an end of what was.
LADDER = tuple(2.0**exponent for exponent in range(-3, 5))
COMPARED = ("adapter", "learning_rate", "dataset_fraction", "lora_rank", "quantization")
# Of a budget; its trials are the points.
LIMITS = ("minutes", "device_hours", "dollars")
GRID = (
    "every method with every share of the rows and three learning rates, whatever the file has of these; further rates where the "
    "best one is the lowest or the highest"
)
# More workers than any layout needs.
EVERYWHERE = 4096


def parse_fractions(text: str) -> tuple[float, ...]:
    """Read shares of the rows with commas.

    Raises:
        UserError: one is none.
    """
    try:
        fractions = tuple(float(part) for part in text.split(","))
    except ValueError:
        fractions = (0.0,)
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise UserError(f"--fractions {text}: not shares of rows; allowed: numbers above 0 and up to 1 with commas, as 0.01,1")
    return fractions


def grid_spec(
    path: Path,
    overrides: Sequence[str],
    methods: Sequence[Method] | None,
    fractions: Sequence[float] | None,
    say: Callable[[str], None] = lambda _: None,
) -> LoadedSpec:
    """Return the search that trains every method at every share of the rows with every one of `RATES`, and nothing else.

    Knobs that the file leaves open and that are not compared get one value: batches of the usual size, the most epochs, and of all
    others the first. Limits in time and money stay.

    Args:
        path: the user's file.
        overrides: of the command line.
        methods: at least one; None: those of the comparison that is there, else of `METHODS` those that the model can train with.
        fractions: of the training rows; None: those of the comparison that is there, else `FRACTIONS`.
        say: is told how many trainings a new one is, and which of `METHODS` are left out, and why.

    Raises:
        SpecError: the file or its model cannot be used.
        UserError: a method cannot be trained anywhere, or no objective is a score.
    """
    loaded = load_spec(path, overrides)
    config, shape = checked_model(loaded)
    spec, width = loaded.spec, shape.hidden_size
    if not any(metric_of(o.metric).section == "eval" for o in spec.resolved_objectives()):
        raise UserError("objectives: none says how good a model is; allowed: with accuracy, eval_loss or another score among them")
    known = _pairs_there(_store(spec.directory, _name_of(spec, path)))
    is_known = bool(known) and methods is None and fractions is None
    methods = _trainable(methods or [m for m, _ in known] or None, spec, _limits(spec, config, width), say)
    fractions = sorted(set(fractions or [fraction for _, fraction in known] or FRACTIONS))
    adapters = list(dict.fromkeys(method.adapter for method in methods))
    ladder = {a: [rate for factor in LADDER if (rate := factor * usual_rate(a, width)) <= HIGHEST_RATE] for a in adapters}
    pairs = [(m, f) for f in fractions for m in methods if not is_known or (m, f) in known]
    rates = {m: [factor * usual_rate(m.adapter, width) for factor in RATES] for m in methods}
    points = [{**m.params, "dataset_fraction": f, "learning_rate": rate} for m, f in pairs for rate in rates[m]]
    ranked = [method for method in methods if method.rank is not None]
    values: dict[str, Any] = {
        **{f"space.{knob}": value for knob, value in _fixed_knobs(spec.space).items()},
        "space.adapter": _choice(adapters),
        "space.dataset_fraction": _choice(fractions),
        "space.learning_rate": {"by_adapter": {adapter: {"choice": rates} for adapter, rates in ladder.items()}},
        "space.quantization": _choice([method.quantization for method in ranked] or ["none"]),
        "sampler.points_to_evaluate": points,
        "scheduler.method": "none",
        "sampler.method": "points",
        "sampler.warm_start": None,
        "budget.trials": len(points),
        "budget.patience": None,
        "name": _name_of(spec, path),
    }
    if ranked:
        values["space.lora_rank"] = _choice([method.rank for method in ranked])
    if not known:
        say(f"{len(points)} trainings: {GRID}")
    return load_spec(path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items())])


def search(loaded: LoadedSpec, emit: Emit) -> Store:
    """Train the grid, or what is left of it, with further rates where the best one is an end, and return where it is.

    A comparison of the name that lacks methods or shares of this one gets them.

    Raises:
        UserError: a search of another model or data set, or with another value of what is not compared, has the name.
        What `search.session.start` and `resume` raise, but where they ended without a result.
    """
    store = _store(loaded.spec.directory, str(loaded.spec.name))
    if store.ledger_path.exists():
        with store.lock():
            added = _add(store, loaded.spec)
        if added is not None:
            emit(added)
    else:
        _to_its_end(store, lambda: start(loaded, emit, own_command()))
    while True:
        with store.lock():
            results = Results.of(store)
            points = further_rates(results.spec, results) if results.state.finished else []
            longer = _with_points(store, results.spec, points, _beyond(results.spec, points)) if points else None
        if results.state.finished and longer is None:
            return store
        if longer is not None:
            emit(longer)
        _to_its_end(store, lambda: resume(store, emit, own_command()))


def _store(directory: str, name: str) -> Store:
    return Store(root=Path(directory).absolute() / name)


def _name_of(spec: SearchSpec, path: Path) -> str:
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', spec.name or path.stem)[:40]}-methods"


def _pairs_there(store: Store) -> list[tuple[Method, float]]:
    return pairs_of(store.load_spec().spec) if store.ledger_path.exists() else []


def _to_its_end(store: Store, run: Callable[[], Store]) -> None:
    """Run a search; one that ended without a result is no error yet, since further rates may have one."""
    try:
        run()
    except NoResult:
        if not store.ledger_path.exists() or not Results.of(store).state.finished:
            raise


def further_rates(spec: SearchSpec, results: Results) -> list[dict[str, Any]]:
    """Return points for each method and share whose best rate is an end of those that were tried: the next rate beyond.

    Where all of them diverged the next lower one may not.

    Args:
        spec: of the comparison, with the points up to now.
        results: of its search, which has ended; where a limit in time or money ended it, nothing is returned.
    """
    points, records = configs_of(spec), results.state.records.values()
    ended = {record.trial_config.recipe for record in records if record.state is not TrialState.RUNNING and not record.was_cut_off}
    if any(config.recipe not in ended for config in points):
        return []
    further = []
    for cell in comparison_of(results.state, spec, results.objectives).cells:
        ladder = spec.space.learning_rate_of(cell.method.adapter).ends()
        own = [config.recipe for config in points if pair_of(config) == (cell.method, cell.fraction)]
        tried = sorted({ladder.index(recipe.learning_rate) for recipe in own})
        if cell.learning_rate is not None:
            best = ladder.index(cell.learning_rate)
            beside = [best - 1, best + 1]
        else:
            beside = [tried[0] - 1] if cell.why == LASTING else []
        # One that failed for a reason of its own is not tried again.
        places = [place for place in beside if 0 <= place < len(ladder) and place not in tried]
        further += [{**cell.method.params, "dataset_fraction": cell.fraction, "learning_rate": ladder[place]} for place in places]
    return further


def _add(store: Store, asked: SearchSpec) -> dict[str, Any] | None:
    """Give a comparison the methods and shares that it lacks, and limits; return what the ledger says of it, None if nothing changes.

    Raises:
        UserError: it is another one: its trials would not compare.
    """
    known = store.load_spec().spec
    others = [part for part in ("model", "data", "objectives") if getattr(known, part) != getattr(asked, part)]
    knobs = (knob for knob in type(asked.space).model_fields if knob not in COMPARED)
    others += [f"space.{knob}" for knob in knobs if getattr(known.space, knob) != getattr(asked.space, knob)]
    others += ["sampler.seed"] if known.sampler.seed != asked.sampler.seed else []
    if others:
        where = f"a comparison named '{store.name}' is in {store.root.parent} already, with other {', '.join(others)}"
        raise UserError(f"{where}; give this one --set name=...")
    pairs = pairs_of(known)
    lacking = [pair for pair in pairs_of(asked) if pair not in pairs]
    points = zip(configs_of(asked), asked.sampler.points_to_evaluate or (), strict=True)
    further = [point for config, point in points if pair_of(config) in lacking]
    # What ends it is as this command has it: a comparison that a limit ended goes on with a later one.
    budget = known.budget.model_copy(update={name: getattr(asked.budget, name) for name in LIMITS})
    price = asked.resources.price_per_device_hour or known.resources.price_per_device_hour
    resources = known.resources.model_copy(update={"price_per_device_hour": price})
    grown = known.model_copy(update={"space": _joined(known.space, asked.space), "budget": budget, "resources": resources})
    words = ", ".join(f"{method.name} ({fraction:.3g})" for method, fraction in lacking)
    why = f"methods and shares of the rows that it did not have: {words}" if lacking else "limits in time or money are others now"
    return _with_points(store, grown, further, why) if lacking or (budget, resources) != (known.budget, known.resources) else None


def _joined(known: SpaceSpec, asked: SpaceSpec) -> SpaceSpec:
    """Return a comparison's space with the methods and shares of another one."""
    values, added = known.model_dump(mode="json"), asked.model_dump(mode="json")
    for knob in (knob for knob in COMPARED if knob != "learning_rate"):
        values[knob] = _choice([*getattr(known, knob).ends(), *getattr(asked, knob).ends()])
    rates = [pair for each in (added, values) for pair in each["learning_rate"]["by_adapter"].items() if pair[1] is not None]
    values["learning_rate"] = {"by_adapter": dict(rates)}
    return SpaceSpec.model_validate(values)


def _with_points(store: Store, spec: SearchSpec, points: Sequence[dict[str, Any]], why: str) -> dict[str, Any]:
    """Give a comparison further points to train when it is resumed; return what the ledger says of it.

    Args:
        store: of the search.
        spec: its spec, whose space holds the points.
        points: what is added to those that it has.
        why: in words.
    """
    every = (*(spec.sampler.points_to_evaluate or ()), *points)
    sampler = spec.sampler.model_copy(update={"points_to_evaluate": every})
    budget = spec.budget.model_copy(update={"trials": len(every)})
    return lengthen(store, spec.model_copy(update={"sampler": sampler, "budget": budget}), why, num_further=len(points))


def _beyond(spec: SearchSpec, points: Sequence[dict[str, Any]]) -> str:
    """Return in words why these points are tried."""
    pairs = [(pair_of(config), config.recipe.learning_rate) for config in configs_of(spec, points)]
    named = [f"{method.name} ({fraction:.3g}) {rate:.3g}" for (method, fraction), rate in pairs]
    return f"rates beyond those tried: {', '.join(named)}"


def confirm_best(store: Store, *, num_seeds: int, say: Callable[[str], None]) -> tuple[Comparison, list[Path], list[str]]:
    """Confirm the best trial of every method and share; return what was found, files, and a line for each seed without a result.

    Raises:
        NoResult: no trial is complete.
        What `search.confirm.confirm` raises.
    """
    best = [cell.record.number for cell in _comparison(store).cells if cell.record is not None]
    if not best:
        raise NoResult(f"{store.name}: no trial is complete, so there is nothing to compare")
    with store.lock():
        if not Results.of(store).state.is_comparison:
            Ledger(store.ledger_path).append("compared")  # so the report has a table of methods
    failures = confirm(store, num_seeds=num_seeds, trials=",".join(map(str, best)), say=say)
    return _comparison(store), [store.report_path / name for name in ("report.html", *FILES)], failures


def _comparison(store: Store) -> Comparison:
    results = Results.of(store)
    return comparison_of(results.state, results.spec, results.objectives)


def _fixed_knobs(space: SpaceSpec) -> dict[str, Any]:
    """Return one value for each knob that has several and is not compared."""
    usual = {"global_batch_size": BATCH_SIZE, "lora_alpha": LORA_ALPHA}
    fixed: dict[str, Any] = {}
    for knob in type(space).model_fields:
        domain = getattr(space, knob)
        if knob not in COMPARED and domain.is_searched:
            ends = domain.ends()
            fixed[knob] = nearest(domain, usual[knob]) if knob in usual else max(ends) if knob == "epochs" else ends[0]
    idle = space.idle_defaults(fixed.get("strategy", space.strategy.ends()[0]), space.adapter.ends()[0], fixed)
    return fixed | {knob: value for knob, value in idle.items() if knob not in COMPARED}


def _limits(spec: SearchSpec, config: Mapping[str, Any], width: int) -> Limits:
    """Return what decides whether a method can be trained somewhere, whatever machine that is."""
    is_on_gpu = spec.resources.gpus_per_worker > 0
    limits = Limits(num_workers=EVERYWHERE, hidden_size=width, max_length=spec.model.max_length, is_on_gpu=is_on_gpu)
    with suppress(ShapeError):  # a family without formulas
        limits = replace(limits, plan=blueprint(config, spec.model.task))
    return limits


def _trainable(methods: Sequence[Method] | None, spec: SearchSpec, limits: Limits, say: Callable[[str], None]) -> list[Method]:
    """Return the methods, each once; of those that nobody asked for, the ones that can be trained somewhere.

    Raises:
        UserError: one that was asked for cannot.
    """
    found, space = [], spec.space
    for method in dict.fromkeys(METHODS if methods is None else methods):
        # The space may have no such adapter, and then no learning rate of it, which decides nothing here.
        own = {knob: getattr(space, knob).ends()[0] for knob in ADAPTER_KNOBS[method.adapter]}
        config = TrialConfig.from_params({**space.first(), **own, **_fixed_knobs(space), **method.params})
        violated = [name for name, value in violations(config, limits).items() if value > 0]
        if not violated:
            found.append(method)
        elif methods is None:
            say(f"left out: {method.name}: {reason(violated[0], config, limits)}")
        else:
            raise UserError(f"--methods: {method.name}: {reason(violated[0], config, limits)}")
    if not found:
        raise UserError("--methods: none of the usual ones can be trained; name those that can")
    return found


def _choice(values: Sequence[Any]) -> Any:
    distinct = list(dict.fromkeys(values))
    return {"choice": distinct} if len(distinct) > 1 else distinct[0]
