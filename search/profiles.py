"""Step profiles that were measured here, on disk and found again by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

from spaces.config import TrialConfig
from trainables.device import cache_directory

# What a profile must say; one that an earlier version wrote may not.
NEEDED = {"compile_seconds", "fixed_seconds", "seconds_per_token", "part_seconds", "peak_memory_bytes", "time_drift", "num_nodes"}


class ProfileCache:
    """One small file for each profile; two searches may write at once."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or cache_directory() / "step_profiles"

    def get(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return what `trainables.step_profile` measured under this key, or None; a file that cannot be read is none."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads(self._path(key).read_text())
            profile = entry["profile"]
            if entry["key"] == json.loads(_text(key)) and profile.keys() >= NEEDED:
                return dict(profile)
        return None

    def put(self, key: Mapping[str, Any], profile: Mapping[str, Any]) -> Path:
        """Keep a profile, in place of an older one; return its file.

        Raises:
            OSError: the directory cannot be written to.
        """
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        entry = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "key": key, "profile": profile}
        fresh.write_text(json.dumps(entry, indent=1))
        return fresh.replace(path)

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self._directory / f"{hashlib.sha256(_text(key).encode()).hexdigest()[:24]}.json"


def fewest_nodes(world_size: int, workers_per_node: Sequence[int]) -> int:
    """Return on how many nodes as many workers sit at least.

    Args:
        world_size: the workers of a trial.
        workers_per_node: how many each node holds, the most first.
    """
    return 1 + sum(held < world_size for held in accumulate(workers_per_node))


def scattered(
    report: Mapping[str, Any] | None, profile: Mapping[str, Any] | None, world_size: int, workers_per_node: Sequence[int]
) -> dict[str, str]:
    """Return for a trial's details in words that its ranks were on more nodes than they need, and waited longer for one another.

    Args:
        report: the last one of a trial.
        profile: of one whose steps were timed.
        world_size: its ranks.
        workers_per_node: how many each node holds, the most first.
    """
    nodes = {place["node_id"] for place in (report or {}).get("details", {}).get("process_map", ())}
    num_nodes, least = (profile or {}).get("num_nodes", len(nodes)), fewest_nodes(world_size, workers_per_node)
    if not workers_per_node or num_nodes <= least:
        return {}
    return {"scattered": f"its ranks were on {num_nodes} nodes, and {least} hold{'s' if least == 1 else ''} as many"}


def profile_key(
    config: TrialConfig,
    *,
    model: Mapping[str, Any],
    data_fingerprint: str,
    max_length: int,
    device: Mapping[str, Any],
    num_nodes: int,
) -> dict[str, Any]:
    """Return all that the time of a step depends on; another value of any of it is another profile.

    Args:
        config: recipe and layout.
        model: its `config.json`.
        data_fingerprint: of the token tables, whose lengths are the shapes.
        max_length: tokens at which rows are cut.
        device: as `trainables.device.examine` found it.
        num_nodes: those that the ranks sit on.
    """
    return {
        "model": model,
        "data": data_fingerprint,
        "max_length": max_length,
        **config.of_step().to_dict(),
        "device": {name: device[name] for name in ("type", "name", "threads")},
        "num_nodes": num_nodes,
        # What a step computes: 5 since AdamW's fused kernel updates shards too.
        "step": 5,
        "versions": {**device["versions"], "paretune": version("paretune")},
    }


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
