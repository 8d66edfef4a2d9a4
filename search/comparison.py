"""The methods of a comparison, what became of each, and how that is told."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from search.advice import noise_lines
from search.confidence import LEVEL, Confirmed, confirmed, told_apart
from search.errors import UserError
from search.formatting import aligned, number_text, short_text
from search.ledger import SearchState
from search.pareto import eligible, sign_of
from search.picture import draw_methods
from search.record import LASTING, TrialRecord
from spaces.config import ADAPTER_KNOBS, Adapter, Quantization, TrialConfig
from spaces.metrics import EVAL_LOSS, PEAK_MEMORY_BYTES, TRAIN_SECONDS, domain_accuracy, domain_of, in_order, metric_of
from spaces.presets import LORA_RANK
from spaces.spec import Objective, SearchSpec

COSTS = (TRAIN_SECONDS, PEAK_MEMORY_BYTES)
# With one there is no spread.
MIN_SEEDS = 2
# Of a report.
FILES = ("methods.csv", "methods.png")


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One way to fine-tune."""

    adapter: Adapter
    rank: int | None = None
    quantization: Quantization = "none"

    @classmethod
    def parse(cls, text: str) -> Method:
        """Read `none`, `lora:16`, `lora:16:nf4`, `bottleneck:16`, `prefix:16` or `ia3`.

        Raises:
            UserError: it is none of these.
        """
        adapter, *rest = text.strip().split(":")
        knobs = ADAPTER_KNOBS.get(adapter, ())  # type: ignore[call-overload]
        most = ("lora_rank" in knobs) + ("quantization" in knobs)
        rank = rest[0] if rest else str(LORA_RANK)
        quantization = rest[1] if len(rest) > 1 else "none"
        is_known = adapter in ADAPTER_KNOBS and quantization in get_args(Quantization) and rank.isdecimal() and int(rank) > 0
        if adapter in ADAPTER_KNOBS and len(rest) > most:
            allowed = (adapter, f"{adapter}:{LORA_RANK}", f"{adapter}:{LORA_RANK}:nf4")[most]
            takes = ("neither a rank nor a quantised base", "a rank and no quantised base", "a rank and a base")[most]
            raise UserError(f"--methods: '{text}' is no method: {adapter} takes {takes}; allowed: {allowed}")
        if not is_known:
            forms = f"{' '.join(ADAPTER_KNOBS)}; with a rank lora:16, and quantised lora:16:nf4 ({' '.join(get_args(Quantization))})"
            raise UserError(f"--methods: '{text}' is no method; allowed: {forms}")
        return cls(adapter=adapter, rank=int(rank) if "lora_rank" in knobs else None, quantization=quantization)  # type: ignore[arg-type]

    @classmethod
    def of(cls, config: TrialConfig) -> Method:
        """Return the method of a trial."""
        recipe = config.recipe
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


# A method, and a share of the training rows.
Pair = tuple[Method, float]
METHODS = (
    Method(adapter="none"),
    Method(adapter="lora", rank=4),
    Method(adapter="lora", rank=LORA_RANK),
    Method(adapter="dora", rank=LORA_RANK),
    Method(adapter="bottleneck", rank=LORA_RANK),
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
    is_at_edge: bool = False
    """Whether its learning rate is the lowest or the highest of several that were tried: a better one may lie beyond."""

    @property
    def num_rows(self) -> int | None:
        """Distinct training rows."""
        rows = self.record.details.get("distinct_rows") if self.record else None
        return None if rows is None else int(rows)

    @property
    def learning_rate(self) -> float | None:
        return self.record.trial_config.recipe.learning_rate if self.record else None

    def confirmed(self, metric: str) -> Confirmed | None:
        """Return what the further seeds say of a metric; None without any."""
        return None if self.record is None else confirmed(self.record, metric)

    def value(self, metric: str) -> float | None:
        """Return a metric's mean over the further seeds, or else what the search measured."""
        found = self.confirmed(metric)
        return found.estimate.mean if found is not None else self.record.values.get(metric) if self.record else None

    def half_width(self, metric: str) -> float | None:
        """Return that of the mean's interval; None with fewer than two seeds."""
        found = self.confirmed(metric)
        return None if found is None else found.estimate.half_width

    def text(self, metric: str) -> str:
        """Return the same for people, with its interval where there is one."""
        found = self.confirmed(metric)
        return found.short_text if found is not None else number_text(metric, self.value(metric))


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

    def rivals(self, fraction: float, domain: str | None = None) -> list[Cell]:
        """Return the best of one share of the rows and what the seeds do not tell apart from it; nothing where none has a result.

        Args:
            fraction: the share.
            domain: by the accuracy on the rows of this one; None: by the objective.
        """
        metric = self.objective.metric if domain is None else domain_accuracy(domain)
        own = [(cell, cell.quality if domain is None else cell.confirmed(metric)) for cell in self.cells if cell.fraction == fraction]
        known = [(cell, quality) for cell, quality in own if quality is not None]
        if not known:
            return []
        sign = sign_of(self.objective) if domain is None else -1.0
        (best, quality), *others = sorted(known, key=lambda pair: sign * pair[1].estimate.mean)
        # Bonferroni's: of several comparisons one would else be wrong too often.
        level = 1 - (1 - LEVEL) / max(1, len(others))
        return [best, *(cell for cell, other in others if not told_apart(quality, other, level))]

    def verdict(self, cell: Cell) -> str:
        """Return in words where a cell stands among those of its share of the rows."""
        rivals = self.rivals(cell.fraction)
        if cell.quality is None:
            return "no result" + (f": {cell.why}" if cell.why else "")
        return "best" if cell == rivals[0] else "not told apart" if cell in rivals else "behind"


def comparison_of(state: SearchState, spec: SearchSpec, objectives: Sequence[Objective]) -> Comparison:
    """Return the best trial of every method and share of a search whose points are a comparison, and why there is none."""
    cells = cells_of(list(state.records.values()), objectives, pairs_of(spec))
    return Comparison(name=str(spec.name), objective=_quality(objectives), cells=tuple(cells))


def cells_of(records: Sequence[TrialRecord], objectives: Sequence[Objective], pairs: Sequence[Pair]) -> list[Cell]:
    """Return the best trial of each method with each share of the rows, by share."""
    objective, cells = _quality(objectives), []
    whole = eligible(records, objectives)
    for method, fraction in sorted(pairs, key=lambda pair: pair[1]):
        own = [r for r in records if pair_of(r.trial_config) == (method, fraction)]
        # Of rates that score alike, as few evaluation rows have it, the one with the least loss.
        costs = {r.number: (sign_of(objective) * r.values[objective.metric], r.values.get(EVAL_LOSS, 0.0)) for r in own if r in whole}
        best = min((r for r in own if r in whole), key=lambda r: costs[r.number], default=None)
        quality = None if best is None else confirmed(best, objective.metric)
        why = "" if best is not None else ", ".join(sorted({_why(record) for record in own})) or "not trained"
        # Where it diverged too it is known what lies there.
        tried = (r for r in own if r in whole or (r.error is not None and r.error["kind"] == LASTING))
        rates = {record.trial_config.recipe.learning_rate for record in tried}
        edge = best is not None and len(rates) > 1 and best.trial_config.recipe.learning_rate in (min(rates), max(rates))
        cells.append(Cell(method=method, fraction=fraction, record=best, quality=quality, why=why, is_at_edge=edge))
    return cells


def configs_of(spec: SearchSpec, points: Sequence[Mapping[str, Any]] | None = None) -> list[TrialConfig]:
    """Return what a search trains at some points; None: at all of those that it lists."""
    listed = spec.sampler.points_to_evaluate or () if points is None else points
    return [TrialConfig.from_params(spec.space.first(**point)) for point in listed]


def pair_of(config: TrialConfig) -> Pair:
    """Return the method of a trial and its share of the rows."""
    return Method.of(config), config.recipe.dataset_fraction


def pairs_of(spec: SearchSpec) -> list[Pair]:
    """Return every method with every share of the rows that a search of listed points compares, each once."""
    return list(dict.fromkeys(map(pair_of, configs_of(spec))))


def _why(record: TrialRecord) -> str:
    if not record.feasible_before_launch:
        return ", ".join(name for name, value in record.constraints.items() if value > 0)
    return record.error["kind"] if record.error else record.state.value


def _quality(objectives: Sequence[Objective]) -> Objective:
    """Return the first objective that says how good a model is."""
    return next(o for o in objectives if metric_of(o.metric).section == "eval")


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
            "is_rate_at_edge": cell.is_at_edge,
            "metric": metric,
            "searched": cell.record.values[metric] if cell.record else None,
            "mean": cell.quality.estimate.mean if cell.quality else None,
            "half_width": cell.quality.estimate.half_width if cell.quality else None,
            "num_seeds": len(cell.quality.values) if cell.quality else 0,
            "split": cell.quality.split if cell.quality else None,
            **{name: cell.value(name) for name in (*_domains(comparison), *COSTS)},
            f"{TRAIN_SECONDS}_half_width": cell.half_width(TRAIN_SECONDS),
        }
        for cell in comparison.cells
    ]


def table_of(comparison: Comparison) -> list[list[str]]:
    """Return a heading and a row for each cell, for people."""
    columns = [*_domains(comparison), *COSTS]
    table = [["rows", "method", comparison.objective.metric, "", *columns, "learning_rate", "trial"]]
    for cell, row in zip(comparison.cells, rows_of(comparison), strict=True):
        rows = f"{cell.num_rows:,} ({cell.fraction:.3g})" if cell.num_rows else f"{cell.fraction:.3g}"
        quality = cell.quality.short_text if cell.quality else "-"
        values = [cell.text(metric) for metric in columns]
        trial = "-" if row["trial"] is None else str(row["trial"])
        rate = short_text(row["learning_rate"]) + ("*" if cell.is_at_edge else "")
        table.append([rows, row["method"], quality, row["verdict"], *values, rate, trial])
    return table


def lines_of(comparison: Comparison) -> list[str]:
    """Return what the numbers are, and which method is the best for how much data."""
    known = [cell.quality for cell in comparison.cells if cell.quality]
    seeds = "/".join(str(n) for n in sorted({len(quality.values) for quality in known}))
    on = " and ".join(sorted({quality.split for quality in known}))
    intervals = f"means and {LEVEL:.0%} intervals" if min((len(q.values) for q in known), default=0) > 1 else "means"
    lines = [f"{intervals} over {seeds} further {'seed' if seeds == '1' else 'seeds'}, on the {on} rows"] if known else []
    if any(cell.is_at_edge for cell in comparison.cells):
        lines.append("*: the lowest or the highest rate that was tried; a better one may lie beyond")
    lines += noise_lines([cell.record for cell in comparison.cells if cell.record])
    if known and max(len(quality.values) for quality in known) < MIN_SEEDS:
        return [*lines, f"with fewer than {MIN_SEEDS} further seeds nothing is told apart: --seeds {MIN_SEEDS} or more"]
    domains = [name for metric in _domains(comparison) if (name := domain_of(metric)) is not None]
    for fraction in comparison.fractions:
        num_known = sum(cell.fraction == fraction and cell.quality is not None for cell in comparison.cells)
        for domain in (None, *domains) if num_known > 1 else ():
            best, *others = [cell.method.name for cell in comparison.rivals(fraction, domain)] or ["-"]
            tied = f"; not told apart: {', '.join(others)}" if others else ", told apart from the rest"
            where = "" if domain is None else f", accuracy on {domain}"
            rows = "all rows" if fraction == 1 else f"{fraction:.3g} of the rows"
            lines.append(f"{rows}{where}: {best}{tied}")
    return lines


def render(comparison: Comparison) -> str:
    """Return the comparison as a table with what it says."""
    return "\n".join([*aligned(table_of(comparison)), "", *lines_of(comparison)])


def write(comparison: Comparison, directory: Path) -> list[Path]:
    """Write table and picture into a directory that is there; return the files."""
    rows = rows_of(comparison)
    table, picture = (directory / name for name in FILES)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_methods(rows, comparison.name, picture)
    return [table, picture]
