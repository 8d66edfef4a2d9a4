"""From the user's rows to token tables: read, split, tokenised and fingerprinted once, domain by domain."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from spaces.architecture import ModelShape
from spaces.inputs import DATA_ROLES, DataSpec, DomainSpec, ModelSpec
from spaces.metrics import EXACT_MATCH
from trainables.columns import Columns, detect, detect_like, field
from trainables.data import TaskData, TokenTable, check_tokens, expected_text
from trainables.docstrings import load_docstrings
from trainables.formats import DataError, Row, read_rows
from trainables.hub import model_config
from trainables.report import TrialError
from trainables.splits import class_order, held_out, stratified_key
from trainables.tokenization import Encoded, EncodedRows, encode_classification, encode_rows, encode_text, end_tokens, tokenizer_for
from trainables.user_metric import UserMetric

EMBEDDED_DATA = "embedded:stdlib-docstrings"
# An answer after this mark is GSM8K's convention; other data name theirs with data.answer_pattern.
DEFAULT_ANSWER_PATTERN = r"####\s*(.+)"
SHARE_WITH_ANSWER = 0.9
NO_ANSWERS = (
    "data.answer_pattern finds an answer in too few completions of the evaluation rows; allowed: prompts with completions of which "
    "nine in ten have one that model.max_length does not cut off, and none is left out for its length"
)
# What the hub calls the rows of a role.
HUB_SPLITS = {"train": "train", "evaluation": "validation", "test": "test"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Split:
    """Raw rows of one role, which of their columns mean what, and the source that error messages name."""

    rows: list[Row]
    source: str
    columns: Columns


@dataclass(frozen=True, kw_only=True, slots=True)
class _Domain:
    """What was read of one domain."""

    splits: Mapping[str, _Split]
    """By role; that of evaluation may be missing, and that of test."""

    @property
    def train(self) -> _Split:
        return self.splits["train"]

    @property
    def is_whole(self) -> bool:
        """Whether the training rows are one long text."""
        return self.train.columns.kind == "text" and len(self.train.rows) == 1

    def split(self, role: str) -> _Split:
        """Return where the rows of a role are from; those that are held out are training rows."""
        return self.splits.get(role, self.train)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Raw:
    """What was read, and what is needed to turn it into tokens."""

    model: ModelSpec
    data: DataSpec
    tokenizer: Any
    domains: Mapping[str, _Domain]
    kinds: Collection[str]
    """What rows hold."""

    def describe(self) -> str:
        """Return the format in words, by domain where they differ."""
        forms = {name: domain.train.columns.describe() for name, domain in self.domains.items()}
        if len(set(forms.values())) == 1:
            return next(iter(forms.values()))
        return "; ".join(f"{name}: {form}" for name, form in forms.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """The rows of one role, of one domain or of all."""

    encoded: list[Encoded]
    labels: list[str] | None
    rows: list[Hashable]
    """What a row is, to count those that are twice."""
    domains: list[int]
    answers: list[str | None]
    """What `data.answer_pattern` finds in what is left of a completion; none where rows have none, or some were left out."""
    num_cut: int = 0
    num_lost: int = 0
    num_last_only: int = 0

    @classmethod
    def join(cls, parts: Sequence[_Part]) -> _Part:
        """Deal the rows of several domains evenly, so that the first of them are of all."""
        place = np.concatenate([np.arange(len(p.encoded)) / max(1, len(p.encoded)) for p in parts])
        order = np.argsort(place, kind="stable")

        def dealt(lists: Sequence[Sequence[Any]]) -> list[Any]:
            together = [item for items in lists for item in items]
            return [together[i] for i in order] if len(together) == len(order) else []

        return cls(
            encoded=dealt([p.encoded for p in parts]),
            labels=None if parts[0].labels is None else dealt([p.labels or [] for p in parts]),
            rows=dealt([p.rows for p in parts]),
            domains=dealt([p.domains for p in parts]),
            answers=dealt([p.answers for p in parts]),
            num_cut=sum(p.num_cut for p in parts),
            num_lost=sum(p.num_lost for p in parts),
            num_last_only=sum(p.num_last_only for p in parts),
        )


def prepare(model: ModelSpec, data: DataSpec, objectives: Collection[str] = ()) -> TaskData:
    """Read, split and tokenise the data.

    Args:
        model: names the tokenizer and the task.
        data: where the rows are.
        objectives: metrics that the data must have what it takes for.

    Raises:
        DataError: with one line for the user.
        trainables.hub.ModelError: the model has no tokenizer that can be loaded.
    """
    domains = {name: _read(source, model.task) for name, source in data.sources.items()}
    kinds = {domain.train.columns.kind for domain in domains.values()}
    raw = _Raw(model=model, data=data, tokenizer=tokenizer_for(model, data, kinds), domains=domains, kinds=kinds)
    parts = _classified(raw) if model.task == "sequence-classification" else _completed(raw)
    joined = {role: _Part.join(list(of_role.values())) for role, of_role in parts.items()}
    if EXACT_MATCH in objectives and len(kinds) > 1:
        raise DataError("objectives: exact_match: some domains have no prompts with completions; allowed: domains that all have")
    if EXACT_MATCH in objectives and not _has_answers(data, joined["evaluation"]):
        raise DataError(f"objectives: exact_match has nothing to compare: {NO_ANSWERS}")
    return _assemble(raw, joined)


def _read(source: DomainSpec, task: str) -> _Domain:
    if source.train == EMBEDDED_DATA:
        train_rows, evaluation_rows = load_docstrings()
        read = {"train": (train_rows, source.train), "evaluation": (evaluation_rows, source.train)}
    else:
        files = {role: file for role in DATA_ROLES if (file := getattr(source, role)) is not None}
        read = {role: (read_rows(file, split=HUB_SPLITS[role]), file) for role, file in files.items()}
    train_rows, train_file = read["train"]
    columns = detect(train_rows, source, train_file, task)
    splits = {
        role: _Split(rows=rows, source=file, columns=detect_like(columns, rows, source, file, task))
        for role, (rows, file) in read.items()
    }
    return _Domain(splits=splits)


def _classified(raw: _Raw) -> dict[str, dict[str, _Part]]:
    """Return the rows of every role and domain: texts with labels."""
    found: dict[str, dict[str, _Part]] = {role: {} for role in DATA_ROLES}
    read = {name: {role: _texts_and_labels(split, raw) for role, split in d.splits.items()} for name, d in raw.domains.items()}
    known = {label for pairs in read.values() for label in pairs["train"][1]}
    if len(known) < 2:
        (label,), domain = known, next(iter(raw.domains.values()))
        column = domain.train.columns.label
        raise DataError(f"{domain.train.source}: a single class, '{label}', in column '{column}'; at least two are needed")
    for index, (name, domain) in enumerate(raw.domains.items()):
        pairs = read[name]
        texts, labels = pairs["train"]
        if "evaluation" not in pairs:
            held = _held_out(texts, labels, domain, raw.data)
            for role, mask in (("train", ~held), ("evaluation", held)):
                rows = np.flatnonzero(mask)
                pairs[role] = [texts[i] for i in rows], [labels[i] for i in rows]
        for role, (role_texts, role_labels) in pairs.items():
            encoded, cut = encode_classification(raw.tokenizer, role_texts, raw.model.max_length)
            found[role][name] = _Part(
                encoded=encoded,
                labels=role_labels,
                rows=list(zip(role_texts, role_labels, strict=True)),
                domains=[index] * len(encoded),
                answers=[],
                num_cut=cut,
            )
    for role in ("evaluation", "test"):
        for name, part in found[role].items():
            unknown = [label for label in part.labels or () if label not in known]
            if unknown:
                source, names = raw.domains[name].split(role).source, sorted(set(unknown))
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                many = f"{len(unknown)} of {len(part.encoded)} {role} rows"
                raise DataError(f"{source}: label '{names[0]}'{more} is in {many}, but in no training row")
    return {role: parts for role, parts in found.items() if parts}


def _texts_and_labels(split: _Split, raw: _Raw) -> tuple[list[str], list[str]]:
    def column(name: str | None) -> list[str]:
        return [field(row, name or "", split.source, i) for i, row in enumerate(split.rows, start=1)]

    return column(split.columns.text), [label.strip() for label in column(split.columns.label)]


def _completed(raw: _Raw) -> dict[str, dict[str, _Part]]:
    """Return the rows of every role and domain: plain text, prompts with completions, or chats."""
    found: dict[str, dict[str, _Part]] = {role: {} for role in DATA_ROLES}
    for index, (name, domain) in enumerate(raw.domains.items()):
        for role, rows in _rows_by_role(domain, raw.data).items():
            found[role][name] = part = _encoded(raw, domain, role, rows, index)
            if not part.encoded:
                raise DataError(
                    f"{domain.split(role).source}: no {role} row has a token to learn from within model.max_length "
                    f"{raw.model.max_length}; raise model.max_length or give more text"
                )
    return {role: parts for role, parts in found.items() if parts}


def _held_out(rows: Sequence[Hashable], labels: Sequence[str], domain: _Domain, data: DataSpec) -> np.ndarray:
    """Return a mask of the rows that are held out.

    Raises:
        DataError: none is.
    """
    held = held_out(rows, labels, data.holdout)
    if not held.any():
        num_different = len(set(rows))
        twice = "" if num_different == len(rows) else f", of which {num_different} differ,"
        raise DataError(
            f"{domain.train.source}: data.holdout: {data.holdout:g} of {len(rows)} rows{twice} leaves none to evaluate on"
        )
    return held


def _rows_by_role(domain: _Domain, data: DataSpec) -> dict[str, list[Row]]:
    train, columns = domain.train, domain.train.columns
    splits = {role: split.rows for role, split in domain.splits.items()}
    if "evaluation" in splits:
        return splits
    if domain.is_whole:
        # Plain text is held out in one piece, its last: random windows would leak their neighbours.
        column = columns.text or ""
        whole = field(train.rows[0], column, train.source, 1)
        cut = round(len(whole) * (1 - data.holdout))
        return splits | {"train": [{column: whole[:cut]}], "evaluation": [{column: whole[cut:]}]}
    held = _held_out([columns.texts(row) for row in train.rows], [""] * len(train.rows), domain, data)
    masks = {"train": ~held, "evaluation": held}
    return splits | {role: [row for row, chosen in zip(train.rows, mask, strict=True) if chosen] for role, mask in masks.items()}


def _encoded(raw: _Raw, domain: _Domain, role: str, rows: list[Row], index: int) -> _Part:
    columns, source = domain.split(role).columns, domain.split(role).source
    answers: list[str | None] = []
    if columns.kind == "text":
        texts = [field(row, columns.text or "", source, i) for i, row in enumerate(rows, start=1)]
        found = EncodedRows(encoded=encode_text(raw.tokenizer, texts, raw.model.max_length, is_whole=domain.is_whole))
    else:
        found = encode_rows(raw.tokenizer, rows, columns, source, raw.model.max_length)
        if columns.kind == "prompt_completion" and not found.num_lost:
            matches = [re.search(_pattern(raw.data), str(row[columns.completion or ""])) for row in rows]
            found_answers = [((match.group(1) or "").strip() or None) if match else None for match in matches]
            answers = [None if i in found.without_end else answer for i, answer in enumerate(found_answers)]
    return _Part(
        encoded=found.encoded,
        labels=None,
        rows=[tuple(e.input_ids) for e in found.encoded],
        domains=[index] * len(found.encoded),
        answers=answers,
        num_cut=found.num_cut,
        num_lost=found.num_lost,
        num_last_only=found.num_last_only,
    )


def _pattern(data: DataSpec) -> str:
    return data.answer_pattern or DEFAULT_ANSWER_PATTERN


def _has_answers(data: DataSpec, part: _Part) -> bool:
    """Return whether completions have answers that can be extracted."""
    num_found = sum(answer is not None for answer in part.answers)
    return data.exact_match_rows > 0 and bool(part.answers) and num_found >= SHARE_WITH_ANSWER * len(part.answers)


def _assemble(raw: _Raw, parts: Mapping[str, _Part]) -> TaskData:
    model, data, tokenizer, train = raw.model, raw.data, raw.tokenizer, parts["train"]
    num_tokens = ModelShape.from_config(model_config(model.name, model.revision)).vocab_size
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i < num_tokens), None)
    if pad is None:
        raise DataError(f"model.name: the tokenizer of {model.name} has neither a padding nor an end-of-text token")
    names = tuple(sorted(set(train.labels or ()), key=class_order))
    has_answers = _has_answers(data, parts["evaluation"])
    tables = {role: _table(part, names, data) for role, part in parts.items()}
    check_tokens(tokenizer, model.name, tables, num_tokens)
    for role in tables.keys() - {"train"} if has_answers else ():
        if _has_answers(data, parts[role]):
            tables[role] = replace(tables[role], answers=tuple(answer or "" for answer in parts[role].answers))
    digest = hashlib.sha256(json.dumps([model.task, names]).encode())
    for role, table in sorted(tables.items()):
        digest.update(role.encode())
        for array in (table.input_ids, table.offsets, table.targets, table.labels):
            digest.update(b"-" if array is None else array.tobytes())
        if table.domains is not None:
            digest.update(table.domains.tobytes())
    weights = [source.weight for source in data.sources.values() if source.weight is not None]
    if data.domains is not None:
        digest.update(json.dumps([list(data.domains), weights]).encode())
    return TaskData(
        task=model.task,
        train=tables["train"],
        evaluation=tables["evaluation"],
        test=tables.get("test"),
        fraction_key=stratified_key(list(zip(train.labels or [""] * len(train.domains), train.domains, strict=True))),
        label_names=names,
        answer_pattern=_pattern(data) if has_answers else None,
        pad_token_id=int(pad),
        end_token_ids=end_tokens(tokenizer, raw.kinds),
        chat_template=tokenizer.chat_template if data.chat_template is not None else None,
        fingerprint=digest.hexdigest(),
        summary=_summary(raw, tables, parts),
        metric=_checked_metric(raw, tables["evaluation"], names),
        domains=tuple(data.domains or ()),
        domain_weights=tuple(weights) or None,
    )


def _table(part: _Part, label_names: Sequence[str], data: DataSpec) -> TokenTable:
    index = {name: i for i, name in enumerate(label_names)}
    labels = None if part.labels is None else [index[label] for label in part.labels]
    return TokenTable.build(part.encoded, labels, None if data.domains is None else part.domains)


def _checked_metric(raw: _Raw, evaluation: TokenTable, label_names: tuple[str, ...]) -> UserMetric | None:
    """Return the user's own score, which was tried on perfect predictions: better now than at the end of the first trial."""
    data = raw.data
    if data.metric is None:
        return None
    metric = UserMetric.load(data.metric)
    if evaluation.labels is not None:
        references = [label_names[label] for label in evaluation.labels]
    elif raw.kinds == {"prompt_completion"}:
        references = [expected_text(evaluation, i, raw.tokenizer) for i in range(min(data.exact_match_rows, evaluation.num_rows))]
    else:
        raise DataError("data.metric: scores labels, or completions of prompts; these rows have neither")
    try:
        if references:
            metric(references, references)
    except TrialError as error:
        raise DataError(f"{error} (given the references as predictions)") from error
    return metric


def _summary(raw: _Raw, tables: Mapping[str, TokenTable], parts: Mapping[str, _Part]) -> dict[str, Any]:
    """Count what a user should know before the search: sizes, cuts, duplicates, leaks into evaluation and test."""
    train, is_classified = tables["train"], parts["train"].labels is not None
    seen: Callable[[Any], Hashable] = (lambda row: row[0]) if is_classified else (lambda row: row)
    texts = {role: [seen(row) for row in part.rows] for role, part in parts.items()}
    summary: dict[str, Any] = {
        "format": raw.describe(),
        "train_rows": train.num_rows,
        "evaluation_rows": tables["evaluation"].num_rows,
        "train_tokens": int(train.lengths.sum()),
        "length_percentiles": {str(p): int(np.percentile(train.lengths, p)) for p in (50, 90, 99, 100)},
        "truncated_rows": parts["train"].num_cut,
        "duplicate_train_rows": len(parts["train"].rows) - len(set(parts["train"].rows)),
        "example": _example(raw, parts["train"])[:300],
    }
    for role in ("evaluation", "test"):
        if role in parts and parts[role].num_cut:
            summary[f"truncated_{role}_rows"] = parts[role].num_cut
    for role, earlier in (("evaluation", "train"), ("test", "train"), ("test", "evaluation")):
        if role in parts:
            known = set(texts[earlier])
            summary[f"{role}_rows_also_in_{earlier}"] = sum(text in known for text in texts[role])
    if "test" in tables:
        summary["test_rows"] = tables["test"].num_rows
    if not is_classified:
        summary |= {"dropped_rows": parts["train"].num_lost, "target_tokens": int(train.num_targets.sum())}
    if parts["train"].num_last_only:
        summary["chats_of_which_the_last_answer_counts"] = parts["train"].num_last_only
    if raw.data.domains is not None:
        counts = {role: np.bincount(part.domains, minlength=len(raw.domains)).tolist() for role, part in parts.items()}
        summary["domains"] = {name: {role: count[i] for role, count in counts.items()} for i, name in enumerate(raw.domains)}
    return summary


def _example(raw: _Raw, train: _Part) -> str:
    if train.labels is None:
        return str(raw.tokenizer.decode(train.encoded[0].input_ids[:64]))
    return "  ->  ".join(cast("tuple[str, str]", train.rows[0]))
