"""Which columns of a user's rows mean what."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from trainables.formats import DataError, Row

Kind = Literal["classification", "messages", "prompt_completion", "text"]

# Of a classified row; of a document, where a question or a title would be a part of it alone.
TEXT_COLUMNS = ("text", "sentence", "question", "content", "review", "utterance", "query", "document", "title")
DOCUMENT_COLUMNS = ("text", "content", "document", "sentence", "review", "utterance")
LABEL_COLUMNS = ("label", "category", "intent", "class", "target", "topic", "sentiment")
CHAT_COLUMNS = ("messages", "conversations", "conversation")
# The order in which formats are tried: the most specific first. A `text` column stands in many files beside better ones.
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query", "input")
COMPLETION_COLUMNS = ("completion", "output", "answer", "response")
# What a prompt is about, in a column of its own: Alpaca's, Dolly's, and that of question answering.
INPUT_COLUMNS = {"instruction": ("input", "context"), "question": ("context",), "query": ("context",)}
# Where the user names the prompt, what it is about would be named too, had the file a key for it; Alpaca's three belong together.
NAMED_INPUT_COLUMNS = {"instruction": ("input",)}


class ColumnNames(Protocol):
    """The columns that the user named; `spaces.inputs.DomainSpec` is one."""

    text: str | None
    label: str | None
    prompt: str | None
    completion: str | None
    messages: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns are used, and as what."""

    kind: Kind
    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    prompt_input: str | None = None
    """Appended to the prompt where it is not empty."""
    completion: str | None = None
    messages: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        used = (self.messages, self.prompt, self.completion, self.text, self.label)
        return tuple(name for name in used if name is not None)

    def describe(self) -> str:
        """Return the format in words."""
        used = (self.messages, self.prompt, self.prompt_input, self.completion, self.text, self.label)
        return f"{self.kind.replace('_', ' and ')} ({', '.join(c for c in used if c)})"

    def texts(self, row: Row) -> tuple[str, ...]:
        """Return all that is used of a row but its label."""
        used = (self.messages, self.prompt, self.prompt_input, self.completion, self.text)
        return tuple(str(row.get(name)) for name in used if name)


def detect(rows: Sequence[Row], given: ColumnNames, source: str, task: str) -> Columns:
    """Return the columns to use: those the user named, else the first format whose columns are there.

    Raises:
        DataError: a named column is missing, or no known format fits.
    """
    there = list(rows[0])
    for key in ("text", "label", "prompt", "completion", "messages"):
        name = getattr(given, key)
        if name is not None and name not in there:
            close = difflib.get_close_matches(name, there, n=1, cutoff=0.4)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise DataError(f"{source}: data.{key}: no column '{name}'; there are: {', '.join(there)}{hint}")
    if task == "sequence-classification":
        label = given.label or _first(LABEL_COLUMNS, there)
        text = given.text or _first([c for c in TEXT_COLUMNS if c != label], there)
        if text is None or label is None:
            missing = "text" if text is None else "label"
            usual = TEXT_COLUMNS if text is None else LABEL_COLUMNS
            raise DataError(
                f"{source}: no column for the {missing} among {', '.join(there)}; name it with data.{missing}, "
                f"or call it one of {', '.join(usual)}"
            )
        return Columns(kind="classification", text=text, label=label)
    return _detect_causal(there, given, source)


def detect_like(train: Columns, rows: Sequence[Row], given: ColumnNames, source: str, task: str) -> Columns:
    """Return the columns of rows that are not trained: those of the training rows where they are there, so that both mean the same.

    Raises:
        DataError: they are not, and no other format of the same kind fits.
    """
    if all(name in rows[0] for name in train.names):
        return train
    found = detect(rows, given, source, task)
    if found.kind != train.kind:
        missing = next(name for name in train.names if name not in rows[0])
        raise DataError(f"{source}: no column '{missing}', which the training rows have; there are: {', '.join(rows[0])}")
    return found


def _detect_causal(there: list[str], given: ColumnNames, source: str) -> Columns:
    chat = given.messages or (None if given.prompt or given.text else _first(CHAT_COLUMNS, there))
    if chat:
        return Columns(kind="messages", messages=chat)
    if (given.prompt is None) != (given.completion is None):
        missing = "completion" if given.prompt else "prompt"
        raise DataError(f"{source}: data.{missing}: needed, because the other of prompt and completion is given")
    if given.prompt or not given.text:
        prompt, completion = given.prompt or _first(PROMPT_COLUMNS, there), given.completion or _first(COMPLETION_COLUMNS, there)
        if prompt and completion:
            usual = (INPUT_COLUMNS if given.prompt is None else NAMED_INPUT_COLUMNS).get(prompt.lower(), ())
            about = _first([name for name in usual if name != completion.lower()], there)
            return Columns(kind="prompt_completion", prompt=prompt, prompt_input=about, completion=completion)
    text = given.text or _first(DOCUMENT_COLUMNS, there)
    if text is None:
        raise DataError(
            f"{source}: no known format among the columns {', '.join(there)}; name them with data.text, "
            "data.messages, or data.prompt and data.completion"
        )
    return Columns(kind="text", text=text)


def field(row: Mapping[str, Any], column: str, source: str, number: int) -> str:
    """Return a row's text in a column.

    Raises:
        DataError: it is missing, empty or no number, with the row's number (from 1, without the header).
    """
    value = row.get(column)
    if value is None or not str(value).strip() or (isinstance(value, float) and math.isnan(value)):
        raise DataError(f"{source}: row {number}: '{column}' is empty")
    return str(value)


def _first(names: Sequence[str], there: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in there}
    return next((lower[n] for n in names if n in lower), None)
