"""Data of several domains: what is trained of each, and how well each is predicted."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_data import task_data
from tiny import VOCABULARY, make_language_model, make_model, make_rows

from spaces.config import TrialConfig
from spaces.inputs import DataSpec, ModelSpec
from spaces.space import SpaceSpec
from trainables.batching import BatchPlan
from trainables.data import TaskData, TokenTable
from trainables.evaluation import evaluate
from trainables.formats import DataError
from trainables.mesh import World
from trainables.model import BaseModel, build
from trainables.preparation import prepare
from trainables.tokenization import Encoded

WORDS = VOCABULARY[4:]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return ModelSpec(name=str(make_model(tmp_path_factory.mktemp("model"))), task="sequence-classification", max_length=32)


def rows_of(directory: Path, name: str, num_rows: int, label: str | None = None) -> str:
    """Write rows of the three labels of `make_rows`, or all of one label."""
    path = make_rows(directory / f"{name}.csv", num_rows=num_rows, seed=num_rows)
    if label is not None:
        lines = path.read_text().splitlines()
        path.write_text("\n".join([lines[0], *(f"{line.rsplit(',', 1)[0]},{label}" for line in lines[1:])]) + "\n")
    return str(path)


def two(model: ModelSpec, directory: Path, *weights: float, **fields: Any) -> TaskData:
    """90 rows of three labels, and 30 of a fourth; a tenth of each is held out."""
    domains: dict[str, Any] = {
        "news": {"train": rows_of(directory, "news", 90)},
        "law": {"train": rows_of(directory, "law", 30, "court")},
    }
    for domain, weight in zip(domains.values(), weights, strict=False):
        domain["weight"] = weight
    return prepare(model, DataSpec(domains=domains, **fields))


def test_labels_rows_and_held_out_shares_are_those_of_all_domains(model: ModelSpec, tmp_path: Path) -> None:
    data = two(model, tmp_path)
    assert data.domains == ("news", "law")
    assert data.label_names == ("court", "food", "sport", "weather")
    assert data.train.domains is not None
    assert data.evaluation.domains is not None
    assert np.bincount(data.train.domains).tolist() == [81, 27]
    assert np.bincount(data.evaluation.domains).tolist() == [9, 3]
    assert data.summary["domains"] == {"news": {"train": 81, "evaluation": 9}, "law": {"train": 27, "evaluation": 3}}
    # The first rows are of all domains: of them alone some scores are made.
    assert set(data.evaluation.domains[:4].tolist()) == {0, 1}
    for fraction in (0.2, 0.5):
        rows = data.subset(fraction)
        assert np.bincount(data.train.domains[rows]).tolist() == [3 * np.ceil(fraction * 27), np.ceil(fraction * 27)]


def test_the_rows_of_a_domain_are_those_that_it_has_alone(model: ModelSpec, tmp_path: Path) -> None:
    data = two(model, tmp_path)
    alone = prepare(model, DataSpec(train=str(tmp_path / "news.csv")))

    def texts(table: TokenTable, domain: int | None) -> Counter[tuple[int, ...]]:
        rows = [i for i in range(table.num_rows) if domain is None or (table.domains is not None and table.domains[i] == domain)]
        return Counter(tuple(table.row(i)[0].tolist()) for i in rows)

    assert texts(data.train, 0) == texts(alone.train, None)
    assert texts(data.evaluation, 0) == texts(alone.evaluation, None)
    assert alone.domains == ()
    assert alone.fingerprint != data.fingerprint


def config(**knobs: Any) -> TrialConfig:
    return TrialConfig.from_params(SpaceSpec.model_validate({"global_batch_size": 4} | knobs).first())


def trained_rows(data: TaskData, epochs: float) -> list[np.ndarray]:
    return BatchPlan(config(epochs=epochs, dataset_fraction=1.0), data)._batches


@pytest.mark.parametrize(("weights", "shares"), [((1.0, 1.0), [0.5, 0.5]), ((3.0, 1.0), [0.75, 0.25]), ((1.0, 4.0), [0.2, 0.8])])
def test_weights_say_how_many_of_the_trained_rows_are_of_each_domain(
    model: ModelSpec, tmp_path: Path, weights: tuple[float, ...], shares: list[float]
) -> None:
    data = two(model, tmp_path, *weights)
    assert data.train.domains is not None
    batches = trained_rows(data, 2.0)
    rows = np.concatenate(batches)
    assert len(rows) == 2 * data.train.num_rows
    counts = np.bincount(data.train.domains[rows])
    assert counts == pytest.approx(np.array(shares) * len(rows), abs=1)
    # No row is trained a third time before each of its domain was trained twice.
    for domain in (0, 1):
        times = Counter(rows[data.train.domains[rows] == domain].tolist()).values()
        assert max(times) - min([*times, *([0] if len(times) < (data.train.domains == domain).sum() else [])]) <= 1


def test_the_mix_is_the_same_at_the_beginning_and_at_the_end() -> None:
    # Rows of one length, so that no bucket sorts them.
    encoded = [Encoded(input_ids=[5, 6, 7], targets=None)] * 3000
    table = TokenTable.build(encoded, [i % 2 for i in range(3000)], [int(i >= 2700) for i in range(3000)])
    data = task_data("sequence-classification", table, table, ("a", "b"))
    data = replace(data, domains=("big", "small"), domain_weights=(1.0, 1.0))
    rows = np.concatenate(trained_rows(data, 1.0))
    assert table.domains is not None
    for quarter in np.split(table.domains[rows], 4):
        assert quarter.mean() == pytest.approx(0.5, abs=0.02)
    # Without weights: a tenth, as many as there are.
    rows = np.concatenate(trained_rows(replace(data, domain_weights=None), 1.0))
    assert table.domains[rows].mean() == pytest.approx(0.1)


@pytest.mark.parametrize("task", ["sequence-classification", "causal-lm"])
def test_the_accuracy_of_a_domain_is_that_of_its_rows_alone(model: ModelSpec, tmp_path: Path, task: str, shared: Path) -> None:
    if task == "causal-lm":
        model = ModelSpec(name=str(shared / "models/stories260k/hf"), task="causal-lm", max_length=64)
        texts = {"a": ["Once upon a time there was a girl."] * 12, "b": ["The quick brown fox is 7 x 8."] * 8}
        for name, lines in texts.items():
            (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{line} {i}"}) for i, line in enumerate(lines)))
        data = prepare(model, DataSpec(domains={n: {"train": str(tmp_path / f"{n}.jsonl")} for n in texts}, holdout=0.5))
    else:
        data = two(model, tmp_path, holdout=0.5)
    base = BaseModel.load(model.name, None, model.task, data.label_names)
    module, world = build(config(), base, World.alone()), World.alone()
    found = evaluate(module, config(), data, data.evaluation, world)
    table = data.evaluation
    assert table.domains is not None
    values = []
    for index, name in enumerate(data.domains):
        rows = np.flatnonzero(table.domains == index)
        ids = [Encoded(input_ids=table.row(int(i))[0], targets=table.row(int(i))[1]) for i in rows]
        part = TokenTable.build(ids, None if table.labels is None else table.labels[rows].tolist())
        alone = evaluate(module, config(), replace(data, domains=()), part, world)
        assert found[f"accuracy.{name}"] == pytest.approx(alone["accuracy"])
        values.append(alone["accuracy"])
    assert values[0] != values[1], "a comparison of equals"


def test_domains_of_a_language_model_may_differ_in_format_and_columns(tmp_path: Path) -> None:
    """What is learned of each is what is learned of it alone."""
    model = ModelSpec(name=str(make_language_model(tmp_path / "model")), task="causal-lm", max_length=32)
    forms: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
        "news": ([{"text": f"today we saw rain {WORDS[i]}"} for i in range(18)], {}),
        "help": ([{"q": f"the {WORDS[i]}", "a": "very good"} for i in range(15)], {"prompt": "q", "completion": "a"}),
        "talk": (
            [
                {"turns": [{"role": "user", "content": f"some {WORDS[i]}"}, {"role": "assistant", "content": "good"}]}
                for i in range(10)
            ],
            {"messages": "turns"},
        ),
    }
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    domains, alone = {}, {}
    for name, (rows, columns) in forms.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        domains[name] = {"train": str(path), **columns}
        chat = {"chat_template": str(template)} if name == "talk" else {}
        alone[name] = prepare(model, DataSpec.model_validate({"train": str(path), **columns, **chat}))
    data = prepare(model, DataSpec.model_validate({"domains": domains, "chat_template": str(template)}))
    for index, (name, single) in enumerate(alone.items()):
        for table, own in ((data.train, single.train), (data.evaluation, single.evaluation)):
            assert table.domains is not None
            rows = [table.row(int(i)) for i in np.flatnonzero(table.domains == index)]
            assert len(rows) == own.num_rows
            for (ids, targets), (own_ids, own_targets) in zip(rows, map(own.row, range(own.num_rows)), strict=True):
                assert ids.tolist() == own_ids.tolist(), name
                assert targets is not None
                assert own_targets is not None
                assert targets.tolist() == own_targets.tolist(), name
    assert data.summary["format"] == "news: text (text); help: prompt and completion (q, a); talk: messages (turns)"
    assert data.answer_pattern is None, "not all of them are answers"
    assert data.end_token_ids == alone["talk"].end_token_ids
    both = {name: domains[name] for name in ("news", "help")}
    with pytest.raises(DataError, match="exact_match: some domains have no prompts with completions"):
        prepare(model, DataSpec.model_validate({"domains": both}), {"exact_match"})
    with pytest.raises(DataError, match="scores labels, or completions of prompts; these rows have neither"):
        prepare(model, DataSpec.model_validate({"domains": both, "metric": "operator:eq"}))


def test_a_column_named_for_all_domains_is_that_of_those_that_name_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body,kind\n" + "".join(f"the {w},x\na {w},y\n" for w in WORDS))
    (tmp_path / "b.csv").write_text("words,kind,body\n" + "".join(f"very {w},x,-\nmore {w},y,-\n" for w in WORDS))
    (tmp_path / "b_test.csv").write_text("kind,words,body\nx,very more,-\n")
    own = {"train": str(tmp_path / "b.csv"), "test": str(tmp_path / "b_test.csv"), "text": "words"}
    domains = {"a": {"train": str(tmp_path / "a.csv")}, "b": own}
    spec = DataSpec.model_validate({"domains": domains, "text": "body", "label": "kind"})
    model = ModelSpec(name=str(make_model(tmp_path / "model")), task="sequence-classification", max_length=32)
    data = prepare(model, spec)
    assert data.summary["format"] == "a: classification (body, kind); b: classification (words, kind)"
    assert data.test is not None
    assert len(data.test.row(0)[0]) == 4, "two words, and what is around them"


def test_a_domain_of_another_format_has_no_columns_of_those_for_all() -> None:
    spec = DataSpec.model_validate(
        {
            "prompt": "q",
            "completion": "a",
            "text": "body",
            "domains": {"own": {"train": "1", "prompt": "ask"}, "chats": {"train": "2", "messages": "turns"}, "rest": {"train": "3"}},
        }
    )
    names = {name: (d.prompt, d.completion, d.text, d.messages) for name, d in spec.sources.items()}
    assert names == {
        "own": ("ask", "a", None, None),
        "chats": (None, None, None, "turns"),
        "rest": ("q", "a", "body", None),
    }


def test_test_rows_may_be_those_of_some_domains_alone(model: ModelSpec, tmp_path: Path) -> None:
    domains: dict[str, Any] = {
        "news": {"train": rows_of(tmp_path, "news", 90), "test": rows_of(tmp_path, "later", 12)},
        "law": {"train": rows_of(tmp_path, "law", 30, "court")},
    }
    data = prepare(model, DataSpec(domains=domains))
    assert data.test is not None
    base = BaseModel.load(model.name, None, model.task, data.label_names)
    found = evaluate(build(config(), base, World.alone()), config(), data, data.test, World.alone())
    assert found["accuracy.news"] == found["accuracy"]
    assert "accuracy.law" not in found
