"""Which trial of a front to take, in words: what it reached, how sure that is, and what speaks against its numbers."""

from __future__ import annotations

from collections.abc import Sequence

from search.confidence import confidence_lines, confirmed, rival_lines
from search.formatting import number_text
from search.pareto import cost_objective, knee
from search.record import TrialRecord
from spaces.metrics import MFU, TRAIN_SECONDS
from spaces.spec import Objective


def recommendation(members: Sequence[TrialRecord], objectives: Sequence[Objective], name: str) -> str:
    """Return in one sentence which trial of the front to take, and what the best of it would cost."""
    chosen = knee(members, objectives)
    if chosen is None:
        return f"Nothing to recommend: no trial of {name} is complete and feasible."
    price = cost_objective(objectives)
    quality = next(o for o in objectives if o is not price)
    sign = -1.0 if quality.direction == "maximize" else 1.0
    best = min(members, key=lambda r: sign * r.values[quality.metric])
    text = f"Take trial {chosen.number} of {name}: {_reached(chosen, quality, price)}"
    if best.number == chosen.number:
        return f"{text}, the best on the front."
    text += f", the knee of the {len(members)} on the front; "
    text += f"the best is trial {best.number}, {_reached(best, quality, price)}"
    cheap, dear = (_price(r, price.metric) for r in (chosen, best))
    ratio = dear / cheap if cheap else 0.0
    return f"{text}, {ratio:.1f} times as much." if ratio > 1 else f"{text}."


def recommendation_lines(members: Sequence[TrialRecord], objectives: Sequence[Objective], name: str) -> list[str]:
    """Return which trial to take, what speaks against its numbers, who may be as good as it, and how sure all of that is."""
    chosen = knee(members, objectives)
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
    return [f"trial {r.number} is {r.why_not_trained}" for r in records if r.source is not None]


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


def _price(record: TrialRecord, metric: str) -> float:
    known = confirmed(record, metric)
    return record.values[metric] if known is None else known.estimate.mean


def _reached(record: TrialRecord, quality: Objective, price: Objective) -> str:
    texts = []
    for metric in (quality.metric, price.metric):
        known = confirmed(record, metric)
        text = f"{metric} {number_text(metric, record.values[metric])}" if known is None else f"{metric} {known.text}"
        if known is None and metric in record.test:
            text += f" ({number_text(metric, record.test[metric])} on the test file)"
        texts.append(text)
    return " at ".join(texts)
