"""Pydantic's errors as a user reads them: path as written, what is wrong, value, what is allowed, nearest key."""

from __future__ import annotations

import difflib
import json
import re
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from spaces.domains import TAG_PREFIX
from spaces.forms import ByAdapter
from spaces.spec import SearchSpec
from spaces.yaml_text import Path

MAX_SHOWN = 80
_FORMS = {
    "fixed": "a value",
    "choice": "{choice: [...]}",
    "int": "{int: [low, high]}",
    "uniform": "{uniform: [low, high]}",
    "log_uniform": "{log_uniform: [low, high]}",
    "profile": "{profile: [...]}",
    "by_adapter": "{by_adapter: {none: ..., lora: ...}}",
}


def explain(error: ValidationError) -> list[tuple[Path, str]]:
    """Return path and words of every error."""
    return list(dict.fromkeys(_explain_one(e["loc"], e["type"], e["msg"], e["input"], e.get("ctx", {})) for e in error.errors()))


def dotted(path: Iterable[str | int]) -> str:
    """Return a path as the user writes it: `objectives[0].metric`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")


def _explain_one(loc: Path, kind: str, message: str, given: Any, context: Mapping[str, Any]) -> tuple[Path, str]:
    path = tuple(step for step in loc if not str(step).startswith(TAG_PREFIX) and step != "[key]")
    names: list[str] = []
    match kind:
        case "missing":
            return path, f"required, but missing; allowed: {_allowed_for(loc)}"
        case "no_data":
            return (*path, "train"), f"required, but missing; allowed: {_allowed_for((*loc, 'train'))}; or {context['allowed']}"
        case "extra_forbidden":
            model = model_at(loc[:-1])
            names = list(model.model_fields) if model else []
            return path, _words("unknown key", given, ", ".join(names), nearest_key(str(path[-1]), names))
        case "union_tag_invalid" | "union_tag_not_found":
            return _explain_domain(path, given, context)
        case "literal_error":
            names = re.findall(r"'([^']*)'", context["expected"])
            what, allowed = "not a known value", ", ".join(names)
        case "string_type":
            what, allowed = "not a text", "a text; in quotes where it looks like a number or a date"
        case "model_type" | "model_attributes_type" | "dict_type":
            model = model_at(loc)
            what, allowed = "not a section", f"the keys {', '.join(model.model_fields)}" if model else "keys and values"
        case "tuple_type" | "list_type":
            what, allowed = "not a list", "a list"
        case _:
            what, allowed, names = message, context.get("allowed", ""), context.get("names", [])
    return path, _words(what, given, allowed, context.get("nearest") or _nearest(given, names))


def _explain_domain(path: Path, given: Any, context: Mapping[str, Any]) -> tuple[Path, str]:
    """A knob that is neither a value nor a mapping with one known key."""
    kinds = [tag.removeprefix(TAG_PREFIX) for tag in re.findall(r"'([^']*)'", context["expected_tags"])]
    forms = ", ".join(_FORMS[kind] for kind in kinds)
    if isinstance(given, Mapping) and len(given) == 1:
        (key, value), keys = next(iter(given.items())), [kind for kind in kinds if kind != "fixed"]
        if key in _FORMS:
            return (*path, key), _words("not a form of this knob", value, forms, None)
        return (*path, key), _words("unknown key", value, ", ".join(keys), _nearest(key, keys))
    if isinstance(given, Mapping):
        return path, _words("needs exactly one form", given, forms, None)
    return path, _words("a list is no form of a knob", given, forms, f"{{choice: {_shown(given)}}}")


def _words(what: str, given: Any, allowed: str, nearest: str | None) -> str:
    hint = f"; did you mean '{nearest}'?" if nearest else ""
    return f"{what}, got {_shown(given)}" + (f"; allowed: {allowed}" if allowed else "") + hint


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _nearest(given: Any, names: Iterable[str]) -> str | None:
    """Return the name that was probably meant."""
    by_lower = {name.lower(): name for name in names}
    text = str(given).lower()
    close = difflib.get_close_matches(text, by_lower, n=1, cutoff=0.6)
    # `min` is too short to be close to `minimize`.
    close = close or [name for name in by_lower if len(text) > 2 and name.startswith(text)]
    return by_lower[close[0]] if close else None


def nearest_key(key: str, names: list[str]) -> str | None:
    """Return the key of this section that was probably meant, or the full path of one in another section."""
    elsewhere = {
        name: f"{section}.{name}"
        for section in SearchSpec.model_fields
        if (model := model_at((section,))) is not None
        for name in model.model_fields
    }
    return _nearest(key, names) or (elsewhere.get(close) if (close := _nearest(key, elsewhere)) else None)


def _allowed_for(loc: Path) -> str:
    """Return what a field takes: its choices, or what its docstring says."""
    model = model_at(loc[:-1])
    field = model.model_fields.get(str(loc[-1])) if model else None
    if field is None:
        return "a value"
    if typing.get_origin(field.annotation) is Literal:
        return ", ".join(map(str, typing.get_args(field.annotation)))
    text = (field.description or "a value").rstrip(".")
    return text[0].lower() + text[1:]


def model_at(loc: Path) -> type[BaseModel] | None:
    """Return the section at a location; inside a knob there is only one, the ranges by adapter."""
    annotation: Any = SearchSpec
    for step in loc:
        if step == f"{TAG_PREFIX}by_adapter":
            annotation = ByAdapter
        elif isinstance(step, str) and isinstance(annotation, type) and issubclass(annotation, BaseModel):
            field = annotation.model_fields.get(step)
            annotation = field.annotation if field else None
        elif isinstance(step, int) or _is_mapping(annotation):
            models = [m for m in _parts(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
            annotation = models[0] if models else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _is_mapping(annotation: Any) -> bool:
    """Return whether keys of the user's own lead into it: `dict[str, X] | None`."""
    return any(typing.get_origin(part) is dict for part in (annotation, *typing.get_args(annotation)))


def _parts(annotation: Any) -> list[Any]:
    """Return an annotation's innermost arguments: `X` of `tuple[X, ...] | None`."""
    arguments = typing.get_args(annotation)
    return [part for argument in arguments for part in _parts(argument)] if arguments else [annotation]
