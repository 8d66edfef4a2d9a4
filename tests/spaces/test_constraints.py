from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spaces.blueprint import blueprint
from spaces.config import TrialConfig
from spaces.constraints import (
    Limits,
    config_within,
    is_feasible,
    memory_within_device,
    predicted_memory,
    reason,
    violations,
    why_none_trains,
    why_not,
)
from spaces.memory import rank_memory
from spaces.space import SpaceSpec
from spaces.tensor_parallel import PLANS

ROOMY = Limits(num_workers=8, hidden_size=384)
ON_GPUS = replace(ROOMY, is_on_gpu=True)
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 96, "vocab_size": 97}
SPLITTABLE = replace(ROOMY, plan=blueprint({"model_type": "llama", **SIZES}, "causal-lm"))


def config(**params: object) -> TrialConfig:
    return TrialConfig.from_params({**SpaceSpec().first(), **params})


def test_int8_is_compiled_on_a_cpu_and_nf4_everywhere():
    assert is_feasible(violations(config(quantization="int8", compile="blocks"), ROOMY))
    assert is_feasible(violations(config(quantization="nf4", compile="blocks"), ON_GPUS))


def test_the_default_space_is_feasible():
    values = violations(config(), ROOMY)
    assert list(values) == [
        "global_batch_divisible",
        "world_size_within_cluster",
        "matrices_split_evenly",
        "shards_of_equal_size",
        "adapter_rank_within_width",
        "quantized_base_whole",
        "int8_as_written",
        "offloaded_from_gpu",
        "norms_whole",
        "vectors_whole",
        "layers_adaptable",
        "prefix_kept",
        "prefix_within_positions",
        "rotated_in_whole_blocks",
        "memory_within_device",
        "memory_within_host",
    ]
    assert is_feasible(values)


@pytest.mark.parametrize(
    ("params", "limits", "name", "value"),
    [
        ({"global_batch_size": 16, "world_size": 3, "micro_batch_size": 1}, ROOMY, "global_batch_divisible", 1),
        ({"global_batch_size": 16, "micro_batch_size": 5}, ROOMY, "global_batch_divisible", 1),
        ({"global_batch_size": 2, "world_size": 4}, ROOMY, "global_batch_divisible", 2),
        ({"world_size": 4}, Limits(num_workers=1, hidden_size=None), "world_size_within_cluster", 3),
        ({"global_batch_size": 24, "world_size": 6, "strategy": "fsdp", "shard_size": 4}, ROOMY, "shards_of_equal_size", 2),
        ({"global_batch_size": 24, "world_size": 6, "strategy": "tp", "tp_size": 4}, SPLITTABLE, "shards_of_equal_size", 2),
        ({"lora_rank": 385}, ROOMY, "adapter_rank_within_width", 1),
        ({"quantization": "nf4", "world_size": 2, "strategy": "fsdp"}, ROOMY, "quantized_base_whole", 1),
        ({"quantization": "int8", "world_size": 8, "strategy": "fsdp"}, ROOMY, "quantized_base_whole", 1),
        ({"quantization": "nf4", "strategy": "fsdp", "offload": "cpu"}, ON_GPUS, "quantized_base_whole", 1),
        ({"strategy": "fsdp", "offload": "cpu"}, ROOMY, "offloaded_from_gpu", 1),
        ({"quantization": "int8", "compile": "blocks"}, ON_GPUS, "int8_as_written", 1),
        ({"adapter": "vera", "precision": "bf16", "world_size": 2, "strategy": "fsdp"}, ROOMY, "vectors_whole", 1),
        ({"adapter": "prefix", "compile": "blocks"}, ROOMY, "prefix_kept", 1),
    ],
)
def test_each_constraint_alone(params, limits, name, value):
    values = violations(config(**params), limits)
    assert {k: v for k, v in values.items() if v > 0} == {name: value}
    assert not is_feasible(values)


@pytest.mark.parametrize(
    ("params", "num_shards", "shard_size"),
    [
        ({"world_size": 8, "strategy": "fsdp"}, 8, None),
        ({"world_size": 8, "strategy": "fsdp", "shard_size": 4}, 4, 4),
        ({"world_size": 4, "strategy": "fsdp", "shard_size": 4}, 4, None),
        ({"world_size": 2, "strategy": "fsdp", "shard_size": 4}, 2, None),
        ({"world_size": 1, "strategy": "fsdp", "shard_size": 4}, 1, None),
        ({"world_size": 8, "strategy": "ddp", "shard_size": 4}, 1, None),
        ({"world_size": 8, "strategy": "tp", "shard_size": 4}, 1, None),
    ],
)
def test_a_shard_size_says_something_where_fsdp_has_more_ranks(params, num_shards, shard_size):
    """Else the config is the one without it, and is not trained twice."""
    made = config(**params)
    assert (made.layout.num_shards, made.layout.shard_size) == (num_shards, shard_size)
    assert is_feasible(violations(made, ROOMY)) or params["strategy"] == "tp"


@pytest.mark.parametrize(
    ("params", "sizes"),
    [
        ({"world_size": 8, "strategy": "tp"}, (8, 1, 1)),
        ({"world_size": 8, "strategy": "tp", "tp_size": 2}, (2, 4, 4)),
        ({"world_size": 2, "strategy": "tp", "tp_size": 2}, (2, 1, 1)),
        ({"world_size": 1, "strategy": "tp", "tp_size": 2}, (1, 1, 1)),
        ({"world_size": 8, "strategy": "fsdp", "tp_size": 2}, (1, 8, 8)),
        ({"world_size": 8, "strategy": "ddp", "tp_size": 2}, (1, 8, 1)),
    ],
)
def test_groups_split_matrices_where_tp_has_more_ranks(params, sizes):
    """Ranks of a group, groups that rows are dealt to, and ranks that share one copy of what FSDP2 shards."""
    layout = config(**params).layout
    assert (layout.tensor_parallel_size, layout.data_parallel_size, layout.num_shards) == sizes
    assert layout.tp_size == (2 if params == {"world_size": 8, "strategy": "tp", "tp_size": 2} else None)


@pytest.mark.parametrize(
    ("params", "is_sharded", "trained_as"),
    [
        ({"world_size": 1, "strategy": "fsdp", "offload": "cpu"}, True, ("fsdp", "cpu")),
        ({"world_size": 2, "strategy": "fsdp", "offload": "cpu"}, True, ("fsdp", "cpu")),
        ({"world_size": 2, "strategy": "fsdp"}, True, ("fsdp", "none")),
        ({"world_size": 1, "strategy": "fsdp"}, False, ("ddp", "none")),
        ({"world_size": 1, "strategy": "tp", "offload": "cpu"}, False, ("ddp", "none")),
        ({"world_size": 2, "strategy": "ddp", "offload": "cpu"}, False, ("ddp", "none")),
    ],
)
def test_fsdp_leaves_weights_to_the_host_on_one_rank_too(params, is_sharded, trained_as):
    made = config(**params)
    alike = made.trained_alike().layout
    assert (made.layout.is_sharded, (alike.strategy, alike.offload)) == (is_sharded, trained_as)
    assert is_feasible(violations(made, ON_GPUS)) or params["strategy"] == "tp"


def test_matrices_are_split_where_the_family_has_a_plan_and_the_sizes_divide():
    name = "matrices_split_evenly"

    def limits(family, **changes):
        return replace(ROOMY, plan=blueprint({"model_type": family, **SIZES, **changes}, "causal-lm"))

    split = config(strategy="tp", world_size=4)
    for known, value, why in (
        (limits("llama"), 0, ""),
        (limits("llama", num_key_value_heads=2), 2, "strategy tp: not divisible by 4 ranks: 2 key-value heads"),
        (limits("qwen3", intermediate_size=98), 2, "strategy tp: not divisible by 4 ranks: 98 inner features"),
        (
            limits("gpt2"),
            1,
            f"strategy tp splits models of these families: {', '.join(sorted(PLANS))}; this is none",
        ),
        (replace(ROOMY, plan=None), 1, "strategy tp splits models of these families"),
        (replace(ROOMY, plan=None, hidden_size=None), 0, ""),
    ):
        assert violations(split, known)[name] == value
        assert violations(config(strategy="tp", world_size=1), known)[name] == 0, "one rank splits nothing"
        assert violations(config(strategy="fsdp", world_size=4), known)[name] == 0
        assert not value or reason(name, split, known).startswith(why)


def test_what_oft_rotates_is_cut_into_whole_blocks():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 100, "vocab_size": 97}
    name = "rotated_in_whole_blocks"

    limits = replace(ROOMY, plan=blueprint({"model_type": "llama", **sizes}, "causal-lm"))

    def value(**params):
        return violations(config(adapter="oft", **params), limits)[name]

    assert value(lora_rank=4) == 0
    assert value(lora_rank=8) == 100 % 8
    assert value(lora_rank=8, lora_target_modules="q_proj,o_proj") == 0
    assert value(lora_rank=1) == 1, "nothing would train"
    gpt2 = replace(ROOMY, plan=blueprint({"model_type": "gpt2", **sizes}, "causal-lm"))
    assert violations(config(adapter="oft", lora_rank=4), gpt2)["layers_adaptable"] == 1
    assert why_none_trains([config(adapter="oft", lora_rank=4)], gpt2).startswith(
        "space.adapter: nothing in the space can be trained: oft and float8"
    )
    assert violations(config(quantization="float8"), gpt2)["layers_adaptable"] == 1
    assert violations(config(quantization="float8"), limits)["layers_adaptable"] == 0
    assert not why_none_trains([config(adapter="oft", lora_rank=7)], limits), "another rank may do"
    assert violations(config(adapter="oft", lora_rank=7), ROOMY)[name] == 0, "not known without a plan"
    assert violations(config(adapter="oft", world_size=2, strategy="tp"), ROOMY)["vectors_whole"] == 1


def test_a_prefix_is_for_language_models_that_keep_it_and_have_positions_for_it():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 97}

    nothing = "space.adapter: nothing in the space can be trained: "

    def limits(family, task, max_length=32, **positions):
        plan = blueprint({"model_type": family, **sizes, **positions}, task, 3)
        return replace(ROOMY, plan=plan, max_length=max_length, hidden_size=64)

    llama, prefix = limits("llama", "causal-lm", max_position_embeddings=48), config(adapter="prefix", lora_rank=16)
    assert is_feasible(violations(prefix, llama))
    assert is_feasible(violations(config(adapter="prefix", lora_rank=100), limits("llama", "causal-lm"))), "it is no rank"
    longer = replace(llama, max_length=33)
    assert violations(prefix, longer)["prefix_within_positions"] == 1
    assert reason("prefix_within_positions", prefix, longer) == "a prefix of 16 tokens and rows of 33 exceed the model's 48 positions"
    assert is_feasible(violations(config(adapter="lora", lora_rank=16), longer))
    for family in ("llama", "bert"):
        classifier = limits(family, "sequence-classification")
        assert why_none_trains([prefix], classifier) == f"{nothing}prefix is for causal-lm: PEFT cannot hand one to a classifier"
    gpt2, full = limits("gpt2", "causal-lm", n_positions=1024), config(adapter="prefix", lora_rank=16, recomputation="full")
    assert is_feasible(violations(prefix, gpt2))
    assert is_feasible(violations(full, llama))
    assert why_none_trains([full], gpt2) == f"{nothing}prefix: GPT-2 loses it with recomputation full"
    assert violations(config(adapter="prefix", world_size=2, strategy="tp"), llama)["vectors_whole"] == 1


def test_ranks_that_split_matrices_all_see_every_row():
    split = config(strategy="tp", world_size=4, global_batch_size=6, micro_batch_size=6)
    assert split.num_grad_accum_steps(128) == 1
    assert violations(split, ROOMY)["global_batch_divisible"] == 0
    assert (
        violations(config(strategy="ddp", world_size=4, global_batch_size=6, micro_batch_size=1), ROOMY)["global_batch_divisible"] > 0
    )


def test_what_is_predicted_to_need_more_memory_than_a_rank_may_take_is_infeasible_by_as_much():
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 97}
    plan = blueprint({"model_type": "llama", **sizes}, "causal-lm")
    limits = Limits(num_workers=1, hidden_size=64, plan=plan, max_length=32)
    made = config(adapter="none", micro_batch_size=8, global_batch_size=16)
    needed = rank_memory(plan, made, 32).peak_bytes
    for given_bytes, missing in ((None, 0), (needed, 0), (needed - 5, 5)):
        values = violations(made, replace(limits, memory_bytes=given_bytes))
        assert max(0, values["memory_within_device"]) == missing
    assert violations(made, replace(limits, plan=None, memory_bytes=1))["memory_within_device"] == 0
    assert "GiB a rank beyond what fits" in reason("memory_within_device", made, replace(limits, memory_bytes=1))


def test_what_is_left_to_the_host_is_held_against_what_the_host_has():
    """Of full fine-tuning in fp32 by ZeRO's counting (arXiv 1910.02054): weights, gradients and two moments, a share on each rank."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 97}
    plan = blueprint({"model_type": "llama", **sizes}, "causal-lm")
    limits = Limits(num_workers=8, hidden_size=64, plan=plan, max_length=32, is_on_gpu=True)
    for world_size in (2, 8):
        needed = 16 * plan.num_params // world_size
        left = config(adapter="none", strategy="fsdp", offload="cpu", world_size=world_size, global_batch_size=16)
        for given_bytes, missing in ((None, 0), (needed, 0), (needed - 5, 5)):
            known = limits if given_bytes is None else limits.on({"usable_bytes": 2**40, "host_bytes": given_bytes})
            assert max(0, violations(left, known)["memory_within_host"]) == missing
            assert violations(config(adapter="none", strategy="fsdp", world_size=2), known)["memory_within_host"] == 0
    assert why_not(left, limits.on({"usable_bytes": 2**40, "host_bytes": 0})) == ["leaves 0.00 GiB a rank too much to the host"]


def test_the_edges_are_feasible():
    assert is_feasible(violations(config(lora_rank=384, world_size=8), ROOMY))
    assert is_feasible(violations(config(lora_rank=9999), Limits(num_workers=1, hidden_size=None)))
    assert is_feasible(violations(config(adapter="none", lora_rank=9999), ROOMY))
    assert is_feasible(violations(config(quantization="nf4", world_size=2), ROOMY))
    assert is_feasible(violations(config(quantization="nf4", strategy="fsdp"), ROOMY)), "one rank spreads nothing"
    assert is_feasible(violations(config(adapter="none", quantization="nf4", world_size=2, strategy="fsdp"), ROOMY))


@given(batch=st.integers(1, 256), world=st.integers(1, 8), micro=st.integers(1, 64), length=st.integers(1, 999))
def test_a_feasible_layout_deals_every_row_exactly_once(batch, world, micro, length):
    made = config(global_batch_size=batch, world_size=world, micro_batch_size=micro)
    feasible = is_feasible(violations(made, ROOMY))
    assert feasible == (made.num_grad_accum_steps(length) * world * micro == batch)


@given(batch=st.integers(1, 256), world=st.integers(1, 8), budget=st.integers(1, 4096), length=st.integers(1, 999))
def test_by_a_budget_of_tokens_every_rank_has_rows_and_passes_are_as_few_as_fit(batch, world, budget, length):
    made = config(global_batch_size=batch, world_size=world)
    made = replace(made, layout=replace(made.layout, micro_batch_tokens=budget))
    values = violations(made, ROOMY)
    assert is_feasible(values) == (batch >= world)
    if batch < world:
        assert f"{world - batch} of {world} ranks without a row" in reason("global_batch_divisible", made, ROOMY)
    rows = math.ceil(batch / world)
    passes = next(n for n in itertools.count(1) if math.ceil(rows / n) * length <= budget or n == rows)
    assert made.num_grad_accum_steps(length) == passes
    assert math.ceil(rows / passes) * length <= made.most_tokens(length) <= max(budget, length)


def test_a_space_where_no_layout_trains_says_why():
    sharded, whole = config(quantization="nf4", world_size=2, strategy="fsdp"), config(quantization="nf4", world_size=2)
    assert why_none_trains([sharded, config(strategy="tp", world_size=2)], ROOMY) == (
        f"space.quantization: nothing in the space can be trained: {reason('quantized_base_whole', sharded, ROOMY)}"
    )
    uneven = config(global_batch_size=16, micro_batch_size=5)
    assert why_none_trains([uneven], ROOMY) == "", "between the ends of a range there may be others"
    assert why_none_trains([uneven], ROOMY, has_all_batches=True) == (
        "space.micro_batch_size: nothing in the space can be trained: "
        "a global batch of 16 rows is no whole number of micro batches of 5 rows on 1 rank"
    )
    assert why_none_trains([uneven, config()], ROOMY, has_all_batches=True) == ""
    assert why_none_trains([sharded, whole], ROOMY) == ""
    assert why_none_trains([whole, config(world_size=16)], replace(ROOMY, num_workers=1)) == "", "that is said elsewhere"


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 96, "vocab_size": 97}


@pytest.mark.parametrize("megabytes", [0.1, 2, 3, 4, 6, 10, 100])
@pytest.mark.parametrize(("world_size", "strategy"), [(1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "tp")])
def test_an_automatic_micro_batch_is_the_largest_budget_of_tokens_that_fits(megabytes: float, world_size: int, strategy: str) -> None:
    plan = blueprint({"model_type": "llama", **SIZES}, "causal-lm")
    limits = replace(ROOMY, plan=plan, max_length=100, memory_bytes=int(megabytes * 1e6))
    given = {"world_size": world_size, "strategy": strategy, "adapter": "none", "recomputation": "none"}
    params = {**SpaceSpec().first(), "global_batch_size": 24, **given}
    chosen, usual = config_within(params, limits), TrialConfig.from_params(params)
    every = [replace(usual, layout=replace(usual.layout, micro_batch_tokens=n)) for n in (4096, 2048, 1024, 512, 256, 128, 100)]
    fitting = [c for c in every if memory_within_device(c, limits) <= 0]
    assert chosen == (fitting[0] if fitting else every[-1]), "not below the longest row"
    assert chosen.recipe == usual.recipe
    given_size = {**params, "micro_batch_size": 6}
    assert config_within(given_size, limits).layout == replace(usual.layout, micro_batch_size=6, micro_batch_tokens=None)
    assert config_within(params, replace(limits, memory_bytes=None)) == usual
    on_gpu = config_within(params, replace(limits, memory_bytes=None, is_on_gpu=True))
    assert on_gpu == replace(usual, layout=replace(usual.layout, micro_batch_tokens=16_384)), "which wants more work at once"


@pytest.mark.parametrize("size", ["auto", 8])
def test_blocks_are_computed_again_where_memory_forces_it(size: object) -> None:
    """None, every other or all, the fewest that fit; half of the usual tokens at once is tried before."""
    plan = blueprint({"model_type": "llama", **SIZES, "num_hidden_layers": 4}, "causal-lm")
    params = {**SpaceSpec().first(), "adapter": "none", "global_batch_size": 512, "micro_batch_size": size}
    least = {"auto": [4096, 2048], 8: [None]}[size]  # type: ignore[index]
    usual = TrialConfig.from_params(params)
    ladder = [
        replace(usual, layout=replace(usual.layout, recomputation=recomputation, micro_batch_tokens=tokens))
        for recomputation in ("none", "half", "full")
        for tokens in least
    ]
    ladder += [
        replace(ladder[-1], layout=replace(ladder[-1].layout, micro_batch_tokens=n))
        for n in (1024, 512, 256, 128, 100)
        if size == "auto"
    ]
    limits = replace(ROOMY, plan=plan, max_length=100)
    seen = set()
    for megabytes in np.geomspace(0.5, 200, 60):
        limited = replace(limits, memory_bytes=int(megabytes * 1e6))
        fitting = [each for each in ladder if memory_within_device(each, limited) <= 0]
        chosen = config_within(params, limited)
        assert chosen == (fitting[0] if fitting else ladder[-1])
        seen.add((chosen.layout.recomputation, chosen.layout.micro_batch_tokens))
    assert {recomputation for recomputation, _ in seen} == {"none", "half", "full"}
    assert config_within(params, limits) == usual, "of unknown memory nothing is forced"
    gpt2 = replace(
        limits, plan=blueprint({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2, "vocab_size": 97}, "causal-lm")
    )
    prefix = {**params, "adapter": "prefix", "lora_rank": 4}
    assert config_within(prefix, replace(gpt2, memory_bytes=1)).layout.recomputation == "none", "which would lose the prefix"


def test_of_a_family_without_formulas_what_ran_out_of_memory_is_tried_smaller() -> None:
    """Each time that it runs out again: half of the tokens at once, then blocks computed again, then half of the tokens again."""
    limits = replace(ROOMY, plan=None, max_length=100)
    params = {**SpaceSpec().first(), "global_batch_size": 512}
    tried = [config_within(params, limits)]
    while len(tried) < 11:
        limits = replace(limits, too_large=limits.too_large | {tried[-1].of_step()})
        tried.append(config_within({**params, "learning_rate": 1e-5 * len(tried)}, limits))
    rungs = [(each.layout.recomputation, each.layout.micro_batch_tokens) for each in tried]
    assert rungs[:3] == [("none", 4096), ("none", 2048), ("half", 2048)]
    assert rungs[3:10] == [("full", tokens) for tokens in (4096, 2048, 1024, 512, 256, 128, 100)]
    assert rungs[10] == rungs[9], "and no further"
    assert violations(tried[10], limits)["memory_within_device"] > 0
    assert "ran out of memory" in reason("memory_within_device", tried[10], limits)
    sizes = [(recomputation, rows) for recomputation in ("none", "half", "full") for rows in (4, 8)]
    given = {(r, n): config(micro_batch_size=n, recomputation=r, global_batch_size=512) for r, n in sizes}
    ran_out = replace(limits, too_large=frozenset([given["half", 8].of_step()]))
    assert {key for key, each in given.items() if memory_within_device(each, ran_out) > 0} == {("none", 8), ("half", 8)}
    other = config_within({**params, "adapter": "none"}, limits)
    assert (other.layout.recomputation, other.layout.micro_batch_tokens) == ("none", 4096), "of which nothing is known"
    assert config_within(params, replace(limits, too_large=frozenset())).layout.micro_batch_tokens == 4096


def test_by_a_budget_of_tokens_short_rows_that_count_much_are_held_against_the_device() -> None:
    plan = blueprint({"model_type": "bert", **SIZES}, "sequence-classification", 3)
    limits = replace(ROOMY, plan=plan, max_length=100, max_targets=1)
    made = config(adapter="none", global_batch_size=512)
    assert made.most_tokens(100) == 4096
    for per_token, num_targets in ((0.01, 41), (0.1, 410), (0.5, 512), (None, 512)):
        predicted = predicted_memory(made, replace(limits, targets_per_token=per_token))
        assert predicted == rank_memory(plan, made, 100, num_targets, num_tokens=4096, num_micro_batches=2)
