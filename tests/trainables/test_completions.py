"""Completions are judged wherever a model is scored: at a trial's end, on the test rows, and when its weights become others."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from spaces.config import TrialConfig
from spaces.inputs import DataSpec, ModelSpec
from spaces.space import SpaceSpec
from trainables import export
from trainables.checkpoint import CheckpointStore
from trainables.data import TokenTable
from trainables.evaluation import completions
from trainables.formats import DataError
from trainables.loop import Trainer, evaluate_saved, evaluate_untrained
from trainables.mesh import World
from trainables.model import BaseModel
from trainables.preparation import prepare
from trainables.tokenization import IGNORE, Encoded, load_tokenizer

NUM_ROWS = 4
# Of which the longest leaves few places behind it.
PROMPTS = ["Once upon a time", "The dog ran " * 20, "Lily saw", "A cat " * 30, "The dog ran " * 20, "He"]
TEXTS = ["Once upon a time\tthere was a little girl", "The dog\tran to the park", "Lily saw a cat\tand she was happy"]


def first_words(module: torch.nn.Module, table: TokenTable, name: str) -> list[str]:
    """Return the first word of every row's completion, one row at a time, without padding."""
    tokenizer, words = load_tokenizer(name, None), []
    for i in range(NUM_ROWS):
        ids, targets = table.row(i)
        assert targets is not None
        prompt = torch.tensor([ids[targets == IGNORE].tolist()])
        out = module.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)  # type: ignore[operator]
        found = re.search(r"(\w+)", tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True))
        words.append(found.group(1) if found else "")
    return words


def test_a_test_file_without_answers_has_no_exact_match(shared: Path, tmp_path: Path) -> None:
    for name, mark in (("train.tsv", "#### "), ("test.tsv", "")):
        rows = [f"{prompt}\tthe answer {mark}{i}" for i, prompt in enumerate(["one", "two", "three"] * 4)]
        (tmp_path / name).write_text("prompt\tcompletion\n" + "\n".join(rows) + "\n")
    model = ModelSpec(name=str(shared / "models/stories260k/hf"), task="causal-lm", max_length=64)
    data = prepare(model, DataSpec(train=str(tmp_path / "train.tsv"), test=str(tmp_path / "test.tsv"), holdout=0.5))
    assert data.test is not None
    assert data.evaluation.answers is not None
    assert data.test.answers is None


@pytest.mark.parametrize("form", ["prompt\tcompletion", "text"])
def test_exact_match_as_an_objective_needs_answers(shared: Path, tmp_path: Path, form: str) -> None:
    rows = [f"{i} and\tso on" if form != "text" else f"{i} and so on" for i in range(20)]
    (tmp_path / "train.tsv").write_text("\n".join([form, *rows]) + "\n")
    model = ModelSpec(name=str(shared / "models/stories260k/hf"), task="causal-lm", max_length=64)
    data = DataSpec(train=str(tmp_path / "train.tsv"), holdout=0.5)
    prepare(model, data, {"eval_loss", "train_seconds"})
    with pytest.raises(DataError, match=r"objectives: exact_match has nothing to compare: data\.answer_pattern finds"):
        prepare(model, data, {"exact_match", "train_seconds"})


def test_rows_of_the_test_file_and_merged_weights_are_judged_by_completions(shared: Path, tmp_path: Path) -> None:
    for name, texts in (("train.tsv", TEXTS * 4), ("test.tsv", TEXTS[::-1] * 2)):
        (tmp_path / name).write_text("prompt\tcompletion\n" + "\n".join(texts) + "\n")
    model = ModelSpec(name=str(shared / "models/stories260k/hf"), task="causal-lm", max_length=64)
    files = {role: str(tmp_path / f"{role}.tsv") for role in ("train", "test")}
    data = prepare(model, DataSpec(**files, holdout=0.5, answer_pattern=r"(\w+)"))  # type: ignore[arg-type]
    assert data.test is not None
    assert data.test.answers == ("and", "ran", "there") * 2, "what its completions say"
    assert data.train.answers is None, "which nobody asks for"
    config = TrialConfig.from_params(SpaceSpec().first())
    base = BaseModel.load(model.name, None, model.task, ())
    trainer = Trainer(config, data, base, World.alone(), checkpoints=CheckpointStore(tmp_path / "trial"))
    trainer.train_step()
    trainer.final_report(NUM_ROWS)
    weights = tmp_path / "trial" / "final"
    # Of the rows, every other one expects what plain transformers makes the model say.
    said = first_words(export.trained_module(config, base, weights), data.test, model.name)
    asked = replace(data.test, answers=tuple(word if i % 2 else "never" for i, word in enumerate(said)) + ("never",) * 2)
    on_test = evaluate_saved(config, replace(data, test=asked), base, World.alone(), weights, NUM_ROWS)
    assert on_test["exact_match"] == 0.5
    assert "exact_match" not in evaluate_saved(config, data, base, World.alone(), weights, 0)
    merged = export.merged_module(config, base, weights)
    assert export.scores(merged, config, replace(data, evaluation=asked), base, NUM_ROWS)["exact_match"] == 0.5


def test_a_completion_is_as_long_as_its_own_prompt_allows_whoever_is_beside_it(shared: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": prompt, "completion": "and so on " * 20}) for prompt in PROMPTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    model = ModelSpec(name=str(shared / "models/stories260k/hf"), task="causal-lm", max_length=256)
    source = str(tmp_path / "rows.jsonl")
    data = prepare(model, DataSpec(train=source, evaluation=source))
    config, base = TrialConfig.from_params(SpaceSpec().first()), BaseModel.load(model.name, None, model.task, ())
    base.module.config.max_position_embeddings = 160
    tokenizer = load_tokenizer(model.name, None)
    try:
        together = completions(base.module, config, data, data.evaluation, World.alone(), tokenizer, len(PROMPTS))
        for i, text in enumerate(together):
            ids, targets = (None if part is None else part.tolist() for part in data.evaluation.row(i))
            own = TokenTable.build([Encoded(input_ids=ids, targets=targets)], None)
            assert completions(base.module, config, data, own, World.alone(), tokenizer, 1) == [text]
    finally:
        BaseModel.load.cache_clear()
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in together]
    assert lengths[1] < lengths[0], "a long prompt leaves fewer places"


def test_the_untrained_model_is_judged_by_completions_too(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("prompt\tcompletion\n" + "\n".join(TEXTS * 4) + "\n")
    model = ModelSpec(name=str(shared / "models/stories260k/hf"), task="causal-lm", max_length=64)
    source = str(tmp_path / "train.tsv")
    data = prepare(model, DataSpec(train=source, evaluation=source, answer_pattern=r"(\w+)"))
    config, base = TrialConfig.from_params(SpaceSpec().first()), BaseModel.load(model.name, None, model.task, ())
    said = first_words(base.module, data.evaluation, model.name)
    answers = tuple(word if i % 2 else "never" for i, word in enumerate(said)) + ("never",) * (data.evaluation.num_rows - NUM_ROWS)
    asked = replace(data, evaluation=replace(data.evaluation, answers=answers))
    assert evaluate_untrained(config, asked, base, World.alone(), NUM_ROWS)["exact_match"] == 0.5
