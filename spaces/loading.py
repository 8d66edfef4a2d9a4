"""From a YAML file and `--set` overrides to a `SearchSpec`, or to one clear line for every error in it."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from spaces.domains import TAG_PREFIX
from spaces.spec import SearchSpec

MAX_BYTES = 1_000_000
Path_ = tuple[str | int, ...]


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
    """`{dotted path: "file" | "--set"}` for every value that is no default."""


def load_spec(path: Path, overrides: Sequence[str] = ()) -> LoadedSpec:
    """Read, override and validate a file.

    Args:
        path: the YAML file.
        overrides: `a.b=value` with the value in YAML; they win over the file.

    Raises:
        SpecError: with all errors at once.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise SpecError([f"{path}: cannot be read: {error.strerror}"]) from error
    if len(raw) > MAX_BYTES:
        raise SpecError([f"{path}: {len(raw)} bytes; a spec has at most {MAX_BYTES}"])
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise SpecError([f"{path}:{line}: invalid UTF-8; save the file as UTF-8"]) from error
    data, lines, errors = _parse(text, str(path))
    origins = {".".join(map(str, p)): "file" for p in _leaves(data)}
    for override in overrides:
        error_line = _apply(data, override, origins)
        if error_line is not None:
            errors.append(error_line)
    return LoadedSpec(spec=_validate(data, str(path), lines, origins, errors), path=path, origins=origins)


def parse_spec(text: str, source: str) -> SearchSpec:
    """Validate a spec that is no file, such as one read back from MLflow.

    Raises:
        SpecError: with all errors at once; `source` stands for the file's name.
    """
    data, lines, errors = _parse(text, source)
    return _validate(data, source, lines, {}, errors)


def dump_spec(spec: SearchSpec) -> str:
    """Return YAML that loads back to an equal spec."""
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the file."""
    return SearchSpec.model_json_schema()


class _Loader(yaml.SafeLoader):
    """Reads `1e-4` as a number, keeps `no` and `on` as text, and refuses duplicate keys and aliases.

    Aliases are refused because a few lines of them expand to gigabytes, and no spec needs one.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|nan)$", re.IGNORECASE),
    list("-+0123456789."),
)


def _parse(text: str, source: str) -> tuple[dict[str, Any], dict[Path_, int], list[str]]:
    """Return the data, the line of every path, and the errors of YAML itself."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise SpecError([f"{source}:{mark.line + 1 if mark else 1}: not valid YAML: {error.problem}"]) from error
    except yaml.YAMLError as error:
        raise SpecError([f"{source}: not valid YAML: {error}"]) from error
    finally:
        loader.dispose()
    if not isinstance(root, yaml.MappingNode):
        raise SpecError([f"{source}:1: the file must hold keys and values, such as `model:` and `data:`"])
    lines: dict[Path_, int] = {}
    errors: list[str] = []

    def walk(node: yaml.Node, path: Path_) -> Any:
        lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value)
                line = key_node.start_mark.line + 1
                if key in result:
                    errors.append(f"{source}:{line}: {_dotted((*path, key))}: the key stands here twice")
                result[key] = walk(value_node, (*path, key))
                lines[(*path, key)] = line
            return result
        if isinstance(node, yaml.SequenceNode):
            return [walk(item, (*path, i)) for i, item in enumerate(node.value)]
        return _scalar(node, path, source, errors)

    return walk(root, ()), lines, errors


def _scalar(node: yaml.Node, path: Path_, source: str, errors: list[str]) -> Any:
    try:
        return _Loader("").construct_object(node)
    except yaml.YAMLError:
        errors.append(f"{source}:{node.start_mark.line + 1}: {_dotted(path)}: the tag {node.tag} is not allowed")
        return None


def _leaves(data: Any, path: Path_ = ()) -> list[Path_]:
    if isinstance(data, dict) and data:
        return [leaf for key, value in data.items() for leaf in _leaves(value, (*path, key))]
    return [path]


def _apply(data: dict[str, Any], override: str, origins: dict[str, str]) -> str | None:
    """Set one `a.b=value`; return the error's line if it has none of that form."""
    key, sep, value = override.partition("=")
    parts = key.strip().split(".")
    if not sep or not all(parts):
        return f"--set {override}: expected KEY=VALUE, such as --set budget.trials=10"
    try:
        parsed = yaml.load(value, Loader=_Loader)  # noqa: S506  a safe loader of our own
    except yaml.YAMLError as error:
        return f"--set {key}: not valid YAML: {value!r} ({str(error).splitlines()[0]})"
    target = data
    for part in parts[:-1]:
        inner = target.get(part)
        if not isinstance(inner, dict):
            inner = target[part] = {}
        target = inner
    target[parts[-1]] = parsed
    for origin in [o for o in origins if o == key or o.startswith(f"{key}.")]:
        del origins[origin]
    origins[key] = "--set"
    return None


def _validate(
    data: dict[str, Any], source: str, lines: Mapping[Path_, int], origins: Mapping[str, str], errors: list[str]
) -> SearchSpec:
    try:
        spec = SearchSpec.model_validate(data)
    except ValidationError as error:
        found = [_error_line(dict(e), data, source, lines, origins) for e in error.errors()]
        raise SpecError([*errors, *dict.fromkeys(found)]) from error
    if errors:
        raise SpecError(errors)
    return spec


def _error_line(
    error: dict[str, Any], data: dict[str, Any], source: str, lines: Mapping[Path_, int], origins: Mapping[str, str]
) -> str:
    path = _user_path(error["loc"], data)
    dotted = _dotted(path)
    if any(origin == "--set" and (dotted == o or dotted.startswith(f"{o}.")) for o, origin in origins.items()):
        where = "--set"
    else:
        line = next((lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in lines), 1)
        where = f"{source}:{line}"
    given, context = error.get("input"), error.get("ctx", {})
    shown = "" if isinstance(given, dict | BaseModel) or error["type"] == "missing" else f", got {_shown(given)}"
    message, names, allowed = error["msg"][0].lower() + error["msg"][1:], context.get("names"), context.get("allowed")
    match error["type"]:
        case "extra_forbidden":
            message, shown, names = "unknown key", "", _keys_at(path[:-1])
            given, allowed = path[-1], ", ".join(names)
        case "missing":
            message = "missing; it is required"
        case "literal_error":
            allowed = context["expected"].replace("'", "")
            message, names = "not allowed", re.split(r", | or ", allowed)
        case "union_tag_invalid":
            names = re.findall(rf"'{TAG_PREFIX}(\w+)'", context["expected_tags"])
            names.remove("fixed")
            message, shown = "not a domain", f", got {_shown(given)}"
            allowed = "a bare value, or one of " + ", ".join(f"{{{name}: ...}}" for name in names)
            given = next(iter(given), "") if isinstance(given, dict) and len(given) == 1 else given
    close = context.get("nearest") or _nearest(given, names)
    hint = f"; did you mean '{close}'?" if close else ""
    return f"{where}: {dotted}: {message}{shown}" + (f"; allowed: {allowed}" if allowed else "") + hint


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(given: Any, names: Sequence[str] | None) -> str | None:
    close = difflib.get_close_matches(str(given), names or (), n=1, cutoff=0.5)
    return close[0] if close else None


def _user_path(loc: tuple[str | int, ...], data: Any) -> Path_:
    """Leave out what pydantic adds for unions: keep the steps that exist in the data, and the last one if it is what is wrong."""
    path: list[str | int] = []
    for position, step in enumerate(loc):
        inside = (isinstance(data, dict) and step in data) or (
            isinstance(data, list) and isinstance(step, int) and step < len(data)
        )
        if inside:
            path.append(step)
            data = data[step]
        elif position == len(loc) - 1 and isinstance(data, dict) and not str(step).startswith(TAG_PREFIX):
            path.append(step)
    return tuple(path)


def _keys_at(path: Path_) -> list[str]:
    """Return the keys that the model at a path allows."""
    model: Any = SearchSpec
    for step in path:
        if isinstance(step, int):
            continue
        field = model.model_fields.get(step) if isinstance(model, type) and issubclass(model, BaseModel) else None
        model = _model_of(field.annotation) if field is not None else None
        if model is None:
            return ["choice", "int", "uniform", "log_uniform"]  # a domain: a union of many models
    return list(model.model_fields)


def _model_of(annotation: Any) -> Any:
    """Return the pydantic model inside an annotation such as `list[X] | None`; None for a domain, which is a union of many."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list):
        models = [m for arg in typing.get_args(annotation) if (m := _model_of(arg)) is not None]
        return models[0] if len(models) == 1 else None
    return None


def _dotted(path: Path_) -> str:
    return ".".join(map(str, path)) or "(file)"
