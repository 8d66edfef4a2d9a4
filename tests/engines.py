"""An engine without Ray, MLflow or workers, and what a worker would report to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from search.engine import Engine
from search.layouts import Forecaster
from search.ledger import Ledger
from search.store import Store
from search.study import SamplerName, Study
from spaces.config import TrialConfig
from spaces.constraints import Limits
from spaces.loading import load_spec

# A rung's verdict.
STOP = {"share": 1 / 9, "goes_on": False, "place": 3, "num_entries": 3, "quota": 1, "front": 2, "num_fronts": 2}


class Clock:
    """Seconds from the real time on, as the ledger's events have it, that pass when a test says so."""

    def __init__(self) -> None:
        self.began = self.now = time.time()

    def __call__(self) -> float:
        return self.now


class Profiles:
    """Says that a step takes a second on one rank and 0.7 on more, once it was timed; knows nothing before."""

    def __init__(self) -> None:
        self.known: set[TrialConfig] = set()

    def __call__(self, config: TrialConfig) -> dict[str, Any]:
        return {}

    def rough_seconds(self, config: TrialConfig) -> tuple[float, str]:
        return 1.0, "estimate"

    def has_profile(self, config: TrialConfig) -> bool:
        return config.of_step() in self.known

    def keep_profile(self, config: TrialConfig, profile: Mapping[str, Any]) -> None:
        self.known.add(config.of_step())

    def values_under(self, config: TrialConfig, trained: TrialConfig, values: Mapping[str, float]) -> dict[str, float]:
        assert self.has_profile(config)
        return {**values, "train_seconds": 1.0 if config.layout.world_size == 1 else 0.7}


def make(
    directory: Path,
    *,
    limits: Limits | None = None,
    trials: int | None = 3,
    budget: Mapping[str, float] = MappingProxyType({}),
    price: float | None = None,
    clock: Callable[[], float] = time.time,
    scheduler: dict[str, Any] | None = None,
    outlook: Forecaster | None = None,
    reuse: bool = True,
    objectives: Sequence[str] = (),
    points: Sequence[Mapping[str, Any]] = (),
    sampler: SamplerName = "tpe",
    **space: Any,
) -> tuple[Engine, list[dict[str, Any]], Store]:
    """Return an engine on a ledger and a study of its own, the events that it tells, and where its files are."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "spec.yaml"
    spec = {
        "name": "s",
        "model": {"name": "m", "task": "sequence-classification"},
        "data": {"train": "t.csv"},
        "space": space,
        "budget": {"trials": trials, **budget},
        "resources": {"price_per_device_hour": price},
        "scheduler": {"method": "asha", **(scheduler or {})},
        "reuse": reuse,
        "objectives": [{"metric": metric} for metric in objectives] or None,
        "directory": str(directory / "runs"),
    }
    path.write_text(yaml.safe_dump(spec))
    loaded = load_spec(path)
    store = Store(root=directory / "runs" / "s")
    store.root.mkdir(parents=True, exist_ok=True)
    seen: list[dict[str, Any]] = []
    ledger = Ledger(store.ledger_path)
    engine = Engine(
        store=store,
        spec=loaded.spec,
        ledger=ledger,
        study=Study(
            space=loaded.spec.space,
            objectives=loaded.spec.resolved_objectives(),
            sampler=sampler,
            seed=0,
            startup_trials=5,
            points_to_evaluate=points,
        ),
        limits=limits or Limits(num_workers=2, hidden_size=64, max_length=32),
        outlook=outlook or Profiles(),
        on_event=seen.append,
        clock=clock,
    )
    return engine, seen, store


def report(accuracy: float, seconds: float, *, final: bool = True, step: int = 9) -> dict[str, Any]:
    """Return a report of a trial of nine steps."""
    return {
        "step": step,
        "num_steps": 9,
        "fidelity": step / 9,
        "metrics": {"accuracy": accuracy, "train_seconds": seconds},
        "final": final,
        "details": {"train_losses": [1.0] * step, "steps_per_loss": 1} | ({"peak_source": "measured_gemm"} if final else {}),
    }
