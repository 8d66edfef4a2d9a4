"""The study: every end is told as what it is, and a resume goes on with the same trials."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState as OptunaState

from search.acquisition import Prospect
from search.hypervolume import hypervolume
from search.proposals import PastTrial, Proposal
from search.study import MAX_MODEL_TRIALS, SamplerName, Study
from spaces.space import SpaceSpec
from spaces.spec import Objective

OBJECTIVES = (
    Objective(metric="accuracy", direction="maximize", reference=0.0),
    Objective(metric="train_seconds", direction="minimize", reference=100.0),
)


def make(*, seed: int = 0, sampler: SamplerName = "tpe", points: Sequence[dict[str, object]] = (), **space: object) -> Study:
    return Study(
        space=SpaceSpec.model_validate(space),
        objectives=OBJECTIVES,
        sampler=sampler,
        seed=seed,
        startup_trials=4,
        points_to_evaluate=points,
    )


def trials(study: Study) -> list[optuna.trial.FrozenTrial]:
    return study._study.trials


def resumed(asked: Sequence[Proposal], **how: Any) -> Study:
    study = make(**how)
    study.restore({proposal.number: proposal.params for proposal in asked})
    return study


def test_every_end_is_told_as_what_it_is() -> None:
    study = make()
    numbers = [study.ask().number for _ in range(5)]
    study.tell_complete(numbers[0], {"accuracy": 0.5, "train_seconds": 3.0, "mfu": 0.1}, {})
    study.tell_pruned(numbers[1], {})
    study.tell_failed(numbers[2])
    study.tell_infeasible(numbers[3], {"world_size_within_cluster": 2.0})
    states = [OptunaState.COMPLETE, OptunaState.PRUNED, OptunaState.FAIL, OptunaState.PRUNED, OptunaState.RUNNING]
    assert [t.state for t in trials(study)] == states
    assert trials(study)[0].values == [0.5, math.log(3.0)]
    assert trials(study)[3].constraints == {"world_size_within_cluster": 2.0}
    with pytest.raises(KeyError):
        study.tell_complete(numbers[4], {"accuracy": 0.5}, {})
    study.tell_complete(numbers[0], {"accuracy": 0.9, "train_seconds": 1.0}, {})  # a late second end changes nothing
    assert trials(study)[0].values == [0.5, math.log(3.0)]


def test_a_resumed_study_is_the_same_and_goes_on() -> None:
    first = make(adapter={"choice": ["none", "lora"]}, world_size={"choice": [1, 2, 4]})
    asked = [first.ask() for _ in range(12)]
    again = resumed(asked, adapter={"choice": ["none", "lora"]}, world_size={"choice": [1, 2, 4]})
    for one, other in zip(trials(first), trials(again), strict=True):
        assert (one.number, one.state, one.distributions) == (other.number, other.state, other.distributions)
        # What is held as a position in a range comes back as it was told to the user, to ten digits.
        assert one.params == {name: value if isinstance(value, str) else pytest.approx(value) for name, value in other.params.items()}
    again.tell_infeasible(1, {"memory": 1.0})
    assert trials(again)[1].constraints == {"memory": 1.0}
    fresh = again.ask()
    assert fresh.number == 12
    assert fresh.params not in [p.params for p in asked], "the resumed study proposes its first points again"


def test_a_trial_that_the_space_holds_no_more_keeps_its_number_and_says_nothing() -> None:
    params = make().ask().params
    asked = [Proposal(number=0, params={**params, "lora_rank": 4}), Proposal(number=2, params={**params, "lora_rank": 8})]
    study = resumed(asked, lora_rank={"choice": [8, 16]})
    study.tell_complete(0, {"accuracy": 0.5, "train_seconds": 3.0}, {})
    study.tell_complete(2, {"accuracy": 0.75, "train_seconds": 3.0}, {})
    assert [(t.state, t.values) for t in trials(study)] == [(OptunaState.COMPLETE, [0.75, math.log(3.0)])]
    assert study.ask().number == 3


def test_the_same_seed_proposes_the_same() -> None:
    one, two, other = (make(seed=seed) for seed in (5, 5, 6))
    proposals = [[study.ask().params for _ in range(6)] for study in (one, two, other)]
    assert proposals[0] == proposals[1] != proposals[2]


def test_the_sampler_sees_the_trials_that_run_and_the_latest_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.study.MAX_REMEMBERED", 5)
    study = make()
    for _ in range(20):
        study.ask()
    for number in [*range(1, 10), 15]:
        study.tell_complete(number, {"accuracy": 0.1 * number, "train_seconds": 3.0}, {})
    for deepcopy in (True, False):
        seen = {t.number for t in study._study.get_trials(deepcopy=deepcopy)}
        assert seen == {0, 6, 7, 8, 9, 15, *range(10, 20)}
    ended = study._study.get_trials(states=(OptunaState.COMPLETE,))
    assert [t.number for t in ended] == [6, 7, 8, 9, 15]
    assert study.ask().number == 20, "what is not shown is not forgotten"


@pytest.mark.parametrize(("sampler", "most"), [("tpe", 8), ("gp", 10), ("nsga2", 12)])
def test_every_sampler_keeps_away_from_what_was_infeasible(sampler: SamplerName, most: int) -> None:
    """Half of the space is infeasible; told as FAIL, as Ray does, TPE would propose it again and again."""
    study = make(sampler=sampler, world_size={"choice": [1, 2, 4, 8]}, dataset_fraction=1.0, global_batch_size=16, lora_rank=4)
    infeasible = []
    for _ in range(60):
        proposal = study.ask()
        world_size = proposal.params["world_size"]
        constraints = {"world_size_within_cluster": float(world_size - 2)}
        infeasible.append(world_size > 2)
        if world_size > 2:
            study.tell_infeasible(proposal.number, constraints)
        else:
            values = {"accuracy": 0.5 - 20 * abs(proposal.params["learning_rate"] - 2e-3), "train_seconds": 10.0 / world_size}
            study.tell_complete(proposal.number, values, constraints)
    assert sum(infeasible[20:]) <= most  # random proposals: about 20


@pytest.mark.parametrize(
    ("sampler", "state"), [("tpe", OptunaState.PRUNED), ("gp", OptunaState.COMPLETE), ("nsga2", OptunaState.COMPLETE)]
)
def test_what_is_infeasible_is_told_as_the_sampler_can_see_it(sampler: SamplerName, state: OptunaState) -> None:
    study = make(sampler=sampler)
    first, second, third, fourth = (study.ask().number for _ in range(4))
    study.tell_infeasible(first, {"memory": 1.0})
    study.tell_complete(second, {"accuracy": 0.5, "train_seconds": 9.0}, {})
    study.tell_complete(third, {"accuracy": 0.7, "train_seconds": 20.0}, {})
    study.tell_infeasible(fourth, {"memory": 1.0})
    assert trials(study)[first].state is OptunaState.PRUNED, "nothing is known yet that it could be as bad as"
    assert trials(study)[fourth].state is state
    assert trials(study)[fourth].values == ([0.5, math.log(20.0)] if state is OptunaState.COMPLETE else None)
    assert [t.number for t in study._study.best_trials] == [second, third]


def test_proposals_are_feasible_on_a_cluster_where_hundreds_run_before_one_has_ended() -> None:
    """TPE alone proposes 90 % of what is infeasible here, since that is all that has ended."""
    study = make(world_size={"choice": [1, 2, 4, 8]})
    running: list[Proposal] = []
    infeasible = 0
    for _ in range(300):
        proposal = study.ask()
        if proposal.params["world_size"] > 4:
            infeasible += 1
            study.tell_infeasible(proposal.number, {"world_size_within_cluster": 4.0})
        else:
            running.append(proposal)
    assert infeasible <= 0.35 * 300  # random: a quarter
    for proposal in running[:20]:
        study.tell_complete(proposal.number, {"accuracy": 0.5, "train_seconds": 10.0}, {})
    later = [study.ask().params["world_size"] for _ in range(40)]
    assert sum(size > 4 for size in later) <= 10


def test_known_points_come_first_and_once_and_the_sampler_fills_them_in() -> None:
    points = [
        {"learning_rate": 2e-3, "world_size": 4, "dataset_fraction": 1.0},
        {"lora_rank": 32},
    ]
    space = {"world_size": {"choice": [1, 2, 4]}}
    study = make(points=points, **space)
    asked = [study.ask(), study.ask()]
    first, second = (proposal.params for proposal in asked)
    assert first | points[0] == first
    assert second["lora_rank"] == 32
    assert set(first) == set(second), "every knob has a value"
    once = resumed(asked[:1], points=points, **space)
    assert once.ask().params["lora_rank"] == 32, "the second point is still to come"
    assert once.ask().params | points[0] != points[0], "a resumed study begins with the points again"


def without_models(study: Study) -> Study:
    """Let chance propose in the place of every method, of which the study chooses one all the same."""
    study._samplers = {method: optuna.samplers.RandomSampler(seed=0) for method in study._samplers}
    return study


@pytest.mark.parametrize("num_past", [0, 20])
def test_auto_is_a_model_until_so_many_trials_are_known_or_running_and_then_tpe(num_past: int) -> None:
    study = without_models(make(sampler="auto"))
    other, values = make(sampler="random", seed=1), {"accuracy": 0.5, "train_seconds": 3.0}
    study.learn(PastTrial(params=other.ask().params, values=values, constraints={}) for _ in range(num_past))
    for known in range(num_past, MAX_MODEL_TRIALS):
        assert study._chosen_method() == "model", known
        number = study.ask().number
        if known % 2:
            study.tell_complete(number, values, {})
    assert study._chosen_method() == "tpe"


def curve(params: Any) -> tuple[float, float]:
    """Return accuracy and seconds of a made-up training: more rows learn more and take longer, and one rate is the best."""
    rows = params["dataset_fraction"] * params["epochs"]
    rate = math.log(params["learning_rate"] / 3e-3)
    return 0.9 * math.exp(-0.5 * rate**2) * rows / (rows + 0.6), 60.0 * rows


class Looks:
    """Looks at points of the made-up training; only those in batches of 16 are open."""

    def point(self, params: Any) -> Prospect:
        return looked_at(params)

    def trial(self, number: int | None, params: Any) -> Prospect:
        return looked_at(params)

    def trains_within(self, params: Any, seconds: float) -> bool:
        return curve(params)[1] <= seconds and getattr(self, "open", lambda _: True)(params)


def looked_at(params: Any) -> Prospect:
    learned = {"learning_rate": math.log(params["learning_rate"]), "rows": math.log(params["dataset_fraction"] * params["epochs"])}
    seconds = curve(params)[1]
    # What is predicted is not what it takes, but goes with it.
    timed = {"seconds": math.log(3 * seconds)}
    return Prospect(learned=learned, timed=timed, belief=0.0, device_seconds=3 * seconds, is_open=params["global_batch_size"] == 16)


def volume_after(sampler: SamplerName, seed: int, *, seconds: float) -> float:
    """Return the hypervolume of a search on one worker after so many seconds of training."""
    study = make(seed=seed, sampler=sampler, epochs={"int": [1, 4]}, dataset_fraction={"log_uniform": [0.05, 1.0]}, adapter="lora")
    points, left = [], seconds
    while left > 0:
        proposal = study.ask(Looks(), budget_left=left / seconds)
        accuracy, took = curve(proposal.params)
        left -= took
        if left > 0:
            study.tell_complete(proposal.number, {"accuracy": accuracy, "train_seconds": took}, {})
            points.append((-accuracy, math.log(took)))
    return hypervolume(points, (0.0, math.log(100.0)))


def test_the_model_finds_a_better_front_in_the_same_time_than_chance_and_than_tpe() -> None:
    volumes = {
        sampler: statistics.mean(volume_after(sampler, seed, seconds=600.0) for seed in range(4))
        for sampler in ("auto", "tpe", "random")
    }
    assert volumes["auto"] > 1.1 * max(volumes["tpe"], volumes["random"]), volumes


@pytest.mark.parametrize("sampler", ["auto", "tpe"])
def test_longer_points_come_after_the_first_ones_as_far_as_they_train_within_the_reference(sampler: SamplerName) -> None:
    whole = make(epochs={"uniform": [0.5, 4.0]})._space.first()
    first, *longer = ({**whole, "epochs": epochs, "dataset_fraction": 1.0} for epochs in (0.5, 1.5, 1.6, 3.0))
    how: dict[str, Any] = {
        "space": SpaceSpec.model_validate({"epochs": {"uniform": [0.5, 4.0]}}),
        "objectives": (OBJECTIVES[0], replace(OBJECTIVES[1], is_limit=True)),
    }
    how |= {"sampler": sampler, "seed": 0, "startup_trials": 9, "points_to_evaluate": [first], "longer_points": longer}
    study = Study(**how)
    asked = [study.ask(Looks()) for _ in range(4)]
    assert [proposal.params["epochs"] for proposal in asked[:3]] == [0.5, 1.5, 1.6]
    assert asked[3].params["epochs"] not in (0.5, 1.5, 1.6, 3.0), "180 seconds, and the reference is 100"
    again = Study(**how)
    again.restore({proposal.number: proposal.params for proposal in asked[:2]})
    assert again.ask(Looks()).params["epochs"] == 1.6
    known = Looks()
    known.open = lambda params: params["epochs"] != 1.5  # type: ignore[attr-defined]
    other = Study(**how)
    assert [other.ask(known).params["epochs"] for _ in range(2)] == [0.5, 1.6], "what is known keeps no other one back"
    without = Study(**how | {"objectives": OBJECTIVES})
    assert [without.ask(Looks()).params["epochs"] for _ in range(2)][1] != 1.5, "the reference is no limit that the user gave"


def test_the_model_proposes_only_what_is_open_and_the_same_for_the_same_seed() -> None:
    proposals = []
    for _ in range(2):
        study = make(sampler="auto", epochs={"int": [1, 4]})
        for number in range(8):
            proposal = study.ask(Looks())
            assert proposal.number == number
            assert number < 4 or proposal.params["global_batch_size"] == 16
            study.tell_complete(proposal.number, dict(zip(("accuracy", "train_seconds"), curve(proposal.params), strict=True)), {})
        proposals.append(study.ask(Looks()).params)
    assert proposals[0] == proposals[1]


def test_a_diverged_trial_is_as_bad_as_the_worst_that_was_learned_up_to_now_and_tells_the_model_no_time() -> None:
    study = make(sampler="auto")
    numbers = [study.ask().number for _ in range(5)]
    study.tell_pruned(numbers[0], {})  # before anything is known that it could be as bad as
    study.tell_complete(numbers[1], {"accuracy": 0.8, "train_seconds": 9.0}, {})
    study.tell_pruned(numbers[2], {})
    study.tell_infeasible(numbers[3], {"memory": 1.0})
    study.tell_complete(numbers[4], {"accuracy": 0.3, "train_seconds": 4.0}, {})
    known = {seen.number: seen.costs for seen in study._known()}
    assert known[1] == (-0.8, math.log(9.0))
    assert known[4] == (-0.3, math.log(4.0))
    for number in (0, 2):
        assert known[number][0] == -0.3
        assert math.isnan(known[number][1])
    assert 3 not in known, "what cannot run is not learned from, but not proposed either"
    assert [t.state for t in trials(study)].count(OptunaState.PRUNED) == 3


def test_ends_that_nobody_waits_for_change_nothing_but_the_front_that_is_known() -> None:
    study = make(sampler="auto")
    study.tell_complete(study.ask().number, {"accuracy": 0.8, "train_seconds": 9.0}, {})
    reserved = study.reserve()
    study.tell_infeasible(reserved, {"memory": 1.0})
    study.tell_pruned(reserved, {})
    study.tell_failed(reserved)
    assert len(study._known()) == 1
    for number in (reserved, reserved, 0):  # a second time, and one that ended before
        study.tell_complete(number, {"accuracy": 0.8, "train_seconds": 5.0}, {})
    assert study._beside == [(-0.8, math.log(5.0))]
    assert len(study._known()) == 1


def test_the_model_is_told_what_runs_what_is_timed_and_which_trial_each_is(monkeypatch: pytest.MonkeyPatch) -> None:
    study = make(sampler="auto", world_size={"profile": [1, 2]})
    past = {**make(sampler="random", seed=1, world_size={"profile": [1, 2]}).ask().params, "world_size": 2}
    study.learn([PastTrial(params=past, values={"accuracy": 0.4, "train_seconds": 8.0}, constraints={})])
    numbers = [study.ask().number for _ in range(6)]
    for number in numbers[:4]:
        study.tell_complete(number, {"accuracy": 0.1 * number, "train_seconds": 9.0}, {})
    study.tell_complete(study.reserve(), {"accuracy": 0.3, "train_seconds": 5.0}, {})
    study.drop(numbers[5])
    told: dict[str, Any] = {}
    monkeypatch.setattr(study._proposer, "propose", lambda **given: told.update(given))
    study.ask(Looks(), budget_left=0.25)
    assert [(seen.number, seen.costs[0]) for seen in told["ended"]] == [(None, -0.4), *((n, -0.1 * n) for n in numbers[:4])]
    assert told["ended"][0].params == past, "under the layout that it was trained under"
    assert [seen.number for seen in told["running"]] == [numbers[4]]
    assert told["beside"] == [(-0.3, math.log(5.0))]
    assert told["references"] == [0.0, math.log(100.0)]
    assert told["budget_left"] == 0.25
    told.clear()
    study.ask(Looks())
    assert not told, "where it found nothing it is not asked again"
    study.tell_failed(numbers[4])
    study.ask(Looks())
    assert told, "until a trial ends"


def test_a_model_that_proposes_the_same_again_gives_way_to_chance() -> None:
    study = without_models(make(sampler="gp", learning_rate=1e-3, global_batch_size=8, lora_rank=4, dataset_fraction=1.0))
    chosen = []
    for _ in range(3):
        chosen.append(study._chosen_method())
        study.ask()
    assert chosen == ["gp", "gp", "random"]


def test_a_stopped_or_diverged_trial_is_as_bad_as_the_worst_for_who_sees_complete_ones_alone() -> None:
    study = make(sampler="gp")
    first, second = study.ask().number, study.ask().number
    study.tell_complete(first, {"accuracy": 0.5, "train_seconds": 9.0}, {"memory": 0.0})
    study.tell_pruned(second, {"memory": 0.0})
    assert trials(study)[second].values == [0.5, math.log(9.0)]
    assert [t.constraints for t in trials(study)] == [{"memory": 0.0}] * 2, "the same of every trial, or GP refuses"


def test_points_that_were_not_begun_or_cut_off_are_proposed_after_a_resume() -> None:
    space = {"learning_rate": {"log_uniform": [1e-4, 1e-2]}, "world_size": {"choice": [1, 2]}, "global_batch_size": 8, "lora_rank": 4}
    points = [{"learning_rate": rate, "world_size": size} for rate, size in ((1e-3, 1), (1e-3, 2), (2e-3, 1), (3e-3, 1))]
    asked = [make(points=points, **space)]
    study = asked[0]
    first, waiting, third = (study.ask() for _ in range(3))
    # What waits for the first, which trains the same recipe, is no trial yet.
    begun = {0: first.params, 1: third.params}
    again = make(points=points, **space)
    again.restore(begun)
    found = [again.ask().params for _ in range(2)]
    assert [(round(p["learning_rate"], 6), p["world_size"]) for p in found] == [(1e-3, 2), (3e-3, 1)]
    assert waiting.params["world_size"] == 2
    measured = {**space, "world_size": {"profile": [2, 1]}}
    assert make(points=points[:1], **measured).ask().params["world_size"] == 2, "whatever the point has of what is measured"
    again = make(points=points[:1], sampler="points", **measured)
    again.restore({0: {**first.params, "world_size": 2}})
    assert again.is_over
    cut = make(points=points, sampler="points", **space)
    cut.restore(begun, cut_off={1})
    found = []
    while not cut.is_over:
        found.append(cut.ask().params)
    assert [(round(p["learning_rate"], 6), p["world_size"]) for p in found] == [(1e-3, 2), (2e-3, 1), (3e-3, 1)]
