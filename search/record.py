"""What is known of one trial, from its proposal to its score, in plain values that all of `search` shares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from spaces.config import TrialConfig
from spaces.metrics import RANK_SPREAD, TIME_DRIFT, TRAIN_SECONDS

if TYPE_CHECKING:
    from spaces.spec import Objective

# Trials that nothing disturbs stay below, one beside which other workers start is far above: docs/metering.md.
NOISY = 0.25
# The kind of failure that the same recipe with the same seed has again; whatever else failed may not fail again.
LASTING = "diverged"


class TrialState(StrEnum):
    """Where a trial stands; Optuna's words."""

    RUNNING = "RUNNING"
    COMPLETE = "COMPLETE"
    PRUNED = "PRUNED"
    FAIL = "FAIL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmation:
    """One more training of a trial that had ended: another seed, nothing else running. No front and no study knows it."""

    seed: int
    state: TrialState
    """COMPLETE or FAIL."""
    values: dict[str, float] = field(default_factory=dict)
    """Final metrics, on the evaluation rows."""
    test: dict[str, float] = field(default_factory=dict)
    """Metrics on the test rows; empty where the search has none."""
    error: dict[str, str] | None = None
    started_at: float
    """Unix seconds."""
    finished_at: float

    @property
    def noise(self) -> str:
        """Why its times are not to be trusted, in words; empty where nothing speaks against them."""
        return noise_of(self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class HarnessRun:
    """A model on one task, or group of tasks, of lm-evaluation-harness."""

    task: str
    """As it was asked for."""
    limit: int | None
    """Rows of each task; None: all."""
    scores: dict[str, dict[str, float | None]]
    """`{"task/metric": {"value": ..., "stderr": ...}}`; of a group its parts' too."""

    @property
    def own(self) -> list[str]:
        """The names that are the task's own; those of its parts where it has none."""
        return [name for name in self.scores if name.partition("/")[0] == self.task] or list(self.scores)

    def text(self, name: str) -> str:
        """Return a score as people read it."""
        value, error = self.scores[name]["value"], self.scores[name].get("stderr")
        return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One trial of a search."""

    number: int
    """Optuna's trial number; unique within the search."""
    state: TrialState
    params: dict[str, Any]
    """The user's knobs, flat, as proposed."""
    config: dict[str, Any] | None = None
    """`TrialConfig.to_dict()`."""
    values: dict[str, float] = field(default_factory=dict)
    """Final metrics by the names of `spaces.metrics`; empty unless the trial reached its end."""
    reports: tuple[dict[str, Any], ...] = ()
    """`TrialReport.to_dict()` of every evaluation point, by ascending step."""
    constraints: dict[str, float] = field(default_factory=dict)
    """Named constraints, each feasible when <= 0."""
    predicted: dict[str, Any] = field(default_factory=dict)
    """What `search.outlook` said before it ran."""
    error: dict[str, str] | None = None
    """`{"kind": ..., "message": ...}` of a trial that failed."""
    attempts: int = 0
    """How often training was begun; more than one after lost workers."""
    started_at: float | None = None
    """Unix seconds; None for a trial that was never launched."""
    finished_at: float | None = None
    """Unix seconds; None while it runs."""
    held_seconds: float = 0.0
    """Wall seconds for which it held a worker group, over all attempts."""
    stopped: dict[str, Any] | None = None
    """The verdict of the rung that stopped it early: `search.rungs.Verdict` with the rung's `share` of the trial's steps."""
    source: int | None = None
    """The trial that trained the same recipe under another layout; this one only has its own times."""
    was_proposed: bool = True
    """Whether the sampler knows it; not of a further layout of a trial."""
    again: int | None = None
    """The trial of the same proposal that ran out of memory; this one has fewer rows at a time, or computes blocks again."""
    details: dict[str, Any] = field(default_factory=dict)
    """Process map, memory by rank, MFU convention and the like, from the final report."""
    test: dict[str, float] = field(default_factory=dict)
    """Metrics on the test file; only members of the front are scored."""
    confirmations: tuple[Confirmation, ...] = ()
    """By ascending seed; each is the last that was tried with its seed."""
    harness: tuple[HarnessRun, ...] = ()
    """On tasks of lm-evaluation-harness; the last of each with as many rows."""

    @property
    def feasible(self) -> bool:
        """Whether no constraint is violated."""
        return all(value <= 0 for value in self.constraints.values())

    @property
    def feasible_before_launch(self) -> bool:
        """Whether the trial was launched: one that ran out of memory was, one that the cluster cannot hold was not."""
        return self.feasible or self.started_at is not None

    @property
    def noise(self) -> str:
        """Why the trial's times are not to be trusted, in words; empty where nothing speaks against them."""
        return " and ".join(filter(None, [self.details.get("scattered"), noise_of(self.values, self.late)]))

    @property
    def trial_config(self) -> TrialConfig:
        """The config; this program always writes one."""
        assert self.config is not None
        return TrialConfig.from_dict(self.config)

    @property
    def shown_params(self) -> dict[str, Any]:
        """The params, with what `auto` became beside it, for people."""
        shown, layout = dict(self.params), (self.config or {}).get("layout", {})
        meant = {"recomputation": layout.get("recomputation"), "micro_batch_size": layout.get("micro_batch_tokens")}
        units = {"micro_batch_size": " tokens"}
        automatic = [knob for knob, value in meant.items() if shown.get(knob) == "auto" and value is not None]
        return shown | {knob: f"auto ({meant[knob]}{units.get(knob, '')})" for knob in automatic}

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether it needed more memory than there is."""
        return self.error is not None and self.error["kind"] == "out_of_memory"

    @property
    def is_whole(self) -> bool:
        """Whether its recipe was trained to the end, in this trial."""
        return self.state is TrialState.COMPLETE and self.source is None

    @property
    def was_cut_off(self) -> bool:
        """Whether it was launched and ended by the end of the search, running or before its turn came: nothing is known by it."""
        return self.state is TrialState.PRUNED and self.stopped is None and self.started_at is not None

    @property
    def root(self) -> int:
        """The number of the trial whose weights are this one's."""
        return self.number if self.source is None else self.source

    @property
    def why_not_trained(self) -> str:
        """What the trial was spared by, in words; empty where it was trained."""
        if self.source is None:
            return ""
        return f"the recipe of trial {self.source} under another layout, of which some steps were timed"

    @property
    def why_stopped(self) -> str:
        """Where a rung stopped the trial and why, in words; empty where none did."""
        return "" if self.stopped is None else f"stopped {place_text(self.stopped)}"

    @property
    def late(self) -> float | None:
        """How much longer than its step profile says, relative; None without a profile."""
        predicted, measured = self.predicted.get(TRAIN_SECONDS), self.values.get(TRAIN_SECONDS)
        if predicted is None or measured is None or self.predicted.get("time_source") != "profile":
            return None
        return float(measured / predicted - 1)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        confirmations = [{**asdict(c), "state": c.state.value} for c in self.confirmations]
        harness = [asdict(run) for run in self.harness]
        return {
            **data,
            "state": self.state.value,
            "reports": list(self.reports),
            "confirmations": confirmations,
            "harness": harness,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrialRecord:
        """Read back what `to_dict` wrote.

        Raises:
            TypeError, KeyError, ValueError: the data are not those of a record.
        """
        confirmations = tuple(Confirmation(**{**c, "state": TrialState(c["state"])}) for c in data.get("confirmations", ()))
        state, reports = TrialState(data["state"]), tuple(data.get("reports", ()))
        harness = tuple(HarnessRun(**run) for run in data.get("harness", ()))
        return cls(**{**data, "state": state, "reports": reports, "confirmations": confirmations, "harness": harness})

    def confirmed_by(self, confirmation: Confirmation) -> TrialRecord:
        """Return the record with a confirmation, in the place of an earlier one with the same seed."""
        others = [c for c in self.confirmations if c.seed != confirmation.seed]
        return replace(self, confirmations=tuple(sorted([*others, confirmation], key=lambda c: c.seed)))


def with_run(runs: Sequence[HarnessRun], run: HarnessRun) -> tuple[HarnessRun, ...]:
    """Return the runs with another one, in the place of that on the same task with as many rows."""
    return (*(r for r in runs if (r.task, r.limit) != (run.task, run.limit)), run)


def classify(
    outcome: Mapping[str, Any], final: Mapping[str, Any] | None, objectives: Sequence[Objective]
) -> tuple[TrialState, dict[str, str] | None, dict[str, float]]:
    """Return state, error and values of a trial from how its job ended and its last report."""
    if outcome["state"] == "stopped":
        return TrialState.PRUNED, None, {}
    if outcome["state"] == "failed":
        return TrialState.FAIL, {"kind": outcome["kind"], "message": outcome["message"]}, {}
    values = dict(final["metrics"]) if final else {}
    missing = [o.metric for o in objectives if not math.isfinite(values.get(o.metric, math.nan))]
    if missing:
        message = f"no finite value for {', '.join(missing)}; reported: {', '.join(sorted(values)) or 'nothing'}"
        return TrialState.FAIL, {"kind": "missing_metric", "message": message}, values
    return TrialState.COMPLETE, None, values


def place_text(verdict: Mapping[str, Any]) -> str:
    """Return a rung's verdict in words."""
    text = f"at {verdict['share']:.0%} of its steps, place {verdict['place']} of {verdict['num_entries']}"
    if verdict["goes_on"] or verdict["place"] > verdict["quota"]:
        return f"{text} where {verdict['quota']} may go on"
    return f"{text} but dominated and in the last front"


def noise_of(values: Mapping[str, Any], late: float | None = None) -> str:
    """Return why times are not to be trusted, in words; empty where nothing speaks against them.

    Args:
        values: metrics of a trial, or a step profile.
        late: how much longer it took than its step profile says, relative.
    """
    drift, spread = values.get(TIME_DRIFT, 0.0), values.get(RANK_SPREAD, 0.0)
    reasons = []
    if drift > NOISY:
        reasons.append(f"its pace changed by {drift:.0%} while it trained")
    if late is not None and late > NOISY:
        reasons.append(f"it took {late:.0%} longer than its step profile says")
    if spread > NOISY:
        reasons.append(f"its slowest rank was {spread:.0%} behind the fastest")
    return " and ".join(reasons)
