"""A warm start: what the sampler learns from an earlier search, what it does not, and that the trials stay that search's."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from search.endpoint import tracking_uri
from search.ledger import Ledger, replay
from search.proposals import PastTrial
from search.record import TrialRecord, TrialState
from search.study import Study
from search.tracking import Tracker
from search.warm_start import _difference, _Earlier, earlier_trials, new_study, on_device, warm_start_text
from spaces.config import TrialConfig
from spaces.constraints import CONSTRAINTS, Limits
from spaces.loading import LoadedSpec, SpecError, load_spec

SPACE: dict[str, Any] = {
    "learning_rate": {"log_uniform": [1e-4, 1e-2]},
    "global_batch_size": {"choice": [8, 16, 32]},
    "lora_rank": {"choice": [4, 8]},
    "dataset_fraction": 1.0,
}
LIMITS = Limits(num_workers=2, hidden_size=64)


def write(directory: Path, name: str, *, space: dict[str, Any] = SPACE, **sections: Any) -> LoadedSpec:
    spec = {
        "name": name,
        "model": {"name": "m", "task": "sequence-classification"},
        "data": {"train": "t.csv"},
        "space": space,
        "directory": str(directory / "runs"),
        **sections,
    }
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return load_spec(path)


def earlier(directory: Path, num_trials: int = 30, **how: Any) -> None:
    """Write the directory of a search that has ended: one trial in three is pruned, one is timed and was not proposed."""
    loaded = write(directory, "earlier", **how)
    root = directory / "runs" / "earlier"
    root.mkdir(parents=True)
    (root / "spec.yaml").write_text((directory / "earlier.yaml").read_text())
    ledger, rng = Ledger(root / "ledger.jsonl"), random.Random(0)
    ledger.append("search_started", name="earlier", data_fingerprint="abc", num_workers=2)
    ledger.append("device_examined", device={"name": "a device"})
    study = Study(space=loaded.spec.space, objectives=loaded.spec.resolved_objectives(), sampler="random", seed=0, startup_trials=1)
    for number in range(num_trials):
        params = study.ask().params
        config = TrialConfig.from_params(params).to_dict()
        ledger.append("trial_started", number=number, params=params, config=config, was_proposed=number != 4)
        values = {"accuracy": rng.random(), "train_seconds": rng.uniform(1, 9), "mfu": 0.1}
        ledger.append("trial_finished", number=number, state="PRUNED" if number % 3 == 2 else "COMPLETE", values=values)


def records(directory: Path) -> list[Any]:
    return list(replay(Ledger(directory / "runs" / "earlier" / "ledger.jsonl").events()).records.values())


def test_the_sampler_learns_the_complete_trials_that_this_space_holds_and_the_others_are_counted(tmp_path: Path) -> None:
    earlier(tmp_path)
    narrow = {**SPACE, "learning_rate": {"log_uniform": [1e-3, 1e-2]}, "global_batch_size": {"choice": [32, 8, 64]}}
    loaded = write(tmp_path, "now", space=narrow, sampler={"warm_start": "earlier"})
    past = earlier_trials(loaded, "abc")
    known = [r for r in records(tmp_path) if r.state.value == "COMPLETE" and r.number != 4]
    held = [r for r in known if r.params["learning_rate"] >= 1e-3 and r.params["global_batch_size"] != 16]
    assert 3 < len(held) < len(known) - 3
    assert [t["params"] for t in past["trials"]] == [r.params for r in held]
    assert past["num_outside"] == len(known) - len(held)
    assert warm_start_text(past) == f"warm start: {len(held)} trials of earlier; {len(known) - len(held)} are outside this space"

    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append("warm_started", **past)
    state = replay(ledger.events())
    spec = loaded.spec
    study = new_study(spec, state, LIMITS, spec.resolved_objectives(), width=64)
    told = [t for t in study._study.trials if t.state.name == "COMPLETE"]
    assert [t.values for t in told] == [[r.values["accuracy"], math.log(r.values["train_seconds"])] for r in held]
    assert all(t.constraints.keys() == {c.__name__ for c in CONSTRAINTS} for t in told)
    assert [study.ask().number for _ in range(3)] == [0, 1, 2], "this search's numbers are its own"
    assert state.records == {}, "and its front too"


@pytest.mark.parametrize(
    ("now", "num_held"), [({}, 19), ({"quantization": {"choice": ["nf4", "none"]}}, 19), ({"recomputation": "full"}, 0)]
)
def test_trials_of_before_a_knob_existed_had_its_default(tmp_path: Path, now: dict[str, Any], num_held: int) -> None:
    earlier(tmp_path)
    path = tmp_path / "runs" / "earlier" / "ledger.jsonl"
    events = Ledger(path).events()
    for event in events:
        for knob in ("quantization", "recomputation"):
            event.get("params", {}).pop(knob, None)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    loaded = write(tmp_path, "now", space={**SPACE, **now}, sampler={"warm_start": "earlier"})
    past = earlier_trials(loaded, "abc")
    assert len(past["trials"]) == num_held
    assert all((t["params"]["quantization"], t["params"]["recomputation"]) == ("none", "auto") for t in past["trials"])
    spec = loaded.spec
    for trial in past["trials"][::2]:
        del trial["params"]["quantization"], trial["params"]["recomputation"]
    study = new_study(spec, replay([{"event": "warm_started", "time": 0.0, **past}]), LIMITS, spec.resolved_objectives(), width=64)
    told = [t for t in study._study.trials if t.state.name == "COMPLETE"]
    assert [t.params.get("quantization", "none") for t in told] == ["none"] * num_held


def test_the_path_of_a_directory_is_a_name_and_without_a_warm_start_there_are_usual_points(tmp_path: Path) -> None:
    earlier(tmp_path)
    loaded = write(tmp_path, "now", sampler={"warm_start": str(tmp_path / "runs" / "earlier")})
    assert len(earlier_trials(loaded, "abc")["trials"]) == 19
    spec, state = write(tmp_path, "cold").spec, replay([])
    study = new_study(spec, state, LIMITS, spec.resolved_objectives(), width=64)
    assert study.ask().params["learning_rate"] == pytest.approx(0.01), "twice the usual rate lies above the range"


@pytest.mark.parametrize(
    ("what", "now"),
    [
        (r"another model\.name \(m\)", {"model": {"name": "other", "task": "sequence-classification"}}),
        (r"another model\.max_length \(128\)", {"model": {"name": "m", "task": "sequence-classification", "max_length": 64}}),
        ("no eval_loss", {"objectives": [{"metric": "eval_loss"}, {"metric": "train_seconds"}]}),
        (
            "accuracy with another direction",
            {"objectives": [{"metric": "accuracy", "direction": "minimize", "reference": 1}, {"metric": "train_seconds"}]},
        ),
        ("other data", {}),
    ],
)
def test_results_that_do_not_compare_are_refused_in_one_line(tmp_path: Path, what: str, now: dict[str, Any]) -> None:
    earlier(tmp_path)
    loaded = write(tmp_path, "now", sampler={"warm_start": "earlier"}, **now)
    with pytest.raises(SpecError, match=rf"now.yaml:\d+: sampler.warm_start: the search 'earlier' has {what}: its results would"):
        earlier_trials(loaded, "abc" if now else "abd")


def test_other_objectives_are_learned_from_where_the_earlier_trials_measured_them(tmp_path: Path) -> None:
    now = write(tmp_path, "now", objectives=[{"metric": m} for m in ("accuracy", "train_seconds", "peak_memory_bytes")]).spec
    values = {"accuracy": 0.5, "train_seconds": 9.0, "peak_memory_bytes": 1e9}
    done = TrialRecord(number=0, state=TrialState.COMPLETE, params={}, values=values)
    there = _Earlier(name="earlier", spec=write(tmp_path, "then").spec, records=[done], data_fingerprint="abc", device=None)
    assert _difference(now, there, "abc") == ""
    without = replace(there, records=[replace(done, values={"accuracy": 0.5, "train_seconds": 9.0})])
    assert _difference(now, without, "abc") == "no peak_memory_bytes"


def test_another_score_of_ones_own_does_not_compare(tmp_path: Path) -> None:
    objectives = [{"metric": "custom"}, {"metric": "train_seconds"}]
    data = {"train": "t.csv", "metric": "a:f"}
    spec = write(tmp_path, "now", objectives=objectives, data=data).spec
    there = _Earlier(name="earlier", spec=spec, records=[], data_fingerprint="abc", device=None)
    assert _difference(spec, there, "abc") == ""
    other = spec.model_copy(update={"data": spec.data.model_copy(update={"metric": "a:g"})})
    assert _difference(other, there, "abc") == "another data.metric"


def test_what_exact_match_is_made_of_is_a_part_of_what_compares(tmp_path: Path) -> None:
    texts = {"model": {"name": "m", "task": "causal-lm"}, "data": {"train": "t.jsonl"}}
    objectives = [{"metric": "exact_match"}, {"metric": "train_seconds"}]
    spec = write(tmp_path, "now", **texts, objectives=objectives).spec
    there = _Earlier(name="earlier", spec=spec, records=[], data_fingerprint="abc", device=None)
    for key, value in (("answer_pattern", "(.+)"), ("exact_match_rows", 9)):
        other = spec.model_copy(update={"data": spec.data.model_copy(update={key: value})})
        assert _difference(other, there, "abc") == f"another data.{key}"
    by_loss = write(tmp_path, "loss", **texts).spec
    there = _Earlier(name="earlier", spec=by_loss, records=[], data_fingerprint="abc", device=None)
    other = by_loss.model_copy(update={"data": by_loss.data.model_copy(update={"answer_pattern": "(.+)", "exact_match_rows": 9})})
    assert _difference(other, there, "abc") == ""


def test_a_search_that_is_not_there_is_refused_in_one_line(tmp_path: Path) -> None:
    loaded = write(tmp_path, "now", sampler={"warm_start": "erlier"})
    with pytest.raises(SpecError, match=r"now.yaml:\d+: sampler.warm_start: no search named 'erlier' in "):
        earlier_trials(loaded, "abc")


def test_a_search_whose_directory_is_gone_is_found_in_mlflow(tmp_path: Path) -> None:
    earlier(tmp_path)
    loaded = write(tmp_path, "now", sampler={"warm_start": "earlier"})
    expected = earlier_trials(loaded, "abc")
    directory = tmp_path / "runs" / "earlier"
    tracker = Tracker(tracking_uri(loaded.spec), "e", artifact_root=tmp_path)
    run_id = tracker.start_search("earlier", params={}, tags={}, spec_path=directory / "spec.yaml")
    for event in Ledger(directory / "ledger.jsonl").events():
        tracker.submit(event)
    assert tracker.flush(60) == 0
    tracker.finish()
    shutil.rmtree(directory)
    assert earlier_trials(loaded, "abc") == expected
    assert len(expected["trials"]) == 19
    by_run = earlier_trials(write(tmp_path, "now", sampler={"warm_start": run_id}), "abc")
    assert by_run == {**expected, "name": run_id}
    with pytest.raises(SpecError, match="has other data"):
        earlier_trials(loaded, "abd")
    assert on_device(earlier_trials(loaded, "abc"), "another device", loaded.spec)["trials"] == []
    misspelt = write(tmp_path, "now", sampler={"warm_start": "erlier"})
    with pytest.raises(
        SpecError, match=r"now.yaml:\d+: sampler.warm_start: no search named 'erlier' in .*; and in MLflow: .* there are: earlier$"
    ):
        earlier_trials(misspelt, "abc")


def test_times_of_other_devices_are_not_learned_from(tmp_path: Path) -> None:
    earlier(tmp_path)
    loaded = write(tmp_path, "now", sampler={"warm_start": "earlier"})
    past = on_device(earlier_trials(loaded, "abc"), "another device", loaded.spec)
    assert past["trials"] == []
    assert warm_start_text(past) == "warm start: 0 trials of earlier: its times are those of a device"
    wider = write(tmp_path, "now", sampler={"warm_start": "earlier"}, resources={"cpus_per_worker": 4})
    assert earlier_trials(wider, "abc")["unusable"] == "its workers had 1 CPU cores and 0 GPUs"


def test_proposals_begin_where_the_earlier_search_was_good_and_a_resume_begins_there_too() -> None:
    space = {"learning_rate": {"log_uniform": [1e-5, 1e-1]}, "global_batch_size": 16, "lora_rank": 4, "dataset_fraction": 1.0}
    from spaces.space import SpaceSpec
    from spaces.spec import Objective

    objectives = [
        Objective(metric=m, direction=d, reference=None) for m, d in (("accuracy", "maximize"), ("train_seconds", "minimize"))
    ]
    how: dict[str, Any] = {"space": SpaceSpec.model_validate(space), "objectives": objectives, "sampler": "tpe", "startup_trials": 8}
    rates = [10 ** (-5 + 4 * i / 39) for i in range(40)]
    first = how["space"].first()
    # Accuracy falls with every order of magnitude away from a rate of 1e-3.
    past = [
        PastTrial(
            params={**first, "learning_rate": r}, values={"accuracy": 1 - abs(n - 19.5) / 40, "train_seconds": 5.0}, constraints={}
        )
        for n, r in enumerate(rates)
    ]

    def proposals(study: Study, number: int) -> list[float]:
        return [study.ask().params["learning_rate"] for _ in range(number)]

    near = {False: 0, True: 0}
    for is_warm in near:
        for seed in range(10):
            study = Study(seed=seed, **how)
            study.learn(past if is_warm else ())
            near[is_warm] += sum(3e-4 < rate < 3e-3 for rate in proposals(study, 4))
    assert near[True] >= 2 * near[False], near

    one, again = (Study(seed=3, **how) for _ in range(2))
    asked = {}
    for study in (one, again):
        study.learn(past)
    for _ in range(5):
        proposal = one.ask()
        asked[proposal.number] = proposal.params
    again.restore(asked)
    told = [[(t.number, t.state, t.params, t.values) for t in study._study.trials] for study in (one, again)]
    assert told[0] == told[1]
    assert sorted(asked) == list(range(5))
