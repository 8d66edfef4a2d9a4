"""Chats to tokens: rendered in a tokenizer's template, of which the assistant's answers are learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainables.formats import DataError

# ShareGPT's names for the speakers, which chat templates do not know.
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}

# A text that no template has of its own.
ANSWER = "forty-two"


def render_chat(tokenizer: Any, messages: Any, where: str) -> tuple[list[int], list[bool], bool]:
    """Render with the tokenizer's template; an assistant's turn is what its message adds to the rendered chat before it.

    Some templates render a turn otherwise once others follow: Qwen 3's has no thoughts there. Of such a chat the last answer alone
    counts, which is rendered as the model will see it.

    Returns:
        Tokens, which of them are learned, and whether it is such a chat.

    Raises:
        DataError: these are no messages, or the template does not take them.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: chat messages need a tokenizer with a chat template, and this model's has none; name one in data.chat_template"
        )
    turns = _turns(messages, where)
    # What a chat begins with answers nothing.
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > 0]
    try:
        try:
            return (*_rendered(tokenizer, turns, answers), False)
        except _Rewritten:
            last = answers[-1]
            return (*_rendered(tokenizer, turns[: last + 1], [last]), True)
    except _Rewritten as error:
        raise DataError(
            f"{where}: the chat template changes earlier turns when an answer is added, so it cannot be told which tokens are "
            "the assistant's; give prompt and completion columns instead"
        ) from error
    except Exception as error:  # whatever a template does
        raise DataError(f"{where}: the model's chat template refuses it: {error}") from error


class _Rewritten(Exception):
    """What was rendered is no longer how the chat begins once more is rendered."""


def _rendered(tokenizer: Any, turns: Sequence[dict[str, Any]], answers: Sequence[int]) -> tuple[list[int], list[bool]]:
    """Return the tokens of a chat, and which are learned, that is rendered up to each of these turns, and to its end."""
    ids: list[int] = []
    learned: list[bool] = []
    before = ""

    def extend(longer: str, is_learned: bool) -> None:
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
        learned.extend([is_learned] * len(added))

    for answer in answers:
        # What the template puts before an answer (the assistant's header) is given to the model, not learned.
        extend(_render(tokenizer, turns[:answer], add_generation_prompt=True), False)
        extend(_render(tokenizer, turns[: answer + 1], add_generation_prompt=False), True)
    if not answers or answers[-1] < len(turns) - 1:
        extend(_render(tokenizer, turns, add_generation_prompt=False), False)
    return ids, learned


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


def answer_ends(tokenizer: Any) -> list[int]:
    """Return the first special token behind an answer in the tokenizer's template, if there is one."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
    behind = _render(tokenizer, turns, add_generation_prompt=False).rpartition(ANSWER)[2]
    special = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    return [i for i in _tokens(tokenizer, behind) if i in special][:1]
