"""The points that are tried first, in spaces of all kinds."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest

from spaces.blueprint import blueprint
from spaces.config import TrialConfig
from spaces.constraints import Limits, is_feasible, violations
from spaces.presets import longer_points, nearest, starting_points, usual_rate
from spaces.space import SpaceSpec


def knob(rng: random.Random, low: float, high: float, *, whole: bool = False) -> Any:
    """Draw a domain of any form between two positive numbers."""
    values = sorted({low * (high / low) ** rng.random() for _ in range(rng.randint(2, 5))})
    if whole:
        values = sorted({max(1, round(v)) for v in values})
    forms: list[Any] = [values[0], {"choice": rng.sample(values, len(values))}]
    if len(values) > 1:
        ends = [values[0], values[-1]]
        forms += [{"int": ends}] if whole else [{"uniform": ends}, {"log_uniform": ends}]
    return rng.choice(forms)


def some_space(rng: random.Random) -> SpaceSpec:
    lora = knob(rng, 1e-5, 1e-1)
    adapter = rng.choice(["none", "lora", {"choice": ["none", "lora"]}, {"choice": ["lora", "none"]}])
    bases: list[Any] = ["none", {"choice": ["int8", "none"]}, *([] if adapter == "none" else ["nf4", {"choice": ["nf4", "int8"]}])]
    return SpaceSpec.model_validate(
        {
            "adapter": adapter,
            "learning_rate": rng.choice([lora, {"by_adapter": {"none": knob(rng, 1e-6, 1e-2), "lora": lora}}]),
            "global_batch_size": knob(rng, 1, 200, whole=True),
            "dataset_fraction": knob(rng, 0.01, 1.0),
            "epochs": knob(rng, 1, 10, whole=rng.random() < 0.5),
            "lora_rank": knob(rng, 1, 200, whole=True),
            "lora_alpha": knob(rng, 1, 100),
            "lora_target_modules": rng.choice(["all-linear", {"choice": ["query,value", "all-linear"]}, "query,value"]),
            "quantization": rng.choice(bases),
            "strategy": rng.choice(["ddp", "fsdp", {"choice": ["tp", "ddp"]}, {"choice": ["tp", "fsdp"]}, "profile"]),
            "world_size": rng.choice([1, 3, {"choice": [1, 2, 4]}, {"int": [2, 5]}, {"profile": [1, 2]}]),
        }
    )


def test_points_lie_in_the_space_and_are_few_and_distinct_and_the_same_every_time() -> None:
    for seed in range(300):
        space = some_space(random.Random(seed))
        points = starting_points(space, width=768, limits=Limits(num_workers=4, hidden_size=768))
        assert points == starting_points(space, width=768, limits=Limits(num_workers=4, hidden_size=768))
        assert 1 <= len(points) <= 7
        for point in points:
            assert space.problem_with_point(point) is None, (point, space)
            assert points.count(point) == 1


def test_without_limits_the_usual_rate_of_lora_is_ten_times_that_of_full_fine_tuning_and_falls_with_the_width() -> None:
    space = SpaceSpec.model_validate({"adapter": {"choice": ["none", "lora"]}, "learning_rate": {"log_uniform": [1e-7, 1.0]}})
    for width in (256, 1024, 4096):
        points = starting_points(space, width=width, limits=Limits(num_workers=1, hidden_size=768))
        assert all(usual_rate(p["adapter"], width) < p["learning_rate"] < 3 * usual_rate(p["adapter"], width) for p in points)
        assert usual_rate("lora", width) == pytest.approx(10 * usual_rate("none", width))
        assert usual_rate("none", width) > usual_rate("none", 2 * width)
    # What the authors' own function gives: 5e-5 at a width of 2000, and about 2.8e-4 for LoRA on Llama-3.1-8B, which is 4096 wide.
    assert usual_rate("none", 2000) == pytest.approx(5e-5)
    assert usual_rate("lora", 4096) == pytest.approx(2.8e-4, rel=0.03)


@pytest.mark.parametrize(
    ("epochs", "fraction", "passes"),
    [
        ({"int": [1, 4]}, {"uniform": [0.1, 1.0]}, []),
        ({"int": [1, 5]}, {"uniform": [0.1, 1.0]}, [4.8]),
        ({"int": [1, 5]}, 1.0, [5.0]),
        ({"int": [1, 20]}, {"uniform": [0.1, 1.0]}, [4.8, 9.6, 19.2]),
        ({"int": [1, 20]}, {"uniform": [0.1, 0.5]}, [4.8, 9.6]),
        ({"choice": [1, 10]}, 1.0, []),  # the longest of the first is one already
    ],
)
def test_where_more_passes_are_allowed_there_are_longer_trainings_each_twice_as_long(
    epochs: Any, fraction: Any, passes: list[float]
) -> None:
    space = SpaceSpec.model_validate({"epochs": epochs, "dataset_fraction": fraction, "adapter": {"choice": ["none", "lora"]}})
    points = longer_points(space, width=768, limits=Limits(num_workers=2, hidden_size=768))
    found = [point["epochs"] * point["dataset_fraction"] for point in points]
    assert found == [pytest.approx(p, rel=0.01) for p in passes]
    assert {point["adapter"] for point in points} <= {"none"}
    assert all(space.problem_with_point(point) is None for point in points)


@pytest.mark.parametrize(
    ("ranks", "size"), [({"choice": [4, 8, 16]}, 4), ({"int": [3, 32]}, 4), ({"choice": [2, 4]}, 4), ({"choice": [8, 16]}, 16)]
)
def test_the_usual_blocks_of_oft_are_the_nearest_that_divide_the_widths(ranks: Any, size: int) -> None:
    """Where none does, the nearest; proposals find that out."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 172, "vocab_size": 97}
    limits = Limits(num_workers=1, hidden_size=64, plan=blueprint({"model_type": "llama", **sizes}, "causal-lm"))
    space = SpaceSpec.model_validate({"adapter": {"choice": ["lora", "oft"]}, "lora_rank": ranks})
    points = starting_points(space, width=64, limits=limits)
    assert {p["lora_rank"] for p in points if p["adapter"] == "oft"} == {size}
    assert {p["lora_rank"] for p in points if p["adapter"] == "lora"} == {nearest(space.lora_rank, 16)}


def test_what_lies_outside_becomes_the_nearest_inside() -> None:
    space = SpaceSpec.model_validate(
        {"learning_rate": {"log_uniform": [0.1, 1.0]}, "global_batch_size": {"choice": [128, 64]}, "lora_rank": {"int": [1, 4]}}
    )
    for point in starting_points(space, width=768, limits=Limits(num_workers=1, hidden_size=768)):
        assert (point["learning_rate"], point["global_batch_size"], point["lora_rank"]) == (0.1, 64, 4)


@pytest.mark.parametrize(
    ("epochs", "fraction", "expected"),
    [
        (
            {"int": [1, 4]},
            {"log_uniform": [0.1, 1.0]},
            [(0.1, 1), (0.25, 1), (0.5, 1), (0.3333, 3), (0.6, 4)],
        ),
        ({"choice": [2, 8]}, 0.5, [(0.5, 2)]),
        # However the epochs are limited, as many passes over all rows are made.
        (1, {"uniform": [0.2, 1.0]}, [(0.2, 1), (0.25, 1), (0.5, 1), (1.0, 1)]),
        ({"int": [1, 2]}, {"choice": [0.25, 1.0]}, [(0.25, 1), (0.25, 2), (1.0, 2)]),
    ],
)
def test_the_first_trainings_are_of_several_lengths(epochs: Any, fraction: Any, expected: list[tuple[float, float]]) -> None:
    knobs = {"epochs": epochs, "dataset_fraction": fraction, "global_batch_size": {"choice": [8, 32, 16]}}
    space = SpaceSpec.model_validate({**knobs, "learning_rate": {"log_uniform": [1e-5, 1.0]}})
    points = starting_points(space, width=768, limits=Limits(num_workers=1, hidden_size=768))
    assert list(dict.fromkeys((p["dataset_fraction"], p["epochs"]) for p in points)) == expected
    assert {p["global_batch_size"] for p in points[:5]} <= {16, 32}


def test_no_knob_of_the_first_trainings_follows_from_the_others() -> None:
    """Or a model of them could not say which of two knobs does something: on a line through the points every knob would do."""
    space = SpaceSpec.model_validate({"adapter": "none", "epochs": {"int": [1, 4]}, "global_batch_size": {"choice": [8, 16, 32]}})
    points = starting_points(space, width=768, limits=Limits(num_workers=1, hidden_size=768))
    table = np.log([[p["dataset_fraction"] * p["epochs"], p["learning_rate"], p["global_batch_size"]] for p in points])
    assert np.linalg.svd(table - table.mean(axis=0), compute_uv=False).min() > 0.05


def test_full_fine_tuning_has_all_lengths_and_every_adapter_a_short_training() -> None:
    space = SpaceSpec.model_validate({"adapter": {"choice": ["rslora", "lora", "none", "dora"]}, "epochs": {"int": [1, 4]}})
    points = starting_points(space, width=768, limits=Limits(num_workers=1, hidden_size=768))
    assert [p["adapter"] for p in points] == ["none"] * 5 + ["dora", "lora", "rslora"]
    assert [p["epochs"] for p in points] == [1, 1, 1, 3, 4, 1, 1, 1]


@pytest.mark.parametrize(
    ("num_workers", "world_size", "expected"), [(1, 1, [1, 1, 1, 3, 4]), (2, 1, [4, 1, 1, 1, 3]), (3, 2, [1, 1, 1, 3, 4])]
)
def test_the_longest_comes_first_where_others_train_beside_it_and_else_last(
    num_workers: int, world_size: int, expected: list[int]
) -> None:
    space = SpaceSpec.model_validate({"adapter": "none", "epochs": {"int": [1, 4]}, "world_size": world_size})
    points = starting_points(space, width=768, limits=Limits(num_workers=num_workers, hidden_size=768))
    assert [p["epochs"] for p in points] == expected


def test_where_full_fine_tuning_does_not_fit_an_adapter_has_all_lengths() -> None:
    space = SpaceSpec.model_validate({"adapter": {"choice": ["none", "lora"]}, "epochs": {"int": [1, 4]}, "precision": "bf16"})
    plan = blueprint(LLAMA, "causal-lm")
    # 8.03e9 weights in bf16 are 15 GiB, in full with gradients and moments in fp32 120.
    limits = Limits(num_workers=1, hidden_size=4096, plan=plan, max_length=128, max_targets=128, memory_bytes=40 * 2**30)
    points = starting_points(space, width=4096, limits=limits)
    assert [p["adapter"] for p in points] == ["lora"] * 5 + ["none"]


@pytest.mark.parametrize(("micro_batch", "batch"), [(32, 32), (4, 16), ({"choice": [16, 8]}, 16), ({"choice": ["auto", 16]}, 16)])
def test_points_keep_to_the_micro_batch(micro_batch: Any, batch: int) -> None:
    space = SpaceSpec.model_validate(
        {"micro_batch_size": micro_batch, "global_batch_size": {"choice": [8, 16, 32, 64]}, "world_size": {"choice": [1, 2, 4]}}
    )
    limits = Limits(num_workers=4, hidden_size=768)
    point, *_ = starting_points(space, width=768, limits=limits)
    assert (point["global_batch_size"], point["world_size"]) == (batch, 1)
    assert is_feasible(violations(TrialConfig.from_params(space.first(**point)), limits))


def test_a_space_of_one_point_has_one() -> None:
    space = SpaceSpec.model_validate(
        {"learning_rate": 1e-3, "global_batch_size": 8, "dataset_fraction": 0.5, "epochs": 2, "lora_rank": 4}
    )
    assert len(starting_points(space, width=768, limits=Limits(num_workers=4, hidden_size=768))) == 1


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("knobs", "memory_bytes", "expected"),
    [
        ({"quantization": {"choice": ["nf4", "none"]}, "strategy": {"choice": ["fsdp", "ddp"]}}, None, (2, "ddp")),
        ({"quantization": {"choice": ["nf4", "none"]}, "strategy": "fsdp"}, None, (2, "fsdp")),
        ({"strategy": {"choice": ["tp", "ddp"]}}, None, (2, "ddp")),
        # Three ranks do not divide 32 heads.
        ({"strategy": {"choice": ["tp", "fsdp"]}, "global_batch_size": 24, "world_size": {"choice": [3, 6]}}, None, (3, "fsdp")),
        # 8.03e9 weights, their gradients and AdamW's two moments in fp32 are 120 GiB: 30 on each of 4 ranks, 60 on each of two.
        ({"adapter": "none", "strategy": "profile"}, 50 * 2**30, (4, "fsdp")),
        ({"adapter": "none", "strategy": "profile"}, 600 * 2**30, (2, "ddp")),
        # Nothing is: then it is the first, and the search says so.
        ({"adapter": "none", "strategy": "profile"}, 2**30, (2, "ddp")),
    ],
)
def test_a_usual_training_has_the_smallest_layout_that_is_feasible_whatever_the_sampler_makes_of_the_rest(
    knobs: dict[str, Any], memory_bytes: int | None, expected: tuple[int, str]
) -> None:
    space = SpaceSpec.model_validate({"world_size": {"choice": [8, 2, 4]}, **knobs})
    limits = Limits(
        num_workers=8,
        hidden_size=4096,
        plan=blueprint(LLAMA, "causal-lm"),
        max_length=128,
        max_targets=128,
        memory_bytes=memory_bytes,
    )
    point, *_ = starting_points(space, width=4096, limits=limits)
    assert (point["world_size"], point["strategy"]) == expected
    for left in itertools.product(space.quantization.ends(), space.strategy.ends()):
        params = space.first(**{"quantization": left[0], "strategy": left[1], **point})
        known = violations(TrialConfig.from_params(params), limits)
        assert is_feasible(known) or memory_bytes == 2**30, (params, known)
