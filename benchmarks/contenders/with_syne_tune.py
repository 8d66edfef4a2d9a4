"""(e) Syne Tune: its multi-objective scheduler `MOASHA` on its `LocalBackend`, two workers of one thread.

As https://github.com/syne-tune/syne-tune/blob/main/examples/launch_height_moasha.py shows it. A trial is a process of its own:
that is how the backend works. It polls ten times as often as by default.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
from syne_tune import StoppingCriterion, Tuner
from syne_tune.backend import LocalBackend
from syne_tune.config_space import choice, loguniform, randint
from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

from benchmarks.contenders.syne_tune_trial import SHARES, TIME_ATTR
from benchmarks.contenders.task import SPACE, Run

DOMAINS = {"choice": choice, "log_uniform": lambda ends: loguniform(*ends), "int": lambda ends: randint(*ends)}


def main() -> None:
    run = Run.from_command_line()
    # It draws from numpy's global generator, whatever seed it is given.
    np.random.seed(run.seed)
    random.seed(run.seed)
    space = {name: DOMAINS[kind](values) for name, domain in SPACE.items() for kind, values in domain.items()}
    scheduler = MOASHA(
        config_space={**space, "run": run.path},
        metrics=["error", "seconds"],
        time_attr=TIME_ATTR,
        grace_period=min(SHARES),
        max_t=max(SHARES),
        reduction_factor=3,
        random_seed=run.seed,
    )
    Tuner(
        trial_backend=LocalBackend(entry_point=str(Path(__file__).with_name("syne_tune_trial.py"))),
        scheduler=scheduler,
        stop_criterion=StoppingCriterion(max_wallclock_time=run.seconds_left),
        n_workers=2,
        sleep_time=0.5,
        print_update_interval=600,
        save_tuner=False,
        trial_backend_path=run.scratch,
    ).run()


if __name__ == "__main__":
    main()
