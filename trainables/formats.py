"""Rows of a user's file or hub data set, and which of their columns mean what."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Row = dict[str, Any]
Kind = Literal["classification", "messages", "prompt_completion", "text"]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
TEXT_COLUMNS = ("text", "sentence", "question", "content", "review", "utterance", "query", "document", "title")
LABEL_COLUMNS = ("label", "category", "intent", "class", "target", "topic", "sentiment")
# The order in which formats are tried: the most specific first. A `text` column stands in many files beside better ones.
PROMPT_COLUMNS = (("prompt", "completion"), ("instruction", "output"), ("question", "answer"), ("input", "output"))


class DataError(Exception):
    """The data cannot be used; the message is one line for the user."""


class ColumnNames(Protocol):
    """The columns that the user named; `spaces.spec.DataSpec` is one."""

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
    """Alpaca's `input`: appended to the instruction where it is not empty."""
    completion: str | None = None
    messages: str | None = None

    def describe(self) -> str:
        """Return the format in words."""
        used = (self.messages, self.prompt, self.prompt_input, self.completion, self.text, self.label)
        return f"{self.kind.replace('_', ' and ')} ({', '.join(c for c in used if c)})"


def read_rows(source: str, *, split: str) -> list[Row]:
    """Read all rows of a local file, or of a split of `hf:org/name[:config][@revision]`.

    A `.txt` file is one row with the whole text.

    Raises:
        DataError: the source cannot be read; the message names file and line.
    """
    if source.startswith("hf:"):
        return _read_hub(source, split)
    path = Path(source)
    if path.suffix not in SUFFIXES:
        raise DataError(f"{source}: unknown kind of file; allowed: {', '.join(SUFFIXES)}, or hf:org/name for the hub")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    if path.suffix == ".parquet":
        rows = _read_parquet(source)
    else:
        text = _decode(raw, source)
        rows = _PARSERS[path.suffix](text, source) if text.strip() else []
    if not rows:
        raise DataError(f"{source}: the file is empty; at least one row is needed")
    return rows


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


def _detect_causal(there: list[str], given: ColumnNames, source: str) -> Columns:
    if given.messages or (not given.prompt and not given.text and _first(("messages", "conversations"), there)):
        return Columns(kind="messages", messages=given.messages or _first(("messages", "conversations"), there))
    if given.prompt and given.completion:
        return Columns(kind="prompt_completion", prompt=given.prompt, completion=given.completion)
    if given.prompt or given.completion:
        missing = "completion" if given.prompt else "prompt"
        raise DataError(f"{source}: data.{missing}: needed, because the other of prompt and completion is given")
    if not given.text:
        for prompt, completion in PROMPT_COLUMNS:
            if prompt in there and completion in there:
                extra = "input" if prompt == "instruction" and "input" in there else None
                return Columns(kind="prompt_completion", prompt=prompt, prompt_input=extra, completion=completion)
    text = given.text or _first(TEXT_COLUMNS, there)
    if text is None:
        raise DataError(
            f"{source}: no known format among the columns {', '.join(there)}; name them with data.text, "
            "data.messages, or data.prompt and data.completion"
        )
    return Columns(kind="text", text=text)


def field(row: Mapping[str, Any], column: str, source: str, number: int) -> str:
    """Return a row's text in a column.

    Raises:
        DataError: it is missing or empty, with the row's number (from 1, without the header).
    """
    value = row.get(column)
    if value is None or not str(value).strip():
        raise DataError(f"{source}: row {number}: '{column}' is empty")
    return str(value)


def _first(names: Sequence[str], there: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in there}
    return next((lower[n] for n in names if n in lower), None)


def _decode(raw: bytes, source: str) -> str:
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark before the first column's name.
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{source}: line {line}: invalid UTF-8 (byte 0x{raw[error.start]:02x}); convert it to UTF-8") from error


def _parse_table(text: str, source: str, delimiter: str) -> list[Row]:
    csv.field_size_limit(100_000_000)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{source}: line {reader.line_num}: {error}") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"{source}: row {number}: not as many fields as the header ({len(reader.fieldnames or [])})")
    return rows


def _parse_jsonl(text: str, source: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(_object(_load(line, f"{source}: line {number}"), f"{source}: line {number}"))
    return rows


def _parse_json(text: str, source: str) -> list[Row]:
    data = _load(text, source)
    if not isinstance(data, list):
        raise DataError(f"{source}: expected a list of objects, got {type(data).__name__}")
    return [_object(item, f"{source}: item {number}") for number, item in enumerate(data, start=1)]


def _load(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error.msg}") from error


def _object(item: Any, where: str) -> Row:
    if not isinstance(item, dict):
        raise DataError(f"{where}: expected an object, got {type(item).__name__}")
    return item


def _parse_csv(text: str, source: str) -> list[Row]:
    # What spreadsheet programs write where the comma is the decimal sign.
    heading = text.lstrip().partition("\n")[0]
    return _parse_table(text, source, ";" if ";" in heading and "," not in heading else ",")


_PARSERS = {
    ".csv": _parse_csv,
    ".tsv": lambda text, source: _parse_table(text, source, "\t"),
    ".jsonl": _parse_jsonl,
    ".json": _parse_json,
    ".txt": lambda text, source: [{"text": text}],
}


def _read_parquet(source: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_table(source).to_pylist())
    except pyarrow.ArrowException as error:
        raise DataError(f"{source}: not valid parquet: {error}") from error


def _read_hub(source: str, split: str) -> list[Row]:
    import datasets

    name, _, revision = source.removeprefix("hf:").partition("@")
    name, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split=split, revision=revision or None)
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"{source}: split '{split}' cannot be loaded from the Hugging Face hub: {reason}") from error
    names = {key: f.names for key, f in data.features.items() if isinstance(f, datasets.ClassLabel)}
    rows = [dict(row) for row in data]
    for row in rows:
        for key, labels in names.items():
            # An unknown class is -1 there, or missing.
            row[key] = None if row[key] is None or row[key] < 0 else labels[row[key]]
    return rows
