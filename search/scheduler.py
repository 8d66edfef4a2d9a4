"""Ray Tune's scheduler of the search: every report is recorded here, and a trial that its rung lets go no further is stopped."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from search.engine import Engine
from search.relay import MESSAGE, NUMBER
from search.rungs import Rungs

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial


class RungScheduler(FIFOScheduler):
    """Successive halving over several objectives, for which Ray has no scheduler.

    Tune asks the scheduler first, and does not show the searcher the result that a trial is stopped at; so it is the scheduler that
    hands the reports to the engine. `metric` stays Ray's default: Tune looks a named one up in every result, and none stands there.
    """

    def __init__(self, engine: Engine, rungs: Rungs) -> None:
        super().__init__()
        self._engine = engine
        self._rungs = rungs

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, Any]) -> str:
        """Record a report with its rung's verdict; STOP makes Tune end the trial and tell the searcher so."""
        message = json.loads(result[MESSAGE])
        if message["event"] != "report":
            return TrialScheduler.CONTINUE
        number, report = trial.config[NUMBER], message["report"]
        verdict = self._rungs.judge(number, report)
        self._engine.reported(number, report, verdict)
        return TrialScheduler.CONTINUE if verdict is None or verdict["goes_on"] else TrialScheduler.STOP

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles what it was given; the ledger is what a resume reads.
        return {}
