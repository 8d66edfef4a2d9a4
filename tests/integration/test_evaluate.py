"""`paretune evaluate` as a user runs it: the front and the untrained model on a task, once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from choices import right_choices
from command import paretune
from tiny import FILLER, WORDS, make_language_model, make_spec, make_task

from search.ledger import Ledger, replay

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trials of a language model that reads which words come together."""
    directory = tmp_path_factory.mktemp("evaluate")
    lines = [" ".join([*words, FILLER[i % len(FILLER)], *words]) for i in range(60) for words in WORDS.values()]
    (directory / "text.txt").write_text("\n".join(lines))
    make_language_model(directory / "language-model")
    make_task(directory / "tasks")
    spec = make_spec(
        directory,
        model={"name": str(directory / "language-model"), "task": "causal-lm", "max_length": 16},
        data={"train": str(directory / "text.txt")},
        space={
            "adapter": {"choice": ["none", "lora"]},
            "learning_rate": 1.0e-2,
            "global_batch_size": 4,
            "dataset_fraction": 1.0,
            "lora_rank": 4,
            "epochs": 4,
        },
        sampler={"method": "points", "points_to_evaluate": [{"adapter": "none"}, {"adapter": "lora"}]},
        budget={"trials": 2},
    )
    paretune("search", str(spec), cwd=directory)
    return directory


def accuracy_of_exported(directory: Path, number: int) -> float:
    """Return the accuracy of a trial's model that was merged and written, with plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = replay(Ledger(directory / "runs/tiny/ledger.jsonl").events()).records[number]
    merge = [] if record.trial_config.recipe.adapter == "none" else ["--merge"]
    output = str(directory / f"exported-{number}")
    paretune("export", "tiny", str(number), "--directory", "runs", "--output", output, *merge, cwd=directory)
    module, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    rows = [json.loads(line) for line in (directory / "tasks/rows.jsonl").read_text().splitlines()]
    right = right_choices(module.eval(), tokenizer, rows)
    return sum(right) / len(right)


def test_the_front_and_the_untrained_model_are_scored_once(searched: Path) -> None:
    arguments = ["evaluate", "tiny", "--directory", "runs", "--tasks", "subjects", "--include-path", "tasks"]
    done = paretune(*arguments, "--json", cwd=searched)
    rows = json.loads(done.stdout)
    members = [
        m["number"] for m in json.loads(paretune("front", "tiny", "--directory", "runs", "--json", cwd=searched).stdout)["front"]
    ]
    assert members
    assert [row["trial"] for row in rows] == [None, *members]
    accuracies = [row["scores"]["subjects/acc"]["value"] for row in rows]
    for number, accuracy in zip(members, accuracies[1:], strict=True):
        assert accuracy == pytest.approx(accuracy_of_exported(searched, number)), "as what is exported has it"
    state = replay(Ledger(searched / "runs/tiny/ledger.jsonl").events())
    runs = [state.harness, *(state.records[n].harness for n in members)]
    assert [run.scores["subjects/acc"]["value"] for (run,) in runs] == accuracies
    told = [line for line in done.stderr.splitlines() if "subjects/acc" in line]
    assert len(told) == len(rows)

    again = paretune(*arguments, cwd=searched)
    assert not [line for line in again.stderr.splitlines() if "subjects/acc" in line], "nothing is scored twice"
    assert "untrained" in again.stdout
    assert f"{accuracies[1]:.4g} ± " in again.stdout
    limited = paretune(*arguments, "--limit", "6", "--trials", str(members[0]), "--json", cwd=searched)
    assert len(json.loads(limited.stdout)) == 2
    (whole, part) = replay(Ledger(searched / "runs/tiny/ledger.jsonl").events()).records[members[0]].harness
    assert (whole.limit, part.limit) == (None, 6), "a part takes no place from the whole"
    picked = paretune("pick", "tiny", "--directory", "runs", "--knee", cwd=searched)
    assert any(f"subjects/acc: {accuracy:.4g} ± " in picked.stdout for accuracy in accuracies[1:])

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{searched / 'runs/mlflow.db'}")
    (experiment,) = (e for e in client.search_experiments() if e.name != "Default")
    runs = client.search_runs([experiment.experiment_id])
    kept = [run.data.metrics["harness/subjects/acc"] for run in runs if "harness/subjects/acc" in run.data.metrics]
    assert sorted(kept) == sorted(accuracies[1:])
    (before,) = [run.data.metrics[name] for run in runs if (name := "reference/harness/subjects/acc") in run.data.metrics]
    assert before == accuracies[0]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--tasks", "subject", "--include-path", "tasks"], "did you mean 'subjects'?"),
        (["--tasks", "subjects", "--include-path", "tasks", "--trials", "7"], "--trials 7: no such trial; the front: "),
        (["--tasks", " , "], "--tasks: there is no task"),
    ],
)
def test_what_cannot_be_scored_is_one_line(searched: Path, options: list[str], line: str) -> None:
    before = (searched / "runs/tiny/ledger.jsonl").read_bytes()
    refused = paretune("evaluate", "tiny", "--directory", "runs", *options, cwd=searched, check=2)
    assert line in refused.stderr.splitlines()[-1]
    assert (searched / "runs/tiny/ledger.jsonl").read_bytes() == before
