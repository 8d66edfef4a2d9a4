"""The reference of the file as Markdown, from the descriptions of its keys: `python -m spaces.reference > docs/spec.md`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from spaces.config import Adapter
from spaces.explain import model_at
from spaces.forms import ByAdapter
from spaces.inputs import DomainSpec
from spaces.space import SpaceSpec
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


# What the adapters are, and what they do not go with.
ADAPTERS: dict[Adapter, tuple[str, str]] = {
    "none": ("every weight", "quantised bases"),
    "lora": ("two low-rank matrices beside each layer (https://arxiv.org/abs/2106.09685)", ""),
    "rslora": ("LoRA, scaled by alpha / sqrt(rank), so that large ranks learn as much as small ones", ""),
    "dora": ("LoRA, and the norms of the rows that it adapts", "`tp`, `int8`, `float8`"),
    "vera": ("two vectors beside each layer, in small files for many tasks", "`tp`, quantised bases"),
    "ia3": ("a factor for each key, value and feed-forward activation, in small files for many tasks", "`tp`, quantised bases"),
    "oft": ("a rotation of what goes into each layer", "`tp`, GPT-2"),
    "bottleneck": ("a narrow layer behind the feed-forward of each block, which no weights stand for: it is never merged", "`tp`"),
    "prefix": (
        "keys and values before those of every row in each attention, never merged",
        "classifiers, `tp`, `compile`, and of GPT-2 `recomputation`",
    ),
}


def reference() -> str:
    """Return the page."""
    return HEAD + "".join(_section(name, field) for name, field in SearchSpec.model_fields.items())


def _section(name: str, field: FieldInfo) -> str:
    model = model_at((name, 0)) or model_at((name,))
    if model is None:
        return f"\n## `{name}`\n\n{_sentence(field)} Default: {_default(field)}.\n"
    more = _domain() if name == "data" else _adapters() if name == "space" else ""
    return f"\n## `{name}`\n\n{_sentence(field)}\n\n{_table(('key', 'default', 'meaning'), _rows(model))}{more}"


def _domain() -> str:
    return f"\nA domain of `data.domains`:\n\n{_table(('key', 'default', 'meaning'), _rows(DomainSpec))}"


def _adapters() -> str:
    rows = []
    for adapter, (trains, without) in ADAPTERS.items():
        low, high = SpaceSpec().learning_rate_of(adapter).ends()
        rows.append((f"`{adapter}`", trains, without or "-", f"{low:g} to {high:g}"))
    return f"\nThe adapters:\n\n{_table(('`adapter`', 'what trains', 'not with', '`learning_rate` by default'), rows)}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rows(model: type[BaseModel]) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        yield f"`{name}`", _default(field), _sentence(field)


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
    if isinstance(field.default, ByAdapter):
        return "by adapter"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    print(reference(), end="")
