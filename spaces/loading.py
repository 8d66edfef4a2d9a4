"""From a YAML file and the command line's overrides to a `SearchSpec`, or to one clear line for every error in them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from spaces import yaml_text
from spaces.budget import budget_overrides
from spaces.explain import dotted, explain
from spaces.inputs import TEMPLATE_SUFFIXES
from spaces.spec import SearchSpec

MAX_BYTES = 1_000_000


# The options that change what the file says.
OPTIONS = ("--set", "--budget")

# A line of the file, or an option.
_Origin = int | str
_Origins = dict[yaml_text.Path, _Origin]
_Error = tuple[_Origin, yaml_text.Path, str]


class SpecError(Exception):
    """The file cannot be used; `lines` holds one line for every error."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedSpec:
    """A valid spec and where its values come from."""

    spec: SearchSpec
    path: Path
    origins: Mapping[str, str]
    """`{dotted path: "FILE:LINE" | "--set" | "--budget"}` for every value that was given."""

    def locate(self, message: str) -> str:
        """Put before a message about the value of a key, or about the file that a key names, where that value was given.

        Args:
            message: one line, `key: ...` with a dotted key in it, or `data file: ...`.
        """
        parts, files = message.split(": "), self.spec.data.files
        key = next((part for part in parts if _is_key(part) or part in files), None)
        if key is None:
            key = next((name for name, file in files.items() if file == parts[0]), None)
            message = message if key is None else f"{key}: {message}"
        return f"{self.origins.get(key or '', str(self.path))}: {message}"


def load_spec(path: Path, overrides: Sequence[str] = (), amounts: Sequence[str] = ()) -> LoadedSpec:
    """Read, override and validate a file.

    Args:
        path: the YAML file.
        overrides: `a.b=value` with the value in YAML, or `a[0].b=value` inside a list. They win over the file,
            later ones over earlier ones.
        amounts: `30m`, `40usd` and so on, which take the place of the file's budget.

    Raises:
        SpecError: with all errors at once.
    """
    data, origins, errors = _parse(_read(path), str(path))
    unusable: list[str] = []
    try:
        # The last word: `--set budget={...}` would take these limits away.
        limits = [("--budget", text) for text in budget_overrides(amounts)]
    except ValueError as error:
        limits, unusable = [], [str(error)]
    given = [*(("--set", text) for text in overrides), *limits]
    unusable += [line for line in (_override(data, option, text, origins) for option, text in given) if line is not None]
    spec = _validate(data, str(path), origins, errors, unusable)
    return LoadedSpec(spec=spec, path=path, origins={dotted(leaf): _place(origins, leaf, str(path)) for leaf in _leaves(data)})


def check_local_data(loaded: LoadedSpec) -> None:
    """Check that the data files that are no hub's and not embedded are there.

    Raises:
        SpecError: with a line for each that is not.
    """
    lines = []
    for key, name in loaded.spec.data.files.items():
        if name.startswith(("hf:", "embedded:")) or Path(name).is_file():
            continue
        folder = Path(name).parent
        beside = [p.name for p in folder.iterdir() if p.is_file()] if folder.is_dir() else []
        close = difflib.get_close_matches(Path(name).name, beside, n=1)
        hint = f"; did you mean '{folder / close[0]}'?" if close else ""
        lines.append(loaded.locate(f"{key}: no such file '{name}'; paths are relative to the working directory{hint}"))
    template = loaded.spec.data.chat_template
    if template is not None and Path(template).suffix in TEMPLATE_SUFFIXES and not Path(template).is_file():
        lines.append(loaded.locate(f"data.chat_template: no such file '{template}'; paths are relative to the working directory"))
    if lines:
        raise SpecError(lines)


def parse_spec(text: str, source: str) -> SearchSpec:
    """Validate a spec that is no file, such as one read back from MLflow; `source` stands for the file's name.

    Raises:
        SpecError: with all errors at once.
    """
    data, origins, errors = _parse(text, source)
    return _validate(data, source, origins, errors, [])


def dump_spec(spec: SearchSpec) -> str:
    """Return YAML that loads back to an equal spec, with every default written out."""
    return yaml_text.dump(spec.model_dump(mode="json", exclude_none=True))


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **SearchSpec.model_json_schema()}


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError([f"{path}: cannot be read: {error.strerror}"]) from error
    if len(raw) > MAX_BYTES:
        raise SpecError([f"{path}: too large; allowed: {MAX_BYTES} bytes"])
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise SpecError([f"{path}:{line}: not valid UTF-8, got byte 0x{raw[error.start]:02x}; save the file as UTF-8"]) from error


def _parse(text: str, source: str) -> tuple[dict[str, Any], _Origins, list[_Error]]:
    """Return the data, the line of every value, and the errors against YAML itself."""
    try:
        document = yaml_text.parse(text)
    except yaml_text.YamlError as error:
        raise SpecError([f"{source}:{error.line}: {error}"]) from error
    data = {} if document.data is None else document.data
    if not isinstance(data, dict):
        raise SpecError([f"{source}:1: the file must hold keys and values; allowed: {', '.join(SearchSpec.model_fields)}"])
    return data, dict(document.lines), list(document.errors)


def _override(data: dict[str, Any], option: str, text: str, origins: _Origins) -> str | None:
    """Set one `a.b=value` in place; return the error's line if that cannot be done."""
    key, separator, value = text.partition("=")
    steps = [step for step in re.split(r"\.|\[(\d+)\]", key.strip()) if step]
    if not separator or not steps:
        return f"{option} {text}: not of the form KEY=VALUE; allowed: for example --set budget.trials=10"
    try:
        document = yaml_text.parse(value)
    except yaml_text.YamlError as error:
        return f"{option} {text}: {error}"
    if document.errors:
        return f"{option} {text}: {document.errors[0][2]}"
    if document.data is None and value.lstrip().startswith("#"):
        return f"{option} {text}: YAML reads the value as a comment; put it in quotes"
    path, target = _reach(data, steps[:-1])
    last: str | int = steps[-1]
    if isinstance(target, list):
        if not (steps[-1].isdecimal() and int(steps[-1]) < len(target)):
            return f"{option} {text}: {dotted(path)} is a list; allowed: a position from 0 to {len(target) - 1}"
        last = int(steps[-1])
    target[last] = document.data
    for other in [p for p in origins if p[: len(path) + 1] == (*path, last)]:
        del origins[other]
    origins[(*path, last)] = option
    return None


def _reach(data: dict[str, Any], steps: Sequence[str]) -> tuple[yaml_text.Path, Any]:
    """Return the path and the container at the end of the steps; what is no container on the way becomes one."""
    path: yaml_text.Path = ()
    target: Any = data
    for step in steps:
        if isinstance(target, list):
            if not (step.isdecimal() and int(step) < len(target)):
                return path, target
            path, inner = (*path, int(step)), target[int(step)]
        else:
            path, inner = (*path, step), target.get(step)
        if not isinstance(inner, dict | list):
            inner = target[path[-1]] = {}
        target = inner
    return path, target


def _validate(data: dict[str, Any], source: str, origins: _Origins, errors: list[_Error], unusable: list[str]) -> SearchSpec:
    """Return the spec, or raise with YAML's errors, the model's, in the order of the file, and unusable overrides."""
    try:
        spec = SearchSpec.model_validate(data)
    except ValidationError as error:
        errors = [*errors, *((_origin(origins, path), path, words) for path, words in explain(error))]
    else:
        if not errors and not unusable:
            return spec
    errors.sort(key=lambda e: (0, e[0]) if isinstance(e[0], int) else (1, 0))
    lines = [f"{_at(origin, source)}: {dotted(path) or 'the file'}: {words}" for origin, path, words in errors]
    raise SpecError([*lines, *unusable])


def _origin(origins: _Origins, path: yaml_text.Path) -> _Origin:
    """Return the line of the value, or of the nearest section around it; the options where these gave it, or all that is in it."""
    inside = [origin for other, origin in origins.items() if path and len(other) > len(path) and other[: len(path)] == path]
    options = dict.fromkeys(origin for origin in inside if isinstance(origin, str))
    if options and not any(isinstance(origin, int) for origin in inside):
        return " and ".join(options)
    return next((origins[path[:n]] for n in range(len(path), -1, -1) if path[:n] in origins), 1)


def _is_key(text: str) -> bool:
    section, _, name = text.partition(".")
    field = SearchSpec.model_fields.get(section)
    return name in getattr(field and field.annotation, "model_fields", ())


def _place(origins: _Origins, path: yaml_text.Path, source: str) -> str:
    return _at(_origin(origins, path), source)


def _at(origin: _Origin, source: str) -> str:
    return origin if isinstance(origin, str) else f"{source}:{origin}"


def _leaves(data: Any, path: yaml_text.Path = ()) -> list[yaml_text.Path]:
    if isinstance(data, dict):
        return [leaf for key, value in data.items() for leaf in _leaves(value, (*path, key))]
    return [path]
