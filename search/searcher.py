"""Ray Tune's side of the search: trials come from the engine, and what they report goes back to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ray.tune.search import Searcher

from search.engine import Assignment, Engine
from search.relay import JOB, MESSAGE, NUMBER
from trainables.job import Job


class EngineSearcher(Searcher):
    """Hands out the engine's trials and records every end, whoever caused it; reports are the scheduler's.

    Tune's own snapshots hold nothing of it: the ledger is what a resume reads.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_concurrent: int,
        submit_job: Callable[[Job], Any],
        stop_job: Callable[[str], Any],
        interrupted: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._engine = engine
        self._max_concurrent = max_concurrent
        self._submit_job, self._stop_job = submit_job, stop_job
        self._interrupted = interrupted
        self._assignments: dict[str, Assignment] = {}

    # Ray's own annotation forgets FINISHED.
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Return the next trial's job, None while there is none to hand out, or FINISHED when there never will be."""
        # By Tune's own count: a trial that has told its end still has its actor, and Tune would start another for the next one.
        if len(self._assignments) >= self._max_concurrent:
            return None
        assignment = self._engine.next()
        if assignment is None:
            return Searcher.FINISHED if self._engine.is_handed_out else None
        self._assignments[trial_id] = assignment
        job = self._engine.job(assignment)
        # At once, and not only when its relay is there: workers would wait for it. What a job reports waits in the dispatcher.
        self._submit_job(job)
        return {JOB: job, NUMBER: assignment.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record the beginning and the end that the worker group told."""
        message, number = json.loads(result[MESSAGE]), self._assignments[trial_id].number
        if message["event"] == "started":
            self._engine.began(number, message["at"], message["attempt"])
        elif message["event"] == "ended":
            self._engine.ended(number, message)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record a trial that Tune ended before its worker group did: stopped at a rung or because the time is over, or lost with the
        process that relayed it.

        When the whole search is interrupted, its trials stay in flight, for a resume.
        """
        assignment = self._assignments.pop(trial_id)
        if self._interrupted():
            return
        lost = {
            "state": "failed",
            "kind": "driver_lost",
            "message": "the process that relayed the trial's reports died",
        }
        self._engine.ended(assignment.number, lost if error else {"state": "stopped"})
        self._stop_job(self._engine.job(assignment).job_id)

    def stop_rest(self) -> None:
        """Stop what still trains when Tune has left: of trials that it ends with its whole loop it tells nobody."""
        for trial_id in list(self._assignments):
            self.on_trial_complete(trial_id)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: see the class."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: see the class."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Do nothing: see the class."""
