"""`paretune plan --device`: public shapes and published rows, on data sheets, without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import make_spec
from typer.testing import CliRunner

from search.cli import app
from search.plan import layout_rows, make_plan
from spaces.blueprint import Blueprint, blueprint
from spaces.config import Layout, Offload, Recipe, TrialConfig
from spaces.constraints import Limits
from spaces.estimate import ASSUMED_UTILISATION, GpuCluster, estimate_step, exchanges
from spaces.hardware import device_named
from spaces.loading import SpecError, load_spec
from spaces.memory import host_bytes, rank_memory
from spaces.space import SpaceSpec

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8}
_QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152064}
# What `config.json` of the public models holds, and the parameters that their pages name.
PUBLIC: dict[str, tuple[dict[str, Any], float]] = {
    "Llama-3 8B": (
        {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        8.03e9,
    ),
    "Llama-3 70B": (
        {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
        70.6e9,
    ),
    "Qwen2.5 7B": (
        {
            **_QWEN,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        7.61e9,
    ),
    "Qwen2.5 32B": (
        {
            **_QWEN,
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
        32.5e9,
    ),
}
H100 = device_named("h100-sxm")
LENGTH = 4096


def shape(name: str) -> Blueprint:
    return blueprint({**PUBLIC[name][0], "tie_word_embeddings": False}, "causal-lm")


def config(
    adapter: str,
    world_size: int,
    strategy: str = "ddp",
    recomputation: str = "none",
    quantization: str = "none",
    micro_batch_size: int = 1,
    shard_size: int | None = None,
    tp_size: int | None = None,
    offload: Offload = "none",
) -> TrialConfig:
    lora: dict[str, Any] = {"adapter_rank": 16, "adapter_alpha": 32.0, "adapter_target_modules": ("all-linear",)}
    recipe = Recipe(
        learning_rate=1e-4,
        global_batch_size=16,
        dataset_fraction=1.0,
        epochs=1.0,
        warmup_fraction=0.0,
        weight_decay=0.0,
        precision="bf16",
        seed=0,
        adapter=adapter,  # type: ignore[arg-type]
        quantization=quantization,  # type: ignore[arg-type]
        **(lora if adapter == "lora" else {}),
    )
    layout = Layout(
        world_size=world_size,
        strategy=strategy,  # type: ignore[arg-type]
        micro_batch_size=micro_batch_size,
        recomputation=recomputation,  # type: ignore[arg-type]
        shard_size=shard_size,
        tp_size=tp_size,
        offload=offload,
    )
    return TrialConfig(recipe=recipe, layout=layout)


def cluster(num_gpus: int, num_nodes: int = 1) -> GpuCluster:
    return GpuCluster(device=H100, num_nodes=num_nodes, gpus_per_node=num_gpus)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_shapes_have_the_parameters_that_their_pages_name(name: str) -> None:
    assert shape(name).num_params == pytest.approx(PUBLIC[name][1], rel=0.01)


@pytest.mark.parametrize(
    ("name", "trial", "length", "published"),
    [
        # Tokens/s per GPU; https://github.com/NVIDIA-NeMo/Automodel/blob/main/docs/performance-summary.mdx
        ("Llama-3 8B", config("lora", 1), 4096, 12_473),
        ("Qwen2.5 7B", config("lora", 1), 4096, 14_110),
        # https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md, table 1: eager and compiled.
        # Its selective recomputation is between our two; without any, the layout would not fit.
        ("Llama-3 8B", config("none", 8, "fsdp", "full", micro_batch_size=2), 8192, 5_762),
        ("Llama-3 8B", config("none", 8, "fsdp", "full", micro_batch_size=2), 8192, 6_667),
    ],
)
def test_published_rows_are_predicted_within_a_fifth_with_a_layout_that_fits(
    name: str, trial: TrialConfig, length: int, published: float
) -> None:
    num_gpus = trial.layout.world_size
    assert rank_memory(shape(name), trial, length, is_on_gpu=True).peak_bytes <= cluster(num_gpus).usable_bytes
    step = estimate_step(shape(name), trial, cluster(num_gpus), length)
    assert step.tokens_per_second / num_gpus == pytest.approx(published, rel=0.2)


@pytest.mark.parametrize(
    ("name", "trial", "fits"),
    [
        ("Llama-3 8B", config("none", 1), False),  # 16 bytes a parameter are 128 GB
        ("Llama-3 70B", config("lora", 1, recomputation="full"), False),  # 141 GB of frozen weights
        ("Llama-3 70B", config("lora", 1, "ddp", "full", "int8"), False),  # 68 GB of them in int8, and 5 GB of tables and head
        ("Llama-3 70B", config("lora", 1, "ddp", "full", "nf4"), True),  # 43 GB
        ("Llama-3 70B", config("lora", 8, "fsdp", "full"), True),  # 18 GB of them on each
        ("Llama-3 70B", config("none", 8, "fsdp", "full"), False),  # 12 bytes a parameter on eight are 106 GB
        ("Qwen2.5 32B", config("none", 8, "fsdp", "full"), False),  # 16 bytes a parameter are 66 GB, and what is gathered and reduced
        ("Qwen2.5 32B", config("none", 16, "fsdp", "full"), True),
    ],
)
def test_what_fits_is_told_from_what_does_not(name: str, trial: TrialConfig, fits: bool) -> None:
    assert (rank_memory(shape(name), trial, LENGTH, is_on_gpu=True).peak_bytes <= cluster(8).usable_bytes) == fits


def test_ranks_on_gpus_hold_no_copy_that_gloo_makes(spec: Path) -> None:
    """In full with recomputation on eight the peak is the reduction of what no block holds."""
    planned = planned_with(spec, adapter="none", world_size="8", strategy="fsdp", recomputation="full")
    assert (
        planned["layouts"][0]["peak_memory_bytes"]
        == rank_memory(shape("Llama-3 8B"), config("none", 8, "fsdp", "full"), LENGTH, is_on_gpu=True).peak_bytes
    )
    sets = [
        "--set",
        "space.adapter=none",
        "--set",
        "space.world_size=8",
        "--set",
        "space.strategy=fsdp",
        "--set",
        "space.recomputation=full",
    ]
    on = [
        json.loads(plan(str(spec), "--json", *sets, "--set", f"resources.gpus_per_worker={n}").stdout)["layouts"][0] for n in (0, 1)
    ]
    assert on[1]["peak_memory_bytes"] == planned["layouts"][0]["peak_memory_bytes"] < on[0]["peak_memory_bytes"]


def test_compute_reaches_what_is_assumed_and_a_slow_network_shows() -> None:
    alone = estimate_step(shape("Llama-3 8B"), config("lora", 1), cluster(1), LENGTH)
    assert alone.communication_seconds == 0
    # The scores that fused attention computes again are not in MFU.
    assert alone.mfu == pytest.approx(ASSUMED_UTILISATION["cuda"], rel=0.03)
    assert alone.mfu < ASSUMED_UTILISATION["cuda"]
    full = config("none", 16)
    inside = estimate_step(shape("Llama-3 8B"), full, cluster(16), LENGTH)
    across = estimate_step(shape("Llama-3 8B"), full, cluster(8, num_nodes=2), LENGTH)
    # The ring: every rank sends 2 x 15/16 of 4 bytes a parameter, over 370 of NVLink's 450 GB/s within a node and 47 GB/s across.
    sent = 2 * 15 / 16 * 4 * shape("Llama-3 8B").num_params
    overlap = inside.compute_seconds * 2 / 3
    assert across.communication_seconds == pytest.approx(sent / 47e9 - overlap)
    assert inside.communication_seconds == pytest.approx(max(0.0, sent / 370e9 - overlap))


@pytest.mark.parametrize("adapter", ["dora", "vera", "ia3", "bottleneck", "prefix"])
def test_every_adapter_has_a_plan_for_this_machine(spec: Path, adapter: str) -> None:
    """Whose memory is told and held against nothing."""
    planned = json.loads(plan(str(spec), "--json", "--set", f"space.adapter={adapter}").stdout)
    assert all(layout["peak_memory_bytes"] > 0 for layout in planned["layouts"])


def test_copies_in_every_node_send_their_own_shard_of_the_gradients_alone_to_another() -> None:
    model, machine = shape("Llama-3 8B"), cluster(8, num_nodes=4)
    inside, between = exchanges(model, config("none", 32, "fsdp", shard_size=8), 16 * LENGTH)
    (alone,) = exchanges(model, config("none", 8, "fsdp"), 16 * LENGTH)
    assert (inside.num_ranks, inside.span) == (alone.num_ranks, alone.span) == (8, 8)
    # 16 rows: two passes of one row on eight ranks, one on 32.
    assert inside.num_bytes == alone.num_bytes / 2
    # The ring of four copies: every rank sends 2 x 3/4 of 4 bytes a parameter of its eighth.
    assert between.seconds(machine) == pytest.approx(2 * 3 / 4 * 4 * model.num_params / 8 / 47e9)
    whole, hybrid = (estimate_step(model, config("none", 32, "fsdp", shard_size=n), machine, LENGTH) for n in (None, 8))
    assert hybrid.communication_seconds < 0.5 * whole.communication_seconds


def test_groups_that_split_matrices_sum_what_their_own_rows_make_and_exchange_pieces() -> None:
    model, machine = shape("Llama-3 8B"), cluster(8, num_nodes=4)
    sums, pieces = exchanges(model, config("none", 32, "tp", tp_size=8), 16 * LENGTH)
    (alone,) = exchanges(model, config("none", 8, "tp"), 16 * LENGTH)
    (sharded,) = exchanges(model, config("none", 4, "fsdp"), 16 * LENGTH)
    assert (sums.num_ranks, sums.span, sums.is_beside) == (alone.num_ranks, alone.span, alone.is_beside) == (8, 8, False)
    # A quarter of the rows; four ranks, in as many nodes, share each piece. Under FSDP2 the residual stream,
    # whose gradient is summed, is in bf16 as what is summed forward is; under autocast it is in fp32.
    assert sums.num_bytes == alone.num_bytes / 4 * (2 + 2) / (2 + 4)
    assert (pieces.num_ranks, pieces.span) == (4, 32)
    matrices = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    blocks, rest = matrices / 8 + 64 * 4096, 2 * 128256 * 4096 + 4096
    # Blocks are gathered twice in bf16 and their gradients reduced in fp32, in each of four micro batches; the rest is gathered once.
    assert pieces.num_bytes == 4 * (blocks * (2 * 2 + 4) + rest * (2 + 4))
    assert pieces.num_bytes < sharded.num_bytes / 4 * 1.5
    spread = estimate_step(model, config("none", 32, "tp", tp_size=8), machine, LENGTH)
    whole = estimate_step(model, config("none", 32, "tp"), machine, LENGTH)
    assert spread.communication_seconds < whole.communication_seconds


def test_what_is_left_to_the_host_comes_and_goes_and_is_updated_there() -> None:
    model = shape("Llama-3 8B")
    num_blocks = model.num_params - 2 * 128256 * 4096 - 4096
    alone, spread = (config("none", n, "fsdp", offload="cpu") for n in (1, 8))
    # 16 micro batches, in fp32: blocks come twice, all else once; a rank alone computes nothing meanwhile. Gradients leave beside.
    step = estimate_step(model, alone, cluster(1), LENGTH)
    fetched, returned = 16 * 4 * (model.num_params + num_blocks), 16 * 4 * model.num_params
    assert step.communication_seconds == pytest.approx(fetched / 32e9 + max(0, returned / 32e9 - step.compute_seconds))
    assert step.update_seconds == pytest.approx(28 * model.num_params / 76.8e9)
    # Eight ranks move an eighth of it in two micro batches, beside what they exchange, and that is all hidden.
    eight = estimate_step(model, spread, cluster(8), LENGTH)
    moving = 2 * 4 * (2 * model.num_params + num_blocks) / 8 / 32e9
    exchanged = sum(each.seconds(cluster(8)) for each in exchanges(model, spread, 16 * LENGTH))
    assert eight.communication_seconds == pytest.approx(max(0, moving + exchanged - eight.compute_seconds))
    assert eight.update_seconds == pytest.approx(step.update_seconds / 8)
    # A frozen base comes as it is held, in bf16.
    lora = estimate_step(model, config("lora", 1, "fsdp", offload="cpu"), cluster(1), LENGTH)
    assert lora.communication_seconds == pytest.approx(16 * 2 * (model.num_params + num_blocks) / 32e9, rel=0.02)


def test_a_device_that_leaves_its_weights_to_the_host_holds_no_share_of_them() -> None:
    """What it holds beside is measured in `tests/trainables/test_memory.py`."""
    model = shape("Llama-3 8B")
    for num_ranks in (1, 8):
        left = config("none", num_ranks, "fsdp", "full", offload="cpu")
        assert host_bytes(model, left) == pytest.approx(16 * model.num_params / num_ranks, abs=16)
        memory = rank_memory(model, left, LENGTH, is_on_gpu=True)
        assert (memory.weights_bytes, memory.optimizer_bytes) == (0, 0)
        assert memory.peak_bytes < 12 * 2**30
    kept = config("none", 8, "fsdp", "full")
    assert host_bytes(model, kept) == 0
    # An eighth of weights, moments and, in the second of two micro batches, gradients.
    difference = rank_memory(model, kept, LENGTH, is_on_gpu=True).peak_bytes - memory.peak_bytes
    assert difference == pytest.approx(16 * model.num_params / 8, rel=0.1)


@pytest.mark.parametrize(("recomputation", "passes"), [("none", 2), ("full", 3)])
def test_a_quantised_base_computes_as_much_and_takes_the_time_of_its_spreading_out_more(recomputation: str, passes: int) -> None:
    plan = shape("Llama-3 8B")
    plain, packed = (
        estimate_step(plan, config("lora", 1, recomputation=recomputation, quantization=q), cluster(1), LENGTH)
        for q in ("none", "nf4")
    )
    # 7.0e9 of the 8.0e9 weights are in the blocks' matrices: 4.5 bits of each are read and 16 written, in 16 micro batches.
    num_weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    spread = 16 * passes * num_weights * (4.5 + 16) / 8 / (H100.gigabytes_per_second * 1e9)
    # Where blocks are computed again, LoRA's last product around a plain layer is too.
    assert packed.seconds - plain.seconds == pytest.approx(spread, rel=1e-6 if recomputation == "none" else 5e-3)
    assert packed.mfu / plain.mfu == pytest.approx(plain.seconds / packed.seconds, rel=1e-6)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({**PUBLIC["Llama-3 8B"][0], "tie_word_embeddings": False}))
    (tmp_path / "train.jsonl").write_text("".join('{"prompt": "a", "completion": "b"}\n' for _ in range(1000)))
    content = {
        "model": {"name": str(tmp_path / "model"), "task": "causal-lm", "max_length": LENGTH},
        "data": {"train": str(tmp_path / "train.jsonl"), "evaluation": str(tmp_path / "train.jsonl")},
        "space": {
            "precision": "bf16",
            "global_batch_size": 16,
            "dataset_fraction": 0.5,
            "world_size": {"choice": [1, 8]},
            "strategy": {"choice": ["ddp", "fsdp"]},
            "micro_batch_size": 1,
        },
        "budget": {"trials": 10},
    }
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def plan(*args: str) -> Any:
    return CliRunner().invoke(app, ["plan", *args])


def test_a_plan_says_which_sizes_a_layout_has_and_which_prefixes_have_no_positions(spec: Path) -> None:
    model = spec.parent / "model/config.json"
    model.write_text(json.dumps({**json.loads(model.read_text()), "max_position_embeddings": 8192}))
    rows = planned_with(spec, world_size="8", strategy="{choice: [tp, fsdp]}", tp_size="2", adapter="{choice: [lora, prefix]}")[
        "layouts"
    ]
    sizes = {row["strategy"]: (row["shard_size"], row["tp_size"]) for row in rows}
    assert sizes == {"tp": ("-", 2), "fsdp": ("all", "-")}
    assert not any("prefix_within_positions" in row["violated"] for row in rows), "rows of 4,096 tokens"
    sets = ("model.max_length=8190", "space.adapter=prefix", "space.lora_rank=16")
    result = plan(str(spec), "--json", *(part for each in sets for part in ("--set", each)))
    assert result.exit_code == 3, "none can run"
    assert all("prefix_within_positions" in row["violated"] for row in json.loads(result.stdout)["layouts"])


# Every recipe costs the same here, on one GPU and with full fine-tuning too little memory.
PROFILED = {
    "adapter": "none",
    "world_size": "{profile: [1, 4, 8]}",
    "strategy": "{profile: [ddp, fsdp]}",
    "recomputation": "full",
}


def planned_with(spec: Path, *options: str, gpus: int = 8, **space: str) -> dict[str, Any]:
    sets = [part for knob, value in space.items() for part in ("--set", f"space.{knob}={value}")]
    result = plan(str(spec), "--device", "h100-sxm", "--gpus-per-node", str(gpus), "--json", *sets, *options)
    assert result.exit_code == 0, result.stderr
    loaded: dict[str, Any] = json.loads(result.stdout)
    return loaded


def test_a_profiled_search_trains_where_it_fits_and_times_the_other_layouts_once(spec: Path) -> None:
    planned = planned_with(spec, **PROFILED)
    fitting = [row for row in planned["layouts"] if row["feasible"] and row["fits"]]
    assert [(row["world_size"], row["strategy"]) for row in fitting] == [(4, "fsdp"), (8, "fsdp")]
    four, eight = (row["step"]["seconds"] * row["world_size"] / 3600 for row in fitting)
    num_steps = 1000 * 0.5 / 16
    assert planned["forecast"]["search"]["device_hours"] == pytest.approx(10 * num_steps * four + 30 * eight)
    # Of another batch the steps cost something else and are timed too, but not by the one trial that has the first.
    batches = {**PROFILED, "global_batch_size": "{choice: [16, 32]}"}
    one = planned_with(spec, "--set", "budget.trials=1", **batches)
    cost = [r["step"]["seconds"] * 8 / 3600 for r in one["layouts"] if r["world_size"] == 8 and r["strategy"] == "fsdp"]
    trained = num_steps * four
    assert any(one["forecast"]["search"]["device_hours"] == pytest.approx(trained + 30 * each, rel=0.02) for each in cost)
    many = planned_with(spec, **batches)["forecast"]["search"]["device_hours"]
    assert many == pytest.approx(10 * trained + 30 * sum(cost), rel=0.02)


def test_neither_the_first_layout_nor_one_that_does_not_fit_is_trained_but_the_smallest_that_does(spec: Path) -> None:
    one = planned_with(spec, **{**PROFILED, "world_size": "{profile: [8, 1, 4]}", "strategy": "tp"})
    assert [(row["world_size"], row["fits"]) for row in one["layouts"]] == [(1, False), (4, True), (8, True)]
    four, eight = (row["step"]["seconds"] * row["world_size"] / 3600 for row in one["layouts"][1:])
    assert eight > 1.1 * four
    assert one["forecast"]["search"]["device_hours"] == pytest.approx(10 * 1000 * 0.5 / 16 * four + 30 * eight)
    assert one["forecast"]["no_search"] == ""


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (("budget={patience: 5}",), "nothing tells beforehand when its budget is used up"),
        # Both ends of the range can be dealt to eight ranks of 125 rows, and one in a thousand between them.
        (
            (
                "space.global_batch_size={int: [1000, 1000000]}",
                "space.micro_batch_size=125",
                "space.world_size=8",
                "model.max_length=16",
            ),
            "none of 400 proposals drawn evenly from the space can run there",
        ),
    ],
)
def test_a_search_without_hours_says_why(spec: Path, sets: tuple[str, ...], why: str) -> None:
    options = [part for each in sets for part in ("--set", each)]
    found = plan(str(spec), "--device", "h100-sxm", "--gpus-per-node", "8", *options).output.splitlines()
    assert [line for line in found if "the whole search: " in line] == [f"no hours of the whole search: {why}"]
    assert any(line.startswith("one run of the fastest layout") for line in found)


def test_a_searched_precision_is_said_of_the_one_run(spec: Path) -> None:
    planned = planned_with(spec, precision="{choice: [fp32, bf16]}")
    assert planned["forecast"]["run"]["precision"] == "bf16", "whose peak is the highest"
    text = plan(str(spec), "--device", "h100-sxm", "--set", "space.precision={choice: [fp32, bf16]}").output
    assert ", precision bf16, " in next(line for line in text.splitlines() if line.startswith("one run of the fastest layout"))


def test_a_price_is_that_of_the_file_and_serves_a_budget_in_dollars(spec: Path) -> None:
    found = planned_with(spec, "--price", "2.5", "--set", "budget={dollars: 3}", "--set", "resources.price_per_device_hour=9")
    assert found["forecast"]["search"]["dollars"] == pytest.approx(3)
    assert found["forecast"]["search"]["device_hours"] == pytest.approx(3 / 2.5)
    assert "price_per_device_hour: 2.5" in found["spec"]


ONE = ("--set", "budget={minutes: 1, trials: 1}")


def test_small_amounts_have_no_exponent_and_one_is_no_plural(spec: Path) -> None:
    text = plan(str(spec), "--device", "h100-sxm", "--rows", "1", *ONE).output
    assert "\n1 trial or 1 minute on 1 x 1 h100-sxm, which holds 1 worker at once\n" in text
    lines = [line for line in text.splitlines() if line.startswith(("one run of", "the whole search"))]
    assert len(lines) == 2
    assert not any("e-0" in line for line in lines)
    (seconds,) = re.findall(r"^the whole search: ([\d.]+) s, \1 GPU seconds$", text, re.MULTILINE)
    known = json.loads(plan(str(spec), "--device", "h100-sxm", "--rows", "1", "--json", *ONE).stdout)["forecast"]["search"]
    assert float(seconds) == pytest.approx(3600 * known["hours"], rel=1e-2)


def test_hours_and_dollars_follow_from_the_tokens(spec: Path) -> None:
    result = plan(str(spec), "--device", "h100-sxm", "--gpus-per-node", "8", "--price", "2.5", "--json")
    assert result.exit_code == 0, result.stderr
    planned = json.loads(result.stdout)
    assert len(planned["layouts"]) == 3, "on one rank the strategies are the same"
    run = planned["forecast"]["run"]
    fastest = max(row["step"]["tokens_per_second"] for row in planned["layouts"])
    assert run["hours"] * 3600 == pytest.approx(1000 * 0.5 * LENGTH / fastest)
    assert run["dollars"] == pytest.approx(run["hours"] * run["world_size"] * 2.5)
    search = planned["forecast"]["search"]
    one = [1000 * 0.5 * LENGTH / row["step"]["tokens_per_second"] / 3600 * row["world_size"] for row in planned["layouts"]]
    # The plan's rows have the smallest rank of LoRA, the search all of them.
    assert search["device_hours"] == pytest.approx(10 * sum(one) / len(one), rel=0.03)
    assert search["hours"] * 8 == pytest.approx(search["device_hours"])


def test_the_forecast_ends_with_the_first_limit_of_the_budget(spec: Path) -> None:
    def searched(budget: str) -> tuple[Any, str]:
        sets = ("--set", f"budget={budget}", "--set", "resources.price_per_device_hour=2.5")
        planned = json.loads(plan(str(spec), "--device", "h100-sxm", "--gpus-per-node", "8", "--json", *sets).stdout)
        return planned["forecast"]["search"], plan(str(spec), *sets).output

    ten, _ = searched("{trials: 10}")
    one = ten["device_hours"] / 10
    for limit, hours in [
        ("minutes: 3", 8 * 3 / 60),
        (f"device_hours: {one * 4}", one * 4),
        (f"dollars: {one * 5}", one * 2),
        (f"minutes: 1000000, trials: 3, dollars: {one * 10}", one * 3),
    ]:
        found, _ = searched(f"{{{limit}}}")
        assert found["device_hours"] == pytest.approx(hours, rel=1e-6)
        assert found["dollars"] == pytest.approx(found["device_hours"] * 2.5)
    found, text = searched("{patience: 5}")
    assert found is None
    assert "\nuntil the hypervolume stops growing on " in text
    assert "\n3 trials or 30 minutes on " in searched("{trials: 3, minutes: 30}")[1]


def test_the_text_says_what_fits_by_how_much_and_what_is_assumed(spec: Path) -> None:
    text = plan(str(spec), "--device", "h100-sxm", "--gpus-per-node", "8", "--set", "space.adapter=none").output
    assert "GiB too much" in text
    assert "# GiB a rank by term" in text
    assert f"assumed, not measured: the matrix units reach {ASSUMED_UTILISATION['cuda']:.0%} of the dense peak of h100-sxm" in text
    assert "1 of 3 can run" in text


def test_a_small_model_is_said_to_reach_less(spec: Path, tmp_path: Path) -> None:
    small = "a model this small is bound by kernel launches"
    assert small not in plan(str(spec), "--device", "h100-sxm").output
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "num_hidden_layers": 1, "vocab_size": 1000}))
    assert small in plan(str(spec), "--device", "h100-sxm").output


def test_nothing_that_fits_is_exit_3(spec: Path) -> None:
    result = plan(str(spec), "--device", "l4", "--set", "space.adapter=none")
    assert result.exit_code == 3
    assert "0 of 3 can run" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "h100-sxn"), "did you mean 'h100-sxm'?"),
        (("--device", "tpu"), "--device: no data sheet of 'tpu'; there are: b200"),
    ],
)
def test_an_unknown_device_is_one_line_and_exit_2(spec: Path, arguments: tuple[str, ...], message: str) -> None:
    result = plan(str(spec), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_options_of_a_device_without_one_are_one_line_and_exit_2(spec: Path) -> None:
    result = plan(str(spec), "--nodes", "2", "--price", "2.5")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == ["error: --nodes, --price: says nothing without --device"]


@pytest.mark.parametrize("device", [[], ["--device", "h100-sxm", "--gpus-per-node", "8", "--set", "space.world_size=profile"]])
def test_no_torch_and_no_transformers_are_loaded_for_it(spec: Path, device: list[str]) -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from search.cli import app;"
        f"r = CliRunner().invoke(app, ['plan', {str(spec)!r}, *{device}]);"
        "print(r.exit_code, 'GiB a rank' in r.output, sorted({'torch', 'transformers', 'ray', 'mlflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "0 True []"


def test_world_sizes_that_profile_names_are_shown_where_the_machine_has_none_of_them() -> None:
    space = SpaceSpec.model_validate({"world_size": {"profile": [2, 4, 8]}, "strategy": "ddp"})
    shown = {num: {row["world_size"] for row in layout_rows(space, 128, Limits(num_workers=num, hidden_size=64))} for num in (1, 4)}
    assert shown == {1: {2, 4, 8}, 4: {2, 4}}
    none = layout_rows(space, 128, Limits(num_workers=1, hidden_size=64))
    assert not any(row["feasible"] for row in none)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.name=./nowhere"], r"model\.name: no such directory: \./nowhere"),
        (["data.train=rows.csv"], r"rows\.csv: no column for the label among text, what; name it with data\.label"),
    ],
)
def test_what_is_to_be_here_and_is_not_is_told_by_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("text,what\na,b\n")
    with pytest.raises(SpecError, match=words):
        make_plan(load_spec(make_spec(tmp_path), changes))
    assert make_plan(load_spec(make_spec(tmp_path)))["num_feasible_layouts"] >= 1
    own = ["data.train=null", "data.test=null", "data.domains={a: {train: rows.csv, label: what}}"]
    assert make_plan(load_spec(make_spec(tmp_path), own)), "a domain names its columns"
    monkeypatch.setattr("search.plan.LARGEST_LOOKED_AT", 5)
    assert make_plan(load_spec(make_spec(tmp_path), ["data.train=rows.csv"])), "a large file is not read for a plan"
