"""`paretune compare-methods`: which way to fine-tune is the best for how much data, and at which cost.

A search over a grid: every method at every share of the training rows with a few learning rates, since each has another best one.
The best of each pair is then confirmed with further seeds on the test rows, and these are what is compared: the search chose by the
evaluation rows. A comparison that was cut off goes on where it was.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from search.confidence import LEVEL, Confirmed, confirmed, told_apart
from search.confirm import confirm
from search.formatting import aligned, number_text, short_text
from search.pareto import eligible, sign_of
from search.picture import draw_methods
from search.record import TrialRecord
from search.results import Results, load_results
from search.session import Emit, NoResult, checked_model, resume, start
from search.store import Store, StoreError
from spaces.config import ADAPTER_KNOBS, Adapter, Quantization, TrialConfig
from spaces.constraints import Limits, reason, violations
from spaces.loading import LoadedSpec, load_spec
from spaces.metrics import PEAK_MEMORY_BYTES, TRAIN_SECONDS, domain_of, in_order, metric_of
from spaces.presets import BATCH_SIZE, LORA_ALPHA, LORA_RANK, nearest, usual_rate
from spaces.space import SpaceSpec
from spaces.spec import Objective

FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
# Times the usual one for all rows, once: with fewer tokens the best rate is higher (`spaces.presets.HIGHER_RATE`).
RATES = (1.0, 2.0, 4.0)
COSTS = (TRAIN_SECONDS, PEAK_MEMORY_BYTES)
COMPARED = ("adapter", "learning_rate", "dataset_fraction", "lora_rank", "quantization")
# More workers than any layout needs.
EVERYWHERE = 4096


class CompareError(Exception):
    """The methods cannot be compared; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to fine-tune."""

    adapter: Adapter
    rank: int | None = None
    quantization: Quantization = "none"

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read `none`, `lora:16`, `lora:16:nf4` or `ia3`.

        Raises:
            CompareError: it is none of these.
        """
        adapter, *rest = text.strip().split(":")
        knobs = ADAPTER_KNOBS.get(adapter, ())  # type: ignore[call-overload]
        most = ("lora_rank" in knobs) + ("quantization" in knobs)
        rank = rest[0] if rest else str(LORA_RANK)
        quantization = rest[1] if len(rest) > 1 else "none"
        is_known = adapter in ADAPTER_KNOBS and quantization in get_args(Quantization) and rank.isdecimal() and int(rank) > 0
        if not is_known or len(rest) > most:
            forms = f"{' '.join(ADAPTER_KNOBS)}; with a rank lora:16, and quantised lora:16:nf4 ({' '.join(get_args(Quantization))})"
            raise CompareError(f"--methods: '{text}' is no method; allowed: {forms}")
        return cls(adapter=adapter, rank=int(rank) if "lora_rank" in knobs else None, quantization=quantization)  # type: ignore[arg-type]

    @classmethod
    def of(cls, record: TrialRecord) -> Method:
        """Return the method of a trial."""
        recipe = record.trial_config.recipe
        return cls(adapter=recipe.adapter, rank=recipe.adapter_rank, quantization=recipe.quantization)

    @property
    def name(self) -> str:
        """What people call it."""
        rank = "" if self.rank is None else f" {self.rank}"
        quantization = "" if self.quantization == "none" else f" {self.quantization}"
        return "full" if self.adapter == "none" else f"{self.adapter}{rank}{quantization}"

    @property
    def params(self) -> dict[str, Any]:
        """The knobs that it is."""
        said = {"lora_rank": self.rank, "quantization": self.quantization}
        return {"adapter": self.adapter} | {knob: value for knob, value in said.items() if knob in ADAPTER_KNOBS[self.adapter]}


METHODS = (
    Method(adapter="none"),
    Method(adapter="lora", rank=4),
    Method(adapter="lora", rank=LORA_RANK),
    Method(adapter="dora", rank=LORA_RANK),
    Method(adapter="lora", rank=LORA_RANK, quantization="nf4"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The best trial of one method with one share of the rows."""

    method: Method
    fraction: float
    record: TrialRecord | None
    """None where no trial is complete."""
    quality: Confirmed | None
    """None where there is no record, or its further seeds failed."""
    why: str = ""
    """Why there is no record, in words."""

    @property
    def num_rows(self) -> int | None:
        """Distinct training rows."""
        rows = self.record.details.get("distinct_rows") if self.record else None
        return None if rows is None else int(rows)

    @property
    def learning_rate(self) -> float | None:
        return self.record.trial_config.recipe.learning_rate if self.record else None

    def value(self, metric: str) -> float | None:
        """Return a metric's mean over the further seeds, or else what the search measured."""
        if self.record is None:
            return None
        found = confirmed(self.record, metric)
        return found.estimate.mean if found is not None else self.record.values.get(metric)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What was found."""

    name: str
    objective: Objective
    cells: tuple[Cell, ...]
    """By share of the rows, then in the order of the methods."""

    @property
    def fractions(self) -> list[float]:
        """The shares of the rows, ascending."""
        return sorted({cell.fraction for cell in self.cells})

    def rivals(self, fraction: float) -> list[Cell]:
        """Return the best of one share of the rows and what the seeds do not tell apart from it; nothing where none has a result."""
        known = [(cell, cell.quality) for cell in self.cells if cell.fraction == fraction and cell.quality is not None]
        if not known:
            return []
        (best, quality), *others = sorted(known, key=lambda pair: sign_of(self.objective) * pair[1].estimate.mean)
        # Bonferroni's: of several comparisons one would else be wrong too often.
        level = 1 - (1 - LEVEL) / max(1, len(others))
        return [best, *(cell for cell, other in others if not told_apart(quality, other, level))]

    def verdict(self, cell: Cell) -> str:
        """Return in words where a cell stands among those of its share of the rows."""
        rivals = self.rivals(cell.fraction)
        if cell.quality is None:
            return "no result" + (f": {cell.why}" if cell.why else "")
        return "best" if cell == rivals[0] else "not told apart" if cell in rivals else "behind"


def parse_fractions(text: str | None) -> tuple[float, ...]:
    """Read shares of the rows with commas.

    Raises:
        CompareError: one is none.
    """
    if text is None:
        return FRACTIONS
    try:
        fractions = tuple(float(part) for part in text.split(","))
    except ValueError:
        fractions = (0.0,)
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise CompareError(f"--fractions {text}: not shares of rows; allowed: numbers above 0 and up to 1 with commas, as 0.01,1")
    return fractions


def grid_spec(path: Path, overrides: Sequence[str], methods: Sequence[Method], fractions: Sequence[float]) -> LoadedSpec:
    """Return the search that trains every method at every share of the rows with every rate, and nothing else.

    Knobs that the file leaves open and that are not compared get one value: batches of the usual size, the most epochs, and of all
    others the first. Limits in time and money stay.

    Args:
        path: the user's file.
        overrides: of the command line.
        methods: at least one.
        fractions: of the training rows.

    Raises:
        SpecError: the file or its model cannot be used.
        CompareError: a method cannot be trained anywhere, or no objective is a score.
    """
    loaded = load_spec(path, overrides)
    spec, width = loaded.spec, checked_model(loaded)[1].hidden_size
    if not any(metric_of(o.metric).section == "eval" for o in spec.resolved_objectives()):
        raise CompareError("objectives: none says how good a model is; allowed: with accuracy, eval_loss or another score among them")
    methods, fractions = list(dict.fromkeys(methods)), sorted(set(fractions))
    adapters = list(dict.fromkeys(method.adapter for method in methods))
    rates = {adapter: [factor * usual_rate(adapter, width) for factor in RATES] for adapter in adapters}
    fixed = _fixed_knobs(spec.space)
    points = [
        {**method.params, "dataset_fraction": fraction, "learning_rate": rate}
        for fraction in fractions
        for method in methods
        for rate in rates[method.adapter]
    ]
    ranks = [method.rank for method in methods if method.rank is not None]
    values: dict[str, Any] = {
        **{f"space.{knob}": value for knob, value in fixed.items()},
        "space.adapter": _choice(adapters),
        "space.dataset_fraction": _choice(fractions),
        "space.learning_rate": {"by_adapter": {adapter: {"choice": values} for adapter, values in rates.items()}},
        "sampler.points_to_evaluate": points,
        "scheduler.method": "none",
        "sampler.method": "points",
        "sampler.warm_start": None,
        "budget.trials": len(points),
        "budget.patience": None,
        "name": f"{re.sub(r'[^A-Za-z0-9._-]', '-', spec.name or path.stem)[:40]}-methods",
    }
    if ranks:
        values["space.lora_rank"] = _choice(ranks)
        values["space.quantization"] = _choice([method.quantization for method in methods if method.rank is not None])
    grid = load_spec(path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items())])
    _check(grid, methods, width)
    return grid


def search(loaded: LoadedSpec, emit: Emit) -> Store:
    """Train the grid, or what is left of it, and return where it is.

    Raises:
        StoreError: a search of another model, data set or grid has the name.
        What `search.session.start` and `resume` raise.
    """
    root = Path(loaded.spec.directory).absolute() / str(loaded.spec.name)
    if not (root / "ledger.jsonl").exists():
        return start(loaded, emit)
    store = Store(root=root)
    known = store.load_spec().spec
    if any(getattr(known, part) != getattr(loaded.spec, part) for part in ("model", "data", "space", "objectives", "sampler")):
        raise StoreError(f"a search named '{store.name}' is in {root.parent} already, of another grid; give this one --set name=...")
    return store if _results(store).state.finished else resume(store, emit)


def confirm_best(
    store: Store, methods: Sequence[Method], *, num_seeds: int, say: Callable[[str], None]
) -> tuple[Comparison, list[Path], list[str]]:
    """Confirm the best trial of every method and share; return what was found, files, and a line for each seed without a result.

    Raises:
        NoResult: no trial is complete.
        What `search.confirm.confirm` raises.
    """
    best = [cell.record.number for cell in _cells(_results(store), methods) if cell.record is not None]
    if not best:
        raise NoResult(f"{store.name}: no trial is complete, so there is nothing to compare")
    failures = confirm(store, num_seeds=num_seeds, trials=",".join(map(str, best)), say=say)
    results = _results(store)
    comparison = Comparison(name=store.name, objective=_quality(results.objectives), cells=tuple(_cells(results, methods)))
    return comparison, write(comparison, store.report_path), failures


def _results(store: Store) -> Results:
    return load_results(str(store.root), store.root.parent)


def _cells(results: Results, methods: Sequence[Method]) -> list[Cell]:
    """Return the best trial of every method and share, and why there is none."""
    objective, cells = _quality(results.objectives), []
    records = list(results.state.records.values())
    whole = eligible(records, results.objectives)
    for fraction in sorted({float(record.params["dataset_fraction"]) for record in records}):
        for method in methods:
            own = [r for r in records if Method.of(r) == method and float(r.params["dataset_fraction"]) == fraction]
            best = min((r for r in own if r in whole), key=lambda r: sign_of(objective) * r.values[objective.metric], default=None)
            quality = None if best is None else confirmed(best, objective.metric)
            why = "" if best is not None else ", ".join(sorted({_why(record) for record in own})) or "not trained"
            cells.append(Cell(method=method, fraction=fraction, record=best, quality=quality, why=why))
    return cells


def _why(record: TrialRecord) -> str:
    if not record.feasible_before_launch:
        return ", ".join(name for name, value in record.constraints.items() if value > 0)
    return record.error["kind"] if record.error else record.state.value


def _quality(objectives: Sequence[Objective]) -> Objective:
    """Return the first objective that says how good a model is."""
    return next(o for o in objectives if metric_of(o.metric).section == "eval")


def _fixed_knobs(space: SpaceSpec) -> dict[str, Any]:
    """Return one value for each knob that has several and is not compared."""
    usual = {"global_batch_size": BATCH_SIZE, "lora_alpha": LORA_ALPHA}
    fixed: dict[str, Any] = {}
    for knob in type(space).model_fields:
        domain = getattr(space, knob)
        if knob not in COMPARED and domain.is_searched:
            ends = domain.ends()
            fixed[knob] = nearest(domain, usual[knob]) if knob in usual else max(ends) if knob == "epochs" else ends[0]
    return fixed


def _check(loaded: LoadedSpec, methods: Sequence[Method], width: int) -> None:
    """Check that every method can be trained somewhere.

    Raises:
        CompareError: one cannot.
    """
    limits = Limits(num_workers=EVERYWHERE, hidden_size=width)
    for point in loaded.spec.sampler.points_to_evaluate or ():
        config = TrialConfig.from_params(loaded.spec.space.first(**point), max_length=loaded.spec.model.max_length)
        violated = [name for name, value in violations(config, limits).items() if value > 0]
        if violated:
            name = next(method.name for method in methods if method.params.items() <= point.items())
            raise CompareError(f"--methods: {name}: {reason(violated[0], config, limits)}")


def _choice(values: Sequence[Any]) -> Any:
    distinct = list(dict.fromkeys(values))
    return {"choice": distinct} if len(distinct) > 1 else distinct[0]


def _domains(comparison: Comparison) -> list[str]:
    """Return the metrics of single domains of the data."""
    found = in_order(metric for cell in comparison.cells if cell.record for metric in cell.record.values)
    return [metric for metric in found if domain_of(metric) is not None and metric != comparison.objective.metric]


def rows_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each cell, ready for CSV and JSON."""
    metric = comparison.objective.metric
    return [
        {
            "fraction": cell.fraction,
            "rows": cell.num_rows,
            "method": cell.method.name,
            "verdict": comparison.verdict(cell),
            "trial": cell.record.number if cell.record else None,
            "learning_rate": cell.learning_rate,
            "metric": metric,
            "searched": cell.record.values[metric] if cell.record else None,
            "mean": cell.quality.estimate.mean if cell.quality else None,
            "half_width": cell.quality.estimate.half_width if cell.quality else None,
            "num_seeds": len(cell.quality.values) if cell.quality else 0,
            "split": cell.quality.split if cell.quality else None,
            **{name: cell.value(name) for name in (*_domains(comparison), *COSTS)},
        }
        for cell in comparison.cells
    ]


def render(comparison: Comparison) -> str:
    """Return the comparison as a table with what it says."""
    columns = [*_domains(comparison), *COSTS]
    table = [["rows", "method", comparison.objective.metric, "", *columns, "learning_rate", "trial"]]
    for cell, row in zip(comparison.cells, rows_of(comparison), strict=True):
        rows = f"{cell.num_rows:,} ({cell.fraction:.3g})" if cell.num_rows else f"{cell.fraction:.3g}"
        quality = cell.quality.short_text if cell.quality else "-"
        values = [number_text(metric, row[metric]) for metric in columns]
        trial = "-" if row["trial"] is None else str(row["trial"])
        table.append([rows, row["method"], quality, row["verdict"], *values, short_text(row["learning_rate"]), trial])
    known = [cell.quality for cell in comparison.cells if cell.quality]
    seeds = "/".join(str(n) for n in sorted({len(quality.values) for quality in known}))
    on = " and ".join(sorted({quality.split for quality in known}))
    intervals = f"means and {LEVEL:.0%} intervals" if min((len(q.values) for q in known), default=0) > 1 else "means"
    lines = [*aligned(table), "", f"{intervals} over {seeds} further seeds, on the {on} rows"]
    for fraction in comparison.fractions:
        rivals = [cell.method.name for cell in comparison.rivals(fraction)]
        num_known = sum(cell.fraction == fraction and cell.quality is not None for cell in comparison.cells)
        if num_known > 1:
            tied = f"; not told apart: {', '.join(rivals[1:])}" if rivals[1:] else ", told apart from the rest"
            lines.append(f"{fraction:.3g} of the rows: {rivals[0]}{tied}")
    return "\n".join(lines)


def write(comparison: Comparison, directory: Path) -> list[Path]:
    """Write table and picture into a directory that is there; return the files."""
    rows = rows_of(comparison)
    table, picture = directory / "methods.csv", directory / "methods.png"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_methods(rows, comparison.name, picture)
    return [table, picture]
