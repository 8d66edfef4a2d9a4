"""The user's file as a model: what to fine-tune, on which data, over which space, for which objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    StrictBool,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from spaces.budget import BudgetSpec
from spaces.domains import Within
from spaces.fidelity import GRACE_PERIOD, REDUCTION_FACTOR, rung_shares
from spaces.inputs import AtLeastOne, AtLeastZero, DataSpec, ModelSpec, SafeName, Section, Task, Text
from spaces.metrics import (
    ACCURACY,
    CUSTOM,
    EVAL_LOSS,
    EXACT_MATCH,
    MACRO_F1,
    METRICS,
    NOT_FROM_PROFILE,
    PERPLEXITY,
    TRAIN_SECONDS,
    Direction,
    domain_accuracy,
    domain_of,
    metric_of,
)
from spaces.space import SpaceSpec

# train/ and test/ metrics are no objectives: the first does not generalise, the second must not be searched on.
OBJECTIVE_METRICS = tuple(m.name for m in METRICS.values() if m.section in ("eval", "perf", "cost"))
# Metrics that one of the two tasks never reports.
_TASK_OF_METRIC: dict[str, Task] = {MACRO_F1: "sequence-classification", EXACT_MATCH: "causal-lm", PERPLEXITY: "causal-lm"}
# Without a time budget, an hour is the time beyond which a trial adds nothing to the hypervolume.
DEFAULT_REFERENCE_SECONDS = 3600.0


def _known_metric(value: Any) -> Any:
    if value not in OBJECTIVE_METRICS and not (isinstance(value, str) and domain_of(value)):
        names = list(OBJECTIVE_METRICS)
        raise PydanticCustomError("metric", "not a metric", {"allowed": ", ".join(names), "names": names})
    return value


_METRIC_SCHEMA = {"anyOf": [{"enum": list(OBJECTIVE_METRICS)}, {"type": "string", "pattern": r"^accuracy\..+$"}]}
MetricName = Annotated[str, BeforeValidator(_known_metric), WithJsonSchema(_METRIC_SCHEMA)]
Finite = Annotated[float, Within()]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """One objective, with all defaults filled in."""

    metric: str
    direction: Direction
    reference: float | None
    """Coordinate of the hypervolume's reference point; None: the untrained model's score, known once it is measured."""
    is_limit: bool = False
    """Whether the user gave the reference: what is worse is worth nothing to him. Others are there to measure from."""


def _is_interim_quality(metric: str) -> bool:
    return metric_of(metric).section == "eval" and metric_of(metric).is_interim


def _before_the_end(objective: Objective) -> Objective:
    """Return what an objective is judged by at a rung."""
    is_of_all = metric_of(objective.metric).section == "eval" and domain_of(objective.metric) is None
    if not is_of_all or objective.direction != "maximize":
        return objective
    return Objective(metric=EVAL_LOSS, direction="minimize", reference=None)


class ObjectiveSpec(Section):
    """One thing to make better."""

    metric: MetricName
    """Name of a reported metric; `accuracy.NAME` for one of `data.domains`."""
    direction: Direction | None = None
    """`minimize` or `maximize`; by default what is better for the metric."""
    reference: Finite | None = None
    """The worst value that is still worth anything: with `train_seconds` the time that a training may take. The hypervolume is
    measured from there, what is recommended lies within it, and where `epochs` allow it trainings that last as long are tried.
    By default 0 for what is maximised, the budget's minutes (or an hour) for a time, and else the untrained model's score: the
    hypervolume is measured from there, and nothing else follows from it."""


class ResourcesSpec(Section):
    """What one worker, that is one rank, takes."""

    workers: AtLeastOne | None = None
    """Workers at once; by default what the nodes hold. On a cluster that starts nodes for what waits: how many it may grow to."""
    cpus_per_worker: AtLeastOne = 1
    """CPU cores of a worker."""
    gpus_per_worker: AtLeastZero = 0
    """GPUs of a worker."""
    price_per_device_hour: Annotated[float, Within(ge=0, le=1_000_000)] | None = None
    """Dollars for an hour of one worker; the search then says what it cost."""


class SamplerSpec(Section):
    """What proposes trials."""

    method: Literal["auto", "tpe", "gp", "nsga2", "random", "points"] = "auto"
    """Optuna's tree-structured Parzen estimator, Gaussian process, NSGA-II (many trials), or random points. `auto`: until 64 trials
    are known or running what is expected to widen the front the most for its device seconds, by Gaussian processes that know how
    long a trial will take; then the estimator. `points`: those of `points_to_evaluate`, and nothing else."""
    seed: AtLeastZero = 0
    """Seeds the proposals."""
    startup_trials: AtLeastZero = 3
    """Trials before a model of them is trusted, the usual points among them and the others random; NSGA-II's generations are as
    large."""
    warm_start: Text | None = None
    """Name of an earlier search with the same model and data, whose trials measured what the objectives are, its directory, or its
    run in MLflow: the sampler learns from its trials."""
    points_to_evaluate: tuple[dict[str, Any], ...] | None = None
    """Points that are known to be good, tried first: each gives values to some knobs; the sampler fills in the others. By default,
    without a warm start, usual trainings of several lengths; `[]` for none."""


class SchedulerSpec(Section):
    """What stops trials before their end: asynchronous successive halving over several objectives."""

    method: Literal["asha", "none"] = "none"
    """`asha` stops a trial at a rung where too many are better; `none` lets every trial finish."""
    grace_period: Annotated[float, Within(gt=0, lt=1)] = GRACE_PERIOD
    """Share of its own steps that every trial trains: the first rung."""
    reduction_factor: Annotated[float, Within(ge=2, le=100)] = REDUCTION_FACTOR
    """One in this many goes on from a rung, and whatever no other trial dominates there; the next rung is this many times further. At
    the rungs trials are evaluated."""
    brackets: AtLeastOne = 1
    """Each further bracket spares its share of the trials one rung more, in case good ones start slowly; trials of one bracket are
    held against one another alone."""

    @property
    def shares(self) -> tuple[float, ...]:
        """The rungs of the first bracket, as shares of a trial's own steps."""
        return rung_shares(self.grace_period, self.reduction_factor)

    @field_validator("brackets")
    @classmethod
    def _brackets_have_rungs(cls, brackets: int, info: ValidationInfo) -> int:
        if {"grace_period", "reduction_factor"} <= info.data.keys():
            most = len(rung_shares(info.data["grace_period"], info.data["reduction_factor"])) + 1
            if brackets > most:
                context = {"allowed": f"1 to {most}: the last of them stops no trial"}
                raise PydanticCustomError("brackets", "more brackets than rungs", context)
        return brackets


class TrackingSpec(Section):
    """Where MLflow is."""

    uri: Text | None = None
    """Tracking URI; by default MLFLOW_TRACKING_URI, or a SQLite file beside the searches."""
    experiment: Text = "paretune"
    """MLflow experiment."""


class SearchSpec(Section):
    """A search."""

    name: SafeName | None = None
    """Name of the search and of its directory; by default the file's name with a date."""
    model: ModelSpec
    """The model that is fine-tuned."""
    data: DataSpec
    """The rows to train and to evaluate on."""
    space: SpaceSpec = SpaceSpec()
    """The knobs of a trial."""
    objectives: tuple[ObjectiveSpec, ...] | None = None
    """Two or three; by default accuracy (eval_loss for causal-lm) and train_seconds."""
    resources: ResourcesSpec = ResourcesSpec()
    """What one worker takes."""
    budget: BudgetSpec = BudgetSpec()
    """When the search ends: by whichever comes first. What still trains when time, device hours or dollars are used up is stopped."""
    sampler: SamplerSpec = SamplerSpec()
    """What proposes trials."""
    scheduler: SchedulerSpec = SchedulerSpec()
    """What stops trials before their end."""
    reuse: StrictBool = True
    """A recipe that was trained is not trained again: of a duplicate all is known, and under another layout, which learns the same,
    only some steps are timed."""
    tracking: TrackingSpec = TrackingSpec()
    """Where MLflow is."""
    directory: Text = "paretune-runs"
    """Where searches are kept, each in a directory of its own."""

    @model_validator(mode="before")
    @classmethod
    def _sections_may_be_empty(cls, data: Any) -> Any:
        """A heading with nothing below it is null in YAML, and means the defaults."""
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @field_validator("objectives")
    @classmethod
    def _two_or_three(cls, objectives: tuple[ObjectiveSpec, ...] | None, info: ValidationInfo) -> tuple[ObjectiveSpec, ...] | None:
        if objectives is None:
            return None
        metrics = [o.metric for o in objectives]
        if len(metrics) not in (2, 3):
            context = {"number": len(metrics), "allowed": "2 or 3 objectives"}
            raise PydanticCustomError("objectives", "{number} objectives", context)
        if len(set(metrics)) < len(metrics):
            raise PydanticCustomError("objectives", "a metric stands twice", {"allowed": "each metric once"})
        model, data = info.data.get("model"), info.data.get("data")
        for metric in metrics:
            task = _TASK_OF_METRIC.get(metric)
            if model is not None and task is not None and model.task != task:
                context = {"metric": metric, "task": model.task, "allowed": f"{metric} only with {task}"}
                raise PydanticCustomError("metric_of_task", "{metric} is not reported for {task}", context)
        domains = [domain_accuracy(name) for name in (data.domains or {})] if data is not None else []
        unknown = [m for m in metrics if domain_of(m) is not None and m not in domains]
        if unknown and data is not None:
            context = {"metric": unknown[0], "allowed": ", ".join(domains) or "with data.domains", "names": domains}
            raise PydanticCustomError("no_such_domain", "{metric} is of no domain of the data", context)
        completed = [m for m in metrics if m == EXACT_MATCH or (m == CUSTOM and model is not None and model.task == "causal-lm")]
        if completed and data is not None and data.exact_match_rows == 0:
            context = {"metric": completed[0], "allowed": "data.exact_match_rows at least 1"}
            raise PydanticCustomError("metric_off", "{metric} is turned off by data.exact_match_rows", context)
        if CUSTOM in metrics and data is not None and data.metric is None:
            raise PydanticCustomError(
                "no_metric", "custom without data.metric", {"allowed": "custom with data.metric: module:function"}
            )
        if any(o.metric == CUSTOM and o.direction == "minimize" and o.reference is None for o in objectives):
            context = {"allowed": "reference: the worst value that is still worth anything"}
            raise PydanticCustomError("no_reference", "custom is to be minimised, and has no reference", context)
        return objectives

    @field_validator("objectives")
    @classmethod
    def _follow_from_profiles(
        cls, objectives: tuple[ObjectiveSpec, ...] | None, info: ValidationInfo
    ) -> tuple[ObjectiveSpec, ...] | None:
        space = info.data.get("space")
        knobs = space.profiled_knobs() if space is not None else []  # its own errors are reported
        unknown = [o.metric for o in objectives or () if o.metric in NOT_FROM_PROFILE]
        if unknown and knobs:
            context = {"metric": unknown[0], "knob": knobs[0], "allowed": "other objectives, or {choice: [...]} for the knob"}
            raise PydanticCustomError("not_from_profile", "{metric} does not follow from a profile of space.{knob}", context)
        return objectives

    @field_validator("budget")
    @classmethod
    def _dollars_have_a_price(cls, budget: BudgetSpec, info: ValidationInfo) -> BudgetSpec:
        resources = info.data.get("resources")
        if budget.dollars is not None and resources is not None and resources.price_per_device_hour is None:
            context = {"allowed": "budget.dollars with resources.price_per_device_hour"}
            raise PydanticCustomError("no_price", "dollars without a price", context)
        return budget

    @field_validator("budget")
    @classmethod
    def _patience_sees_a_hypervolume(cls, budget: BudgetSpec, info: ValidationInfo) -> BudgetSpec:
        objectives = info.data.get("objectives") or ()
        # What the untrained model scores is known before the first trial, seconds have a default, and what is maximised begins at 0.
        found = [(o, metric_of(o.metric)) for o in objectives if o.reference is None]
        unknown = [o.metric for o, m in found if m.section != "eval" and m.unit != "s" and (o.direction or m.direction) == "minimize"]
        if budget.patience is not None and unknown:
            context = {"metric": unknown[0], "allowed": f"a reference for {unknown[0]}: the worst value that is still worth anything"}
            raise PydanticCustomError("no_hypervolume", "patience without a reference of {metric}", context)
        return budget

    @field_validator("sampler")
    @classmethod
    def _points_are_in_the_space(cls, sampler: SamplerSpec, info: ValidationInfo) -> SamplerSpec:
        space = info.data.get("space")
        if space is None:
            return sampler  # its own errors are reported
        for number, point in enumerate(sampler.points_to_evaluate or ()):
            problem = space.problem_with_point(point)
            if problem is not None:
                context = {"number": number, **problem}
                raise PydanticCustomError("point_outside", "points_to_evaluate[{number}] is outside the space: {what}", context)
        return sampler

    @field_validator("scheduler")
    @classmethod
    def _a_rung_knows_something(cls, scheduler: SchedulerSpec, info: ValidationInfo) -> SchedulerSpec:
        model, objectives = info.data.get("model"), info.data.get("objectives")
        if scheduler.method != "asha" or model is None or objectives is None:
            return scheduler  # the default objectives have one of quality
        if not any(_is_interim_quality(o.metric) for o in objectives):
            known = [m for m in OBJECTIVE_METRICS if _is_interim_quality(m) and _TASK_OF_METRIC.get(m) in (None, model.task)]
            context = {"allowed": f"with one of {', '.join(known)} among the objectives, or method: none"}
            raise PydanticCustomError("no_rung_objective", "no objective of quality is known before a trial's end", context)
        return scheduler

    def resolved_objectives(self) -> tuple[Objective, ...]:
        """Return the objectives with every default filled in."""
        quality = ACCURACY if self.model.task == "sequence-classification" else EVAL_LOSS
        given = self.objectives or (ObjectiveSpec(metric=quality), ObjectiveSpec(metric=TRAIN_SECONDS))
        return tuple(self._resolve(objective) for objective in given)

    def rung_objectives(self) -> tuple[Objective, ...]:
        """Return the objectives that trials are held against one another by before their end; none if all are let finish.

        An objective that only the end of a trial tells (exact_match, peak_memory_bytes) is not among them. For a score to be
        maximised (accuracy, macro_f1) the loss stands in: so early it says more about the end. A domain has no loss of its own.
        """
        if self.scheduler.method != "asha":
            return ()
        known = [o for o in self.resolved_objectives() if metric_of(o.metric).is_interim]
        return tuple({o.metric: o for o in map(_before_the_end, known)}.values())

    def _resolve(self, objective: ObjectiveSpec) -> Objective:
        metric = metric_of(objective.metric)
        direction = objective.direction or metric.direction
        reference = objective.reference
        if reference is None and direction == "maximize":
            reference = 0.0
        elif reference is None and metric.unit == "s":
            reference = DEFAULT_REFERENCE_SECONDS if self.budget.minutes is None else self.budget.minutes * 60
        is_limit = objective.reference is not None
        return Objective(metric=metric.name, direction=direction, reference=reference, is_limit=is_limit)
