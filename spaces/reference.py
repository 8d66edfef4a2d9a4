"""The reference of the file as Markdown, from the descriptions of its keys: `python -m spaces.reference > docs/spec.md`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from spaces.explain import model_at
from spaces.spec import SearchSpec

HEAD = """# The file

Every key of a `SPEC.yaml`, with its default. `paretune schema` prints the same as a JSON schema, for editors, and `paretune validate`
checks a file.
`1e-4` is a number. Any value can be given as `--set section.key=value` too. This page is made by `python -m spaces.reference`.

A knob of `space` is a value, or one of these: `{choice: [a, b]}`; `{int: [low, high]}`, both included; `{uniform: [low, high]}`;
`{log_uniform: [low, high]}`, where every order of magnitude is as likely. The learning rate may depend on the adapter:
`{by_adapter: {none: ..., lora: ...}}`. `world_size`, `strategy`, `shard_size`, `tp_size`, `offload`, `micro_batch_size`,
`recomputation` and `compile` only change how fast a trial runs, so they may be `{profile: [a, b]}`: every recipe is trained once, at
the smallest world size that fits (of layouts that were all timed before, at the one that takes the least of the devices), and has a
point for each of the others from the time of some steps.
"""


def reference() -> str:
    """Return the page."""
    return HEAD + "".join(_section(name, field) for name, field in SearchSpec.model_fields.items())


def _section(name: str, field: FieldInfo) -> str:
    model = model_at((name, 0)) or model_at((name,))
    if model is None:
        return f"\n## `{name}`\n\n{_sentence(field)} Default: {_default(field)}.\n"
    rows = "\n".join(_rows(model))
    return f"\n## `{name}`\n\n{_sentence(field)}\n\n| key | default | meaning |\n|---|---|---|\n{rows}\n"


def _rows(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"| `{name}` | {_default(field)} | {_sentence(field)} |"


def _sentence(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    return text if text.endswith(".") else f"{text}."


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value: Any = field.default
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    if value in (None, (), []):
        return "none"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    print(reference(), end="")
