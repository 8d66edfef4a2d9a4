"""Which trial of a front to take, in words: what it reached, how sure that is, and what speaks against its numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence

import numpy as np

from search.confidence import Confirmed, confidence_lines, confirmed, rival_lines
from search.formatting import number_text
from search.hypervolume import Points
from search.pareto import cost_objective, front_indices, quality_of, sign_of
from search.record import TrialRecord
from spaces.metrics import MFU, TRAIN_SECONDS
from spaces.spec import Objective

COMPARISONS = {"<=": operator.le, ">=": operator.ge}


def knee(members: Sequence[TrialRecord], objectives: Sequence[Objective]) -> TrialRecord | None:
    """Return the member furthest on the good side of the chord between the front's ends; None of none.

    Every objective is scaled to [0, 1] over the front. The chord becomes, for any number of objectives, the plane on
    which the scaled objectives sum to a constant, so the knee has the smallest sum. Of up to two members, or of equals,
    it is the first. An objective counts as further seeds have it where they have it of all members, and no member is the knee
    that another then dominates.
    """
    if not members:
        return None
    rows = _known_costs(members, objectives)
    best = np.flatnonzero(front_indices(rows) == 0)
    if len(best) <= 2:
        return members[int(best[0])]
    rows = rows[best]
    lowest = rows.min(axis=0)
    span = rows.max(axis=0) - lowest
    scaled = (rows - lowest) / np.where(span > 0, span, 1.0)
    return members[int(best[int(scaled.sum(axis=1).argmin())])]


def best_in(members: Sequence[TrialRecord], objectives: Sequence[Objective], quality: Objective) -> TrialRecord:
    """Return the member that is the best in one objective, and of equals in the others, by what counts for the knee."""
    rows = _known_costs(members, [quality, *objectives]).tolist()
    return members[min(range(len(members)), key=rows.__getitem__)]


def within(members: Sequence[TrialRecord], limits: Mapping[str, tuple[str, float]]) -> list[TrialRecord]:
    """Return the members within all limits, such as `{"train_seconds": ("<=", 60)}`, by what counts for the knee.

    A missing metric is not within.

    Raises:
        KeyError: the comparison is neither `<=` nor `>=`.
    """
    kept = set(range(len(members)))
    for metric, (op, bound) in limits.items():
        holds, values = COMPARISONS[op], known_values(members, metric)
        kept &= {i for i, value in enumerate(values) if value is not None and holds(value, bound)}
    return [members[i] for i in sorted(kept)]


def _known_costs(members: Sequence[TrialRecord], objectives: Sequence[Objective]) -> Points:
    """Return the objectives' values, all turned to minimise: one row for each member."""
    columns = [[sign_of(o) * value for value in known_values(members, o.metric) if value is not None] for o in objectives]
    return np.asarray(columns, dtype=np.float64).reshape(len(objectives), len(members)).T


def known_values(members: Sequence[TrialRecord], metric: str) -> list[float | None]:
    """Return a metric of each member: means over further seeds where all have those, of the same rows, else what the search saw."""
    known = _of_seeds(members, metric)
    return [r.values.get(metric) for r in members] if known is None else [c.estimate.mean for c in known]


def _of_seeds(members: Sequence[TrialRecord], metric: str) -> list[Confirmed] | None:
    """Return what further seeds say of each member; None where they do not of all, or not on the same rows."""
    known = [c for r in members if (c := confirmed(r, metric)) is not None and math.isfinite(c.estimate.mean)]
    return known if len(known) == len(members) and len({c.split for c in known}) == 1 else None


def recommended(members: Sequence[TrialRecord], objectives: Sequence[Objective]) -> TrialRecord | None:
    """Return the member with the best quality within the user's limits; None where no member learned anything within them.

    A reference that the user gave is the worst value that is still worth anything: with `train_seconds` the time that there is.
    """
    worth = _worth_anything(members, objectives)
    return best_in(worth, objectives, quality_of(objectives)) if worth else None


def _worth_anything(members: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    quality = quality_of(objectives)
    known = [o for o in objectives if o.reference is not None and (o.is_limit or o is quality)]
    rows = _known_costs(members, known)
    bounds = [sign_of(o) * o.reference for o in known if o.reference is not None]
    # What costs just as much as there is may be spent; what learned nothing is worth nothing.
    return [
        record
        for record, row in zip(members, rows.tolist(), strict=True)
        if all(value < bound if o is quality else value <= bound for o, value, bound in zip(known, row, bounds, strict=True))
    ]


def recommendation(members: Sequence[TrialRecord], objectives: Sequence[Objective], name: str) -> str:
    """Return in one sentence which trial of the front to take, and where more time begins to pay less."""
    if not members:
        return f"Nothing to recommend: no trial of {name} is complete and feasible."
    price, quality = cost_objective(objectives), quality_of(objectives)
    best, limits = recommended(members, objectives), [o for o in objectives if o.is_limit and o is not quality]
    if best is None:
        wanted = [quality, *limits] if quality.reference is not None else limits
        bounds = " and ".join(f"{o.metric} {number_text(o.metric, o.reference)}" for o in wanted)
        nearest = best_in(members, objectives, quality)
        found = _reached(nearest, members, (quality, price))
        return f"Nothing to recommend: no trial of {name} is better than {bounds}; the best is trial {nearest.number}, {found}."
    worth = _worth_anything(members, objectives)
    hit = [o for o in limits if len(_worth_anything(members, [o, quality])) < len(members)]
    within_it = " within " + " and ".join(number_text(o.metric, o.reference) for o in hit) if hit else ""
    text = f"Take trial {best.number} of {name}: {_reached(best, members, (quality, price))}, the best on the front{within_it}"
    bend = knee(worth, objectives)
    if bend is None or bend.number == best.number:
        return f"{text}."
    text += f"; the knee of the {len(worth)}{within_it} is trial {bend.number}, {_reached(bend, members, (quality, price))}"
    prices = dict(zip((r.number for r in members), known_values(members, price.metric), strict=True))
    cheap, dear = (prices[r.number] or 0.0 for r in (bend, best))
    return f"{text}, {cheap / dear:.0%} of that." if 0 < cheap < dear else f"{text}."


def recommendation_lines(members: Sequence[TrialRecord], objectives: Sequence[Objective], name: str) -> list[str]:
    """Return which trial to take, what speaks against its numbers, who may be as good as it, and how sure all of that is."""
    chosen = recommended(members, objectives)
    own = [] if chosen is None else [*noise_lines([chosen]), *rival_lines(chosen, members, objectives)]
    return [
        recommendation(members, objectives, name),
        *own,
        *confidence_lines(members, objectives),
        *noise_lines([r for r in members if r is not chosen]),
        *_not_trained(members),
        *_without_mfu(members),
    ]


def doubts(records: Sequence[TrialRecord]) -> list[str]:
    """Return in lines whose times are not to be trusted, or not of a training of their own."""
    return [*noise_lines(records), *_not_trained(records)]


def _not_trained(records: Sequence[TrialRecord]) -> list[str]:
    """Return in a line which trials are recipes of others, whose steps were timed."""
    timed = [record for record in records if record.source is not None]
    if len(timed) < 2:
        return [f"trial {record.number} is {record.why_not_trained}" for record in timed]
    pairs = ", ".join(f"{record.number} of {record.source}" for record in timed)
    return [f"recipes of other trials under another layout, of which some steps were timed: {pairs}"]


def noise_lines(records: Sequence[TrialRecord]) -> list[str]:
    """Return in lines whose times are not to be trusted."""
    lines = []
    for record in (r for r in records if r.noise):
        is_sure = confirmed(record, TRAIN_SECONDS) is not None and not any(c.noise for c in record.confirmations)
        what = "trust its confirmed times" if is_sure else "train it again before you trust its times"
        lines.append(f"trial {record.number} is noisy: {record.noise}; {what}")
    return lines


def _without_mfu(members: Sequence[TrialRecord]) -> list[str]:
    """Return one line for every reason why members have no MFU."""
    numbers: dict[str, list[str]] = {}
    for record in members:
        if MFU not in record.values and "peak_source" in record.details:
            numbers.setdefault(record.details["peak_source"], []).append(str(record.number))
    return [f"no MFU of trial {', '.join(those)}: {reason}" for reason, those in numbers.items()]


def _reached(record: TrialRecord, members: Sequence[TrialRecord], objectives: Sequence[Objective]) -> str:
    """Return what a member reached, by what it was chosen by: the sentence names two that are held against each other."""
    texts = []
    for metric in (o.metric for o in objectives):
        known = confirmed(record, metric) if _of_seeds(members, metric) is not None else None
        text = f"{metric} {number_text(metric, record.values[metric])}" if known is None else f"{metric} {known.text}"
        if known is None and metric in record.test:
            text += f" ({number_text(metric, record.test[metric])} on the test file)"
        texts.append(text)
    return " at ".join(texts)
