"""YAML as people mean it, with the line of every value: `1e-4` is a number, `no` is a text, a key stands once."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
"""Keys and list positions from the root to a value."""

_MAP, _SEQ = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))

# YAML 1.2's core schema. PyYAML follows 1.1, which reads 1e-4 as a text, no as false and 12:30 as a number.
_RESOLVERS = (
    (_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    (_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    (_INT, re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")),
    (
        _FLOAT,
        re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
        list("-+.0123456789"),
    ),
)


_SCALARS: dict[str, Callable[[str], Any]] = {
    _NULL: lambda text: None,
    _BOOL: lambda text: text.lower() == "true",
    _INT: int,
    _FLOAT: float,
    _STR: str,
}


class YamlError(Exception):
    """The text is not YAML that can be used; `line` counts from 1."""

    def __init__(self, message: str, line: int = 1) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """Plain values with their places."""

    data: Any
    lines: dict[Path, int]
    """Line, from 1, of every key and every list item."""
    errors: list[tuple[int, Path, str]] = field(default_factory=list)
    """Line, path and words of what is wrong within YAML's own rules: a repeated key, a tag, a number too long."""


class _Loader(yaml.SafeLoader):
    """Refuses aliases: a few lines of them expand to gigabytes, and no spec needs one."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own name and form

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed; write the value again", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for something else than a text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that stands twice twice."""
        return True


for _class in (_Loader, _Dumper):
    for _tag, _pattern, _first in _RESOLVERS:
        _class.add_implicit_resolver(_tag, _pattern, _first)


def parse(text: str) -> Document:
    """Read one YAML document; an empty text gives None.

    Raises:
        YamlError: the text cannot be read at all.
    """
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        document = Document(data=None, lines={})
        data = None if root is None else _build(root, (), document)
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"not valid YAML: {error.problem}", mark.line + 1 if mark else 1) from error
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {' '.join(str(error).split())}") from error
    return Document(data=data, lines=document.lines, errors=document.errors)


def dump(data: Any) -> str:
    """Return YAML that `parse` reads back as the same values."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def _build(node: yaml.Node, path: Path, document: Document) -> Any:
    line = node.start_mark.line + 1
    document.lines.setdefault(path, line)
    if isinstance(node, yaml.MappingNode) and node.tag == _MAP:
        return _build_mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode) and node.tag == _SEQ:
        return [_build(item, (*path, i), document) for i, item in enumerate(node.value)]
    read = _SCALARS.get(node.tag)
    if read is None:
        document.errors.append((line, path, f"the tag {node.tag} is not allowed"))
        return None
    try:
        return read(node.value)
    except ValueError:
        document.errors.append((line, path, "not a number that can be read"))
        return None


def _build_mapping(node: yaml.MappingNode, path: Path, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            document.errors.append((line, path, "a key must be a text"))
            continue
        inner = (*path, key_node.value)
        if key_node.value in result:
            document.errors.append((line, inner, f"the key stands twice, first in line {document.lines[inner]}"))
            continue
        document.lines[inner] = line
        result[key_node.value] = _build(value_node, inner, document)
    return result
