"""What an adapter reaches, and what a quantised base saves and costs, as far as the trials of a search say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import geometric_mean, median
from typing import Any

from search.formatting import number_text
from search.pareto import cost_objective, cost_vector, eligible, quality_of, sign_of
from search.record import TrialRecord
from spaces.config import Layout
from spaces.metrics import TOKENS_PER_SECOND
from spaces.spec import Objective

ALIKE = "they differ in other knobs too, and `paretune compare-methods` compares what is alike in all else"
NOTE = f"Of trials of one base: {ALIKE}."


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

    Weights are those of a rank that holds all of them, in the median. How long a token takes is held against the whole base under
    trials of the same adapter and layout alone, and is not told where there are none.
    """
    by_base: dict[str, list[TrialRecord]] = {}
    for record in eligible(records, objectives):
        recipe = _part(record, "recipe")
        if recipe.get("adapter", "none") != "none":
            by_base.setdefault(recipe.get("quantization", "none"), []).append(record)
    if len(by_base) < 2:
        return None
    price, quality = cost_objective(objectives), quality_of(objectives)
    heading = ["base", "trials", "weights of a rank", "times the seconds of a token", f"best {quality.metric}", f"at {price.metric}"]
    rows = []
    for base in sorted(by_base, key=lambda name: (name != "none", name)):
        own = by_base[base]
        best = min(own, key=lambda r: cost_vector(r.values, (quality, price)))
        weights = [held for r in own if (held := _weights_bytes(r)) is not None]
        rows.append(
            [
                base,
                str(len(own)),
                f"{median(weights) / 2**20:,.0f} MiB" if weights else "-",
                _times_as_long(own, by_base.get("none", [])),
                number_text(quality.metric, best.values[quality.metric]),
                number_text(price.metric, best.values[price.metric]),
            ]
        )
    return [h.replace("_", " ") for h in heading], rows


def _times_as_long(own: Sequence[TrialRecord], whole: Sequence[TrialRecord]) -> str:
    """Return the geometric mean, over the adapters and layouts that both have, of the ratio of their median paces."""
    ours, theirs = _paces(own), _paces(whole)
    ratios = [median(theirs[alike]) / median(ours[alike]) for alike in ours.keys() & theirs.keys()]
    return f"{geometric_mean(ratios):.2f}" if ratios else "-"


def _paces(records: Sequence[TrialRecord]) -> dict[tuple[str, Layout], list[float]]:
    """Return tokens per second by adapter and layout, whatever is in a micro batch."""
    found: dict[tuple[str, Layout], list[float]] = {}
    for record in records:
        if TOKENS_PER_SECOND in record.values:
            config = record.trial_config
            layout = replace(config.layout, micro_batch_size=1, micro_batch_tokens=None)
            found.setdefault((config.recipe.adapter, layout), []).append(record.values[TOKENS_PER_SECOND])
    return found


def _weights_bytes(record: TrialRecord) -> float | None:
    """Return what the first rank held of weights, or else was predicted to; None where ranks share them."""
    layout = record.trial_config.layout
    if layout.num_shards > 1 or layout.tensor_parallel_size > 1:
        return None
    held: Any = next((terms for terms in record.details.get("memory_by_rank", ()) if terms), None)
    found: float | None = (held or record.predicted.get("memory") or {}).get("weights_bytes")
    return found


def _part(record: TrialRecord, name: str) -> Mapping[str, Any]:
    part: Mapping[str, Any] = (record.config or {}).get(name, {})
    return part
