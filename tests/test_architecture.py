"""The shape of the code: who imports whom, where a foreign library may be named, and how long things are."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("spaces", "trainables", "search")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 60

ALLOWED_PACKAGES = {"spaces": {"spaces"}, "trainables": {"spaces", "trainables"}, "search": set(PACKAGES)}
# One file per foreign boundary; a type that crosses it is ours.
BOUNDARIES = {
    "ray.tune": {"search/tuner.py", "search/relay.py", "search/searcher.py", "search/scheduler.py"},
    "ray.train": {"trainables/worker.py", "trainables/worker_group.py"},
    "optuna": {"search/study.py"},
    "lm_eval": {"trainables/harness.py"},
    "mlflow": {"search/tracking.py"},
    "plotly": {"search/report.py"},
    "matplotlib": {"search/picture.py"},
    "scipy": {"search/scaling.py"},
}
# `spaces` is pure: it answers in milliseconds, on a machine without torch and without Ray.
ALLOWED_IN_SPACES = {"spaces", "numpy", "pydantic", "pydantic_core", "typing_extensions", "yaml"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted name of all that is imported, inside functions too, and `ray.tune` of `ray.tune.run()`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ray":
            yield f"ray.{node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
                yield str(node.args[0].value)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def broken_rules(name: str, source: str) -> list[str]:
    """Return what a module breaks of the rules about imports."""
    package = name.partition("/")[0]
    names = set(imported(ast.parse(source)))
    broken = [f"{name} imports {n}" for n in names for p in PACKAGES if is_within(n, p) and p not in ALLOWED_PACKAGES[package]]
    broken += [f"{name} imports {n}" for n in names for lib, at in BOUNDARIES.items() if is_within(n, lib) and name not in at]
    if package == "spaces":
        tops = {n.partition(".")[0] for n in names}
        broken += [f"{name} imports {t}" for t in tops - ALLOWED_IN_SPACES - sys.stdlib_module_names]
    return sorted(set(broken))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way_and_foreign_libraries_stay_behind_their_file(path):
    assert broken_rules(name_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("spaces/a.py", "import trainables.loop"),
        ("spaces/a.py", "def f():\n    from search import cli"),
        ("spaces/a.py", "import torch"),
        ("spaces/a.py", "import ray"),
        ("trainables/a.py", "from search.study import Study"),
        ("trainables/a.py", "import optuna"),
        ("trainables/a.py", "from ray import train"),
        ("search/a.py", "import ray\nray.tune.run()"),
        ("search/a.py", "from ray.train import Checkpoint"),
        ("search/cli.py", "import mlflow.entities"),
        ("search/cli.py", "import importlib\nimportlib.import_module('matplotlib.pyplot')"),
    ],
)
def test_the_rules_find_what_breaks_them(name, source):
    assert broken_rules(name, source) != []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("spaces/a.py", "import json, numpy, yaml\nfrom spaces.spec import SearchSpec"),
        ("trainables/worker.py", "import torch, ray.train\nfrom spaces import config"),
        ("search/study.py", "import optuna\nfrom trainables.job import Job"),
        ("search/a.py", "import ray\nray.init()\nfrom search.report import write_report"),
    ],
)
def test_the_rules_leave_the_rest_alone(name, source):
    assert broken_rules(name, source) == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_and_functions_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) < MAX_MODULE_LINES
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in functions}
    assert {name: length for name, length in lengths.items() if length >= MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_init_holds_a_docstring_and_nothing_else(package):
    (statement,) = ast.parse((ROOT / package / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
    assert isinstance(statement.value.value, str)


def test_there_is_no_package_below_tests():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_are_ours(package):
    """Another distribution ships an `import spaces` too."""
    module = __import__(package)
    assert Path(module.__file__ or "").parent == ROOT / package
