from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from spaces.metrics import METRICS
from spaces.spec import OBJECTIVE_METRICS, Objective, SearchSpec


def spec(task: str = "sequence-classification", **sections: Any) -> SearchSpec:
    return SearchSpec.model_validate({"model": {"name": "m", "task": task}, "data": {"train": "t.csv"}} | sections)


def test_a_model_and_data_are_enough():
    assert spec().resolved_objectives() == (
        Objective(metric="accuracy", direction="maximize", reference=0.0),
        Objective(metric="train_seconds", direction="minimize", reference=3600.0),
    )
    assert spec("causal-lm").resolved_objectives()[0] == Objective(metric="eval_loss", direction="minimize", reference=None)


def test_the_reference_of_a_time_is_the_budget():
    assert spec(budget={"minutes": 10}).resolved_objectives()[1].reference == 600.0


def test_what_the_user_says_about_an_objective_wins():
    given = [{"metric": "peak_memory_bytes", "reference": 2e9}, {"metric": "mfu"}, {"metric": "eval_loss"}]
    memory, mfu, loss = spec(objectives=given).resolved_objectives()
    assert (memory.direction, memory.reference) == ("minimize", 2e9)
    assert (mfu.direction, mfu.reference) == ("maximize", 0.0)
    assert (loss.direction, loss.reference) == ("minimize", None)
    flipped = spec(objectives=[{"metric": "tokens_per_second", "direction": "minimize"}, {"metric": "mfu"}])
    assert flipped.resolved_objectives()[0] == Objective(metric="tokens_per_second", direction="minimize", reference=None)


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        ["accuracy"],
        ["accuracy", "accuracy"],
        ["accuracy", "train_seconds", "mfu", "eval_loss"],
        ["accuracy", "train_loss"],
        ["accuracy", "bleu"],
        ["exact_match", "train_seconds"],
    ],
)
def test_objectives_are_two_or_three_known_ones_of_the_task(metrics):
    with pytest.raises(ValidationError):
        spec(objectives=[{"metric": m} for m in metrics])


def test_exact_match_must_not_be_turned_off():
    wanted = [{"metric": "exact_match"}, {"metric": "train_seconds"}]
    spec("causal-lm", objectives=wanted)
    with pytest.raises(ValidationError, match="turned off"):
        spec("causal-lm", objectives=wanted, data={"train": "t", "exact_match_rows": 0})


def test_neither_training_nor_test_metrics_are_objectives():
    assert set(METRICS) - set(OBJECTIVE_METRICS) == {m.name for m in METRICS.values() if m.section in ("train", "test")}


@pytest.mark.parametrize("name", ["banking-77.v2_x", "a", "x" * 64, "..a"])
def test_safe_names(name):
    assert spec(name=name).name == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "x" * 65, "a b", "a\n", "ä", 7])
def test_unsafe_names(name):
    with pytest.raises(ValidationError):
        spec(name=name)


@pytest.mark.parametrize(
    "train",
    [
        "a.csv",
        "embedded:stdlib-docstrings",
        "hf:imdb",
        "hf:openai/gsm8k:main",
        "hf:PolyAI/banking77@refs/convert/parquet",
        "hf:a/b:c@d",
    ],
)
def test_names_of_data(train):
    assert spec(data={"train": train}).data.train == train


@pytest.mark.parametrize("train", ["", "  ", "hf:", "hf:a b", "hf:a/b/c", "embedded:docstrings", 3, None])
def test_what_is_no_name_of_data(train):
    with pytest.raises(ValidationError):
        spec(data={"train": train})


@pytest.mark.parametrize(
    "sections",
    [
        {"data": {"train": "t", "holdout": 0}},
        {"data": {"train": "t", "holdout": 0.6}},
        {"data": {"train": "t", "answer_pattern": "("}},
        {"data": {"train": "t", "exact_match_rows": -1}},
        {"model": {"name": "m", "task": "causal-lm", "max_length": 7}},
        {"model": {"name": "embedded:bert", "task": "causal-lm"}},
        {"model": {"name": "m", "task": "regression"}},
        {"budget": {"trials": 0}},
        {"budget": {"minutes": 0}},
        {"resources": {"workers": 0}},
        {"resources": {"gpus_per_worker": -1}},
        {"sampler": {"method": "grid"}},
        {"scheduler": {"method": "hyperband"}},
        {"scheduler": {"grace_period": 0}},
        {"scheduler": {"grace_period": 1}},
        {"scheduler": {"reduction_factor": 1.5}},
        {"scheduler": {"brackets": 0}},
        {"tracking": {"experiment": ""}},
        {"traking": {}},
    ],
)
def test_sections_are_checked(sections):
    with pytest.raises(ValidationError):
        spec(**sections)


def test_a_rung_judges_by_what_is_known_before_the_end():
    asha = {"method": "asha"}
    assert [(o.metric, o.direction) for o in spec(scheduler=asha).rung_objectives()] == [
        ("eval_loss", "minimize"),
        ("train_seconds", "minimize"),
    ]
    both = [{"metric": m} for m in ("macro_f1", "train_seconds", "eval_loss")]
    assert [o.metric for o in spec(objectives=both, scheduler=asha).rung_objectives()] == ["eval_loss", "train_seconds"]
    assert spec().rung_objectives() == ()
    early = [{"metric": "eval_loss"}, {"metric": "exact_match"}, {"metric": "peak_memory_bytes"}]
    assert [o.metric for o in spec("causal-lm", objectives=early, scheduler=asha).rung_objectives()] == ["eval_loss"]


@pytest.mark.parametrize("metrics", [["exact_match", "train_seconds"], ["peak_memory_bytes", "mfu"]])
def test_whoever_asks_for_early_stopping_needs_an_objective_that_is_known_early(metrics):
    objectives = [{"metric": m} for m in metrics]
    spec("causal-lm", objectives=objectives)
    with pytest.raises(ValidationError, match="no objective of quality is known before a trial's end"):
        spec("causal-lm", objectives=objectives, scheduler={"method": "asha"})


def test_there_are_no_more_brackets_than_rungs():
    assert spec(scheduler={"brackets": 3}).scheduler.brackets == 3
    with pytest.raises(ValidationError, match="more brackets than rungs"):
        spec(scheduler={"brackets": 4})
    assert spec(scheduler={"brackets": 4, "grace_period": 1 / 27}).scheduler.shares == pytest.approx((1 / 27, 1 / 9, 1 / 3))


def test_a_heading_with_nothing_below_it_means_the_defaults():
    assert spec(space=None, budget=None, objectives=None) == spec()


def test_a_spec_is_frozen():
    with pytest.raises(ValidationError):
        spec().directory = "elsewhere"


def test_the_import_is_fast_and_brings_neither_torch_nor_ray():
    code = (
        "import sys, time; start = time.process_time(); import spaces.spec, spaces.loading; "
        "print(time.process_time() - start, *{'torch', 'ray', 'numpy', 'optuna', 'mlflow'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    seconds = []
    for _ in range(5):  # the first run may compile bytecode, and the machine may be busy: the best of a few counts
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
        measured, *heavy = out.stdout.split()
        assert heavy == []
        seconds.append(float(measured))
        if seconds[-1] < 0.4:
            return
        time.sleep(0.5)
    pytest.fail(f"import spaces.spec takes {min(seconds):.2f} s of CPU time; at most 0.4 s")


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"learning_rat": 1e-3}, "there is no knob 'learning_rat'"),
        ({"world_size": 3}, r"world_size is one of \[1, 2\], got 3"),
        ({"dataset_fraction": 0.01}, r"dataset_fraction lies in \[0.1, 1\], got 0.01"),
        ({"epochs": "many"}, "many"),
        ({"adapter": "none", "lora_rank": 8}, "lora_rank says nothing with adapter none"),
        ({"adapter": "none", "quantization": "nf4"}, "quantization says nothing with adapter none"),
        ({"adapter": "dora"}, "adapter"),
        ({"learning_rate": 1e-3}, "learning_rate depends on the adapter"),
    ],
)
def test_a_known_point_lies_in_the_space(point, message):
    space = {"adapter": {"choice": ["none", "lora"]}, "world_size": {"choice": [1, 2]}, "epochs": {"int": [1, 3]}}
    good = {"adapter": "lora", "learning_rate": 1e-3, "lora_rank": 8, "world_size": 2, "epochs": 3}
    assert spec(space=space, sampler={"points_to_evaluate": [good]}).sampler.points_to_evaluate == (good,)
    with pytest.raises(ValidationError, match=message) as raised:
        spec(space=space, sampler={"points_to_evaluate": [good, point]})
    assert "points_to_evaluate[1]" in str(raised.value)


def test_objectives_of_a_profiled_space_follow_from_profiles():
    with pytest.raises(ValidationError, match=r"total_seconds does not follow from a profile of space\.world_size"):
        spec(objectives=[{"metric": "accuracy"}, {"metric": "total_seconds"}], space={"world_size": "profile"})
    spec(objectives=[{"metric": "accuracy"}, {"metric": "peak_memory_bytes"}], space={"world_size": "profile"})


def test_a_score_of_ones_own_needs_its_function():
    wanted = [{"metric": "custom"}, {"metric": "train_seconds"}]
    spec(objectives=wanted, data={"train": "t", "metric": "my.scores:f1"})
    with pytest.raises(ValidationError, match=r"custom without data\.metric"):
        spec(objectives=wanted)
    with pytest.raises(ValidationError, match="has no reference"):
        spec(
            objectives=[{"metric": "custom", "direction": "minimize"}, {"metric": "train_seconds"}],
            data={"train": "t", "metric": "my.scores:f1"},
        )
    with pytest.raises(ValidationError, match="custom is turned off"):
        spec("causal-lm", objectives=wanted, data={"train": "t", "metric": "my.scores:f1", "exact_match_rows": 0})


def test_the_accuracy_of_a_domain_may_be_an_objective():
    domains = {"law": {"train": "law.csv"}, "art": {"train": "art.csv"}}
    both = [{"metric": "accuracy.law"}, {"metric": "accuracy.art", "reference": 0.1}]
    assert spec(objectives=both, data={"domains": domains}).resolved_objectives() == (
        Objective(metric="accuracy.law", direction="maximize", reference=0.0),
        Objective(metric="accuracy.art", direction="maximize", reference=0.1, is_limit=True),
    )
    with pytest.raises(ValidationError, match="of no domain"):
        spec(objectives=[{"metric": "accuracy.war"}, {"metric": "train_seconds"}], data={"domains": domains})


def test_patience_needs_a_hypervolume() -> None:
    def spec(*objectives: dict[str, object]) -> SearchSpec:
        model = {"name": "m", "task": "sequence-classification"}
        budget = {"patience": 3}
        return SearchSpec.model_validate({"model": model, "data": {"train": "t.csv"}, "objectives": objectives, "budget": budget})

    accuracy, memory = {"metric": "accuracy"}, {"metric": "peak_memory_bytes"}
    with pytest.raises(ValidationError, match="patience without a reference of peak_memory_bytes"):
        spec(accuracy, memory)
    assert spec(accuracy, {**memory, "reference": 1e9}).budget.patience == 3
    assert spec(accuracy, {"metric": "train_seconds"}, {"metric": "eval_loss"}).budget.patience == 3
