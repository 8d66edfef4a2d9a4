"""`ray job submit` against a real cluster of two nodes, and the cluster file against Ray's own schema."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import yaml
from tiny import make_spec

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def test_cluster_yaml_is_valid_by_rays_own_schema() -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    jsonschema.validate(config, schema)
    spot = config["available_node_types"]["gpu_spot"]
    assert spot["min_workers"] < spot["max_workers"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "max_workers": "many"}, schema)


@dataclass
class TwoNodes:
    job_server: str
    address: str
    env: dict[str, str]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def environment(directory: Path) -> dict[str, str]:
    """Return the environment of nodes and jobs, with a token of their own."""
    token = directory / "token"
    token.write_text("a" * 64)
    token.chmod(0o600)
    return {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }


@contextmanager
def started(commands: list[list[str]], env: dict[str, str], directory: Path, address: str) -> Iterator[None]:
    """Run `ray start` with these options, one after the other, for the time of the block."""
    nodes: list[subprocess.Popen[bytes]] = []
    log = (directory / "nodes.log").open("ab")
    try:
        for command in commands:
            # Another Ray on this machine has the usual port, and jobs are started by whoever listens on it.
            options = [*command, "--block", "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}"]
            nodes.append(subprocess.Popen([BIN / "ray", "start", *options], env=env, stdout=log, stderr=log, cwd=directory))
            _wait_for_nodes(address, len(nodes), env, directory)
        yield
    finally:
        for node in reversed(nodes):
            node.send_signal(signal.SIGTERM)
        for node in reversed(nodes):
            try:
                node.wait(30)
            except subprocess.TimeoutExpired:
                node.kill()


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """Ray's sockets live below its temporary directory, and their paths are limited to 107 characters."""
    temp = Path("/tmp") / f"pt{os.getpid()}"
    yield temp
    shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture
def two_nodes(tmp_path: Path, short_directory: Path) -> Iterator[TwoNodes]:
    """A head without CPUs that trials may use, a worker with one CPU each, token authentication, own ports and directories."""
    port, dashboard, env = free_port(), free_port(), environment(tmp_path)
    common = ["--num-cpus=1", "--object-store-memory=100000000"]
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    commands = [
        [*head, f"--temp-dir={short_directory}/head", *common],
        [f"--address=127.0.0.1:{port}", f"--temp-dir={short_directory}/worker", *common],
    ]
    with started(commands, env, tmp_path, f"127.0.0.1:{port}"):
        yield TwoNodes(job_server=f"http://127.0.0.1:{dashboard}", address=f"127.0.0.1:{port}", env=env)


def _wait_for_nodes(address: str, count: int, env: dict[str, str], cwd: Path) -> None:
    code = f"import ray; ray.init('{address}', logging_level='ERROR'); print('alive', sum(n['Alive'] for n in ray.nodes()))"
    end = time.monotonic() + 90
    while time.monotonic() < end:
        done = subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True, check=False)
        if f"alive {count}" in done.stdout:
            return
    raise AssertionError(f"no {count} nodes: {done.stdout} {done.stderr} {(cwd / 'nodes.log').read_text()[-2000:]}")


@pytest.mark.slow
def test_a_submitted_search_trains_over_two_nodes_and_without_the_token_nobody_gets_in(two_nodes: TwoNodes, tmp_path: Path) -> None:
    working_dir = tmp_path / "project"
    make_spec(
        working_dir,
        space={
            "learning_rate": {"log_uniform": [1.0e-3, 1.0e-2]},
            "global_batch_size": 8,
            "dataset_fraction": 0.5,
            "lora_rank": 2,
            "world_size": 2,
            "strategy": {"choice": ["ddp", "fsdp"]},
        },
        budget={"trials": 2},
    )
    submit = ["job", "submit", "--address", two_nodes.job_server, "--working-dir", str(working_dir), "--"]
    entrypoint = ["python", "-m", "search.cli", "search", "spec.yaml"]
    done = subprocess.run(
        [BIN / "ray", *submit, *entrypoint],
        env=two_nodes.env,
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    lines = (working_dir / "runs/tiny/ledger.jsonl").read_text().splitlines()
    trials = [e for e in map(json.loads, lines) if e["event"] == "trial_finished"]
    assert [t["state"] for t in trials] == ["COMPLETE", "COMPLETE"]
    for trial in trials:
        nodes = {entry["node_id"] for entry in trial["details"]["process_map"]}
        assert len(nodes) == 2, f"both ranks sat on one node: {trial['details']['process_map']}"
    assert re.search(r"trial \d{4} COMPLETE", done.stdout + done.stderr)

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{two_nodes.job_server}/api/jobs/", timeout=10)
    assert refused.value.code == 401

    other = tmp_path / "other"
    other.write_text("b" * 64)
    env = {**two_nodes.env, "RAY_ADDRESS": two_nodes.address, "RAY_AUTH_TOKEN_PATH": str(other)}
    command = [sys.executable, "-m", "search.cli", "search", str(working_dir / "spec.yaml"), "--set", "name=other"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"error: RAY_ADDRESS: the Ray cluster at {two_nodes.address} lets nobody in" in done.stderr
    assert "Traceback" not in done.stderr


# What Ray's autoscaler looks up, as `ray up` fills it in where a file leaves it out.
EMPTY = {
    **{key: {} for key in ("auth", "docker", "file_mounts")},
    **{
        f"{what}_commands": []
        for what in ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    },
    **{key: [] for key in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
    "file_mounts_sync_continuously": False,
}


@pytest.mark.slow
def test_an_autoscaler_starts_the_nodes_that_a_search_asks_for(tmp_path: Path, short_directory: Path) -> None:
    """Ray's own autoscaler, with a provider whose nodes are processes of this machine: none runs before a trial waits for one."""
    port, head, env = free_port(), "ray.head.default", environment(tmp_path)
    provider = {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}"}
    node = {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    autoscaler = {
        **EMPTY,
        "cluster_name": "fake",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {**provider, "disable_node_updaters": True, "disable_launch_config_check": True},
        "available_node_types": {head: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}, "worker": node},
        "head_node_type": head,
    }
    (tmp_path / "autoscaler.yaml").write_text(yaml.safe_dump(autoscaler))
    env |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    options = ["--head", f"--port={port}", "--num-cpus=0", "--object-store-memory=100000000", f"--temp-dir={short_directory}"]
    options += [f"--autoscaling-config={tmp_path}/autoscaler.yaml", "--include-dashboard=false"]
    make_spec(tmp_path / "project", resources={"workers": 2}, budget={"trials": 2})
    with started([options], env, tmp_path, f"127.0.0.1:{port}"):
        command = [sys.executable, "-m", "search.cli", "search", "project/spec.yaml", "--set", "space.world_size=2"]
        env["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "the cluster has room for 0 workers now, resources.workers asks for 2" in done.stderr
    lines = (tmp_path / "project/runs/tiny/ledger.jsonl").read_text().splitlines()
    trials = [e for e in map(json.loads, lines) if e["event"] == "trial_finished"]
    assert [t["state"] for t in trials] == ["COMPLETE", "COMPLETE"]
    for trial in trials:
        assert len({entry["node_id"] for entry in trial["details"]["process_map"]}) == 2, "each node holds one worker"
