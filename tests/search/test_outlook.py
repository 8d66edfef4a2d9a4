"""What is said of a trial before it runs: from a profile where there is one, else from an estimate."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engines import make, report
from synthetic_data import token_data

from search.layouts import layout_to_train, layouts_of
from search.outlook import Outlook
from search.profiles import ProfileCache, fewest_nodes
from spaces.blueprint import blueprint
from spaces.config import TrialConfig
from spaces.constraints import Limits
from spaces.estimate import ASSUMED_UTILISATION, usable_bytes
from spaces.flops import flops_of_blueprint
from spaces.memory import rank_memory
from spaces.packing import packing_of
from spaces.space import SpaceSpec
from spaces.spec import SearchSpec
from trainables.batching import BatchPlan, StepSizes

MODEL = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
}
DEVICE = {
    "type": "cpu",
    "name": "a processor",
    "threads": 1,
    "versions": {"torch": "2.13.0"},
    "peak_flops_per_second": {"fp32": 1e10},
    "bytes_per_second": 1e10,
    "link_bytes_per_second": 5e9,
    "process_bytes": 500,
    "workers_per_node": [8, 4],
}
PROFILE = {
    "compile_seconds": 0.0,
    "fixed_seconds": 0.5,
    "seconds_per_token": 0.01,
    "part_seconds": {"forward": 0.2, "backward": 0.3},
    "peak_memory_bytes": 12345,
    "time_drift": 0.4,
    "num_nodes": 1,
}
SPEC = SearchSpec.model_validate(
    {"model": {"name": "m", "task": "sequence-classification", "max_length": 32}, "data": {"train": "t"}}
)


def config(**params: Any) -> TrialConfig:
    return TrialConfig.from_params({**SpaceSpec().first(), "dataset_fraction": 1.0, **params})


def sizes_of(trial: TrialConfig) -> StepSizes:
    packing = packing_of(MODEL, "sequence-classification", trial, 32)
    assert packing is not None
    return BatchPlan(trial, token_data(), packing).sizes()


def outlook(cache: ProfileCache, **changes: Any) -> Outlook:
    plan = blueprint(MODEL, "sequence-classification", 3)
    given: dict[str, Any] = {"model": MODEL, "plan": plan, "device": DEVICE, "profiles": cache, **changes}
    return Outlook(SPEC, token_data(), **given)


def test_without_a_profile_the_time_is_an_estimate_from_flops_and_the_memory_that_of_the_largest_batch(tmp_path: Path) -> None:
    predicted = outlook(ProfileCache(tmp_path))(config())
    sizes = sizes_of(config())
    plan = blueprint(MODEL, "sequence-classification", 3)
    length = sizes.padded_tokens.sum() / sizes.rows.sum()
    flops = flops_of_blueprint(plan, config().recipe).total(
        num_tokens=16 * length, num_targets=16, sum_of_squared_lengths=16 * length**2
    )
    compute = len(sizes.rows) * flops / (1e10 * ASSUMED_UTILISATION["cpu"])
    assert predicted["time_source"] == "estimate"
    assert compute < predicted["train_seconds"] < 1.2 * compute, "the update comes on top"
    (fullest,) = sizes.fullest
    tokens = int(sizes.micro_tokens[fullest])
    expected = rank_memory(plan, config(), math.ceil(tokens / 16), 16, num_tokens=tokens)
    assert sum(predicted["memory"].values()) == expected.peak_bytes


def test_with_a_profile_the_time_is_that_of_its_line_over_all_steps(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    says = outlook(cache)
    cache.put(says.key(config()), PROFILE)
    for fraction in (1.0, 0.5):
        sizes = sizes_of(config(dataset_fraction=fraction))
        predicted = says(config(dataset_fraction=fraction, learning_rate=1e-4, seed=0))
        assert predicted["time_source"] == "profile"
        assert predicted["train_seconds"] == pytest.approx(0.5 * len(sizes.rows) + 0.01 * sizes.padded_tokens.sum())


def test_what_is_said_roughly_is_what_is_planned_batch_by_batch(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    for source in ("estimate", "profile"):
        says = outlook(cache)
        for given in ({}, {"dataset_fraction": 0.5, "epochs": 3.0}, {"global_batch_size": 8}):
            seconds, told = says.rough_seconds(config(**given))
            planned = says(config(**given))
            assert told == planned["time_source"] == source
            assert seconds == pytest.approx(planned["train_seconds"], rel=0.05)
        cache.put(says.key(config()), PROFILE)
        cache.put(says.key(config(global_batch_size=8)), PROFILE)
    rows = outlook(ProfileCache(tmp_path / "none"), plan=None).rough_seconds(config(dataset_fraction=0.5, epochs=3.0))
    assert rows == (pytest.approx(1.5 * token_data().train.num_rows), "rows")


def test_whatever_changes_the_time_of_a_step_is_another_profile(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    cache.put(outlook(cache).key(config()), PROFILE)
    for other in (
        {"lora_rank": 8},
        {"adapter": "none"},
        {"world_size": 2},
        {"strategy": "fsdp"},
        {"micro_batch_size": 4},
        {"global_batch_size": 32},
        {"recomputation": "full"},
        {"precision": "bf16"},
        {"quantization": "nf4"},
        {"quantization": "int8"},
    ):
        assert cache.get(outlook(cache).key(config(**other))) is None, other
    for device in ({"name": "another"}, {"threads": 2}, {"versions": {"torch": "2.14.0"}}):
        assert cache.get(outlook(cache, device={**DEVICE, **device}).key(config())) is None, device
    one_each = {**DEVICE, "workers_per_node": [1] * 8}
    key = outlook(cache).key(config(world_size=8))
    cache.put(key, PROFILE)
    assert cache.get(outlook(cache, device=one_each).key(config(world_size=8))) is None, "eight ranks on one node or on eight"
    assert cache.get(outlook(cache, device=one_each).key(config())) is not None, "one rank sits on one node"
    wider = {**MODEL, "hidden_size": 128}
    assert cache.get(outlook(cache, model=wider).key(config())) is None
    other_data = Outlook(SPEC, replace(token_data(), fingerprint="other"), model=MODEL, plan=None, device=DEVICE, profiles=cache)
    assert cache.get(other_data.key(config())) is None
    assert cache.get(outlook(cache).key(config(learning_rate=1e-5))) is not None, "the rate costs nothing"


@pytest.mark.parametrize(
    ("world_size", "workers_per_node", "num_nodes"),
    [(8, [8], 1), (8, [8, 8], 1), (8, [1] * 8, 8), (8, [4, 4], 2), (9, [8, 4, 4], 2), (12, [8, 4, 4], 2), (13, [8, 4, 4], 3)],
)
def test_ranks_sit_on_the_fewest_nodes_that_hold_them(world_size: int, workers_per_node: list[int], num_nodes: int) -> None:
    assert fewest_nodes(world_size, workers_per_node) == num_nodes


def test_a_trained_recipe_has_the_times_of_another_layouts_profile(tmp_path: Path) -> None:
    trained, other = config(), config(world_size=2, strategy="fsdp", micro_batch_size=4)
    says = outlook(ProfileCache(tmp_path))
    says.keep_profile(other, PROFILE)
    sizes = sizes_of(other)
    seconds = 0.5 * len(sizes.rows) + 0.01 * float(sizes.padded_tokens.sum())
    # 3e9 FLOPs at 30 % of the peak of one rank, and a fifth more with what it computes again.
    reported = {
        "accuracy": 0.8,
        "eval_loss": 0.5,
        "train_loss": 0.4,
        "train_seconds": 40.0,
        "device_seconds": 40.0,
        "step_seconds": 40.0 / len(sizes.rows),
        "mfu": 0.3,
        "hfu": 0.36,
    }
    values = says.values_under(other, trained, {**reported, "flops_per_step": 3.0, "time_drift": 0.1, "total_seconds": 50.0})
    assert {k: values[k] for k in ("accuracy", "eval_loss", "train_loss", "flops_per_step")} == {
        "accuracy": 0.8,
        "eval_loss": 0.5,
        "train_loss": 0.4,
        "flops_per_step": 3.0,
    }
    assert values["train_seconds"] == pytest.approx(seconds)
    assert values["device_seconds"] == pytest.approx(2 * seconds)
    assert values["mfu"] == pytest.approx(0.3 * 40.0 / (2 * seconds)), "the same FLOPs"
    assert values["hfu"] / values["mfu"] == pytest.approx(1.2)
    assert values["tokens_per_second"] == pytest.approx(sizes.tokens.sum() / seconds)
    assert values["padding_fraction"] == pytest.approx(1 - sizes.tokens.sum() / sizes.padded_tokens.sum())
    assert values["peak_memory_bytes"] == 12345
    assert values["backward_seconds"] == 0.3
    assert values["time_drift"] == 0.4, "of the timed steps"
    assert not values.keys() & {"rank_spread", "total_seconds"}, "nothing is known of these"
    says.keep_profile(other, {**PROFILE, "rank_spread": 0.3})
    assert says.values_under(other, trained, reported)["rank_spread"] == 0.3
    says.keep_profile(other, {**PROFILE, "compile_seconds": 7.0})
    compiled = says.values_under(other, trained, reported)
    assert compiled["train_seconds"] == pytest.approx(seconds + 7.0)
    assert compiled["device_seconds"] == pytest.approx(2 * (seconds + 7.0))
    assert compiled["compile_seconds"] == 7.0
    assert {k: compiled[k] for k in ("mfu", "step_seconds", "tokens_per_second")} == {
        k: pytest.approx(values[k]) for k in ("mfu", "step_seconds", "tokens_per_second")
    }
    assert says(other)["train_seconds"] == pytest.approx(seconds + 7.0)
    assert says.rough_seconds(other)[0] == pytest.approx(seconds + 7.0, rel=0.3)
    again = config(recomputation="full")
    says.keep_profile(again, PROFILE)
    assert "hfu" not in says.values_under(again, trained, reported), "what is computed again is the layout's"
    with pytest.raises(KeyError, match="no step profile"):
        says.values_under(config(world_size=2), trained, reported)
    assert not outlook(ProfileCache(tmp_path)).has_profile(other), "later searches take only what was measured alone"


def test_a_point_that_was_timed_while_its_pace_changed_is_noisy(tmp_path: Path) -> None:
    says = outlook(ProfileCache(tmp_path / "cache"))
    space = {"adapter": "lora", "lora_rank": 4, "global_batch_size": 16, "world_size": {"profile": [1, 2]}}
    engine, _, store = make(tmp_path, trials=1, outlook=says, **space)
    first = engine.next()
    assert first is not None
    last = report(0.8, 40.0)
    engine.reported(first.number, {**last, "metrics": {**last["metrics"], "device_seconds": 40.0, "step_seconds": 1.0}})
    (store.trial_path(first.number) / "final").mkdir(parents=True)
    engine.ended(first.number, {"state": "complete"})
    timed = engine.next()
    assert timed is not None
    assert not timed.is_trained
    engine.ended(timed.number, {"state": "complete", "profile": PROFILE})
    assert engine.state.records[timed.number].noise == "its pace changed by 40% while it trained"
    assert not engine.state.records[first.number].noise


def test_a_damaged_profile_is_none(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    key = outlook(cache).key(config())
    path = cache.put(key, PROFILE)
    assert cache.get(key) is not None
    path.write_text('{"key": ')
    assert cache.get(key) is None
    cache.put(key, {name: value for name, value in PROFILE.items() if name != "time_drift"})
    assert cache.get(key) is None, "of before it was known whether it is noisy"


def test_what_is_not_known_is_not_said(tmp_path: Path) -> None:
    assert outlook(ProfileCache(tmp_path), plan=None)(config()) == {}
    slow = {k: v for k, v in DEVICE.items() if k != "bytes_per_second"}
    assert set(outlook(ProfileCache(tmp_path), device=slow)(config())) == {"memory"}
    assert set(outlook(ProfileCache(tmp_path))(config(precision="bf16"))) == {"memory"}, "no peak at this precision"


def test_a_rank_may_take_what_the_device_or_its_share_of_the_host_leaves() -> None:
    assert usable_bytes(DEVICE, 2000) == 1500
    assert usable_bytes(DEVICE, 100) == 0
    assert usable_bytes({"type": "cuda"}, 1000) == 920


def test_the_memory_is_that_of_ranks_on_the_device_that_was_found(tmp_path: Path) -> None:
    sharded = config(world_size=2, strategy="fsdp", adapter="none", precision="bf16")
    sizes, plan = sizes_of(sharded), blueprint({**MODEL, "vocab_size": 20_000}, "sequence-classification", 3)
    (fullest,) = sizes.fullest
    tokens, rows = int(sizes.micro_tokens[fullest]), int(sizes.micro_rows[fullest])
    held = []
    for kind in ("cpu", "cuda"):
        predicted = outlook(ProfileCache(tmp_path), plan=plan, device={**DEVICE, "type": kind})(sharded)
        held.append(sum(predicted["memory"].values()))
        assert (
            held[-1]
            == rank_memory(plan, sharded, math.ceil(tokens / rows), rows, num_tokens=tokens, is_on_gpu=kind == "cuda").peak_bytes
        )
    assert held[1] < held[0], "gloo copies"


@pytest.mark.parametrize(("epochs", "chosen"), [(1.0, "none"), (1000.0, "blocks")])
def test_blocks_are_compiled_where_that_pays_over_the_length_of_the_trial(tmp_path: Path, epochs: float, chosen: str) -> None:
    says = outlook(ProfileCache(tmp_path))
    spec = SPEC.model_copy(update={"space": SpaceSpec.model_validate({"compile": {"profile": ["none", "blocks"]}})})
    params = {**spec.space.first(), "dataset_fraction": 1.0, "epochs": epochs}
    candidates = layouts_of(params, spec, Limits(num_workers=1, hidden_size=64, max_length=32))
    plain, compiled = (c.config for c in candidates)
    assert (plain.layout.compile, compiled.layout.compile) == ("none", "blocks")
    assert layout_to_train(candidates, says).config == plain, "nothing was timed"
    says.keep_profile(plain, PROFILE)
    # Half of the time a step, after 30 seconds.
    halved = {"fixed_seconds": PROFILE["fixed_seconds"] / 2, "seconds_per_token": PROFILE["seconds_per_token"] / 2}
    says.keep_profile(compiled, {**PROFILE, **halved, "compile_seconds": 30.0})
    seconds = {c: says.rough_seconds(c)[0] for c in (plain, compiled)}
    assert seconds[compiled] == pytest.approx(seconds[plain] / 2 + 30.0)
    assert layout_to_train(candidates, says).config.layout.compile == chosen
