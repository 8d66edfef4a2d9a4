"""Which trials can be exported, and what their card says; the weights are those of `tests/trainables/test_export.py`."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from synthetic import confirmed_event, numbers_on_front, results_of, synthetic_events
from tiny import make_spec
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from search.cli import app
from search.ledger import Ledger, replay
from search.model_card import model_card
from search.results import load_results
from search.store import Store
from spaces.config import TrialConfig
from spaces.loading import load_spec
from trainables.checkpoint import CheckpointStore
from trainables.columns import Columns
from trainables.loop import Command, train
from trainables.mesh import World
from trainables.model import BaseModel
from trainables.preparation import prepare

MEMBER, OTHER = 0, 1


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a search of two trials that were really trained; the second one's weights are gone."""
    directory = tmp_path_factory.mktemp("export")
    loaded = load_spec(make_spec(directory, space={"adapter": "lora", "lora_rank": 4, "global_batch_size": 8, "learning_rate": 5e-3}))
    spec = loaded.spec
    data = prepare(spec.model, spec.data)
    base = BaseModel.load(spec.model.name, None, spec.model.task, data.label_names)
    store = Store.create(loaded)
    ledger = Ledger(store.ledger_path)
    started = {"mlflow_run_id": None, "data_fingerprint": data.fingerprint, "data": data.summary, "machine": "made up"}
    ledger.append("search_started", name=store.name, versions={"torch": "2.11"}, git_commit="c0ffee", num_workers=2, **started)
    ledger.append("reference", metrics={"accuracy": 0.3, "eval_loss": 1.1})
    for number, fraction in ((MEMBER, 1.0), (OTHER, 0.2)):
        params = {**spec.space.first(), "dataset_fraction": fraction}
        config = TrialConfig.from_params(params)
        ledger.append("trial_started", number=number, params=params, config=config.to_dict(), command="")
        checkpoints = CheckpointStore(store.trial_path(number)) if number == MEMBER else None
        reports = list(train(config, data, base, World.alone(), control=lambda _: Command.CONTINUE, checkpoints=checkpoints))
        ledger.append("trial_reported", number=number, report=reports[-1].to_dict(), held_seconds=1.0)
        values = dict(reports[-1].metrics)
        if number == OTHER:  # dominated
            values |= {"accuracy": 0.1, "train_seconds": 1e6}
        ledger.append("trial_finished", number=number, state="COMPLETE", values=values, error=None, attempts=1, held_seconds=1.0)
    return directory


def export(directory: Path, *words: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["export", *words, "--directory", str(directory / "runs")])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["tiny", "17"], "trial 17: tiny has no such trial; its front: 0"),
        (["tiny", "1"], "trial 1: only weights of the front (0) are kept; this trains it again: paretune search"),
        (["tini", "0"], "no search named 'tini'"),
    ],
)
def test_what_cannot_be_exported_is_told_in_one_line(searched: Path, words: list[str], line: str) -> None:
    printed = export(searched, *words, code=2)
    assert line in printed
    assert len(printed.splitlines()) == 1
    assert not (searched / "runs/tiny/exports").exists()


def test_a_directory_with_something_in_it_is_left_alone(searched: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "something is there already" in export(searched, "tiny", "0", "--output", str(tmp_path), code=2)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_changed_data_are_refused(searched: Path, tmp_path: Path) -> None:
    rows = searched / "train.csv"
    before = rows.read_text()
    try:
        rows.write_text(before + "more rain,weather\n")
        assert "the data changed since the search began" in export(searched, "tiny", "0", "--output", str(tmp_path / "x"), code=2)
        assert not (tmp_path / "x").exists()
    finally:
        rows.write_text(before)


def test_a_merged_model_loads_and_its_card_says_where_it_is_from(searched: Path, tmp_path: Path) -> None:
    told = json.loads(export(searched, "tiny", "0", "--merge", "--output", str(tmp_path / "out"), "--json"))
    assert told == {"directory": str(tmp_path / "out"), "is_merged": True, "scores": {}}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(input_ids=torch.tensor([[2, 5, 3]])).logits).all()
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    results = load_results("tiny", searched / "runs")
    record = results.state.records[MEMBER]
    scores = {(r.dataset_split, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert scores["evaluation", "accuracy"] == pytest.approx(record.values["accuracy"], abs=1e-6)
    assert results.command_of(record) in card.text
    assert (results.state.started or {})["data_fingerprint"] in card.text
    assert "torch 2.11" in card.text
    assert not list(tmp_path.glob("*.tmp"))


def test_an_adapter_goes_below_the_search(searched: Path) -> None:
    directory = Path(export(searched, "tiny", "0").strip())
    assert directory == searched / "runs/tiny/exports/0000"
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (searched / "runs/tiny/exports/0000").iterdir()), "for others too"
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"} <= {
        p.name for p in directory.iterdir()
    }
    assert ModelCard.load(directory / "README.md").data.library_name == "peft"


def test_the_card_names_test_scores_further_seeds_and_quantisation(tmp_path: Path) -> None:
    events = synthetic_events(12)
    number = min(numbers_on_front(list(replay(events).records.values())))
    seeds = [confirmed_event(number, seed, accuracy=0.6, seconds=50.0, test=0.5 + 0.01 * seed) for seed in (1, 2, 3)]
    results = results_of(replay([*events, *seeds]), load_spec(make_spec(tmp_path)).spec)
    record = results.state.records[number]
    card = model_card(results, record, is_merged=False, scores={})
    (row,) = re.findall(r"^\| accuracy .*$", card, re.MULTILINE)
    assert "±" in row
    assert "One seed" not in card
    config = record.trial_config
    quantized = replace(record, config=replace(config, recipe=replace(config.recipe, quantization="nf4")).to_dict(), confirmations=())
    card = model_card(results, quantized, is_merged=True, scores={"accuracy": 0.123})
    assert "0.123" in card
    assert "One seed" in card
    card = model_card(results, quantized, is_merged=False, scores={}, unquantized=["classifier"])
    assert "llm_int8_skip_modules=['classifier']" in card
    compile(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], "card", "exec")
    in_float8 = replace(record, config=replace(config, recipe=replace(config.recipe, quantization="float8")).to_dict())
    card = model_card(results, in_float8, is_merged=False, scores={}, unquantized=["classifier"])
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    assert "from torchao.quantization import Float8WeightOnlyConfig\nfrom transformers import" in code
    assert "quantization_config=TorchAoConfig(Float8WeightOnlyConfig(), modules_to_not_convert=['classifier']), dtype=" in code
    compile(code, "card", "exec")
    bottleneck = replace(record, config=replace(config, recipe=replace(config.recipe, adapter="bottleneck")).to_dict())
    card = model_card(results, bottleneck, is_merged=False, scores={})
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    assert "library_name" not in card
    assert "PeftModel" not in code
    assert 'load(base, "THIS_DIRECTORY")' in code
    compile(code, "card", "exec")
    prefix = replace(record, config=replace(config, recipe=replace(config.recipe, adapter="prefix", adapter_rank=12)).to_dict())
    code = re.findall(r"```python\n(.*?)```", model_card(results, prefix, is_merged=False, scores={}), re.DOTALL)[0]
    assert 'PeftModel.from_pretrained(base, "THIS_DIRECTORY")' in code
    assert 'pad(tokens["attention_mask"], (12, 0), value=1)' in code
    compile(code, "card", "exec")


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (Columns(kind="prompt_completion", prompt="question", completion="answer"), 'give it `prompt + "\\n"`'),
        (Columns(kind="messages", messages="messages"), "apply_chat_template"),
        (Columns(kind="text", text="text"), ""),
        (Columns(kind="classification", text="text", label="label"), ""),
    ],
)
def test_the_card_says_how_a_prompt_is_given(tmp_path: Path, columns: Columns, told: str) -> None:
    """As `trainables.tokenization` makes rows: a prompt ends with one line break more, a chat is in its template."""
    events = synthetic_events(12)
    number = min(numbers_on_front(list(replay(events).records.values())))
    events[0]["data"]["format"] = columns.describe()
    results = results_of(replay(events), load_spec(make_spec(tmp_path)).spec)
    card = model_card(results, results.state.records[number], is_merged=False, scores={})
    assert told in card
    assert ("It was trained on" in card) == bool(told)
    # One domain of several.
    events[0]["data"]["format"] = f"news: text (messages); own: {columns.describe()}"
    results = results_of(replay(events), load_spec(make_spec(tmp_path)).spec)
    card = model_card(results, results.state.records[number], is_merged=False, scores={})
    assert told in card
    assert ("Of own it was trained on" in card) == bool(told)
    assert "Of news" not in card
