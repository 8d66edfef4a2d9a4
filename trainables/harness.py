"""lm-evaluation-harness on a language model in memory: https://github.com/EleutherAI/lm-evaluation-harness."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

# Rows that are scored together; of unequal length, so that more pad more.
BATCH_ROWS = 8
# Draws for the standard error of scores that are no means of rows; with its own 100,000 a task takes minutes for that.
BOOTSTRAP = 1000


class HarnessError(Exception):
    """The tasks cannot be run; the message is one line for the user."""


class Harness:
    """Tasks that models are scored on."""

    def __init__(self, tasks: Sequence[str], *, include_path: Path | None = None, limit: int | None = None) -> None:
        """Look the tasks up.

        Args:
            tasks: names of tasks or groups of them.
            include_path: directory of further tasks' YAML files.
            limit: rows of each task; None: all.

        Raises:
            HarnessError: lm-evaluation-harness is not installed, or there is no such task.
        """
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise HarnessError("lm-evaluation-harness is not installed; it comes with: pip install -e '.[eval]'") from error
        # It warns of every model that it does not load itself.
        logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
        self.version: str = lm_eval.__version__
        self._limit = limit
        self._manager = TaskManager(include_path=None if include_path is None else str(include_path))
        known = set(self._manager.all_tasks)
        for task in tasks:
            if task not in known:
                close = difflib.get_close_matches(task, known, n=1)
                hint = f"; did you mean '{close[0]}'?" if close else ""
                raise HarnessError(f"--tasks: there is no task '{task}'; allowed: what `lm-eval ls tasks` prints{hint}")

    def scores(self, module: Any, tokenizer: Any, task: str) -> dict[str, dict[str, float | None]]:
        """Return `{"task/metric": {"value": ..., "stderr": ...}}` of a model, on a GPU where there is one.

        Args:
            module: transformers' own, for language modelling; it is left in evaluation mode.
            tokenizer: its tokenizer.
            task: one of those that were looked up.

        Raises:
            HarnessError: a task's data cannot be read, or it does not run on this model.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            module = module.to("cuda" if torch.cuda.is_available() else "cpu")
            model = HFLM(pretrained=module, tokenizer=tokenizer, batch_size=BATCH_ROWS)
            found = simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=self._manager,
                limit=self._limit,
                log_samples=False,
                bootstrap_iters=BOOTSTRAP,
            )
        except Exception as error:  # whatever a task's own code raises
            lines = str(error).splitlines() or ["no message"]
            raise HarnessError(f"--tasks {task}: {type(error).__name__}: {lines[0]}") from error
        return dict(_flat(found["results"]))


def _flat(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, float | None]]]:
    """Yield what is in `{"task": {"acc,none": ..., "acc_stderr,none": ..., "alias": ...}}`; the word behind a comma is a filter."""
    for task, row in results.items():
        for key, value in row.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = row.get(f"{metric}_stderr,{kind}")
                name = f"{task}/{metric}" if kind == "none" else f"{task}/{metric} {kind}"
                yield name, {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
