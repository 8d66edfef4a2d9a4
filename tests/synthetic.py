"""A made-up search: the events that a ledger of a few dozen trials holds, with every way in which a trial can end."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from search.ledger import SearchState
from search.record import TrialRecord
from search.results import Results
from spaces.config import TrialConfig
from spaces.spec import Objective, SearchSpec

BEGIN = 1_700_000_000.0
ACCURACY = Objective(metric="accuracy", direction="maximize", reference=0.0)
SECONDS = Objective(metric="train_seconds", direction="minimize", reference=120.0)
OBJECTIVES = (ACCURACY, SECONDS)
RUNGS = (12, 36, 108)
TRAIN_ROWS = 5000

# What a rung says of the trials that are pruned: at the first that they go on, at the second that they do not.
VERDICT = {"place": 3, "num_entries": 5, "quota": 1, "front": 2, "num_fronts": 3}
DEVICE = {
    "type": "cpu",
    "name": "made up",
    "threads": 1,
    "capacity_bytes": 2 * 10**9,
    "usable_bytes": 10**9,
    "peak_flops_per_second": {"fp32": 1e11},
}
PREDICTED_MEMORY = {"weights_bytes": 300, "optimizer_bytes": 100, "gradients_bytes": 0, "activations_bytes": 110}
PEAK = {"peak_source": "measured_gemm", "mfu_convention": "as tests count"}
HELD_MEMORY = {"weights_bytes": 300, "optimizer_bytes": 100, "working_bytes": 100, "around_bytes": 700}


def results_of(
    state: SearchState, spec: SearchSpec, report_path: Path = Path("report"), objectives: Sequence[Objective] = OBJECTIVES
) -> Results:
    """Return the results of a search that has no directory."""
    return Results(
        name=spec.name or "synthetic",
        spec=spec,
        spec_path="<spec>.yaml",
        directory=Path("runs"),
        report_path=report_path,
        state=state,
        objectives=tuple(objectives),
    )


def synthetic_events(num_trials: int = 12, *, name: str = "synthetic", seed: int = 0) -> list[dict[str, Any]]:
    """Return the events of a finished search; most trials are complete, some pruned, failed or infeasible."""
    random_ = random.Random(seed)
    clock = [BEGIN, BEGIN]
    events = [
        _event(
            "search_started",
            BEGIN,
            name=name,
            mlflow_run_id=None,
            machine="made up",
            data_fingerprint="f00d",
            git_commit="c0ffee",
            versions={"torch": "2.11"},
            num_workers=2,
            data={"format": "made up", "rows": 9},
            data_name="made/up.csv",
        ),
        _event("device_examined", BEGIN + 0.5, device=DEVICE),
        _event("reference", BEGIN + 1, metrics={"accuracy": 0.04, "eval_loss": 3.2}),
    ]
    for number in range(num_trials):
        worker = number % 2
        params = _params(random_)
        config = TrialConfig.from_params(params).to_dict()
        known = {"number": number, "params": params, "config": config}
        if number % 11 == 5:
            events.append(
                _event(
                    "trial_infeasible",
                    clock[worker],
                    **known,
                    constraints={"world_size_within_cluster": 2.0},
                    why=["needs 4 workers, and there are 2"],
                )
            )
            continue
        predicted = {"memory": PREDICTED_MEMORY, "train_seconds": 50.0, "time_source": "estimate" if number % 2 else "profile"}
        events.append(_event("trial_started", clock[worker], **known, command=f"train {number} again", predicted=predicted))
        events.append(_event("trial_placed", clock[worker] + 0.5, number=number, attempt=1))
        ended = _train(number, params, clock[worker] + 1, random_)
        events += ended
        clock[worker] = ended[-1]["time"] + 0.5
    events.append(_event("test_scored", max(clock), number=0, metrics={"accuracy": 0.71}))
    events.append(_event("search_finished", max(clock) + 1, reason="trials"))
    return sorted(events, key=lambda event: event["time"])


def confirmed_event(
    number: int, seed: int, *, accuracy: float, seconds: float, test: float | None = None, error: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return the event of one further seed of a trial."""
    values = {} if error else {"accuracy": accuracy, "eval_loss": 1.0, "train_seconds": seconds}
    return _event(
        "confirmed",
        BEGIN + 10_000 + 100 * seed + number,
        number=number,
        seed=seed,
        state="FAIL" if error else "COMPLETE",
        values=values,
        test={} if test is None or error else {"accuracy": test, "eval_loss": 1.1},
        error=error,
        started_at=BEGIN + 9_990 + 100 * seed + number,
    )


def without_mfu(events: list[dict[str, Any]], reason: str) -> list[dict[str, Any]]:
    """Return the events of a search whose device has no peak."""
    text = json.dumps(events).replace(json.dumps(PEAK["peak_source"]), json.dumps(reason)).replace('"mfu": 0.31, ', "")
    return list(json.loads(text))


def numbers_on_front(records: list[TrialRecord]) -> set[int]:
    """Return the non-dominated trials of two objectives, the slow way."""
    whole = [r for r in records if r.state == "COMPLETE"]
    points = {r.number: (-r.values["accuracy"], r.values["train_seconds"]) for r in whole}
    return {n for n, p in points.items() if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points.values())}


def _params(random_: random.Random) -> dict[str, Any]:
    return {
        "adapter": "lora",
        "learning_rate": 10 ** random_.uniform(-4, -2),
        "global_batch_size": random_.choice([16, 32, 64]),
        "dataset_fraction": random_.uniform(0.1, 1.0),
        "epochs": 1.0,
        "lora_rank": random_.choice([4, 8, 16]),
        "lora_alpha": 32.0,
        "lora_target_modules": "all-linear",
        "warmup_fraction": 0.1,
        "weight_decay": 0.0,
        "precision": "fp32",
        "seed": 0,
        "world_size": random_.choice([1, 2]),
        "strategy": random_.choice(["ddp", "fsdp"]),
        "micro_batch_size": "auto",
        "recomputation": "none",
    }


def _train(number: int, params: dict[str, Any], begin: float, random_: random.Random) -> list[dict[str, Any]]:
    seconds = 80 * params["dataset_fraction"] / params["world_size"] ** 0.6 * random_.uniform(0.9, 1.1)
    fit = math.exp(-((math.log10(params["learning_rate"]) + 2.8) ** 2))
    best = 0.95 * fit * (1 - math.exp(-3 * params["dataset_fraction"]))
    events = []
    for step in RUNGS[: 2 if number % 7 == 3 else 3]:
        final = step == RUNGS[-1]
        share = step / RUNGS[-1]
        metrics = {
            "accuracy": best * (1 - math.exp(-4 * share)),
            "eval_loss": 3.2 - 2.4 * best * share,
            "train_loss": 3.2 - 2.6 * best * share,
            "train_seconds": seconds,
            "tokens_per_second": 9000.0 * params["world_size"] ** 0.6,
            "mfu": 0.31,
            "peak_memory_bytes": 1.1e9 / params["world_size"],
        }
        rows = {"distinct_rows": round(TRAIN_ROWS * params["dataset_fraction"]), "train_rows": TRAIN_ROWS}
        details: dict[str, Any] = {"train_losses": [3.2 - 0.1 * n for n in range(1, step // 4 + 1)], "steps_per_loss": 4}
        if final:
            details |= {"memory_by_rank": [HELD_MEMORY] * params["world_size"], **rows, **PEAK}
        report = {
            "step": step,
            "num_steps": 108,
            "fidelity": share,
            "metrics": metrics,
            "final": final,
            "details": details,
        }
        verdict = {"share": share, **VERDICT, "goes_on": step == RUNGS[0]} if number % 7 == 3 else None
        known = {"report": report} if verdict is None else {"report": report, "verdict": verdict}
        events.append(_event("trial_reported", begin + seconds * share, number=number, **known))
    end: dict[str, Any] = {"state": "COMPLETE", "values": metrics, "error": None, "details": details}
    if number % 7 == 3:
        end = {"state": "PRUNED", "values": {}, "error": None}
    elif number % 7 == 6:
        error = {"kind": "out_of_memory", "message": "tried to allocate 2.0 GiB"}
        end = {"state": "FAIL", "values": {}, "error": error, "constraints": {"memory_within_device": 1.0}}
    elif number % 9 == 8:
        end = {"state": "FAIL", "values": {}, "error": {"kind": "diverged", "message": "the loss is not finite"}}
    events.append(_event("trial_finished", events[-1]["time"] + 0.2, number=number, attempts=1, **end))
    return events


def _event(event: str, time: float, **fields: Any) -> dict[str, Any]:
    # As they come out of the ledger, where tuples have become lists.
    return dict(json.loads(json.dumps({"event": event, "time": time, **fields})))
