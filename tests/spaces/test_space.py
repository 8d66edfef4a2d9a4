from __future__ import annotations

from typing import Any

import optuna
import pytest
from pydantic import ValidationError

from spaces.config import TrialConfig
from spaces.loading import load_spec
from spaces.space import SpaceSpec

optuna.logging.set_verbosity(optuna.logging.ERROR)

BOTH = {
    "adapter": {"choice": ["none", "lora"]},
    "learning_rate": {"by_adapter": {"none": {"log_uniform": [1e-5, 1e-4]}, "lora": {"log_uniform": [1e-3, 1e-2]}}},
    "epochs": {"int": [1, 3]},
    "world_size": {"choice": [4, 1, 2]},
    "strategy": {"choice": ["ddp", "fsdp"]},
    "micro_batch_size": {"choice": ["auto", 4]},
    "recomputation": {"choice": ["none", "full"]},
}


def space(**knobs: Any) -> SpaceSpec:
    return SpaceSpec.model_validate(knobs)


def proposals(of: SpaceSpec, number: int = 60) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [of.suggest(study.ask()) for _ in range(number)]


def test_every_proposal_is_a_trial_config():
    for params in proposals(space(**BOTH)):
        config = TrialConfig.from_params(params)
        assert config.recipe.adapter == params["adapter"]
        assert config.layout.world_size in (1, 2, 4)


def test_lora_knobs_are_asked_for_only_with_lora():
    for params in proposals(space(**BOTH)):
        assert ("lora_rank" in params) == (params["adapter"] == "lora")
        assert ("lora_alpha" in params) == (params["adapter"] == "lora")
        assert ("lora_target_modules" in params) == (params["adapter"] == "lora")
        assert ("quantization" in params) == (params["adapter"] == "lora")


def test_a_base_is_quantised_only_with_lora():
    searched = space(**BOTH, quantization={"choice": ["none", "nf4", "int8"]})
    assert "quantization" in searched.names_searched()
    assert "quantization" not in space(adapter="none", quantization={"choice": ["none", "nf4"]}).names_searched()
    recipes = [TrialConfig.from_params(params).recipe for params in proposals(searched)]
    assert {(r.adapter, r.quantization) for r in recipes} == {("none", "none"), *(("lora", q) for q in ("none", "nf4", "int8"))}
    whole = TrialConfig.from_params({**searched.first(adapter="none"), "quantization": "nf4"})
    assert whole.recipe.quantization == "none"
    assert TrialConfig.from_dict(whole.to_dict()) == whole
    older = whole.to_dict()
    del older["recipe"]["quantization"]
    assert TrialConfig.from_dict(older) == whole, "a search that was begun before can go on"


def test_a_number_of_rows_is_one_and_auto_is_a_budget_of_tokens():
    rows = TrialConfig.from_params(space(micro_batch_size=4).first())
    assert (rows.layout.micro_batch_size, rows.layout.micro_batch_tokens) == (4, None)
    tokens = TrialConfig.from_params(space().first())
    assert (tokens.layout.micro_batch_size, tokens.layout.micro_batch_tokens) == (None, 4096)
    assert TrialConfig.from_dict(tokens.to_dict()) == tokens
    older = rows.to_dict()
    del older["layout"]["micro_batch_tokens"]
    assert TrialConfig.from_dict(older) == rows, "of a search that was begun when there were only rows"


def test_the_learning_rate_follows_the_adapter():
    seen = {p["adapter"]: [] for p in proposals(space(**BOTH))}
    for params in proposals(space(**BOTH)):
        seen[params["adapter"]].append(params["learning_rate"])
    assert 1e-5 <= min(seen["none"]) <= max(seen["none"]) <= 1e-4
    assert 1e-3 <= min(seen["lora"]) <= max(seen["lora"]) <= 1e-2


def test_the_sampler_sees_a_learning_rate_by_its_position_in_the_range_of_its_adapter():
    """Under one name and with its value TPE would mix the densities of two ranges; of two names GP would learn nothing."""
    searched = space(**BOTH)
    for adapter, (low, high) in (("none", (1e-5, 1e-4)), ("lora", (1e-3, 1e-2))):
        rates = {0.0: low, 0.5: (low * high) ** 0.5, 1.0: high}
        for position, rate in rates.items():
            encoded = searched.encode({"adapter": adapter, "learning_rate": rate})
            assert {n: v for n, v in encoded.items() if n.startswith("learning_rate")} == {
                "learning_rate_position": pytest.approx(position, abs=1e-12)
            }


def test_learning_rates_of_which_one_is_a_choice_have_a_name_per_adapter():
    rates = {"by_adapter": {"none": {"choice": [1e-5, 1e-4]}, "lora": {"log_uniform": [1e-3, 1e-2]}}}
    searched = space(adapter={"choice": ["none", "lora"]}, learning_rate=rates)
    names = {p["adapter"]: {n for n in searched.encode(p) if n.startswith("learning_rate")} for p in proposals(searched)}
    assert names == {"none": {"learning_rate_none_index"}, "lora": {"learning_rate_lora"}}


@pytest.mark.parametrize("kind", ["uniform", "log_uniform"])
def test_a_number_comes_back_from_its_position_as_it_was(kind):
    rates = {"by_adapter": {"none": {kind: [1e-5, 1e-4]}, "lora": {kind: [1e-3, 1e-2]}}}
    searched = space(adapter={"choice": ["none", "lora"]}, learning_rate=rates)
    for rate in (1e-3, 2e-3, 0.0012345, 1e-2):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
        study.enqueue_trial(searched.encode({"adapter": "lora", "learning_rate": rate}))
        assert searched.suggest(study.ask())["learning_rate"] == rate


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_learning_rate_for_one_adapter_is_enough_where_there_is_one(adapter):
    rates = {"by_adapter": {adapter: {"choice": [1e-3, 1e-4]}}}
    assert space(adapter=adapter, learning_rate=rates).suggest(_Lowest())["learning_rate"] == 1e-4
    with pytest.raises(ValidationError, match="by_adapter has nothing for"):
        space(adapter={"choice": ["none", "lora"]}, learning_rate=rates)


def test_a_trial_with_an_adapter_that_the_space_has_not_is_outside_of_it():
    searched = space(adapter="lora", learning_rate={"by_adapter": {"lora": 1e-3}})
    params = {**searched.suggest(_Lowest()), "adapter": "none"}
    assert searched.with_defaults(params) == params
    assert not searched.holds(params)


class _Lowest:
    def suggest_float(self, name, low, high, *, log=False):
        return low

    def suggest_int(self, name, low, high):
        return low

    def suggest_categorical(self, name, choices):
        return choices[0]


def test_encoded_params_are_proposed_again_when_enqueued():
    searched = space(**BOTH)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for params in proposals(searched, 20):
        study.enqueue_trial(searched.encode(params))
        trial = study.ask()
        assert searched.suggest(trial) == params
        assert set(trial.params) == set(searched.encode(params))


def test_encode_refuses_what_the_space_does_not_hold():
    params = space(**BOTH).first()
    with pytest.raises(ValueError, match="dataset_fraction"):
        space(**BOTH).encode(params | {"dataset_fraction": 0.01})
    with pytest.raises(ValueError, match="weight_decay is fixed"):
        space(**BOTH).encode(params | {"weight_decay": 0.5})


def test_pinning_overrides_give_the_same_params_and_search_nothing(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("model: {name: m, task: causal-lm}\ndata: {train: t.txt}\nspace: " + str(BOTH).replace("'", '"'))
    loaded = load_spec(path)
    for params in proposals(loaded.spec.space, 20):
        pinned = load_spec(path, loaded.spec.space.fixed_to(params)).spec.space
        assert pinned.names_searched() == []
        assert TrialConfig.from_params(pinned.first()) == TrialConfig.from_params(params)


def test_names_searched():
    assert space().names_searched() == ["learning_rate", "global_batch_size", "dataset_fraction", "lora_rank"]
    assert "lora_rank" not in space(adapter="none", learning_rate=1e-4).names_searched()
    assert space(adapter={"choice": ["lora"]}, world_size={"choice": [2]}, lora_rank=8).names_searched() == [
        "learning_rate",
        "global_batch_size",
        "dataset_fraction",
    ]
    two_rates = {"by_adapter": {"none": 1e-4, "lora": 1e-3}}
    assert "learning_rate" in space(adapter={"choice": ["none", "lora"]}, learning_rate=two_rates).names_searched()
    assert "learning_rate" not in space(adapter="lora", learning_rate=two_rates).names_searched()


def test_layouts_are_every_combination():
    assert space(**BOTH).layouts() == [(w, s) for w in (1, 2, 4) for s in ("ddp", "fsdp")]
    assert space(world_size={"int": [2, 4]}).layouts() == [(2, "ddp"), (3, "ddp"), (4, "ddp")]
    assert space().layouts() == [(1, "ddp")]


def test_corners_are_trial_configs_at_the_ends():
    corners = list(space(**BOTH, global_batch_size={"int": [8, 64]}).corners())
    # On one rank the strategies are the same; adapter, batch, micro batch and recomputation have two values each.
    assert len(corners) == (3 * 2 - 1) * 2 * 2 * 2 * 2
    assert {c["adapter"] for c in corners} == {"none", "lora"}
    assert {c["global_batch_size"] for c in corners} == {8, 64}
    assert {c["micro_batch_size"] for c in corners} == {"auto", 4}
    assert {c["recomputation"] for c in corners} == {"none", "full"}
    for params in corners:
        TrialConfig.from_params(params)
    quantised = list(space(**BOTH, quantization={"choice": ["none", "nf4"]}).corners())
    pairs = [(c["adapter"], c.get("quantization")) for c in quantised]
    assert pairs.count(("none", None)) == pairs.count(("lora", "none")) == pairs.count(("lora", "nf4")) == len(pairs) // 3


def test_a_corner_is_no_layout_that_another_shard_size_gives_too():
    corners = space(**BOTH, shard_size={"choice": ["auto", 2, 4]}).corners()
    found = [(c["world_size"], c["strategy"], c["shard_size"]) for c in corners]
    kinds = list(dict.fromkeys(found))
    assert kinds == [
        (1, "ddp", "auto"),
        (2, "ddp", "auto"),
        (2, "fsdp", "auto"),
        (4, "ddp", "auto"),
        (4, "fsdp", "auto"),
        (4, "fsdp", 2),
    ]
    sizes = [c["shard_size"] for c in space(world_size=4, strategy="fsdp", shard_size={"choice": [2, 8, "auto"]}).corners()]
    assert set(sizes) == {2, 8}, "in two copies, and in one"


def test_a_corner_is_no_layout_that_another_tp_size_gives_too():
    sizes = {"choice": [1, 2, 4]}
    corners = space(world_size=sizes, strategy={"choice": ["tp", "ddp"]}, tp_size={"choice": [2, "auto"]}).corners()
    kinds = dict.fromkeys((c["world_size"], c["strategy"], c["tp_size"]) for c in corners)
    assert list(kinds) == [(1, "tp", 2), (2, "tp", 2), (2, "ddp", 2), (4, "tp", 2), (4, "tp", "auto"), (4, "ddp", 2)]


BOTH_PLACES = {"world_size": [1, 2], "strategy": ["fsdp", "ddp", "tp"], "offload": ["cpu", "none"]}
# One rank that leaves nothing to the host has no strategy, and none but fsdp leaves anything.
PLACES = [(1, "fsdp", "cpu"), (1, "fsdp", "none"), (2, "fsdp", "cpu"), (2, "fsdp", "none"), (2, "ddp", "cpu"), (2, "tp", "cpu")]


def test_a_corner_and_a_measured_layout_are_none_that_another_offload_gives_too():
    def places(found):
        return list(dict.fromkeys((each["world_size"], each["strategy"], each["offload"]) for each in found))

    choices = space(**{knob: {"choice": values} for knob, values in BOTH_PLACES.items()})
    assert places(choices.corners()) == PLACES
    profiled = space(**{knob: {"profile": values} for knob, values in BOTH_PLACES.items()})
    assert places(profiled.measured_layouts(profiled.first())) == PLACES
    profiled = space(world_size="profile", strategy="profile", offload="profile")
    assert places(profiled.measured_layouts(profiled.first()))[:3] == [(1, "ddp", "none"), (1, "fsdp", "cpu"), (2, "ddp", "none")]


def test_what_is_computed_again_as_memory_has_it_is_a_kind_of_its_own():
    for values in (["none", "auto"], ["auto", "none"], ["none", "half", "full", "auto"]):
        chosen = space(recomputation={"choice": values})
        assert [c["recomputation"] for c in chosen.corners()] == values * (len(list(chosen.corners())) // len(values))
        profiled = space(recomputation={"profile": values})
        assert [p["recomputation"] for p in profiled.measured_layouts(profiled.first())] == values


def test_what_says_nothing_with_a_strategy_is_no_part_of_what_trains_it_again():
    searched = space(world_size=2, strategy={"choice": ["ddp", "fsdp"]}, offload="cpu", shard_size={"choice": [2, "auto"]})
    for strategy, offload, size in (("ddp", "none", "auto"), ("fsdp", "cpu", "2")):
        params = {**searched.first(), "strategy": strategy}
        fixed = dict(each.removeprefix("space.").split("=") for each in searched.fixed_to(params))
        assert (fixed["strategy"], fixed["offload"], fixed["shard_size"], fixed["tp_size"]) == (strategy, offload, size, "auto")
        fixed["shard_size"] = fixed["shard_size"] if fixed["shard_size"] == "auto" else int(fixed["shard_size"])
        again = {knob: fixed[knob] for knob in ("strategy", "offload", "shard_size")}
        assert TrialConfig.from_params({**params, **again}) == TrialConfig.from_params(params)
        space(world_size=2, strategy=strategy, offload=offload)
    with pytest.raises(ValidationError, match="says nothing without strategy fsdp"):
        space(strategy={"choice": ["ddp", "tp"]}, offload="cpu")


def test_what_a_file_fixes_and_a_pinned_strategy_has_not_is_at_its_default_in_what_trains_it_again():
    searched = space(world_size=2, strategy={"choice": ["ddp", "fsdp"]}, offload="cpu")
    for strategy, offload in (("ddp", "none"), ("fsdp", "cpu")):
        pins = searched.fixed_to({"strategy": strategy})
        fixed = dict(each.removeprefix("space.").split("=") for each in pins)
        assert fixed.get("offload", "cpu") == offload
        space(world_size=2, strategy=strategy, offload=fixed.get("offload", "cpu"))


@pytest.mark.parametrize("value", [2.7, True, 0, "2"])
def test_a_point_in_a_range_of_integers_is_one(value):
    searched = space(epochs={"int": [1, 4]}, weight_decay={"uniform": [0, 1]})
    assert searched.problem_with_point({"epochs": 2, "weight_decay": 1}) is None
    assert searched.problem_with_point({"epochs": value}) is not None
    assert searched.problem_with_point({"weight_decay": True}) is not None


def test_a_base_that_no_adapter_can_have_is_refused_and_no_part_of_what_trains_the_others_again():
    for adapter in ("none", "ia3", {"choice": ["none", "vera"]}):
        with pytest.raises(ValidationError, match=r"says nothing with adapter (none|ia3)"):
            space(adapter=adapter, quantization="nf4")
        space(adapter=adapter, quantization={"choice": ["none", "nf4"]})
    searched = space(adapter={"choice": ["none", "lora"]}, quantization="nf4")
    for adapter, quantization in (("none", "none"), ("lora", "nf4")):
        params = searched.first(adapter=adapter)
        fixed = dict(each.removeprefix("space.").split("=") for each in searched.fixed_to(params))
        space(adapter=adapter, quantization=fixed["quantization"])
        again = TrialConfig.from_params({**params, "quantization": fixed["quantization"]})
        assert (again, again.recipe.quantization) == (TrialConfig.from_params(params), quantization)


@pytest.mark.parametrize("value", [1, 0, "all", 2.5, True])
def test_a_shard_has_ranks_to_be_spread_over(value):
    with pytest.raises(ValidationError, match="not a shard size"):
        space(shard_size=value)
    with pytest.raises(ValidationError, match="not a tensor-parallel size"):
        space(tp_size=value)


@pytest.mark.parametrize(
    "knobs",
    [
        {"dataset_fraction": 0},
        {"dataset_fraction": 1.5},
        {"dataset_fraction": {"uniform": [0.0, 1.0]}},
        {"learning_rate": -1e-3},
        {"learning_rate": {"log_uniform": [1e-2, 1e-4]}},
        {"world_size": 0},
        {"world_size": {"choice": [1, 0]}},
        {"global_batch_size": 0},
        {"epochs": 0},
        {"epochs": {"int": [0, 3]}},
        {"lora_rank": 0},
        {"lora_alpha": 0},
        {"warmup_fraction": 1.0},
        {"warmup_fraction": -0.1},
        {"weight_decay": -0.1},
        {"precision": "fp16"},
        {"quantization": "fp4"},
        {"strategy": "fsdp2"},
        {"adapter": "None"},
        {"seed": -1},
        {"micro_batch_size": 0},
        {"micro_batch_size": True},
        {"micro_batch_size": {"choice": ["auto", "big"]}},
        {"lora_target_modules": "q_proj; v_proj"},
        {"lora_target_modules": ""},
        {"rank": 8},
    ],
)
def test_out_of_range_is_refused(knobs):
    with pytest.raises(ValidationError):
        space(**knobs)


def test_the_edges_of_the_ranges_are_inside():
    space(dataset_fraction=1, warmup_fraction=0, weight_decay=0, world_size=1, epochs=0.5, micro_batch_size=1)


def test_a_profiled_layout_is_asked_of_nobody_and_every_one_gets_its_turn() -> None:
    space = SpaceSpec.model_validate(
        {"world_size": {"profile": [1, 2]}, "strategy": "profile", "recomputation": {"choice": ["none", "full"]}}
    )
    params = space.first()
    layouts = space.measured_layouts(params)
    expected = [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (2, "tp")]
    assert [(p["world_size"], p["strategy"]) for p in layouts] == expected, "one rank has no strategy"
    assert all(p["learning_rate"] == params["learning_rate"] and p["recomputation"] == "none" for p in layouts)
    assert space.encode({"world_size": 2}) == {}
    assert {"world_size", "strategy"} <= set(space.names_searched())
    assert SpaceSpec().measured_layouts(params) == [params]


def test_profile_alone_is_every_value() -> None:
    space = SpaceSpec.model_validate({"world_size": "profile", "recomputation": "profile"})
    assert space.world_size.ends()[:4] == [1, 2, 4, 8]
    assert space.recomputation.ends() == ["none", "half", "full"]


@pytest.mark.parametrize("kind", ["choice", "profile"])
def test_corners_have_every_way_to_compile(kind: str) -> None:
    """What cannot be trained compiled may be trained without."""
    corners = space(compile={kind: ["blocks", "none"]}).corners()
    assert {params["compile"] for params in corners} == {"blocks", "none"}
