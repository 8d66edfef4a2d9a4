"""From the user's rows to token tables: split, tokenised and fingerprinted once, the same for every trial."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spaces.spec import DataSpec, ModelSpec
from trainables.docstrings import load_docstrings
from trainables.formats import Columns, DataError, Row, detect, field, read_rows
from trainables.tokenization import IGNORE, Encoded, encode_classification, encode_rows, encode_text, load_tokenizer

EMBEDDED_DATA = "embedded:stdlib-docstrings"
# Holding out must not depend on the search's seed: two searches on the same data then compare.
SPLIT_SEED = 20_240_901
# An answer after this mark is GSM8K's convention; other data name theirs with data.answer_pattern.
DEFAULT_ANSWER_PATTERN = r"####\s*(.+)"
SHARE_WITH_ANSWER = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTable:
    """Rows of tokens, flat, so that they travel through the object store without a copy."""

    input_ids: np.ndarray
    """int32 (num_tokens,)"""
    offsets: np.ndarray
    """int64 (num_rows + 1,): row i is input_ids[offsets[i]:offsets[i + 1]]"""
    targets: np.ndarray | None
    """causal-lm: int32 (num_tokens,), the token itself where the loss counts it, else -100; not shifted"""
    labels: np.ndarray | None
    """classification: int64 (num_rows,)"""

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 (num_rows,): tokens per row"""
        return np.diff(self.offsets)

    @property
    def num_targets(self) -> np.ndarray:
        """int64 (num_rows,): positions per row that the loss counts; one for a classified row.

        The first token of a row is never predicted, so a target there does not count.
        """
        if self.targets is None:
            return np.ones(self.num_rows, dtype=np.int64)
        counted = np.concatenate([[0], np.cumsum(self.targets != IGNORE)])
        first = (self.targets[self.offsets[:-1]] != IGNORE).astype(np.int64)
        return (counted[self.offsets[1:]] - counted[self.offsets[:-1]] - first).astype(np.int64)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return a row's token ids and targets."""
        part = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[part], None if self.targets is None else self.targets[part]

    @classmethod
    def build(cls, encoded: Sequence[Encoded], labels: Sequence[int] | None) -> TokenTable:
        """Lay rows end to end."""
        lengths = np.array([len(e.input_ids) for e in encoded], dtype=np.int64)
        has_targets = bool(encoded) and encoded[0].targets is not None
        return cls(
            input_ids=np.concatenate([np.asarray(e.input_ids, dtype=np.int32) for e in encoded]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            targets=np.concatenate([np.asarray(e.targets, dtype=np.int32) for e in encoded]) if has_targets else None,
            labels=None if labels is None else np.asarray(labels, dtype=np.int64),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """All that a trial trains and is evaluated on."""

    task: str
    train: TokenTable
    evaluation: TokenTable
    test: TokenTable | None
    fraction_key: np.ndarray
    """float64 (num_train_rows,): a row is in fraction f if its key is below f, so smaller fractions are subsets"""
    label_names: tuple[str, ...]
    answers: tuple[str, ...] | None
    """The answer that each evaluation row expects, for exact match"""
    answer_pattern: str | None
    pad_token_id: int
    eos_token_id: int | None
    fingerprint: str
    """sha256 over all tokens, targets and labels"""
    summary: dict[str, Any]
    """What was found in the data, for people; plain values"""

    def subset(self, fraction: float) -> np.ndarray:
        """Return the indices of the training rows in a fraction, ascending: int64 (num_rows,)."""
        return np.flatnonzero(self.fraction_key < fraction)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Split:
    """Raw rows of one role and the source that error messages name."""

    rows: list[Row]
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Raw:
    """What was read, and what is needed to turn it into tokens."""

    model: ModelSpec
    data: DataSpec
    columns: Columns
    tokenizer: Any
    train: _Split
    evaluation: _Split | None
    test: _Split | None


def prepare(model: ModelSpec, data: DataSpec) -> TaskData:
    """Read, split and tokenise the data.

    Raises:
        DataError: with one line for the user.
        trainables.hub.ModelError: the model has no tokenizer that can be loaded.
    """
    train, evaluation, test = _read(data)
    raw = _Raw(
        model=model,
        data=data,
        columns=detect(train.rows, data, train.source, model.task),
        tokenizer=load_tokenizer(model.name, model.revision),
        train=train,
        evaluation=evaluation,
        test=test,
    )
    return _prepare_classification(raw) if model.task == "sequence-classification" else _prepare_causal(raw)


def _read(data: DataSpec) -> tuple[_Split, _Split | None, _Split | None]:
    if data.train == EMBEDDED_DATA:
        train_rows, evaluation_rows = load_docstrings()
        return _Split(rows=train_rows, source=data.train), _Split(rows=evaluation_rows, source=data.train), None

    def read(source: str | None, split: str) -> _Split | None:
        return None if source is None else _Split(rows=read_rows(source, split=split), source=source)

    train = read(data.train, "train")
    assert train is not None  # data.train is required
    return train, read(data.evaluation, "validation"), read(data.test, "test")


def _prepare_classification(raw: _Raw) -> TaskData:
    data, columns, train, evaluation, test = raw.data, raw.columns, raw.train, raw.evaluation, raw.test
    assert columns.text is not None  # `detect` found both for this task
    assert columns.label is not None

    def texts_and_labels(split: _Split) -> tuple[list[str], list[str]]:
        detect(split.rows, data, split.source, raw.model.task)
        texts = [field(row, columns.text or "", split.source, i) for i, row in enumerate(split.rows, start=1)]
        return texts, [field(row, columns.label or "", split.source, i) for i, row in enumerate(split.rows, start=1)]

    texts, labels = texts_and_labels(train)
    names = sorted(set(labels))
    if len(names) < 2:
        raise DataError(f"{train.source}: a single class, '{names[0]}', in column '{columns.label}'; at least two are needed")
    if evaluation is None:
        held = _held_out(labels, data.holdout)
        parts = {"train": np.flatnonzero(~held), "evaluation": np.flatnonzero(held)}
        chosen = {role: ([texts[i] for i in rows], [labels[i] for i in rows]) for role, rows in parts.items()}
        if not len(parts["evaluation"]):
            raise DataError(f"{train.source}: data.holdout: {data.holdout:g} of {len(texts)} rows leaves no row to evaluate on")
    else:
        chosen = {"train": (texts, labels), "evaluation": texts_and_labels(evaluation)}
    if test is not None:
        chosen["test"] = texts_and_labels(test)
    tables, truncated = {}, 0
    for role, (role_texts, role_labels) in chosen.items():
        unknown = sorted(set(role_labels) - set(chosen["train"][1]))
        if unknown:
            where = {"evaluation": evaluation, "test": test}.get(role) or train
            raise DataError(f"{where.source}: label '{unknown[0]}' is in the {role} rows, but in no training row")
        encoded, cut = encode_classification(raw.tokenizer, role_texts, raw.model.max_length)
        truncated += cut if role == "train" else 0
        tables[role] = TokenTable.build(encoded, [names.index(label) for label in role_labels])
    rows = {role: list(zip(*pair, strict=True)) for role, pair in chosen.items()}
    return _assemble(
        raw,
        tables,
        fraction_key=_stratified_key(tables["train"].labels),
        label_names=tuple(names),
        summary=_summary(columns, tables, rows, truncated, example=f"{texts[0]}  ->  {labels[0]}"),
    )


def _prepare_causal(raw: _Raw) -> TaskData:
    data, columns, train, evaluation, test = raw.data, raw.columns, raw.train, raw.evaluation, raw.test
    splits = {
        "train": train.rows,
        "evaluation": evaluation.rows if evaluation else [],
        "test": test.rows if test else [],
    }
    sources = {"train": train.source, "evaluation": (evaluation or train).source, "test": (test or train).source}
    if evaluation is None and columns.kind == "text" and len(train.rows) == 1:
        # Plain text is held out in one piece, its last: random windows would leak their neighbours.
        whole = field(train.rows[0], columns.text or "", train.source, 1)
        cut = round(len(whole) * (1 - data.holdout))
        splits |= {"train": [{columns.text or "": whole[:cut]}], "evaluation": [{columns.text or "": whole[cut:]}]}
    elif evaluation is None:
        held = _held_out([""] * len(train.rows), data.holdout)
        splits["train"] = [row for row, out in zip(train.rows, held, strict=True) if not out]
        splits["evaluation"] = [row for row, out in zip(train.rows, held, strict=True) if out]
    tables, kept, truncated, dropped = {}, {}, 0, 0
    for role, rows in splits.items():
        if role == "test" and not rows:
            continue
        if columns.kind == "text":
            texts = [field(row, columns.text or "", sources[role], i) for i, row in enumerate(rows, start=1)]
            encoded = encode_text(raw.tokenizer, texts, raw.model.max_length)
            kept[role] = [tuple(e.input_ids) for e in encoded]
        else:
            encoded, cut_rows, lost = encode_rows(raw.tokenizer, rows, columns, sources[role], raw.model.max_length)
            kept[role] = [tuple(e.input_ids) for e in encoded]
            truncated, dropped = (truncated + cut_rows, dropped + lost) if role == "train" else (truncated, dropped)
        if not encoded:
            raise DataError(
                f"{sources[role]}: no {role} row has a token to learn from within model.max_length {raw.model.max_length}; "
                "raise model.max_length or give more text"
            )
        tables[role] = TokenTable.build(encoded, None)
    pattern, answers = _answers(data, columns, splits["evaluation"], tables["evaluation"])
    train_table = tables["train"]
    shown = raw.tokenizer.decode(train_table.row(0)[0][:64])
    summary = _summary(columns, tables, kept, truncated, example=shown)
    summary |= {"dropped_rows": dropped, "target_tokens": int(train_table.num_targets.sum())}
    return _assemble(
        raw,
        tables,
        fraction_key=_stratified_key(np.zeros(train_table.num_rows, dtype=np.int64)),
        label_names=(),
        summary=summary,
        answers=answers,
        answer_pattern=pattern,
    )


def _answers(data: DataSpec, columns: Columns, rows: Sequence[Row], table: TokenTable) -> tuple[str | None, tuple[str, ...] | None]:
    """Return the pattern and the expected answers, if the completions have answers that can be extracted."""
    if columns.kind != "prompt_completion" or data.exact_match_rows == 0 or table.num_rows != len(rows):
        return None, None
    pattern = data.answer_pattern or DEFAULT_ANSWER_PATTERN
    found = [re.search(pattern, str(row[columns.completion or ""])) for row in rows]
    if sum(match is not None for match in found) < SHARE_WITH_ANSWER * len(rows):
        return None, None
    return pattern, tuple(match.group(1).strip() if match else "" for match in found)


def _assemble(
    raw: _Raw,
    tables: dict[str, TokenTable],
    *,
    fraction_key: np.ndarray,
    label_names: tuple[str, ...],
    summary: dict[str, Any],
    answers: tuple[str, ...] | None = None,
    answer_pattern: str | None = None,
) -> TaskData:
    model, tokenizer = raw.model, raw.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise DataError(f"model.name: the tokenizer of {model.name} has neither a padding nor an end-of-text token")
    digest = hashlib.sha256(json.dumps([model.task, label_names]).encode())
    for role, table in sorted(tables.items()):
        digest.update(role.encode())
        for array in (table.input_ids, table.offsets, table.targets, table.labels):
            digest.update(b"-" if array is None else array.tobytes())
    return TaskData(
        task=model.task,
        train=tables["train"],
        evaluation=tables["evaluation"],
        test=tables.get("test"),
        fraction_key=fraction_key,
        label_names=label_names,
        answers=answers,
        answer_pattern=answer_pattern,
        pad_token_id=int(pad),
        eos_token_id=tokenizer.eos_token_id,
        fingerprint=digest.hexdigest(),
        summary=summary,
    )


def _held_out(labels: Sequence[str], share: float) -> np.ndarray:
    """Return a mask of the held-out rows, bool (num_rows,): the share of every class, and never its last row."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    members: dict[str, list[int]] = {}
    for i in order:
        members.setdefault(labels[i], []).append(int(i))
    held = np.zeros(len(labels), dtype=bool)
    for rows in members.values():
        held[rows[: min(len(rows) - 1, round(len(rows) * share))]] = True
    return held


def _stratified_key(labels: np.ndarray | None) -> np.ndarray:
    """Return each row's place in a random order of its class, as a share of the class: float64 (num_rows,).

    Rows with a key below f are then f of every class, rounded up, and every class keeps a row.
    """
    assert labels is not None  # only classification asks, and there every row has a label
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    key = np.empty(len(labels))
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        key[rows] = np.arange(len(rows)) / len(rows)
    return key


def _summary(
    columns: Columns, tables: dict[str, TokenTable], rows: dict[str, list[Any]], truncated: int, *, example: str
) -> dict[str, Any]:
    """Count what a user should know before the search: sizes, cuts, duplicates, leaks into evaluation and test."""
    train = tables["train"]
    texts = {role: [row[0] if columns.kind == "classification" else row for row in part] for role, part in rows.items()}
    summary: dict[str, Any] = {
        "format": columns.describe(),
        "train_rows": train.num_rows,
        "evaluation_rows": tables["evaluation"].num_rows,
        "train_tokens": int(train.lengths.sum()),
        "length_percentiles": {str(p): int(np.percentile(train.lengths, p)) for p in (50, 90, 99, 100)},
        "truncated_rows": truncated,
        "duplicate_train_rows": len(rows["train"]) - len(set(rows["train"])),
        "example": example[:300],
    }
    for role, earlier in (("evaluation", "train"), ("test", "train"), ("test", "evaluation")):
        if role in rows:
            seen = set(texts[earlier])
            summary[f"{role}_rows_also_in_{earlier}"] = sum(text in seen for text in texts[role])
    if "test" in tables:
        summary["test_rows"] = tables["test"].num_rows
    return summary
