"""`paretune evaluate`: the members of the front, and the model before, on tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.confirm import chosen_trials, cut_short
from search.errors import UserError
from search.formatting import aligned, number_text
from search.ledger import Ledger, SearchState, objectives_of
from search.publication import publish, reopen
from search.record import HarnessRun, TrialRecord
from search.rendering import harness_lines
from search.results import Results
from search.session import connected_tracker
from search.store import Store
from spaces.config import Precision
from spaces.spec import SearchSpec

if TYPE_CHECKING:
    from trainables.harness import Harness


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluated:
    """One model on the tasks."""

    record: TrialRecord | None
    """None: the model before it was trained."""
    runs: tuple[HarnessRun, ...]
    """One for each task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What models are scored on."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags."""
    limit: int | None = None
    """Rows of each task; None: all."""
    include_path: Path | None = None
    """Directory of further tasks' YAML files."""

    def options(self) -> list[str]:
        """Return it as the command line has it."""
        limit = [] if self.limit is None else ["--limit", str(self.limit)]
        path = [] if self.include_path is None else ["--include-path", str(self.include_path)]
        return ["--tasks", ",".join(self.tasks), *limit, *path]

    def run_of(self, task: str, runs: Sequence[HarnessRun]) -> HarnessRun | None:
        """Return the run on a task that is one of these."""
        return next((run for run in runs if (run.task, run.limit) == (task, self.limit)), None)


def evaluate(store: Store, request: Request, *, trials: str | None, say: Callable[[str], None]) -> list[Evaluated]:
    """Score the model as it was loaded and then trial after trial; what was scored before is not scored again.

    An adapter is merged first, where it can be: what is scored is what `paretune export --merge` writes.

    Args:
        store: the search, of a language model.
        request: the tasks.
        trials: numbers of complete trials with commas; None for the members of the front.
        say: takes a line on what happens.

    Raises:
        UserError: nothing, or nothing further, can be scored, or a trial is none that can be.
        SpecError: model or tracking server cannot be used.
    """
    from trainables.harness import Harness, HarnessError

    if not request.tasks:
        raise UserError("--tasks: there is no task; allowed: names with commas, as arc_easy,hellaswag")
    with store.lock():
        loaded, state = store.load_spec_here(), store.state()
        spec = loaded.spec
        if spec.model.task != "causal-lm":
            what = "lm-evaluation-harness scores language models"
            raise UserError(f"{store.name}: model.task is {spec.model.task}; allowed: causal-lm, since {what}")
        chosen = chosen_trials(list(state.records.values()), objectives_of(spec, state), trials, store.name)
        without = [str(r.number) for r in chosen if not (store.trial_path(r.root) / "final").exists()]
        if without:
            raise UserError(f"--trials: only weights of the front are kept, and there are none of {', '.join(without)}")
        named = [] if trials is None else ["--trials", trials]
        try:
            # The untrained model computes as the trials do beside which it stands.
            precision = chosen[0].trial_config.recipe.precision
            harness = Harness(request.tasks, include_path=request.include_path, limit=request.limit)
            tracker = connected_tracker(loaded)
            reopen(tracker, store, state)
            with cut_short(tracker, state):
                for number in (None, *(record.number for record in chosen)):
                    for event in _scored(store, spec, state, number, request, harness, precision):
                        tracker.submit(event)
                        state.apply(event)
                        run = request.run_of(event["task"], _runs(state, number))
                        who = "the untrained model" if number is None else f"trial {number:04d}"
                        say(f"{who}: {', '.join(harness_lines(run) if run else ())}")
        except HarnessError as error:
            raise UserError(str(error)) from error
        command = store.command("evaluate", store.name, *request.options(), *named)
        publish(Results.of(store, state), tracker, command_for_rest=command)
    return [
        Evaluated(
            record=None if number is None else state.records[number],
            runs=tuple(run for task in request.tasks if (run := request.run_of(task, _runs(state, number))) is not None),
        )
        for number in (None, *(record.number for record in chosen))
    ]


def _scored(
    store: Store, spec: SearchSpec, state: SearchState, number: int | None, request: Request, harness: Harness, precision: Precision
) -> Iterator[dict[str, Any]]:
    """Yield an event of the ledger for each task that a model was not scored on; trials of the same weights share the score."""
    ledger, made = Ledger(store.ledger_path), None
    root = None if number is None else state.records[number].root
    for task in request.tasks:
        if request.run_of(task, _runs(state, number)) is not None:
            continue
        shared = [run for r in state.records.values() if root is not None and r.root == root for run in r.harness]
        known = request.run_of(task, shared)
        if known is None:
            made = made or _model(store, spec, None if number is None else state.records[number], precision)
            scores = harness.scores(*made, task)
        else:
            scores = known.scores
        facts = {"task": task, "limit": request.limit, "version": harness.version, "scores": scores}
        yield ledger.append("harness_scored", number=number, **facts)


def _runs(state: SearchState, number: int | None) -> tuple[HarnessRun, ...]:
    return state.harness if number is None else state.records[number].harness


def _model(store: Store, spec: SearchSpec, record: TrialRecord | None, precision: Precision) -> tuple[Any, Any]:
    """Return a model for use and its tokenizer."""
    from trainables import export as weights
    from trainables.hub import resolve_model
    from trainables.model import BaseModel
    from trainables.tokenization import load_tokenizer

    model = spec.model
    base = BaseModel.load(resolve_model(model.name), model.revision, model.task, ())
    tokenizer = load_tokenizer(base.name, base.revision)
    if record is None:
        return weights.for_use(weights.in_format(base.copy(), precision), base), tokenizer
    config = record.trial_config
    try:
        module = weights.whole_module(config, base, store.trial_path(record.root) / "final")
    except (ValueError, KeyError) as error:
        raise UserError(f"trial {record.number}: its weights cannot be used: {str(error).splitlines()[0]}") from error
    return weights.for_use(module, base), tokenizer


def rows_of(found: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Return a row for each model, ready for JSON; of groups of tasks their parts too."""
    return [
        {
            "trial": None if one.record is None else one.record.number,
            "scores": {name: score for run in one.runs for name, score in run.scores.items()},
        }
        for one in found
    ]


def render(found: Sequence[Evaluated], metrics: Sequence[str]) -> str:
    """Return the scores as a table, with the objectives beside them."""
    texts = [{name: run.text(name) for run in one.runs for name in run.own} for one in found]
    names = list(dict.fromkeys(name for row in texts for name in row))
    table = [["trial", *metrics, *names]]
    for one, row in zip(found, texts, strict=True):
        values = ["-" if one.record is None else number_text(m, one.record.values.get(m)) for m in metrics]
        who = "untrained" if one.record is None else str(one.record.number)
        table.append([who, *values, *(row.get(name, "-") for name in names)])
    limits = {run.limit for one in found for run in one.runs} - {None}
    rows = f", of {', '.join(map(str, limits))} rows of each task" if limits else ""
    return "\n".join([*aligned(table), "", f"lm-evaluation-harness: score ± standard error{rows}"])
