"""One trial of Syne Tune: the script that its backend starts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.contenders.task import RUNGS, SPACE, Run, Task

TIME_ATTR = "ninths"
# Where a trial reports, in ninths of its steps, so that rungs are whole numbers.
SHARES = {round(9 * share): share for share in RUNGS}


def main() -> None:
    from syne_tune import Reporter

    parser = argparse.ArgumentParser()
    parser.add_argument("--run", type=Path)
    for name, domain in SPACE.items():
        ((_, values),) = domain.items()
        parser.add_argument(f"--{name}", type=type(values[0]))
    params: dict[str, Any] = vars(parser.parse_known_args()[0])
    run = Run(**json.loads(params.pop("run").read_text()))
    report = Reporter()
    for point in Task(run.data).train(params, RUNGS):
        if point.share == 1.0:
            run.finished(params, point.accuracy, point.train_seconds)
        # What all of it will take at this pace, so that trials of one rung are compared by what they will cost.
        report(**{TIME_ATTR: round(9 * point.share), "error": 1 - point.accuracy, "seconds": point.train_seconds / point.share})


if __name__ == "__main__":
    main()
