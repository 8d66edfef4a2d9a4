"""The embedded data set: docstrings of Python's standard library, labelled with the module that they come from.

Real text that every machine has. The sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections import defaultdict
from pathlib import Path

NUM_MODULES = 24
# One row in ten is for evaluation, chosen by the text's own hash: the same on every machine that has the text.
EVALUATION_SHARE = 0.1
MIN_WORDS = 4


def load_docstrings() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and evaluation rows `{"text", "label"}` of the 24 modules with the most docstrings."""
    by_module: dict[str, list[str]] = defaultdict(list)
    seen: set[str] = set()
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__"} & set(parts):
            continue
        for text in _docstrings(path):
            if len(text.split()) >= MIN_WORDS and text not in seen:
                seen.add(text)
                by_module[parts[0]].append(text)
    # Private modules mirror public ones (`_pydecimal`, `_pyio`), whose docstrings they repeat.
    public = {module: texts for module, texts in by_module.items() if not module.startswith("_")}
    largest = sorted(public, key=lambda module: (-len(public[module]), module))[:NUM_MODULES]
    train: list[dict[str, str]] = []
    evaluation: list[dict[str, str]] = []
    for module in sorted(largest):
        for text in public[module]:
            share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
            (evaluation if share < EVALUATION_SHARE else train).append({"text": text, "label": module})
    return train, evaluation


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # the library ships a few files that are wrong on purpose, as test data
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [" ".join(text.split()) for text in texts if text]
