"""`paretune export`: one trial as a directory that plain transformers and PEFT load, with a model card that says where it is from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.errors import UserError
from search.formatting import number_text
from search.model_card import base_name, model_card
from search.pareto import eligible
from search.record import TrialRecord
from search.results import Results
from search.session import check_same_data
from search.store import Store
from spaces.loading import LoadedSpec, SpecError


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written."""

    directory: Path
    is_merged: bool
    """Whether an adapter is in the weights."""
    scores: dict[str, float]
    """On the evaluation rows, where the weights are not those that the trial was scored with; else empty."""

    @property
    def text(self) -> str:
        """What to tell the user."""
        scores = ", ".join(f"{name} {number_text(name, value)}" for name, value in self.scores.items())
        return f"{self.directory}" + (f"\nas written, on the evaluation rows: {scores}" if scores else "")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {"directory": str(self.directory), "is_merged": self.is_merged, "scores": self.scores}


def export(store: Store, number: int, *, merge: bool, output: Path | None, say: Callable[[str], None]) -> Exported:
    """Write a trial's model.

    Args:
        store: the search.
        number: the trial; complete, and with its weights still there.
        merge: whether to add the adapter to the weights, so that transformers alone loads them.
        output: where to; by default below the search's own directory.
        say: takes a line on what takes long.

    Raises:
        UserError: the data changed since the search began, or there is no such trial; nothing was written.
        SpecError: model or data cannot be used; nothing was written.
    """
    from trainables import export as weights
    from trainables.hub import resolve_model
    from trainables.model import BaseModel

    results = Results.of(store)
    record = _chosen(number, store, results)
    config = record.trial_config
    merge = merge and config.recipe.adapter != "none"  # there is nothing to merge: it is whole
    target = (output or store.export_path(number, is_merged=merge)).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: something is there already; remove it, or name another directory with --output")
    data = _data(store.load_spec())
    check_same_data(data.fingerprint, store, results.state)
    model = results.spec.model
    base = BaseModel.load(resolve_model(model.name), model.revision, model.task, data.label_names, data.pad_token_id)
    try:
        module = (weights.merged_module if merge else weights.trained_module)(config, base, _weights(store, record))
        module = weights.as_saved(module, config)
        # Where rounding or a spread out base makes them other weights than those that were scored.
        is_whole = merge or config.recipe.adapter == "none"
        is_other = is_whole and (config.recipe.quantization, config.recipe.precision) != ("none", "fp32")
        if is_other:
            say(f"these are not quite the weights that were scored: scoring them on {data.evaluation.num_rows:,} evaluation rows")
        scores = weights.scores(module, config, data, base, results.spec.data.exact_match_rows) if is_other else {}
        is_plain = config.recipe.quantization == "none" or merge or model.task == "causal-lm"
        card = model_card(
            results, record, is_merged=merge, scores=scores, unquantized=[] if is_plain else weights.unquantized(module)
        )
        with _whole(target) as directory:
            how = {"end_token_ids": data.end_token_ids, "chat_template": data.chat_template, "origin": base_name(model.name)}
            weights.save(module, base, config, directory, **how)
            (directory / "README.md").write_text(card)
    except (ValueError, KeyError) as error:
        raise UserError(f"trial {number}: its weights cannot be exported: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    return Exported(directory=target, is_merged=merge, scores=scores)


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """Give a directory that becomes the target once it is filled, and else is gone."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        for path in temporary.rglob("*"):
            path.chmod(path.stat().st_mode | 0o444)  # safetensors writes for its owner alone
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _chosen(number: int, store: Store, results: Results) -> TrialRecord:
    """Return the trial, if it has weights."""
    record = results.state.records.get(number)
    members = ", ".join(str(member.number) for member in results.members) or "none"
    if record is None:
        raise UserError(f"trial {number}: {results.name} has no such trial; its front: {members}")
    if record not in eligible([record], results.objectives):
        raise UserError(f"trial {number} is {record.state.value}, and only complete trials have weights; the front: {members}")
    if not _weights(store, record).exists():
        again = results.command_of(record)
        raise UserError(f"trial {number}: only weights of the front ({members}) are kept; this trains it again: {again}")
    return record


def _weights(store: Store, record: TrialRecord) -> Path:
    return store.trial_path(record.root) / "final"


def _data(loaded: LoadedSpec) -> Any:
    from trainables import preparation
    from trainables.formats import DataError
    from trainables.hub import ModelError

    try:
        # Weights are written without the user's own score, whose module may not be here.
        return preparation.prepare(loaded.spec.model, loaded.spec.data.model_copy(update={"metric": None}))
    except (DataError, ModelError) as error:
        raise SpecError([loaded.locate(str(error))]) from error
