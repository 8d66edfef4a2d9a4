"""`paretune compare-methods`: which way to fine-tune is the best for how much data, and at which cost.

A search over a grid: every method at every share of the training rows with a few learning rates, since each has another best one.
The best of each pair is then confirmed with further seeds on the test rows, and these are what is compared: the search chose by the
evaluation rows. A comparison that was cut off goes on where it was.
"""

from __future__ import annotations

import csv
import json
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
from search.session import Emit, checked_model, resume, start
from search.store import Store, StoreError
from spaces.config import Adapter, Quantization
from spaces.loading import LoadedSpec, load_spec
from spaces.metrics import PEAK_MEMORY_BYTES, TRAIN_SECONDS
from spaces.presets import BATCH_SIZE, LORA_RANK, usual_rate
from spaces.space import SpaceSpec
from spaces.spec import Objective

FRACTIONS = (0.01, 0.03, 0.1, 0.3, 1.0)
# Times the usual one for all rows, once: with fewer tokens the best rate is higher (`spaces.presets.HIGHER_RATE`).
RATES = (1.0, 2.0, 4.0)
COSTS = (TRAIN_SECONDS, PEAK_MEMORY_BYTES)


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
        """Read `none`, `lora:16` or `lora:16:nf4`.

        Raises:
            CompareError: it is none of these.
        """
        adapter, *rest = text.strip().split(":")
        rank = rest[0] if rest else str(LORA_RANK)
        quantization = rest[1] if len(rest) > 1 else "none"
        is_known = adapter in get_args(Adapter) and quantization in get_args(Quantization) and rank.isdecimal() and int(rank) > 0
        if not is_known or len(rest) > 2 or (adapter == "none" and rest):
            forms = f"{' '.join(get_args(Adapter))}; with an adapter its rank and {' '.join(get_args(Quantization))}, as lora:16:nf4"
            raise CompareError(f"--methods: '{text}' is no method; allowed: {forms}")
        if adapter == "none":
            return cls(adapter="none")
        return cls(adapter=adapter, rank=int(rank), quantization=quantization)  # type: ignore[arg-type]

    @classmethod
    def of(cls, record: TrialRecord) -> Method:
        """Return the method of a trial."""
        recipe = record.trial_config.recipe
        return cls(adapter=recipe.adapter, rank=recipe.adapter_rank, quantization=recipe.quantization)

    @property
    def name(self) -> str:
        """What people call it."""
        if self.adapter == "none":
            return "full"
        return f"{self.adapter} {self.rank}" + ("" if self.quantization == "none" else f" {self.quantization}")

    @property
    def params(self) -> dict[str, Any]:
        """The knobs that it is."""
        if self.adapter == "none":
            return {"adapter": "none"}
        return {"adapter": self.adapter, "lora_rank": self.rank, "quantization": self.quantization}


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
    record: TrialRecord
    quality: Confirmed | None
    """None where its further seeds failed."""

    @property
    def num_rows(self) -> int | None:
        rows = self.record.details.get("distinct_rows")
        return None if rows is None else int(rows)


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
        return [best, *(cell for cell, other in others if not told_apart(quality, other))]

    def verdict(self, cell: Cell) -> str:
        """Return in words where a cell stands among those of its share of the rows."""
        rivals = self.rivals(cell.fraction)
        if cell.quality is None:
            return "no result"
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
    others the first.

    Args:
        path: the user's file.
        overrides: of the command line.
        methods: at least one.
        fractions: of the training rows.

    Raises:
        SpecError: the file or its model cannot be used.
    """
    loaded = load_spec(path, overrides)
    spec, width = loaded.spec, checked_model(loaded)[1].hidden_size
    adapters = list(dict.fromkeys(method.adapter for method in methods))
    rates = {adapter: [factor * usual_rate(adapter, width) for factor in RATES] for adapter in adapters}
    fixed = _fixed_knobs(spec.space)
    points = [
        {**method.params, "dataset_fraction": fraction, "learning_rate": rate}
        for fraction in sorted(fractions)
        for method in methods
        for rate in rates[method.adapter]
    ]
    ranks = [method.rank for method in methods if method.rank is not None]
    values: dict[str, Any] = {
        **{f"space.{knob}": value for knob, value in fixed.items()},
        "space.adapter": _choice(adapters),
        "space.dataset_fraction": _choice(sorted(fractions)),
        "space.learning_rate": {"by_adapter": {adapter: {"choice": values} for adapter, values in rates.items()}},
        "sampler.points_to_evaluate": points,
        "scheduler.method": "none",
        "budget": {"trials": len(points)},
        "name": spec.name or f"{path.stem}-methods",
    }
    if ranks:
        values["space.lora_rank"] = _choice(ranks)
        values["space.quantization"] = _choice([method.quantization for method in methods if method.rank is not None])
    return load_spec(path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items())])


def search(loaded: LoadedSpec, emit: Emit) -> Store:
    """Train the grid, or what is left of it, and return where it is.

    Raises:
        StoreError: a search of another grid has the name.
        What `search.session.start` and `resume` raise.
    """
    root = Path(loaded.spec.directory).absolute() / str(loaded.spec.name)
    if not (root / "ledger.jsonl").exists():
        return start(loaded, emit)
    store = Store(root=root)
    known = store.load_spec().spec
    if (known.space, known.sampler) != (loaded.spec.space, loaded.spec.sampler):
        raise StoreError(f"a search named '{store.name}' is in {root.parent} already, of another grid; give this one --set name=...")
    return store if _results(store).state.finished else resume(store, emit)


def confirm_best(
    store: Store, methods: Sequence[Method], *, num_seeds: int, say: Callable[[str], None]
) -> tuple[Comparison, list[Path], list[str]]:
    """Confirm the best trial of every method and share; return what was found, files, and a line for each seed without a result.

    Raises:
        CompareError: no trial is complete.
        What `search.confirm.confirm` raises.
    """
    best = _best(_results(store), methods)
    if not best:
        raise CompareError(f"{store.name}: no trial is complete, so there is nothing to compare")
    failures = confirm(store, num_seeds=num_seeds, trials=",".join(str(cell.record.number) for cell in best), say=say)
    results = _results(store)
    comparison = Comparison(name=store.name, objective=results.objectives[0], cells=tuple(_best(results, methods)))
    return comparison, write(comparison, store.report_path), failures


def _results(store: Store) -> Results:
    return load_results(str(store.root), store.root.parent)


def _best(results: Results, methods: Sequence[Method]) -> list[Cell]:
    objective = results.objectives[0]
    cells: dict[tuple[float, str], TrialRecord] = {}
    for record in eligible(list(results.state.records.values()), results.objectives):
        place = (float(record.params["dataset_fraction"]), Method.of(record).name)
        other = cells.get(place)
        if other is None or sign_of(objective) * (record.values[objective.metric] - other.values[objective.metric]) < 0:
            cells[place] = record
    order = {method.name: index for index, method in enumerate(methods)}
    found = sorted((place for place in cells if place[1] in order), key=lambda place: (place[0], order[place[1]]))
    return [
        Cell(
            method=Method.of(cells[place]),
            fraction=place[0],
            record=cells[place],
            quality=confirmed(cells[place], objective.metric),
        )
        for place in found
    ]


def _fixed_knobs(space: SpaceSpec) -> dict[str, Any]:
    """Return one value for each searched knob that is not compared."""
    compared = ("adapter", "learning_rate", "dataset_fraction", "lora_rank", "quantization")
    fixed: dict[str, Any] = {}
    for knob in space.names_searched():
        ends = getattr(space, knob).ends() if knob not in compared else []
        if knob == "global_batch_size":
            fixed[knob] = min(ends, key=lambda size: abs(size - BATCH_SIZE))
        elif ends:
            fixed[knob] = max(ends) if knob == "epochs" else ends[0]
    return fixed


def _choice(values: Sequence[Any]) -> Any:
    distinct = list(dict.fromkeys(values))
    return {"choice": distinct} if len(distinct) > 1 else distinct[0]


def rows_of(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a row for each cell, ready for CSV and JSON."""
    return [
        {
            "fraction": cell.fraction,
            "rows": cell.num_rows,
            "method": cell.method.name,
            "verdict": comparison.verdict(cell),
            "trial": cell.record.number,
            "learning_rate": cell.record.trial_config.recipe.learning_rate,
            "metric": comparison.objective.metric,
            "searched": cell.record.values[comparison.objective.metric],
            "mean": cell.quality.estimate.mean if cell.quality else None,
            "half_width": cell.quality.estimate.half_width if cell.quality else None,
            "num_seeds": len(cell.quality.values) if cell.quality else 0,
            "split": cell.quality.split if cell.quality else None,
            **{metric: _mean(cell.record, metric) for metric in COSTS},
        }
        for cell in comparison.cells
    ]


def _mean(record: TrialRecord, metric: str) -> float | None:
    found = confirmed(record, metric)
    return found.estimate.mean if found is not None else record.values.get(metric)


def render(comparison: Comparison) -> str:
    """Return the comparison as a table with what it says."""
    table = [["rows", "method", comparison.objective.metric, "", *COSTS, "learning_rate", "trial"]]
    for cell, row in zip(comparison.cells, rows_of(comparison), strict=True):
        rows = f"{cell.num_rows:,} ({cell.fraction:.3g})" if cell.num_rows else f"{cell.fraction:.3g}"
        quality = cell.quality.short_text if cell.quality else "-"
        costs = [number_text(metric, row[metric]) for metric in COSTS]
        table.append([rows, row["method"], quality, row["verdict"], *costs, short_text(row["learning_rate"]), str(row["trial"])])
    known = [cell.quality for cell in comparison.cells if cell.quality]
    seeds = "/".join(str(n) for n in sorted({len(quality.values) for quality in known}))
    on = " and ".join(sorted({quality.split for quality in known}))
    lines = [*aligned(table), "", f"means and {LEVEL:.0%} intervals over {seeds} further seeds, on the {on} rows"]
    for fraction in comparison.fractions:
        rivals = [cell.method.name for cell in comparison.rivals(fraction)]
        if rivals:
            tied = f"; not told apart: {', '.join(rivals[1:])}" if rivals[1:] else ", told apart from all others"
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
