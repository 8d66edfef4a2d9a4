"""The engine: what is on disk when, what a resume does with it, and what each end of a trial becomes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from engines import STOP, Clock, Profiles, make, report

from search.engine import Assignment, Engine, SearchExhausted
from search.known import Known
from search.ledger import Ledger, replay
from search.pareto import front
from search.proposals import Proposal
from search.record import TrialState
from spaces.blueprint import blueprint
from spaces.config import TrialConfig
from spaces.constraints import CONSTRAINTS, Limits

# What runs out of memory with these is not tried again.
CLOSED = {"micro_batch_size": 4, "recomputation": "none"}


def test_a_trial_is_on_disk_before_anybody_hears_of_it(tmp_path: Path) -> None:
    engine, seen, store = make(tmp_path)
    assignment = engine.next()
    assert assignment is not None
    assert seen[-1]["event"] == "trial_started"
    assert replay(Ledger(store.ledger_path).events()).in_flight == {assignment.number}
    engine.reported(assignment.number, report(0.5, 3.0))
    engine.ended(assignment.number, {"state": "complete", "attempts": 1})
    record = replay(Ledger(store.ledger_path).events()).records[assignment.number]
    assert record.state is TrialState.COMPLETE
    assert record.values == {"accuracy": 0.5, "train_seconds": 3.0}
    assert record.details["peak_source"] == "measured_gemm"


@pytest.mark.parametrize(
    ("outcome", "final", "state", "kind"),
    [
        ({"state": "complete"}, True, TrialState.COMPLETE, None),
        ({"state": "stopped"}, False, TrialState.PRUNED, None),
        ({"state": "failed", "kind": "diverged", "message": "x"}, False, TrialState.FAIL, "diverged"),
        ({"state": "failed", "kind": "worker_lost", "message": "x"}, False, TrialState.FAIL, "worker_lost"),
        ({"state": "complete"}, False, TrialState.FAIL, "missing_metric"),
    ],
)
def test_an_end_becomes_the_state_that_it_is(tmp_path: Path, outcome: dict, final: bool, state: TrialState, kind: str | None) -> None:
    engine, _, _ = make(tmp_path)
    assignment = engine.next()
    assert assignment is not None
    engine.reported(assignment.number, report(0.5, 3.0, final=final))
    engine.ended(assignment.number, outcome)
    engine.ended(assignment.number, {"state": "complete"})  # a late second end changes nothing
    record = engine.state.records[assignment.number]
    assert record.state is state
    assert (record.error or {}).get("kind") == kind
    assert len(engine.front()) == (state is TrialState.COMPLETE)


def test_out_of_memory_is_a_violated_constraint_and_no_failure_that_the_sampler_ignores(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, **CLOSED)
    assignment = engine.next()
    assert assignment is not None
    engine.ended(assignment.number, {"state": "failed", "kind": "out_of_memory", "message": "x"})
    (trial,) = engine._study._study.trials
    assert {name for name, value in trial.constraints.items() if value > 0} == {"memory_within_device"}
    assert trial.constraints.keys() == {constraint.__name__ for constraint in CONSTRAINTS}, "GP wants the same ones of all trials"
    assert not engine.state.records[assignment.number].feasible


def test_where_a_trial_ran_out_of_memory_nothing_as_large_is_started_again_not_even_after_a_resume(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 97}
    plan = blueprint({"model_type": "bert", **sizes}, "sequence-classification", 3)
    limits = Limits(num_workers=1, hidden_size=64, plan=plan, max_length=32, memory_bytes=10**9)
    space = {"micro_batch_size": {"choice": [2, 4, 8]}, "global_batch_size": 8, "lora_rank": 4}
    engine, seen, _ = make(tmp_path, limits=limits, trials=12, **space)
    ran_out = 0
    while (assignment := engine.next()) is not None:
        is_large = assignment.config.layout.micro_batch_size >= 4
        ran_out += is_large
        failed = {"state": "failed", "kind": "out_of_memory", "message": "x"}
        engine.ended(assignment.number, failed if is_large else {"state": "stopped"})
    assert 1 <= ran_out <= 2, "once for each size at most"
    large = [e for e in seen if e["event"] == "trial_infeasible"]
    assert large
    assert all(e["constraints"]["memory_within_device"] > 0 for e in large)
    resumed, seen, _ = make(tmp_path, limits=limits, trials=24, **space)
    while (assignment := resumed.next()) is not None:
        assert assignment.config.layout.micro_batch_size < (8 if ran_out == 1 else 4) or ran_out == 0
        resumed.ended(assignment.number, {"state": "stopped"})


def test_where_a_trial_ran_out_of_memory_an_automatic_micro_batch_becomes_smaller(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 97}
    plan = blueprint({"model_type": "bert", **sizes}, "sequence-classification", 3)
    limits = Limits(num_workers=1, hidden_size=64, plan=plan, max_length=32, memory_bytes=10**9)
    points = [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]
    space = {"points": points, "global_batch_size": 8, "lora_rank": 4, "recomputation": "none"}
    engine, seen, _ = make(tmp_path, limits=limits, trials=8, **space)
    tried, rates, sizes = [], [], set()
    while (assignment := engine.next()) is not None:
        tried.append(assignment.config.layout.micro_batch_tokens)
        sizes.add(assignment.config.recipe.global_batch_size)
        rates.append(assignment.config.recipe.learning_rate)
        failed = {"state": "failed", "kind": "out_of_memory", "message": "x"}
        engine.ended(assignment.number, failed if tried[-1] > 64 else {"state": "stopped"})
    # Eight rows of 32 tokens are 256.
    assert tried == [4096, 128, *[64] * 8], "what is tried again takes nothing from the budget of eight trials"
    assert rates[:3] == [1e-3] * 3, "the same recipe with fewer tokens at a time"
    assert sizes == {8}, "the global batch stays"
    assert rates[3] == 2e-3
    assert len(set(rates[3:])) == 7
    assert [record.again for record in engine.state.records.values()] == [None, 0, 1, *[None] * 7]
    assert not [e for e in seen if e["event"] == "trial_infeasible"]


def test_where_a_trial_ran_out_of_memory_blocks_are_computed_again(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 97}
    plan = blueprint({"model_type": "llama", **sizes}, "causal-lm")
    limits = Limits(num_workers=1, hidden_size=64, plan=plan, max_length=32, memory_bytes=10**9)
    engine, seen, _ = make(tmp_path, limits=limits, trials=2, global_batch_size=256, lora_rank=4, micro_batch_size=32)
    tried = []
    while (assignment := engine.next()) is not None:
        tried.append((assignment.config.layout.recomputation, assignment.config.layout.micro_batch_size))
        failed = {"state": "failed", "kind": "out_of_memory", "message": "x"}
        engine.ended(assignment.number, failed if tried[-1][0] != "full" else {"state": "stopped"})
    assert tried == [("none", 32), ("half", 32), ("full", 32), ("full", 32)]
    assert not [e for e in seen if e["event"] == "trial_infeasible"]


def test_what_ran_out_of_memory_is_tried_again_after_a_resume_too_and_takes_no_point_of_the_user(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 97}
    plan = blueprint({"model_type": "bert", **sizes}, "sequence-classification", 3)
    limits = Limits(num_workers=1, hidden_size=64, plan=plan, max_length=32, memory_bytes=10**9)
    space = {"points": [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}], "global_batch_size": 8, "lora_rank": 4}
    space["recomputation"] = "none"
    engine, _, _ = make(tmp_path, limits=limits, trials=2, **space)
    for _ in range(2):
        assignment = engine.next()
        assert assignment is not None
        engine.ended(assignment.number, {"state": "failed", "kind": "out_of_memory", "message": "x"})
    resumed, _, _ = make(tmp_path, limits=limits, trials=2, **space)
    tried = []
    while (assignment := resumed.next()) is not None:
        tried.append((assignment.config.recipe.learning_rate, assignment.config.layout.micro_batch_tokens))
        resumed.ended(assignment.number, {"state": "stopped"})
    assert tried == [(1e-3, 64), (2e-3, 64)]
    assert resumed.is_handed_out


def test_nothing_is_tried_again_once_the_time_is_over(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 97}
    plan = blueprint({"model_type": "bert", **sizes}, "sequence-classification", 3)
    limits = Limits(num_workers=1, hidden_size=64, plan=plan, max_length=32, memory_bytes=10**9)
    clock = Clock()
    engine, _, _ = make(tmp_path, limits=limits, trials=4, budget={"minutes": 1.0}, clock=clock, global_batch_size=8, lora_rank=4)
    assignment = engine.next()
    assert assignment is not None
    clock.now += 61
    engine.ended(assignment.number, {"state": "failed", "kind": "out_of_memory", "message": "x"})
    assert engine.next() is None
    assert engine.is_handed_out


def test_a_job_says_how_long_it_is_predicted_to_take_also_after_a_resume(tmp_path: Path) -> None:
    class Seconds(Profiles):
        def __call__(self, config: TrialConfig) -> dict[str, Any]:
            return {"train_seconds": 50.0 / config.layout.world_size, "time_source": "estimate"}

        def rough_seconds(self, config: TrialConfig) -> tuple[float, str]:
            return 50.0 / config.layout.world_size, "estimate"

    engine, _, _ = make(tmp_path, outlook=Seconds(), world_size=2)
    assignment = engine.next()
    assert assignment is not None
    assert engine.job(assignment).predicted_seconds == 25.0
    engine.reported(assignment.number, report(0.5, 10.0))
    engine.ended(assignment.number, {"state": "complete"})
    assignment = engine.next()
    assert assignment is not None
    assert engine.job(assignment).predicted_seconds == 10.0, "the first took two fifths of what was estimated"
    resumed, _, _ = make(tmp_path, world_size=2)
    assert resumed.next() == assignment
    assert resumed.job(assignment).predicted_seconds == 10.0
    unknown = resumed.next()
    assert unknown is not None
    assert resumed.job(unknown).predicted_seconds is None


def test_the_study_looks_at_points_with_what_is_left_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    engine, _, _ = make(tmp_path, trials=4, budget={"minutes": 1.0}, clock=clock, world_size={"choice": [1, 2, 4]})
    asked = []

    def ask(look: Any, *, budget_left: float) -> Proposal:
        costs = [look.point(dict(proposal.params, world_size=n)) for n in (2, 4)]
        asked.append((round(budget_left, 2), costs[0].device_seconds, [c.is_open for c in costs]))
        return Proposal(number=len(asked), params=proposal.params | {"lora_alpha": len(asked)})

    proposal = engine._study.ask()
    monkeypatch.setattr(engine._study, "ask", ask)
    for seconds in (0.0, 50.0, 9.5):
        clock.now += seconds
        assignment = engine.next()
        assert assignment is not None
        engine.ended(assignment.number, {"state": "stopped"})
    # Of four trials and of a minute: none, then 50 s, then all but half a second, in which no trial of a second ends.
    assert asked == [(1.0, 2.0, [True, False]), (0.17, 2.0, [True, False]), (0.01, 2.0, [False, False])]


def run_to_end(engine: Engine, *, seconds: float = 3.0) -> None:
    """Train what is proposed, two at once."""
    live: list[Assignment] = []
    while (assignment := engine.next()) is not None or live:
        if assignment is not None:
            live.append(assignment)
        if len(live) == 2 or assignment is None:
            first = live.pop(0)
            if first.is_trained:
                accuracy = 1 / (1 + first.config.recipe.learning_rate * first.number)
                known = report(accuracy, seconds)
                known["metrics"] |= {"eval_loss": 1 - accuracy, "macro_f1": accuracy, "mfu": 0.1, "peak_memory_bytes": 1e9}
                engine.reported(first.number, known)
                (engine._store.trial_path(first.number) / "final").mkdir(parents=True, exist_ok=True)
            engine.ended(first.number, {"state": "complete"} if first.is_trained else {"state": "complete", "profile": {}})


THREE = ("eval_loss", "macro_f1", "peak_memory_bytes")


@pytest.mark.parametrize("objectives", [("accuracy", "train_seconds"), THREE, ("mfu", "accuracy")])
def test_a_search_by_the_model_proposes_nothing_infeasible_and_resumes(tmp_path: Path, objectives: tuple[str, ...]) -> None:
    how: dict[str, Any] = {"sampler": "auto", "objectives": objectives, "world_size": {"choice": [1, 2, 4, 8]}, "reuse": False}
    engine, seen, _ = make(tmp_path, trials=12, **how)
    run_to_end(engine)
    assert sum(e["event"] == "trial_finished" for e in seen) == 12
    # Until five have ended proposals are drawn by chance, and half of the space is infeasible.
    begun = [n for n, e in enumerate(seen) if e["event"] == "trial_started"]
    assert not [e for e in seen[begun[6] :] if e["event"] == "trial_infeasible"]
    again, seen, _ = make(tmp_path, trials=16, **how)
    run_to_end(again)
    assert [e["event"] for e in seen if e["event"] in ("trial_infeasible", "trial_finished")] == ["trial_finished"] * 4


def test_where_layouts_are_timed_a_search_by_the_model_ends_and_resumes(tmp_path: Path) -> None:
    how: dict[str, Any] = {"sampler": "auto", "world_size": {"profile": [1, 2]}, "global_batch_size": 16}
    engine, _, _ = make(tmp_path, trials=8, **how)
    run_to_end(engine)
    assert engine._study._beside, "what is only timed is on the front too"
    cut, _, _ = make(tmp_path, trials=9, **how)
    assignment = cut.next()
    assert assignment is not None
    cut.reported(assignment.number, report(0.5, 3.0))
    cut.ended(assignment.number, {"state": "complete"})
    cut.finished("its time is over")  # while the other layout waits
    resumed, _, _ = make(tmp_path, trials=11, **how)
    run_to_end(resumed)
    assert resumed.is_handed_out


@pytest.mark.parametrize(("kind", "num_tried"), [("error", 1), ("out_of_memory", 1), ("worker_lost", 6), ("no_workers", 6)])
def test_steps_that_cannot_be_timed_are_tried_once_whatever_recipes_have_them(tmp_path: Path, kind: str, num_tried: int) -> None:
    tried, live = [], list[Assignment]()
    for trials in (3, 6):  # the search and its resume
        space = {"compile": {"profile": ["none", "blocks"]}, "global_batch_size": 16, "lora_rank": 4, **CLOSED}
        engine, _, _ = make(tmp_path, trials=trials, **space)
        while (assignment := engine.next()) is not None or live:
            live += [] if assignment is None else [assignment]
            if assignment is not None and len(live) < 2:
                continue
            first = live.pop(0)
            if first.is_trained:
                engine.reported(first.number, report(0.5, 3.0))
                (engine._store.trial_path(first.number) / "final").mkdir(parents=True)
                engine.ended(first.number, {"state": "complete"})
            else:
                tried.append(first.number)
                engine.ended(first.number, {"state": "failed", "kind": kind, "message": "no compiler"})
    assert len(tried) == num_tried
    records = engine.state.records.values()
    assert sum(record.state is TrialState.COMPLETE for record in records) == 6
    timed = [record for record in records if record.source is not None]
    assert {record.error and record.error["message"] for record in timed} == {"no compiler"}
    # Of what waited when the first one failed there is a trial; later recipes have none.
    assert len(timed) == 6 if num_tried == 6 else len(timed) <= 3
    if num_tried == 1:
        config = timed[0].trial_config
        assert Known(engine.state.records).why_untimed(config) is not None
        # Such steps have been timed since then.
        assert Known(engine.state.records, lambda other: other.of_step() == config.of_step()).why_untimed(config) is None


def test_a_layout_that_cannot_be_timed_is_not_proposed_again_of_what_is_trained(tmp_path: Path) -> None:
    space = {"learning_rate": {"choice": [1e-3, 2e-3, 4e-3]}, "dataset_fraction": 1.0, "lora_rank": 4, "global_batch_size": 16}
    engine, _, _ = make(tmp_path, trials=30, sampler="auto", world_size={"choice": [1, 2]}, **space, **CLOSED)

    def train_all() -> None:
        while (assignment := engine.next()) is not None:
            if assignment.is_trained:
                engine.reported(assignment.number, report(0.5, 3.0))
                (engine._store.trial_path(assignment.number) / "final").mkdir(parents=True)
                engine.ended(assignment.number, {"state": "complete"})
            else:
                engine.ended(assignment.number, {"state": "failed", "kind": "error", "message": "no peer"})

    with pytest.raises(SearchExhausted):
        train_all()
    states = [record.state for record in engine.state.records.values()]
    assert states.count(TrialState.COMPLETE) == 3
    assert states.count(TrialState.FAIL) <= 2, "one for each way round"


def test_a_space_that_is_used_up_is_told_without_a_look_at_it_for_every_proposal(tmp_path: Path) -> None:
    looks = []

    class Counts(Profiles):
        def rough_seconds(self, config: TrialConfig) -> tuple[float, str]:
            looks.append(config)
            return 1.0, "estimate"

    space = {"dataset_fraction": 1.0, "lora_rank": {"choice": [4, 8]}, "global_batch_size": {"choice": [8, 16, 32]}}
    engine, _, _ = make(tmp_path, trials=50, sampler="auto", outlook=Counts(), learning_rate=1e-3, **space)
    with pytest.raises(SearchExhausted, match="in a row were infeasible or known"):
        run_to_end(engine)
    assert len(engine.state.records) == 6
    assert len(looks) < 2000


def test_what_is_known_is_not_learned_twice_and_a_resumed_search_knows_the_same(tmp_path: Path) -> None:
    space = {"dataset_fraction": 1.0, "lora_rank": 4, "global_batch_size": {"choice": [8, 16]}, "world_size": {"choice": [1, 2]}}
    how: dict[str, Any] = {"sampler": "auto", "learning_rate": {"choice": [1e-3, 1e-2]}, **space}
    engine, _, _ = make(tmp_path, trials=50, **how)

    def train_all() -> None:
        while (assignment := engine.next()) is not None:
            # One rate diverges: that is true under every layout.
            if assignment.config.recipe.learning_rate == 1e-2:
                engine.ended(assignment.number, {"state": "failed", "kind": "diverged", "message": "x"})
            elif assignment.is_trained:
                engine.reported(assignment.number, report(0.5, 3.0))
                engine.ended(assignment.number, {"state": "complete"})
            else:
                engine.ended(assignment.number, {"state": "complete", "profile": {}})

    with pytest.raises(SearchExhausted):
        train_all()
    assert sorted(seen.number for seen in engine._study._known()) == sorted(engine.state.records)
    again, _, _ = make(tmp_path, trials=60, **how)
    known = sorted(engine._study._known(), key=lambda seen: seen.number or 0)
    assert str(again._study._known()) == str(known), "in words, since nan is not nan"
    assert again._study._chosen_method() == engine._study._chosen_method() == "model"


def test_a_trial_that_was_cut_off_says_nothing_to_a_search_that_goes_on(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2, sampler="auto")
    first, second = engine.next(), engine.next()
    assert first is not None
    assert second is not None
    engine.reported(first.number, report(0.5, 3.0))
    engine.ended(first.number, {"state": "complete"})
    engine.ended(second.number, {"state": "stopped"})
    assert engine.state.records[second.number].was_cut_off
    for each in (engine, make(tmp_path, trials=4, sampler="auto")[0]):
        assert [seen.number for seen in each._study._known()] == [first.number]


def test_steps_that_ran_out_of_memory_are_not_proposed_again_where_no_formula_tells(tmp_path: Path) -> None:
    space = {"micro_batch_size": {"choice": [2, 4, 8, 16]}, "global_batch_size": 16, "lora_rank": 4}
    engine, _, _ = make(tmp_path, trials=24, sampler="auto", **space)
    ran_out = []
    while (assignment := engine.next()) is not None:
        is_large = assignment.config.layout.micro_batch_size >= 8
        ran_out.append(is_large)
        if is_large:
            engine.ended(assignment.number, {"state": "failed", "kind": "out_of_memory", "message": "x"})
        else:
            engine.reported(assignment.number, report(0.5, 3.0))
            engine.ended(assignment.number, {"state": "complete"})
    # By chance before the model begins, then once for each of the two at most.
    assert sum(ran_out[8:]) <= 2, ran_out


def test_the_reference_that_is_measured_first_reaches_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _, _ = make(tmp_path, trials=20, sampler="auto", objectives=("eval_loss", "train_seconds"))
    engine.referenced({"eval_loss": 4.5})
    told: list[Any] = []
    monkeypatch.setattr(engine._study._proposer, "propose", lambda **given: told.append(given["references"]))
    for _ in range(8):
        assignment = engine.next()
        assert assignment is not None
        known = report(0.5, 3.0)
        known["metrics"]["eval_loss"] = 2.0
        engine.reported(assignment.number, known)
        engine.ended(assignment.number, {"state": "complete"})
    assert [first for first, _ in told] == [4.5] * len(told) != []


def test_infeasible_proposals_cost_none_of_the_budget(tmp_path: Path) -> None:
    engine, seen, _ = make(tmp_path, trials=4, world_size={"choice": [1, 2, 4, 8]})
    handed_out = [engine.next() for _ in range(5)]
    assert [a is None for a in handed_out] == [False] * 4 + [True]
    assert all(a.config.layout.world_size <= 2 for a in handed_out if a)
    infeasible = [e for e in seen if e["event"] == "trial_infeasible"]
    assert infeasible
    assert all(e["constraints"]["world_size_within_cluster"] > 0 for e in infeasible)


def test_a_space_without_a_feasible_point_ends_with_the_reason(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, limits=Limits(num_workers=2, hidden_size=2), lora_rank={"choice": [4, 8]})
    with pytest.raises(SearchExhausted, match="adapter_rank_within_width"):
        engine.next()


def test_a_resume_hands_out_the_trials_in_flight_first_and_keeps_the_budget(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=3)
    first, second = engine.next(), engine.next()
    assert first is not None
    assert second is not None
    engine.reported(first.number, report(0.5, 3.0))
    engine.ended(first.number, {"state": "complete"})
    # The driver dies here.
    resumed, _, _ = make(tmp_path, trials=3)
    again = resumed.next()
    assert again == second
    third = resumed.next()
    assert third is not None
    assert third.number not in (first.number, second.number)
    assert resumed.next() is None


def test_a_proposal_that_never_reached_the_ledger_is_made_anew(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path)
    first = engine.next()
    engine._study.ask()  # killed between the proposal and the ledger
    resumed, _, _ = make(tmp_path)
    assert resumed.num_left == 3
    handed_out = [resumed.next() for _ in range(3)]
    assert handed_out[0] == first
    assert [a.number for a in handed_out if a] == [0, 1, 2]


def test_the_sampler_learns_the_same_from_a_search_that_was_resumed(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=40, world_size={"choice": [1, 2, 4]}, **CLOSED)
    outcomes = [{"state": "complete"}, {"state": "stopped"}, {"state": "failed", "kind": "out_of_memory", "message": "x"}]
    for i in range(12):
        assignment = engine.next()
        assert assignment is not None
        is_stopped = i % 4 == 1
        engine.reported(assignment.number, report(0.1 * (i % 7), 1.0 + i % 5, final=not is_stopped), STOP if is_stopped else None)
        if i % 4 < 3:
            engine.ended(assignment.number, outcomes[i % 4])
    resumed, _, _ = make(tmp_path, trials=40, world_size={"choice": [1, 2, 4]}, **CLOSED)
    before, after = (
        [(t.number, t.state, t.params, t.values, t.constraints) for t in e._study._study.trials] for e in (engine, resumed)
    )
    for (*one, params, _, _), (*other, again, _, _) in zip(before, after, strict=True):
        # A position in a range is found again from the number that it gave, to ten digits.
        assert params.pop("learning_rate_position") == pytest.approx(again.pop("learning_rate_position"))
        assert one == other
    assert before == after
    assert resumed.num_left == engine.num_left + len(engine.state.in_flight)
    assert [r.number for r in resumed.front()] == [r.number for r in engine.front()]


def test_the_front_and_the_budget_are_those_of_all_records(tmp_path: Path) -> None:
    """They are kept up to date trial by trial; here they are counted again from everything."""
    engine, _, _ = make(tmp_path, trials=60, world_size={"choice": [1, 2, 4]})
    rng = random.Random(0)
    for _ in range(40):
        assignment = engine.next()
        assert assignment is not None
        engine.reported(assignment.number, report(rng.randrange(6) / 6, 1.0 + rng.randrange(6)))
        if rng.random() < 0.9:
            engine.ended(assignment.number, {"state": "complete"})
        records = list(engine.state.records.values())
        assert [r.number for r in engine.front()] == [r.number for r in front(records, engine.objectives)]
        assert engine.num_left == 60 - sum(r.started_at is not None for r in records)


def test_a_trial_that_its_rung_stops_is_pruned_and_says_where_and_why(tmp_path: Path) -> None:
    engine, _, store = make(tmp_path)
    assignment = engine.next()
    assert assignment is not None
    engine.reported(assignment.number, report(0.5, 3.0, final=False, step=1), {**STOP, "goes_on": True})
    assert engine.state.records[assignment.number].stopped is None
    engine.reported(assignment.number, report(0.5, 3.0, final=False, step=1), STOP)
    engine.ended(assignment.number, {"state": "stopped"})
    record = replay(Ledger(store.ledger_path).events()).records[assignment.number]
    assert record.state is TrialState.PRUNED
    assert record.stopped == STOP
    assert record.why_stopped == "stopped at 11% of its steps, place 3 of 3 where 1 may go on"
    assert engine.front() == []
    (trial,) = engine._study._study.trials
    assert trial.state.name == "PRUNED"
    assert trial.values is None
    assert engine.num_left == 2, "it counts as one of the budget"


def test_a_crash_between_the_verdict_and_the_end_does_not_let_the_trial_go_on(tmp_path: Path) -> None:
    engine, _, _ = make(tmp_path, trials=2)
    stopped, other = engine.next(), engine.next()
    assert stopped is not None
    assert other is not None
    engine.reported(stopped.number, report(0.5, 3.0, final=False, step=1), STOP)
    # The driver dies here.
    resumed, seen, _ = make(tmp_path, trials=2)
    assert resumed.state.records[stopped.number].state is TrialState.PRUNED
    assert [e["event"] for e in seen] == ["trial_finished"]
    assert resumed.next() == other
    assert resumed.next() is None


def test_a_job_reports_at_the_rungs_of_its_bracket(tmp_path: Path) -> None:
    for brackets, lengths in ((1, {2}), (3, {0, 1, 2})):
        engine, _, _ = make(tmp_path / str(brackets), trials=20, scheduler={"brackets": brackets})
        assignments = [assignment for _ in range(20) if (assignment := engine.next()) is not None]
        assert len(assignments) == 20
        assert {len(engine.job(assignment).rungs) for assignment in assignments} == lengths


def test_what_a_worker_may_still_write_to_is_left_alone_until_the_search_ends(tmp_path: Path) -> None:
    engine, _, store = make(tmp_path)
    outcomes = [{"state": "stopped"}, {"state": "failed", "kind": "driver_lost", "message": "x"}, {"state": "complete"}]
    for outcome in outcomes:
        assignment = engine.next()
        assert assignment is not None
        (store.trial_path(assignment.number) / "step-00000001.tmp").mkdir(parents=True)
        engine.reported(assignment.number, report(0.5, 3.0, final=outcome["state"] == "complete"))
        engine.ended(assignment.number, outcome)
    left = sorted(p.parent.name for p in (store.root / "trials").glob("*/*"))
    assert left == ["0000", "0001"]
    engine.finished("trials")
    assert list((store.root / "trials").glob("*/*")) == []


def test_weights_are_kept_for_the_front_alone(tmp_path: Path) -> None:
    engine, _, store = make(tmp_path)
    results = [(0.5, 3.0), (0.4, 4.0), (0.6, 2.0)]
    for accuracy, seconds in results:
        assignment = engine.next()
        assert assignment is not None
        for part in ("final", "step-00000001"):
            (store.trial_path(assignment.number) / part).mkdir(parents=True)
        engine.reported(assignment.number, report(accuracy, seconds))
        engine.ended(assignment.number, {"state": "complete"})
    left = sorted(str(p.relative_to(store.root / "trials")) for p in (store.root / "trials").glob("*/*"))
    assert left == ["0002/final"]


def test_a_resume_removes_what_a_driver_left_that_was_killed_before_it_swept(tmp_path: Path) -> None:
    engine, _, store = make(tmp_path)
    for accuracy, seconds in [(0.5, 3.0), (0.4, 4.0)]:
        assignment = engine.next()
        assert assignment is not None
        engine.reported(assignment.number, report(accuracy, seconds))
        engine.ended(assignment.number, {"state": "complete"})
    running = engine.next()
    assert running is not None
    for number, part in [(0, "final"), (0, "step-00000001"), (1, "final"), (running.number, "step-00000001")]:
        (store.trial_path(number) / part).mkdir(parents=True)
    make(tmp_path)
    left = sorted(str(p.relative_to(store.root / "trials")) for p in (store.root / "trials").glob("*/*"))
    assert left == ["0000/final", "0002/step-00000001"]


def test_points_alone_are_trained_however_many_of_them_are_infeasible(tmp_path: Path) -> None:
    points = [{"learning_rate": rate, "world_size": size} for rate, size in ((1e-3, 1), (2e-3, 4), (1e-3, 1))]
    space = {"learning_rate": {"log_uniform": [1e-4, 1e-2]}, "world_size": {"choice": [1, 4]}, "global_batch_size": 16}
    engine, _, _ = make(tmp_path, trials=10, sampler="points", points=points, dataset_fraction=1.0, lora_rank=4, **space)
    assignment = engine.next()
    assert assignment is not None
    assert not engine.is_handed_out
    engine.reported(assignment.number, report(0.5, 1.0))
    engine.ended(assignment.number, {"state": "complete"})
    assert engine.next() is None
    assert engine.is_handed_out
    assert engine.why_over == "all points were tried"
    assert [r.state for r in engine.state.records.values() if r.started_at is not None] == [TrialState.COMPLETE]


@pytest.mark.parametrize(("workers_per_node", "is_scattered"), [([2, 2], True), ([1, 1], False), ([], False)])
def test_a_trial_whose_ranks_were_on_more_nodes_than_they_need_has_times_that_are_not_to_be_trusted(
    tmp_path: Path, workers_per_node: list[int], is_scattered: bool
) -> None:
    space = {"learning_rate": 1e-3, "global_batch_size": 16, "dataset_fraction": 1.0, "lora_rank": 4, "world_size": 2}
    _, _, store = make(tmp_path, **space)
    Ledger(store.ledger_path).append("device_examined", device={"name": "made up", "workers_per_node": workers_per_node})
    engine, _, _ = make(tmp_path, **space)
    assignment = engine.next()
    assert assignment is not None
    last = report(0.5, 3.0)
    nodes = [{"rank": 0, "node_id": "a"}, {"rank": 1, "node_id": "b"}]
    engine.reported(assignment.number, {**last, "details": {**last["details"], "process_map": nodes}})
    engine.ended(assignment.number, {"state": "complete"})
    noise = engine.state.records[assignment.number].noise
    assert noise == ("its ranks were on 2 nodes, and 1 holds as many" if is_scattered else "")
