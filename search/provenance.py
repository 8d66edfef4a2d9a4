"""Where a result comes from: the machine in words, the versions, the commit, and the commands that give it again or go on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spaces.spec import SearchSpec


def machine() -> str:
    """Return the machine in words, without its name."""
    memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {memory} GiB memory"


def versions() -> dict[str, str]:
    """Return the versions that a result depends on: those of its trials, and what searches with them."""
    from trainables.device import package_versions  # with torch, which most commands do without

    names = ("paretune", "ray", "optuna", "mlflow", "numpy")
    return {**package_versions(), **{name: version(name) for name in names}}


def git_commit() -> str | None:
    """Return the commit of the user's working directory, if it is a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def own_command() -> str:
    """Return the command that started this process."""
    return shlex.join(["paretune", *sys.argv[1:]])


def command_in(directory: Path, *words: str) -> str:
    """Return `paretune WORDS` for the searches of a directory, as it is typed where this runs."""
    here = directory.absolute()
    if here == Path(SearchSpec.model_fields["directory"].default).absolute():
        return shlex.join(["paretune", *words])
    shown = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else here
    return shlex.join(["paretune", *words, "--directory", str(shown)])


def reproduce_command(spec: SearchSpec, spec_path: str, name: str, number: int, params: Mapping[str, Any]) -> str:
    """Return the command that trains one trial of the search `name` again."""
    searched = {knob: params[knob] for knob in spec.space.names_searched() if knob in params}
    # A name has up to 64 characters.
    pins = [*spec.space.fixed_to(searched), "budget.trials=1", f"name={name[:48]}-again-{number}"]
    if spec.sampler.method == "points":
        pins.append("sampler.method=random")
    if spec.sampler.points_to_evaluate:
        pins.append("sampler.points_to_evaluate=[]")
    if spec.sampler.warm_start is not None:
        pins.append("sampler.warm_start=")
    return shlex.join(["paretune", "search", spec_path, *(part for pin in pins for part in ("--set", pin))])


def flat_params(spec: SearchSpec) -> dict[str, Any]:
    """Return the spec as flat `{dotted path: value}` for MLflow's parent run."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif value is not None:
            flat[prefix] = value if isinstance(value, str | int | float) else json.dumps(value)

    walk("", spec.model_dump(mode="json", exclude_none=True))
    return flat
