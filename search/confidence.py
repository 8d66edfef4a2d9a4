"""How sure a score is: means over seeds with Student's t, and which members of a front they tell apart.

Only seeds that a search did not use count. The search chose a trial because its one seed came out well, so that one is biased; the
further ones are not. The interval is about seeds, that is the order of the rows and the new weights: it knows nothing of other rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist, fmean, variance
from typing import Any

from search.formatting import interval_text, number_text
from search.record import TrialRecord, TrialState
from search.scaling import student_t
from spaces.metrics import EXACT_MATCH, is_known, metric_of
from spaces.spec import Objective

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A mean, and what lies around it at `LEVEL`."""

    mean: float
    half_width: float | None
    """None: too few seeds to say."""

    @property
    def low(self) -> float:
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half_width or 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmed:
    """One metric of one trial over its further seeds."""

    metric: str
    estimate: Estimate
    values: tuple[float, ...]
    """One per seed."""
    split: str
    """`test` or `evaluation`, for a metric of quality: the rows that it was scored on; empty for the others."""

    @property
    def text(self) -> str:
        """The value with what it rests on, for people."""
        seeds = f"{len(self.values)} seed{'s' if len(self.values) > 1 else ''}"
        return f"{self.short_text} ({f'{self.split}, ' if self.split else ''}{seeds})"

    @property
    def short_text(self) -> str:
        return interval_text(self.metric, self.estimate.mean, self.estimate.half_width)


def estimate(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """Return the mean of independent values and its interval: t times s / sqrt(n)."""
    if len(values) < 2:
        return Estimate(mean=fmean(values), half_width=None)
    error = math.sqrt(variance(values) / len(values))
    return Estimate(mean=fmean(values), half_width=student_t(len(values) - 1, level) * error)


def difference(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> Estimate:
    """Return the mean of `a` less that of `b`, with Welch's interval: the two may scatter differently."""
    mean = fmean(a) - fmean(b)
    if min(len(a), len(b)) < 2:
        return Estimate(mean=mean, half_width=None)
    parts = [variance(values) / len(values) for values in (a, b)]
    if not any(parts):
        return Estimate(mean=mean, half_width=0.0)
    # Welch and Satterthwaite.
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    return Estimate(mean=mean, half_width=student_t(freedom, level) * math.sqrt(sum(parts)))


def binomial_interval(share: float, num_rows: int, level: float = LEVEL) -> tuple[float, float]:
    """Return between which shares the true one lies, of rows that are right or wrong by themselves (Wilson 1927, JASA 22:209)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z**2 / (2 * num_rows)) / (1 + z**2 / num_rows)
    half = z / (1 + z**2 / num_rows) * math.sqrt(share * (1 - share) / num_rows + z**2 / (4 * num_rows**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def score_text(record: TrialRecord, metric: str) -> str:
    """Return a trial's value for people; of exact_match, which few rows are asked for, with what so few rows can say."""
    value, num_rows = record.values.get(metric), record.details.get("exact_match_rows")
    if metric != EXACT_MATCH or value is None or num_rows is None:
        return number_text(metric, value)
    low, high = binomial_interval(value, num_rows)
    return f"{number_text(metric, value)} ({low:.2g} to {high:.2g})"


def confirmed(record: TrialRecord, metric: str) -> Confirmed | None:
    """Return what the further seeds of a trial say of a metric, on the test rows where it is scored there; None without any."""
    done = [c for c in record.confirmations if c.state is TrialState.COMPLETE]
    is_quality = is_known(metric) and metric_of(metric).section == "eval"
    on_test = is_quality and bool(done) and all(metric in c.test for c in done)
    values = tuple(scores[metric] for c in done if metric in (scores := c.test if on_test else c.values))
    if not values:
        return None
    split = ("test" if on_test else "evaluation") if is_quality else ""
    sure = estimate(values)
    if is_quality and len({*values}) == 1:
        sure = replace(sure, half_width=None)
    return Confirmed(metric=metric, estimate=sure, values=values, split=split)


def told_apart(a: Confirmed, b: Confirmed, level: float = LEVEL) -> bool:
    """Whether the seeds say that two trials differ at all; not where there are too few to say.

    Nor where each trial's seeds have one score, which is as coarse as its rows are few: that says nothing of how they scatter.
    """
    if a.split and len({*a.values}) == len({*b.values}) == 1:
        return False
    gap = difference(a.values, b.values, level)
    return gap.half_width is not None and abs(gap.mean) > gap.half_width


def rivals(chosen: TrialRecord, members: Sequence[TrialRecord], metric: str) -> list[TrialRecord]:
    """Return the members that the seeds do not tell apart from one of them in a metric."""
    mine = confirmed(chosen, metric)
    others = [(r, confirmed(r, metric)) for r in members if r.number != chosen.number]
    return [r for r, theirs in others if mine is not None and theirs is not None and not told_apart(mine, theirs)]


def rival_lines(chosen: TrialRecord, members: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[str]:
    """Return a line for each objective in which other members may be as good as the chosen one."""
    lines = []
    for metric in (o.metric for o in objectives):
        mine = confirmed(chosen, metric)
        others = [
            f"trial {r.number} ({theirs.short_text})" for r in rivals(chosen, members, metric) if (theirs := confirmed(r, metric))
        ]
        if mine is not None and others:
            lines.append(f"not told apart from trial {chosen.number} in {metric} ({mine.short_text}): {', '.join(others)}")
    return lines


def confidence_lines(members: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[str]:
    """Return what the confirmations of a front say beside their numbers; nothing of a front without any."""
    if not any(r.confirmations for r in members):
        return []
    splits = {c.split for r in members for o in objectives if (c := confirmed(r, o.metric)) is not None and c.split}
    on = {"test": "scored on the test rows", "evaluation": "scored on the evaluation rows, which the search chose by"}
    scored = " and ".join(on[split] for split in sorted(splits))
    lines = [f"confirmed: mean and {LEVEL:.0%} interval over further seeds, each trained alone{f', {scored}' if scored else ''}"]
    for metric in (o.metric for o in objectives):
        known = [(r, c) for r in members if (c := confirmed(r, metric)) is not None]
        pairs = [f"{a.number} and {b.number}" for (a, mine), (b, theirs) in pairwise(known) if not told_apart(mine, theirs)]
        if pairs:
            lines.append(f"neighbours that the seeds do not tell apart in {metric}: trials {', '.join(pairs)}")
    missing = [str(r.number) for r in members if not r.confirmations]
    lines += [f"not confirmed: trial{'s' if len(missing) > 1 else ''} {', '.join(missing)}"] if missing else []
    noise = {r.number: [f"{c.seed}: {c.noise}" for c in r.confirmations if c.noise] for r in members}
    lines += [f"trial {number} is noisy with seed {', with seed '.join(seeds)}" for number, seeds in noise.items() if seeds]
    return lines + [line for r in members for line in failure_lines(r)]


def failure_lines(record: TrialRecord) -> list[str]:
    """Return a line for every further seed that gave no result; the mean of the others is then too good."""
    return [
        f"trial {record.number} failed with seed {c.seed}: {c.error['kind']}: {c.error['message']}"
        for c in record.confirmations
        if c.error
    ]


def confirmed_as_json(record: TrialRecord, objectives: Sequence[Objective]) -> dict[str, Any]:
    """Return mean and interval of every objective that was confirmed, ready for JSON."""
    found = [c for o in objectives if (c := confirmed(record, o.metric)) is not None]
    return {
        c.metric: {
            "mean": c.estimate.mean,
            "half_width": c.estimate.half_width,
            "num_seeds": len(c.values),
            "split": c.split or None,
        }
        for c in found
    }
