"""Rows of a user's file or hub data set."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")


class DataError(Exception):
    """The data cannot be used; the message is one line for the user."""


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
        if path.suffix == ".parquet":
            rows = _read_parquet(path)
        else:
            text = _decode(path.read_bytes(), source)
            rows = _PARSERS[path.suffix](text, source) if text.strip() else []
    except OSError as error:
        raise DataError(f"{source}: cannot be read: {error.strerror}") from error
    if not rows:
        raise DataError(f"{source}: the file is empty; at least one row is needed")
    return rows


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
    names = [name for name in reader.fieldnames or () if name]  # spreadsheet programs leave some without one
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{source}: line 1: two columns are named '{twice[0]}'")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"{source}: row {number}: not as many fields as the header ({len(reader.fieldnames or [])})")
    return rows


def _parse_jsonl(text: str, source: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{source}: line {number}"
            try:
                rows.append(_object(json.loads(line), where))
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON: {error.msg}") from error
    return rows


def _parse_json(text: str, source: str) -> list[Row]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # lines of JSON, which many files of this name hold
            return _parse_jsonl(text, source)
        raise DataError(f"{source}: not valid JSON: {error.msg}") from error
    if not isinstance(data, list):
        raise DataError(f"{source}: expected a list of objects, got {type(data).__name__}")
    return [_object(item, f"{source}: item {number}") for number, item in enumerate(data, start=1)]


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


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        try:
            return list(pyarrow.parquet.read_table(file).to_pylist())
        except pyarrow.ArrowException as error:
            raise DataError(f"{path}: not valid parquet: {error}") from error


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
