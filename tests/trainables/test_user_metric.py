"""A user's own score: found by its import path, given what was predicted, carried to processes that cannot import it."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import make_model, make_rows

from spaces.config import TrialConfig
from spaces.inputs import DataSpec, ModelSpec
from spaces.space import SpaceSpec
from trainables.data import TaskData
from trainables.evaluation import evaluate
from trainables.formats import DataError
from trainables.mesh import World
from trainables.model import BaseModel, build
from trainables.preparation import prepare
from trainables.report import TrialError
from trainables.user_metric import UserMetric

SCORES = """
WEIGHTS = {"a": 2.0}


def share_right(predictions, references):
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)


def weighed(predictions, references):
    return sum(WEIGHTS.get(r, 1.0) * (p == r) for p, r in zip(predictions, references, strict=True))


def not_finite(predictions, references):
    return float("nan")


def fails_on_rows(predictions, references):
    if predictions != references:
        raise ValueError("too few")
    return 1.0


def fails(predictions, references):
    raise KeyError("b")


no_function = 3
"""


@pytest.fixture
def scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_scores", raising=False)
    (tmp_path / "own_scores.py").write_text(SCORES)
    return tmp_path


def classified(directory: Path, path: str) -> tuple[ModelSpec, TaskData]:
    model = ModelSpec(name=str(make_model(directory / "model")), task="sequence-classification", max_length=32)
    rows = make_rows(directory / "train.csv", num_rows=80)
    return model, prepare(model, DataSpec(train=str(rows), metric=path))


def test_it_is_given_labels_and_reported_beside_the_accuracy(scores: Path) -> None:
    model, data = classified(scores, "own_scores:share_right")
    base = BaseModel.load(model.name, None, model.task, data.label_names)
    config = TrialConfig.from_params(SpaceSpec().first())
    found = evaluate(build(config, base, World.alone()), config, data, data.evaluation, World.alone())
    assert 0 < found["custom"] < 1  # else it could be a constant
    assert found["custom"] == pytest.approx(found["accuracy"])


def test_its_module_travels_with_it(scores: Path) -> None:
    metric = UserMetric.load("own_scores:weighed")
    (scores / "pickled").write_bytes(pickle.dumps(metric))
    code = "import pickle, pathlib; print(pickle.loads(pathlib.Path('pickled').read_bytes())(['a', 'b'], ['a', 'c']))"
    (scores / "own_scores.py").unlink()
    root = str(Path(__file__).parents[2])
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=scores, env={"PYTHONPATH": root}, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "2.0", run.stderr


def test_what_is_installed_is_imported_by_its_name(scores: Path) -> None:
    metric = UserMetric.load("sklearn.metrics:accuracy_score")
    assert metric(["a", "b"], ["a", "c"]) == 0.5
    assert len(metric.pickled) < 200


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("own_score:f", "data.metric: own_score cannot be imported: ModuleNotFoundError: No module named 'own_score'"),
        ("own_scores:share", "data.metric: own_scores has no function 'share'; it has: fails, .*, share_right, weighed"),
        ("own_scores:no_function", "data.metric: own_scores has no function 'no_function'"),
        ("own_scores:fails", r"data.metric: own_scores:fails failed: KeyError: 'b' \(given the references as predictions\)"),
        ("own_scores:not_finite", "data.metric: own_scores:not_finite gave nan, which is no finite number"),
    ],
)
def test_what_cannot_be_a_score_is_found_before_anything_starts(scores: Path, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classified(scores, path)


def test_a_score_that_fails_ends_its_trial_with_the_reason(scores: Path) -> None:
    metric = UserMetric.load("own_scores:fails_on_rows")
    with pytest.raises(TrialError, match="own_scores:fails_on_rows failed: ValueError: too few"):
        metric(["a"], ["b"])


def test_completions_are_judged_by_it(scores: Path, shared: Path) -> None:
    from trainables.evaluation import completion_scores, completions
    from trainables.tokenization import load_tokenizer

    model = ModelSpec(name=str(shared / "models/stories260k/hf"), task="causal-lm", max_length=64)
    rows = ["Once upon a time\tthere was a little girl", "The dog\tran to the park", "Lily saw a cat\tand she was happy"] * 4
    (scores / "rows.tsv").write_text("prompt\tcompletion\n" + "\n".join(rows) + "\n")
    spec: dict[str, Any] = {"train": str(scores / "rows.tsv"), "holdout": 0.5}
    data = prepare(model, DataSpec(**spec, metric="own_scores:share_right"))
    assert data.evaluation.answers is None
    base, tokenizer = BaseModel.load(model.name, None, model.task, ()), load_tokenizer(model.name, None)
    config = TrialConfig.from_params(SpaceSpec().first())
    module = build(config, base, World.alone())
    texts = completions(module, config, data, data.evaluation, World.alone(), tokenizer, 4)
    assert len(texts) == 4
    assert completion_scores(module, config, data, data.evaluation, World.alone(), tokenizer, 4) == {"custom": 0.0}
    (scores / "own_scores.py").write_text("def first(predictions, references):\n    return references.count('ran to the park')\n")
    del sys.modules["own_scores"]
    data = prepare(model, DataSpec(**spec, metric="own_scores:first"))
    ran = sum(tokenizer.decode(data.evaluation.row(i)[0], skip_special_tokens=True).endswith("ran to the park") for i in range(4))
    found = completion_scores(module, config, data, data.evaluation, World.alone(), tokenizer, 4)
    assert found["custom"] == ran


def test_what_is_not_defined_for_a_model_that_knows_nothing_is_left_out_until_the_end(scores: Path) -> None:
    model, data = classified(scores, "own_scores:fails_on_rows")
    base, world = BaseModel.load(model.name, None, model.task, data.label_names), World.alone()
    config = TrialConfig.from_params(SpaceSpec().first())
    module = build(config, base, world)
    found = evaluate(module, config, data, data.evaluation, world, is_final=False)
    assert "accuracy" in found
    assert "custom" not in found
    with pytest.raises(TrialError, match="too few"):
        evaluate(module, config, data, data.evaluation, world)
