"""Bad input through the command: one clear line for each error, exit code 2, nothing started, nothing written."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import yaml
from tiny import make_rows, make_spec
from typer.testing import CliRunner

from search.cli import app


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_spec(tmp_path_factory.mktemp("bad"))


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


CASES = {
    "unknown key": (["budget.trails=3"], "budget.trails", "did you mean 'trials'?"),
    "wrong type": (["budget.trials=many"], "budget.trials", '"many"'),
    "range reversed": (["space.learning_rate={log_uniform: [1e-2, 1e-4]}"], "space.learning_rate", "reversed"),
    "fraction 0": (["space.dataset_fraction=0"], "space.dataset_fraction", "above 0"),
    "fraction 1.5": (["space.dataset_fraction=1.5"], "space.dataset_fraction", "at most 1"),
    "missing column": (["data.text=body"], "data.text", "no column 'body'"),
    "world size": (["space.world_size=64"], "space.world_size", "more workers than the cluster"),
    "a model that tp cannot split": (
        ["space.world_size=2", "space.strategy=tp"],
        "space.strategy",
        "splits models of these families",
    ),
    "a quantised base that is sharded": (
        ["space.world_size=2", "space.strategy=fsdp", "space.quantization=nf4"],
        "space.quantization",
        "a base in nf4 is neither spread over ranks nor left to the host",
    ),
    "weights left to a host that has no GPUs": (
        ["space.strategy=fsdp", "space.offload=cpu"],
        "space.offload",
        "moves weights from a GPU, and the workers have none",
    ),
    "weights left to the host without fsdp": (
        ["space.strategy=ddp", "space.offload=cpu"],
        "space.offload",
        "says nothing without strategy fsdp",
    ),
    "a prefix of a classifier": (["space.adapter=prefix"], "space.adapter", "prefix is for causal-lm"),
    "batches that nothing divides": (
        ["space.micro_batch_size=5", "space.global_batch_size=16"],
        "space.micro_batch_size",
        "16 rows is no whole number of micro batches of 5 rows on 1 rank",
    ),
    "unknown model": (["model.name=nobody/nothing"], "model.name", "no model 'nobody/nothing'"),
    "no such directory": (["model.name=./nowhere"], "model.name", "no such directory: ./nowhere"),
    "no such file": (["data.train=trian.csv"], "data.train", "no such file 'trian.csv'"),
    "no such template": (["data.chat_template=chat.jinja"], "data.chat_template", "no such file 'chat.jinja'"),
    "longer than the model": (["model.max_length=100000"], "model.max_length", "allowed: 1 to"),
    "an encoder that generates": (["model.task=causal-lm"], "model.task", "allowed: sequence-classification"),
    "no server": ([f"tracking.uri=http://127.0.0.1:{closed_port()}"], "tracking.uri", "127.0.0.1"),
    "file store": (["tracking.uri=file:///mlruns"], "tracking.uri", "sqlite"),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_starts_nothing(spec: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    overrides, key, hint = CASES[case]
    result = CliRunner().invoke(app, ["search", str(spec), *(part for o in overrides for part in ("--set", o))])
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: --set: ")
    assert key in lines[0]
    assert hint in lines[0]
    assert not (spec.parent / "runs/tiny/ledger.jsonl").exists()


@pytest.mark.parametrize(
    ("amount", "words"),
    [
        ("30", "--budget 30: not a budget; allowed: 50trials, 30m, 2h, 8gpu-hours, 40usd"),
        ("5usd", "--budget: budget: dollars without a price"),
        ("0m", "--budget: budget.minutes: out of range"),
    ],
)
def test_a_bad_budget_is_one_line(spec: Path, amount: str, words: str) -> None:
    result = CliRunner().invoke(app, ["search", str(spec), "--budget", amount])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {words}")
    assert len(result.stderr.splitlines()) == 1


def test_what_is_wrong_in_a_data_file_names_the_line_that_asked_for_it(spec: Path) -> None:
    bad = spec.with_name("bad.yaml")
    bad.write_text(spec.read_text().replace("train.csv", "other.csv"))
    line = next(n for n, text in enumerate(bad.read_text().splitlines(), start=1) if "other.csv" in text)
    data = spec.with_name("other.csv")
    for content, hint in [(b"", "empty"), (b"text,label\nyes \xff,a\n", "UTF-8"), (b"text,label\na,b\n", "a single class")]:
        data.write_bytes(content)
        result = CliRunner().invoke(app, ["search", str(bad)])
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1].startswith(f"error: {bad}:{line}: data.train: {data}: ")
        assert hint in result.stderr


def test_a_cluster_that_does_not_answer_is_one_line(spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port()}")
    result = CliRunner().invoke(app, ["search", str(spec)])
    assert result.exit_code == 2
    assert "RAY_ADDRESS: no Ray cluster answers at 127.0.0.1" in result.stderr
    assert not (spec.parent / "runs/tiny").exists()
    assert "no Ray cluster answers" in CliRunner().invoke(app, ["doctor"]).output


def test_validate_looks_for_local_data(spec: Path) -> None:
    assert CliRunner().invoke(app, ["validate", str(spec)]).exit_code == 0
    missing = CliRunner().invoke(app, ["validate", str(spec), "--set", "data.test=nowhere.csv"])
    assert missing.exit_code == 2
    assert "--set: data.test: no such file 'nowhere.csv'" in missing.stderr
    misspelt = CliRunner().invoke(app, ["validate", str(spec), "--set", f"data.train={spec.parent}/trian.csv"])
    assert f"did you mean '{spec.parent}/train.csv'?" in misspelt.stderr


def test_all_errors_of_a_file_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("model: {name: m, task: causal-ml}\ndata: {trian: a.csv}\nspace: {lora_rankk: 4}\n")
    result = CliRunner().invoke(app, ["validate", str(path)])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 3  # task, data.trian, space.lora_rankk
    assert all(f"{path}:" in line for line in lines)


def test_plan_says_what_cannot_run_here_and_exits_3_if_nothing_can(spec: Path) -> None:
    planned = CliRunner().invoke(app, ["plan", str(spec), "--set", "space.world_size={choice: [1, 64]}"])
    assert planned.exit_code == 0
    assert "needs 64 workers, and there are 2" in planned.output
    nothing = CliRunner().invoke(app, ["plan", str(spec), "--set", "space.world_size=64"])
    assert nothing.exit_code == 3


def test_a_schema_comes_out_that_accepts_what_the_loader_accepts(spec: Path) -> None:
    import json

    import jsonschema

    schema = json.loads(CliRunner().invoke(app, ["schema"]).output)
    jsonschema.validate(yaml.safe_load(spec.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"model": {}}, schema)


def test_an_unknown_search_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    make_rows(tmp_path / "t.csv")
    result = CliRunner().invoke(app, ["front", "nothing", "--directory", str(tmp_path)])
    assert result.exit_code == 2
    assert "no search named 'nothing'" in result.stderr
