"""Text to tokens, and which of them the loss counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from trainables.columns import Columns, field
from trainables.formats import DataError, Row
from trainables.hub import ModelError, resolve_model

IGNORE = -100

# ShareGPT's names for the speakers, which chat templates do not know.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


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
            ids, targets, is_last_only = _chat(tokenizer, row.get(columns.messages or ""), f"{source}: row {number}")
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


def end_tokens(tokenizer: Any, kind: str) -> tuple[int, ...]:
    """Return the tokens behind which an answer is over: the end of the text, and of chats what the template puts behind a turn.

    The tokenizer of a base model ends texts with another one than its chat template ends turns with.

    Args:
        tokenizer: the model's.
        kind: what a row holds, as `Columns.kind`.
    """
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if kind == "messages":
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        before = _tokens(tokenizer, _render(tokenizer, turns[:1], add_generation_prompt=True))
        answer = _tokens(tokenizer, _render(tokenizer, turns, add_generation_prompt=False))[len(before) :]
        special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
        ends += [i for i in answer if i in special][-1:]
    return tuple(dict.fromkeys(ends))


def _begin(tokenizer: Any) -> list[int]:
    """Return the begin-of-text token where the tokenizer puts one: what is exported is given text as it does."""
    begin = tokenizer("a")["input_ids"][:1]
    return list(begin) if begin == [tokenizer.bos_token_id] else []


def _chat(tokenizer: Any, messages: Any, where: str) -> tuple[list[int], list[int], bool]:
    """Render with the tokenizer's template; an assistant's turn is what its message adds to the rendered chat before it.

    Some templates render a turn otherwise once others follow: Qwen 3's has no thoughts there. Of such a chat the last answer alone
    counts, which is rendered as the model will see it.

    Returns:
        Tokens, targets, and whether it is such a chat.
    """
    if tokenizer.chat_template is None:
        raise DataError(f"{where}: chat messages need a tokenizer with a chat template, and this model's has none")
    turns = _turns(messages, where)
    # What a chat begins with answers nothing.
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > 0]
    try:
        try:
            return (*_rendered(tokenizer, turns, answers), False)
        except _Rewritten:
            last = answers[-1]
            return (*_rendered(tokenizer, turns[: last + 1], [last]), True)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"{where}: the model's chat template refuses it: {error}") from error
    except _Rewritten as error:
        raise DataError(
            f"{where}: the chat template changes earlier turns when an answer is added, so it cannot be told which tokens are "
            "the assistant's; give prompt and completion columns instead"
        ) from error


class _Rewritten(Exception):
    """What was rendered is no longer how the chat begins once more is rendered."""


def _rendered(tokenizer: Any, turns: Sequence[dict[str, Any]], answers: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return tokens and targets of a chat that is rendered up to each of these turns, and to its end."""
    ids: list[int] = []
    targets: list[int] = []
    before = ""

    def extend(longer: str, is_target: bool) -> None:
        nonlocal before
        added = _tokens(tokenizer, longer)
        if added[: len(ids)] == ids:
            added = added[len(ids) :]
        elif longer.startswith(before):
            # A token would span the seam, such as of two line breaks; what the model answers comes after a seam too.
            added = _tokens(tokenizer, longer[len(before) :])
        else:
            raise _Rewritten
        before = longer
        ids.extend(added)
        targets.extend(added if is_target else [IGNORE] * len(added))

    for answer in answers:
        # What the template puts before an answer (the assistant's header) is given to the model, not learned.
        extend(_render(tokenizer, turns[:answer], add_generation_prompt=True), False)
        extend(_render(tokenizer, turns[: answer + 1], add_generation_prompt=False), True)
    if not answers or answers[-1] < len(turns) - 1:
        extend(_render(tokenizer, turns, add_generation_prompt=False), False)
    return ids, targets


def _render(tokenizer: Any, turns: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=add_generation_prompt))


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _turns(messages: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: the messages are not valid JSON: {error.msg}") from error
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected a list of messages, got {type(messages).__name__}")
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: expected messages with role and content, got {type(message).__name__}")
        role, content = message.get("role", message.get("from")), _content(message.get("content", message.get("value")))
        # What a template knows beside the text, such as calls of tools, is its own business.
        known = {key: value for key, value in message.items() if value is not None}
        if role is None or (content is None and not known.get("tool_calls")):
            raise DataError(f"{where}: a message needs role and content, a text, got {', '.join(message) or 'nothing'}")
        turns.append({**known, "role": ROLES.get(role, role), "content": content})
    return turns


def _content(given: Any) -> str | None:
    """Return a message's text; None where it has none, or pictures and the like beside it."""
    if isinstance(given, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in given):
        return "".join(str(part.get("text") or "") for part in given)
    return given if isinstance(given, str) else None


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
