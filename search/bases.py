"""What an adapter reaches, and what a quantised base saves and costs, as far as the trials of a search say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from search.formatting import number_text
from search.pareto import cost_objective, cost_vector, eligible, quality_of, sign_of
from search.record import TrialRecord
from spaces.metrics import TOKENS_PER_SECOND
from spaces.spec import Objective

ALIKE = "they differ in other knobs too, and `paretune compare-methods` compares what is alike in all else"
NOTE = "Trials of one base differ in other knobs too; `paretune compare-methods` compares bases alike in all else."


def adapter_lines(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[str]:
    """Return a line with the best trial of each adapter within the reference of the price; nothing where only one was trained."""
    price, quality = cost_objective(objectives), quality_of(objectives)
    limit = price.reference * sign_of(price) if price.is_limit and price.reference is not None else None
    by_adapter: dict[str, list[TrialRecord]] = {}
    for record in eligible(records, objectives):
        own = by_adapter.setdefault(_part(record, "recipe").get("adapter", "none"), [])
        if limit is None or sign_of(price) * record.values[price.metric] <= limit:
            own.append(record)
    if len(by_adapter) < 2:
        return []
    texts = []
    for adapter, own in sorted(by_adapter.items(), key=lambda item: (item[0] != "none", item[0])):
        best = min(own, key=lambda r: cost_vector(r.values, (quality, price)), default=None)
        reached = "nothing" if best is None else " at ".join(number_text(o.metric, best.values[o.metric]) for o in (quality, price))
        texts.append(f"{adapter} {reached}" + ("" if best is None else f" (trial {best.number})"))
    within = "" if limit is None else f" within {number_text(price.metric, price.reference)}"
    return [f"best {quality.metric} of each adapter{within}: {', '.join(texts)}; {ALIKE}"]


def bases_table(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> tuple[list[str], list[list[str]]] | None:
    """Return headings and a row for each base of complete trials with an adapter; None of fewer than two bases.

    Weights are those of a rank that holds all of them, and the pace that of a device: medians over the trials.
    """
    by_base: dict[str, list[TrialRecord]] = {}
    for record in eligible(records, objectives):
        recipe = _part(record, "recipe")
        if recipe.get("adapter", "none") != "none":
            by_base.setdefault(recipe.get("quantization", "none"), []).append(record)
    if len(by_base) < 2:
        return None
    price, quality = cost_objective(objectives), quality_of(objectives)
    heading = ["base", "trials", "weights of a rank", "tokens/s of a device", f"best {quality.metric}", f"at {price.metric}"]
    rows = []
    for base in sorted(by_base, key=lambda name: (name != "none", name)):
        own = by_base[base]
        best = min(own, key=lambda r: cost_vector(r.values, (quality, price)))
        weights = [held for r in own if (held := _weights_bytes(r)) is not None]
        paces = [r.values[TOKENS_PER_SECOND] / _part(r, "layout").get("world_size", 1) for r in own if TOKENS_PER_SECOND in r.values]
        rows.append(
            [
                base,
                str(len(own)),
                f"{median(weights) / 2**20:,.0f} MiB" if weights else "-",
                number_text(TOKENS_PER_SECOND, median(paces) if paces else None),
                number_text(quality.metric, best.values[quality.metric]),
                number_text(price.metric, best.values[price.metric]),
            ]
        )
    return [h.replace("_", " ") for h in heading], rows


def _weights_bytes(record: TrialRecord) -> float | None:
    """Return what the first rank held of weights, or else was predicted to; None where ranks share them."""
    if _part(record, "layout").get("strategy") != "ddp":
        return None
    held: Any = next((terms for terms in record.details.get("memory_by_rank", ()) if terms), None)
    found: float | None = (held or record.predicted.get("memory") or {}).get("weights_bytes")
    return found


def _part(record: TrialRecord, name: str) -> Mapping[str, Any]:
    part: Mapping[str, Any] = (record.config or {}).get(name, {})
    return part
