"""Checkpoints survive what crashes do to files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from trainables.checkpoint import KEEP, Checkpoint, CheckpointStore, read_checkpoint
from trainables.report import DiskFull


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(weights={"w": torch.full((50,), float(step))}, optimizer={"w/step": torch.tensor(1.0)}, state={"step": step})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3):
        store.save(step, checkpoint(step))
    return store


def test_the_newest_is_read_back_and_old_ones_go(store: CheckpointStore, tmp_path: Path) -> None:
    latest = store.latest_valid()
    assert latest is not None
    assert latest.state == {"step": 3}
    assert torch.equal(latest.weights["w"], torch.full((50,), 3.0))
    assert len(list(tmp_path.iterdir())) == KEEP


@pytest.mark.parametrize("damage", ["flip", "truncate", "manifest", "file"])
def test_a_damaged_one_is_passed_over_with_one_warning(
    store: CheckpointStore, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = tmp_path / "step-00000003"
    weights = newest / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1  # neither safetensors nor torch notice this one
    match damage:
        case "flip":
            weights.write_bytes(raw)
        case "truncate":
            weights.write_bytes(raw[:100])
        case "manifest":
            (newest / "manifest.json").unlink()
        case "file":
            weights.unlink()
    latest = store.latest_valid()
    assert latest is not None
    assert latest.state == {"step": 2}
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "step-00000003" in caplog.text
    with pytest.raises(ValueError, match="step-00000003"):
        read_checkpoint(newest)


def test_a_crash_while_writing_leaves_nothing_that_is_read(store: CheckpointStore, tmp_path: Path) -> None:
    (tmp_path / "step-00000009.tmp").mkdir()
    latest = store.latest_valid()
    assert latest is not None
    assert latest.state == {"step": 3}


def test_nothing_written_is_a_pickle(store: CheckpointStore, tmp_path: Path) -> None:
    store.save_final(checkpoint(3))
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".safetensors", ".json"}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_told_with_the_place_and_leaves_nothing_half_written(
    store: CheckpointStore, tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("trainables.checkpoint.save_file", full)
    with pytest.raises(DiskFull, match=rf"{tmp_path}: no space is left for its weights") as caught:
        store.save(4, checkpoint(4))
    assert caught.value.kind == "disk_full"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    monkeypatch.setattr("trainables.checkpoint.save_file", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        store.save(4, checkpoint(4))
