"""Text to tokens, and which of them the loss counts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spaces.inputs import TEMPLATE_SUFFIXES, DataSpec, ModelSpec
from trainables.chats import answer_ends, render_chat
from trainables.columns import Columns, field
from trainables.formats import DataError, Row
from trainables.hub import ModelError, resolve_model

IGNORE = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """One row of tokens; `targets` is absent for classification."""

    input_ids: Sequence[int]
    targets: Sequence[int] | None


def load_tokenizer(name: str, revision: str | None) -> Any:
    """Load a model's tokenizer.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_model(name), revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"model.name: no tokenizer for {name}: {str(error).splitlines()[0]}") from error


def tokenizer_for(model: ModelSpec, data: DataSpec, kinds: Collection[str]) -> Any:
    """Return the model's tokenizer, with the chat template that the data name.

    Args:
        model: names it.
        data: may name a template.
        kinds: what rows hold, as `Columns.kind`.

    Raises:
        ModelError: there is no tokenizer.
        DataError: the template cannot be used: there is none, or no chats, or a model would not learn where its answers end.
    """
    tokenizer = load_tokenizer(model.name, model.revision)
    if data.chat_template is None:
        return tokenizer
    if "messages" not in kinds:
        words = ", ".join(kind.replace("_", " and ") for kind in sorted(kinds))
        raise DataError(f"data.chat_template: is for chats, and the rows hold {words}")
    tokenizer.chat_template = _read_template(data.chat_template)
    try:
        ends = answer_ends(tokenizer)
    except Exception as error:  # whatever a template does
        raise DataError(f"data.chat_template: {data.chat_template} refuses a question with its answer: {error}") from error
    if not ends:
        raise DataError(
            f"data.chat_template: {data.chat_template} ends answers with no special token of this model, so that it would not learn "
            f"where to stop; allowed: one that ends them with {{{{ eos_token }}}}, here {tokenizer.eos_token}"
        )
    return tokenizer


def _read_template(source: str) -> str:
    """Return the template in a Jinja file, or that of a model's tokenizer."""
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template: {source} cannot be read: {error}") from error
    if path.suffix in TEMPLATE_SUFFIXES:
        raise DataError(f"data.chat_template: no such file: {source}")
    try:
        return str(load_tokenizer(source, None).get_chat_template())
    except (ModelError, ValueError) as error:
        raise DataError(f"data.chat_template: {source} is no file, and no model whose tokenizer has a template") from error


def encode_classification(tokenizer: Any, texts: Sequence[str], max_length: int) -> tuple[list[Encoded], int]:
    """Return the rows, cut at the right end, and how many were cut."""
    whole = tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    short = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    cut = sum(len(a) > len(b) for a, b in zip(whole, short, strict=True))
    return [Encoded(input_ids=ids, targets=None) for ids in short], cut


def encode_text(tokenizer: Any, texts: Sequence[str], max_length: int, *, is_whole: bool) -> list[Encoded]:
    """Tokenise plain text and cut it into windows of `max_length`; the loss counts every token.

    Each text has windows of its own, so that none sees another. A last window of less than two tokens is left out.

    Args:
        tokenizer: the model's.
        texts: at least one.
        max_length: tokens of a window.
        is_whole: the training rows are one long text; otherwise each text is a document between a begin- and an end-of-text token,
            where the model has these.
    """
    documents = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    if not is_whole:
        begin, end = _begin(tokenizer), [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        documents = [[*begin, *document, *end] for document in documents]
    windows = [document[i : i + max_length] for document in documents for i in range(0, len(document), max_length)]
    return [Encoded(input_ids=window, targets=window) for window in windows if len(window) > 1]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedRows:
    """Rows for a language model as tokens."""

    encoded: list[Encoded]
    num_cut: int = 0
    num_lost: int = 0
    """Left out, because no target was left."""
    without_end: frozenset[int] = frozenset()
    """Which of `encoded` lack the end of what is to be learned, for their length."""
    num_last_only: int = 0
    """Chats of which the last answer alone counts."""


def encode_rows(tokenizer: Any, rows: Sequence[Row], columns: Columns, source: str, max_length: int) -> EncodedRows:
    """Tokenise prompts with completions, or chats; the loss counts completions and assistant turns alone.

    Raises:
        DataError: a row has not the form that its format demands.
    """
    encoded: list[Encoded] = []
    without_end: set[int] = set()
    num_cut, num_lost, num_last_only, begin = 0, 0, 0, _begin(tokenizer)
    for number, row in enumerate(rows, start=1):
        if columns.kind == "messages":
            ids, learned, is_last_only = render_chat(tokenizer, row.get(columns.messages or ""), f"{source}: row {number}")
            targets = [token if counts else IGNORE for token, counts in zip(ids, learned, strict=True)]
            num_last_only += is_last_only
        else:
            ids, targets = _prompt_completion(tokenizer, row, columns, begin, source, number)
        is_short = False
        if len(ids) > max_length:
            num_cut += 1
            num_whole = _num_learned(targets)
            ids, targets = _shorten(ids, targets, max_length, tokenizer.bos_token_id)
            is_short = _num_learned(targets) < num_whole
        if all(target == IGNORE for target in targets[1:]):
            num_lost += 1
            continue
        if is_short:
            without_end.add(len(encoded))
        encoded.append(Encoded(input_ids=ids, targets=targets))
    return EncodedRows(
        encoded=encoded, num_cut=num_cut, num_lost=num_lost, num_last_only=num_last_only, without_end=frozenset(without_end)
    )


def _num_learned(targets: Sequence[int]) -> int:
    return sum(target != IGNORE for target in targets)


def _prompt_completion(
    tokenizer: Any, row: Row, columns: Columns, begin: list[int], source: str, number: int
) -> tuple[list[int], list[int]]:
    prompt = field(row, columns.prompt or "", source, number)
    if columns.prompt_input and str(row.get(columns.prompt_input) or "").strip():
        prompt = f"{prompt}\n{row[columns.prompt_input]}"
    completion = field(row, columns.completion or "", source, number)
    # The two are tokenised apart, as they are when the model answers: no token may span the seam.
    head = tokenizer(f"{prompt}\n", add_special_tokens=False, verbose=False)["input_ids"]
    tail = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    head = [*begin, *head]
    if tokenizer.eos_token_id is not None:
        tail = [*tail, tokenizer.eos_token_id]
    return head + tail, [IGNORE] * len(head) + tail


def end_tokens(tokenizer: Any, kinds: Collection[str]) -> tuple[int, ...]:
    """Return the tokens behind which an answer is over: the end of the text, and of chats what the template puts behind a turn.

    The tokenizer of a base model ends texts with another one than its chat template ends turns with.

    Args:
        tokenizer: the model's.
        kinds: what rows hold, as `Columns.kind`.
    """
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([*ends, *(answer_ends(tokenizer) if "messages" in kinds else [])]))


def _begin(tokenizer: Any) -> list[int]:
    """Return the begin-of-text token where the tokenizer puts one: what is exported is given text as it does."""
    begin = tokenizer("a")["input_ids"][:1]
    return list(begin) if begin == [tokenizer.bos_token_id] else []


def _shorten(ids: list[int], targets: list[int], max_length: int, begin: int | None) -> tuple[list[int], list[int]]:
    """Cut the prompt from the left, so that what follows it stays, and what is too long all the same at the right.

    Half of the window is the prompt's, if it is as long: an answer without its question teaches nothing. A begin-of-text token stays.
    """
    num_prompt = next((i for i, t in enumerate(targets) if t != IGNORE), len(ids))
    num_kept = min(num_prompt, max(max_length // 2, max_length - (len(ids) - num_prompt)))
    start = num_prompt - num_kept
    if start and ids[0] == begin:
        ids, targets = [ids[0], *ids[start + 1 :]], [targets[0], *targets[start + 1 :]]
        start = 0
    return ids[start : start + max_length], targets[start : start + max_length]
