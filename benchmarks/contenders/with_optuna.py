"""(d) Plain Optuna around the plain loop: one process, two threads, model and data loaded once. The honest strong baseline."""

from __future__ import annotations

import optuna
import torch

from benchmarks.contenders.task import Run, Task, suggest


def main() -> None:
    run = Run.from_command_line()
    torch.set_num_threads(2)
    task = Task(run.data)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        params = suggest(trial)
        point = task.finish(params)
        run.finished(params, point.accuracy, point.train_seconds)
        return point.accuracy, point.train_seconds

    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.TPESampler(seed=run.seed))
    study.optimize(objective, timeout=run.seconds_left)


if __name__ == "__main__":
    main()
