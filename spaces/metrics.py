"""The metrics that a trial reports: name, unit, better direction, and the section that MLflow shows it in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One reported number."""

    name: str
    section: Literal["eval", "train", "perf", "cost", "test"]
    unit: str
    direction: Direction
    description: str
    is_interim: bool = True
    """Whether a trial can tell it before its end, from what it did so far."""

    @property
    def tracked_name(self) -> str:
        """The name in MLflow, whose UI groups charts by what stands before the slash."""
        return f"{self.section}/{self.name}"


EVAL_LOSS = "eval_loss"
PERPLEXITY = "perplexity"
ACCURACY = "accuracy"
MACRO_F1 = "macro_f1"
EXACT_MATCH = "exact_match"
CUSTOM = "custom"
TRAIN_LOSS = "train_loss"
TRAIN_SECONDS = "train_seconds"
COMPILE_SECONDS = "compile_seconds"
DEVICE_SECONDS = "device_seconds"
TOTAL_SECONDS = "total_seconds"
TOKENS_PER_SECOND = "tokens_per_second"
SAMPLES_PER_SECOND = "samples_per_second"
STEP_SECONDS = "step_seconds"
TIME_DRIFT = "time_drift"
RANK_SPREAD = "rank_spread"
MFU = "mfu"
HFU = "hfu"
PEAK_MEMORY_BYTES = "peak_memory_bytes"
PADDING_FRACTION = "padding_fraction"
FLOPS_PER_STEP = "flops_per_step"
# By the part of a step; communication is what of the exchange the computation waits for, and in no other part.
PART_SECONDS = {part: f"{part}_seconds" for part in ("data", "forward", "backward", "communication", "optimizer")}

_TABLE = (
    Metric(
        name=EVAL_LOSS,
        section="eval",
        unit="nats",
        direction="minimize",
        description="mean cross entropy on the evaluation set, per row or per target token",
    ),
    Metric(
        name=PERPLEXITY,
        section="eval",
        unit="",
        direction="minimize",
        description="of a language model, e to the evaluation loss: among how many equally likely tokens it chooses",
    ),
    Metric(
        name=ACCURACY,
        section="eval",
        unit="",
        direction="maximize",
        description="share of evaluation rows (classification) or target tokens (causal-lm) predicted right",
    ),
    Metric(
        name=MACRO_F1,
        section="eval",
        unit="",
        direction="maximize",
        description="unweighted mean of the classes' F1 on the evaluation set",
    ),
    Metric(
        name=EXACT_MATCH,
        section="eval",
        unit="",
        direction="maximize",
        description="share of evaluation rows whose greedy completion gives the expected answer",
        is_interim=False,
    ),
    Metric(
        name=CUSTOM,
        section="eval",
        unit="",
        direction="maximize",
        description="what the function of data.metric makes of predictions and references",
        is_interim=False,
    ),
    Metric(
        name=TRAIN_LOSS,
        section="train",
        unit="nats",
        direction="minimize",
        description="mean training loss since a ninth or, beyond it, a third of the steps",
    ),
    Metric(
        name=TRAIN_SECONDS,
        section="perf",
        unit="s",
        direction="minimize",
        description="all optimizer steps at the steady pace, and compile_seconds: what the training costs alone on its resources",
    ),
    Metric(
        name=COMPILE_SECONDS,
        section="perf",
        unit="s",
        direction="minimize",
        description="what the first steps took beyond the steady pace while torch compiled blocks",
    ),
    Metric(
        name=DEVICE_SECONDS,
        section="cost",
        unit="s",
        direction="minimize",
        description="train_seconds times the world size",
    ),
    Metric(
        name=TOTAL_SECONDS,
        section="cost",
        unit="s",
        direction="minimize",
        description="wall time since the trial was last begun, with set-up, evaluation and checkpoints",
    ),
    Metric(
        name=TOKENS_PER_SECOND,
        section="perf",
        unit="1/s",
        direction="maximize",
        description="real tokens per second in the steady state, all ranks together; padding earns nothing",
    ),
    Metric(
        name=SAMPLES_PER_SECOND,
        section="perf",
        unit="1/s",
        direction="maximize",
        description="rows per second in the steady state, all ranks together",
    ),
    Metric(
        name=STEP_SECONDS,
        section="perf",
        unit="s",
        direction="minimize",
        description="a mean optimizer step at the steady pace",
    ),
    *(
        Metric(
            name=name,
            section="perf",
            unit="s",
            direction="minimize",
            description=f"mean seconds of a steady step in its part {part}",
        )
        for part, name in PART_SECONDS.items()
    ),
    Metric(
        name=TIME_DRIFT,
        section="perf",
        unit="",
        direction="minimize",
        description="range of the pace over the quarters of the trial, relative: how much something else took from it",
    ),
    Metric(
        name=RANK_SPREAD,
        section="perf",
        unit="",
        direction="minimize",
        description="range of the ranks' forward seconds, relative: how much the slowest holds up the others",
    ),
    Metric(
        name=MFU,
        section="perf",
        unit="",
        direction="maximize",
        description="model FLOPs of the real tokens over step time over the devices' peak",
    ),
    Metric(
        name=HFU,
        section="perf",
        unit="",
        direction="maximize",
        description="as mfu, with what the backward pass computes a second time",
    ),
    Metric(
        name=PEAK_MEMORY_BYTES,
        section="perf",
        unit="B",
        direction="minimize",
        description="largest peak over the ranks: allocator on a GPU, resident set on a CPU",
        is_interim=False,
    ),
    Metric(
        name=PADDING_FRACTION,
        section="perf",
        unit="",
        direction="minimize",
        description="share of the trained positions that are padding",
    ),
    Metric(
        name=FLOPS_PER_STEP,
        section="perf",
        unit="FLOP",
        direction="minimize",
        description="model FLOPs of the real tokens of a mean optimizer step",
    ),
)

# Of a layout of which some steps were timed, and of a whole trial none, these are not known.
NOT_FROM_PROFILE = frozenset({TOTAL_SECONDS, HFU})

METRICS: dict[str, Metric] = {metric.name: metric for metric in _TABLE}

# Of the rows of one of several domains: `accuracy.NAME`.
_DOMAIN = f"{ACCURACY}."


def domain_accuracy(domain: str) -> str:
    """Return the name of the accuracy on the evaluation rows of one domain of the data."""
    return f"{_DOMAIN}{domain}"


def domain_of(metric: str) -> str | None:
    """Return the domain whose accuracy a metric is; None for all others."""
    return metric.removeprefix(_DOMAIN) if metric.startswith(_DOMAIN) else None


def is_known(name: str) -> bool:
    """Return whether a name is that of a reported metric."""
    return name in METRICS or domain_of(name) is not None


def metric_of(name: str) -> Metric:
    """Return what is known of a reported metric.

    Raises:
        KeyError: there is no such metric.
    """
    domain = domain_of(name)
    return METRICS[name] if domain is None else replace(METRICS[ACCURACY], name=name, description=f"accuracy on the rows of {domain}")


def in_order(names: Iterable[str]) -> list[str]:
    """Return names of metrics, each once, in the order of the table; accuracies of domains come last, by name."""
    found = set(names)
    return [name for name in METRICS if name in found] + sorted(name for name in found if domain_of(name) is not None)


def is_learned(name: str) -> bool:
    """Return whether a metric follows from the recipe alone, however it is spread over devices."""
    return name in _LEARNED or domain_of(name) is not None


_LEARNED = frozenset(name for name, metric in METRICS.items() if metric.section in ("eval", "train"))
