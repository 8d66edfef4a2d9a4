"""`paretune doctor`: what about this machine would make a search fail or mislead, each with its remedy."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from search.cluster import check_reachable
from search.errors import UserError

Finding = dict[str, str]

# Below this, a search with checkpoints of a small model may fill the disk.
MIN_FREE_BYTES = 5 * 2**30


def examine(directory: Path) -> list[Finding]:
    """Return `{"check", "status", "message"}` for every check; status is ok, warning or error."""
    checks = (_python, _packages, _own_packages, _devices, _threads, _disk, _ray, _tracking)
    return [_named(check.__name__.strip("_"), *check(directory)) for check in checks]


def render(findings: list[Finding]) -> str:
    """Return the findings as text."""
    return "\n".join(f"{f['status']:8} {f['check'].replace('_', ' ')}: {f['message']}" for f in findings)


def _named(check: str, status: str, message: str) -> Finding:
    return {"check": check, "status": status, "message": message}


def _python(_: Path) -> tuple[str, str]:
    return "ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"


def _packages(_: Path) -> tuple[str, str]:
    names = ("torch", "transformers", "peft", "bitsandbytes", "ray", "optuna", "mlflow", "datasets")
    found, missing = [], []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return "error", f"not installed: {', '.join(missing)}; remedy: pip install -e . in paretune's directory"
    return "ok", ", ".join(found)


def _own_packages(_: Path) -> tuple[str, str]:
    import spaces

    here = Path(__file__).resolve().parent.parent
    there = Path(spaces.__file__ or "").resolve().parent.parent
    if there != here:
        return (
            "error",
            f"another distribution's `spaces` is imported, from {there}; remedy: a fresh virtual environment",
        )
    return "ok", "search, trainables and spaces are paretune's own"


def _devices(_: Path) -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        return "ok", f"no GPU; {psutil.cpu_count()} CPU cores, {psutil.virtual_memory().total / 2**30:.0f} GiB memory"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "ok", f"{len(names)} GPU: {', '.join(sorted(set(names)))}; a search uses them with `resources: {{gpus_per_worker: 1}}`"


def _threads(_: Path) -> tuple[str, str]:
    busy = os.getloadavg()[0]
    if busy > 0.5 * (psutil.cpu_count() or 1):
        return "warning", f"the machine is busy (load {busy:.1f}): measured times will be too long"
    return "ok", f"load {busy:.1f}"


def _disk(directory: Path) -> tuple[str, str]:
    place = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    status = "ok" if free > MIN_FREE_BYTES else "warning"
    return status, f"{free / 2**30:.0f} GiB free for {directory}"


def _ray(_: Path) -> tuple[str, str]:
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        return "ok", "no RAY_ADDRESS: a search starts Ray on this machine"
    try:
        check_reachable()
    except UserError as error:
        return "error", str(error)
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    known = "RAY_AUTH_TOKEN" in os.environ or token.exists()
    return ("ok" if known else "warning"), f"cluster at {address}; " + (
        "a token is there" if known else "no token: a cluster with token authentication answers 401"
    )


def _tracking(directory: Path) -> tuple[str, str]:
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        from search.tracking import Tracker, TrackingError

        try:
            Tracker(uri, "paretune", artifact_root=None).connect(timeout_seconds=5)
        except TrackingError as error:
            return "error", str(error)
        return "ok", f"{uri} answers"
    database = directory.absolute() / "mlflow.db"
    if not database.exists():
        return "ok", f"{database} will be made by the first search"
    with sqlite3.connect(database) as connection:
        (verdict,) = connection.execute("PRAGMA quick_check").fetchone()
    return ("ok" if verdict == "ok" else "error"), f"{database}: {verdict}"
