"""The study: every end is told as what it is, and a resume goes on with the same trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState as OptunaState

from search.study import Study
from spaces.space import SpaceSpec
from spaces.spec import Objective

OBJECTIVES = (
    Objective(metric="accuracy", direction="maximize", reference=0.0),
    Objective(metric="train_seconds", direction="minimize", reference=100.0),
)


def make(path: Path, *, seed: int = 0, points: Sequence[dict[str, object]] = (), **space: object) -> Study:
    return Study(
        path=path,
        name="mine",
        space=SpaceSpec.model_validate(space),
        objectives=OBJECTIVES,
        sampler="tpe",
        seed=seed,
        startup_trials=4,
        points_to_evaluate=points,
    )


def trials(path: Path) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(storage=f"sqlite:///{path}", study_name="mine").trials


def test_every_end_is_told_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    study = make(path)
    numbers = [study.ask().number for _ in range(5)]
    study.tell_complete(numbers[0], {"accuracy": 0.5, "train_seconds": 3.0, "mfu": 0.1})
    study.tell_pruned(numbers[1])
    study.tell_failed(numbers[2])
    study.tell_infeasible(numbers[3], {"world_size_within_cluster": 2.0})
    states = [OptunaState.COMPLETE, OptunaState.PRUNED, OptunaState.FAIL, OptunaState.PRUNED, OptunaState.RUNNING]
    assert [t.state for t in trials(path)] == states
    assert trials(path)[0].values == [0.5, 3.0]
    assert trials(path)[3].constraints == {"world_size_within_cluster": 2.0}
    assert study.running() == [numbers[4]]
    with pytest.raises(KeyError):
        study.tell_complete(numbers[4], {"accuracy": 0.5})


def test_a_resumed_study_goes_on_and_tells_twice_without_harm(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    first = make(path)
    asked = [first.ask() for _ in range(3)]
    first.tell_complete(0, {"accuracy": 0.5, "train_seconds": 3.0})
    again = make(path)
    assert again.running() == [1, 2]
    again.tell_complete(0, {"accuracy": 0.9, "train_seconds": 1.0})
    assert trials(path)[0].values == [0.5, 3.0]
    again.tell_infeasible(1, {"memory": 1.0})
    assert trials(path)[1].constraints == {"memory": 1.0}
    fresh = again.ask()
    assert fresh.number == 3
    assert fresh.params not in [p.params for p in asked], "the resumed study proposes its first points again"


def test_the_same_seed_proposes_the_same(tmp_path: Path) -> None:
    one, two, other = (make(tmp_path / f"{i}.db", seed=seed) for i, seed in enumerate((5, 5, 6)))
    proposals = [[study.ask().params for _ in range(6)] for study in (one, two, other)]
    assert proposals[0] == proposals[1] != proposals[2]


def test_tpe_keeps_away_from_what_was_infeasible(tmp_path: Path) -> None:
    """Half of the space is infeasible; told as FAIL, as Ray does, TPE would propose it again and again."""
    study = make(tmp_path / "study.db", world_size={"choice": [1, 2, 4, 8]}, dataset_fraction=1.0, learning_rate=0.001)
    infeasible = 0
    for _ in range(40):
        proposal = study.ask()
        world_size = proposal.params["world_size"]
        if world_size > 2:
            infeasible += 1
            study.tell_infeasible(proposal.number, {"world_size_within_cluster": world_size - 2})
        else:
            study.tell_complete(proposal.number, {"accuracy": 0.5 + 0.1 * world_size, "train_seconds": 10.0 / world_size})
    assert infeasible <= 12  # random proposals: about 20


def test_known_points_come_first_and_once_and_the_sampler_fills_them_in(tmp_path: Path) -> None:
    points = [
        {"learning_rate": 2e-3, "world_size": 4, "dataset_fraction": 1.0},
        {"lora_rank": 32},
    ]
    space = {"world_size": {"choice": [1, 2, 4]}}
    study = make(tmp_path / "study.db", points=points, **space)
    first, second = study.ask().params, study.ask().params
    assert first | points[0] == first
    assert second["lora_rank"] == 32
    assert set(first) == set(second), "every knob has a value"
    resumed = make(tmp_path / "study.db", points=points, **space)
    assert resumed.ask().params | points[0] != resumed.ask().params, "a resumed study begins with the points again"
