"""(a) paretune, as a user's file would ask for it: everything by default, so without early stopping (docs/early_stopping.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from benchmarks.contenders.task import LAST_SECONDS, MODEL, SPACE, Run, data_spec
from search.session import start
from spaces.loading import load_spec


def main() -> None:
    run = Run.from_command_line()
    spec = {
        "name": "time-to-front",
        "model": MODEL,
        "data": data_spec(run.data),
        "space": {**SPACE, "lora_alpha": 16},
        "objectives": [{"metric": "accuracy"}, {"metric": "train_seconds", "reference": LAST_SECONDS}],
        "sampler": {"seed": run.seed},
        "budget": {"trials": 10_000, "minutes": run.seconds_left / 60},
        "directory": run.scratch,
    }
    path = Path(run.scratch) / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    params: dict[int, dict[str, Any]] = {}

    def emit(event: dict[str, Any]) -> None:
        if event["event"] == "trial_started":
            params[event["number"]] = {name: value for name, value in event["params"].items() if name in SPACE}
        elif event["event"] == "trial_finished" and event["state"] == "COMPLETE":
            values = event["values"]
            run.finished(params[event["number"]], values["accuracy"], values["train_seconds"])

    start(load_spec(path), emit)


if __name__ == "__main__":
    main()
