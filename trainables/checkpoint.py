"""Checkpoints: safetensors and JSON with a checksum manifest. No pickle, which would run code from whoever wrote the file."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainables.report import DiskFull

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# The newest may be damaged by the crash that makes it needed.
KEEP = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What was saved at a step."""

    weights: dict[str, torch.Tensor]
    """Trained parameters, whole, by name."""
    optimizer: dict[str, torch.Tensor]
    """Optimizer state, whole, by `<parameter>/<state>`."""
    state: dict[str, Any]
    """Plain values."""


class CheckpointStore:
    """The checkpoints of one trial in one directory; only rank 0 writes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.save_seconds = 0.0
        """What the newest checkpoint took, from its gathering on."""

    def save(self, step: int, checkpoint: Checkpoint) -> None:
        """Write a checkpoint so that it is either whole or not there, and drop the oldest."""
        self._write(self._directory / f"step-{step:08d}", checkpoint)
        for old in self._steps()[:-KEEP]:
            shutil.rmtree(old)

    def save_final(self, checkpoint: Checkpoint) -> Path:
        """Write the trained weights of a finished trial; return their directory."""
        self._write(self._directory / "final", checkpoint)
        return self._directory / "final"

    def clear(self) -> None:
        """Remove all that was written."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def latest_valid(self) -> Checkpoint | None:
        """Return the newest checkpoint whose files match their checksums, or None; damaged ones are passed over with a warning."""
        for path in reversed(self._steps()):
            problem = _problem(path)
            if problem is None:
                return read_checkpoint(path)
            logger.warning("checkpoint %s is passed over: %s", path, problem)
        return None

    def _steps(self) -> list[Path]:
        return sorted(p for p in self._directory.glob("step-*") if p.suffix != ".tmp")

    def _write(self, target: Path, checkpoint: Checkpoint) -> None:
        temporary = target.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            self._fill(temporary, checkpoint)
        except (OSError, SafetensorError) as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            raise DiskFull(f"{self._directory}: no space is left for its weights, which are written below `directory`") from error
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(target.parent)

    @staticmethod
    def _fill(temporary: Path, checkpoint: Checkpoint) -> None:
        save_file(checkpoint.weights, temporary / "weights.safetensors")
        if checkpoint.optimizer:
            save_file(checkpoint.optimizer, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(checkpoint.state))
        digests = {p.name: _digest(p) for p in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(digests, indent=2))
        for path in temporary.iterdir():
            _sync(path)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        ValueError: a file does not match its checksum, or the manifest is not there.
    """
    problem = _problem(path)
    if problem is not None:
        raise ValueError(f"{path}: {problem}")
    return Checkpoint(
        weights=load_file(path / "weights.safetensors"),
        optimizer=load_file(optimizer) if (optimizer := path / "optimizer.safetensors").exists() else {},
        state=json.loads((path / "state.json").read_text()),
    )


def _problem(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; neither safetensors nor torch notice a flipped byte."""
    try:
        digests: Mapping[str, str] = json.loads((path / MANIFEST).read_text())
        wrong = [name for name, digest in digests.items() if _digest(path / name) != digest]
    except (OSError, json.JSONDecodeError) as error:
        return f"incomplete ({error})"
    return f"{', '.join(wrong)} does not match its checksum" if wrong else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
