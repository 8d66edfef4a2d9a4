"""MFU of paretune's training step on one GPU, on models of the size that people fine-tune, and where the rest of the time goes.

    python benchmarks/large_models.py --text tinyshakespeare/input.txt --tokenizer stories260k/hf \
        --results benchmarks/results/large_models.json

The rules:

- Llama 3's shapes with random weights: what a step takes does not depend on them. Real text in rows of 4,096 tokens, bf16.
- Each case is a process of its own: its optimizer steps, compilation and first ones apart, are timed by CUDA events as in a search.
- MFU counts model FLOPs alone: a frozen weight 4 a token, a trained one 6, causal attention half, and nothing twice.
- Two more steps run under torch's profiler; every kernel belongs to one class, and idle is the time in which none ran.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.heading import heading  # noqa: E402
from spaces.blueprint import blueprint  # noqa: E402
from spaces.config import TrialConfig  # noqa: E402
from spaces.inputs import DataSpec, ModelSpec  # noqa: E402
from spaces.memory import rank_memory  # noqa: E402
from spaces.space import SpaceSpec  # noqa: E402

# https://huggingface.co/meta-llama/Llama-3.1-8B and Llama-3.2-1B, config.json; `tiny` is to try this file on a CPU.
LLAMA: dict[str, dict[str, Any]] = {
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
SHARED = {"vocab_size": 128_256, "max_position_embeddings": 131_072, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
STEPS = 10
# Kernels by name, the first that fits; Inductor names its own after what it fused.
CLASSES = {
    "attention": r"flash|fmha|sdpa|attention|cudnn.*(fprop|bprop).*",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|matmul",
    "compiled": r"^triton_",
    "optimizer": r"multi_tensor|fused_adam|FusedAdam",
    "copies": r"^Mem(cpy|set)|copy",
    "other": r"",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One training."""

    shape: str
    adapter: str
    micro_batch: int
    compile: str
    num_passes: int = 1
    """A step, of which the update of the weights is the last part."""
    recomputation: str = "none"
    quantization: str = "none"
    goal: float | None = None
    """MFU."""

    @property
    def name(self) -> str:
        method = {"none": "in full"}.get(self.adapter, f"{self.adapter} of rank 16")
        base = "" if self.quantization == "none" else f" on {self.quantization}"
        rows = f"{self.micro_batch} row(s) a pass and {self.micro_batch * self.num_passes} a step"
        rest = f"{rows}, compile {self.compile}, recomputation {self.recomputation}"
        return f"Llama {self.shape} {method}{base}, {rest}"

    def config(self, length: int) -> TrialConfig:
        params = {
            "adapter": self.adapter,
            "learning_rate": 1e-5,
            "global_batch_size": self.micro_batch * self.num_passes,
            "dataset_fraction": 1.0,
            "epochs": 4,  # a megabyte is too little for the steps of several passes
            "lora_rank": 16,
            "precision": "bf16",
            "quantization": self.quantization,
            "micro_batch_size": self.micro_batch,
            "recomputation": self.recomputation,
            "compile": self.compile,
        }
        if self.adapter == "none":
            del params["lora_rank"], params["quantization"]
        return TrialConfig.from_params(SpaceSpec.model_validate(params).first())


CASES = [
    Case(shape="8B", adapter="lora", micro_batch=1, compile="none"),
    Case(shape="8B", adapter="lora", micro_batch=1, compile="blocks", goal=0.45),
    Case(shape="1B", adapter="lora", micro_batch=4, compile="none"),
    Case(shape="1B", adapter="lora", micro_batch=4, compile="blocks", goal=0.40),
    Case(shape="1B", adapter="none", micro_batch=4, num_passes=4, compile="none"),
    Case(shape="1B", adapter="none", micro_batch=4, num_passes=4, compile="blocks", goal=0.50),
    Case(shape="1B", adapter="none", micro_batch=4, compile="blocks"),
    Case(shape="8B", adapter="lora", micro_batch=1, compile="blocks", quantization="nf4"),
]


def train_once(case: Case, text: str, tokenizer: str, length: int) -> dict[str, Any]:
    """Train in this process and return what was measured."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from spaces.architecture import ModelShape
    from trainables.device import device_peak
    from trainables.loop import Trainer
    from trainables.mesh import World
    from trainables.meter import speed
    from trainables.model import BaseModel
    from trainables.preparation import prepare

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = World(rank=0, world_size=1, device=device, control_group=None)
    data = prepare(ModelSpec(name=tokenizer, task="causal-lm", max_length=length), DataSpec(train=text))
    settings = LlamaConfig(**LLAMA[case.shape], **SHARED, use_cache=False)
    # Frozen weights compute in bf16, and trained ones are fp32; made where they are used, because a CPU draws 8B numbers in a minute.
    with device:
        module = AutoModelForCausalLM.from_config(settings, dtype=torch.float32 if case.adapter == "none" else torch.bfloat16)
    if case.adapter == "none":
        module = module.to("cpu")  # as a search has it: the trial trains a copy, beside which this one would count
    described = {**settings.to_dict(), "architectures": ["LlamaForCausalLM"]}
    shape = ModelShape.from_config(described)
    base = BaseModel(name=tokenizer, revision=None, task="causal-lm", module=module, new_parameters=(), shape=shape)
    config = case.config(length)
    trainer = Trainer(config, data, base, world, None)
    started = time.perf_counter()
    for _ in range(3):
        trainer.train_step()
    trainer.step_parts()  # waits for the device
    start_seconds = time.perf_counter() - started
    for _ in range(STEPS):
        trainer.train_step()
    parts = trainer.step_parts()
    sizes = trainer.sizes
    peak = trainer.memory.peak_bytes()
    assert trainer.flops is not None
    cost = speed(parts, sizes, world, trainer.flops, config)
    predicted = rank_memory(blueprint(described, "causal-lm"), config, length, is_on_gpu=device.type == "cuda")
    result = {
        "tokens_per_second": cost["tokens_per_second"],
        "mfu": cost.get("mfu"),
        "hfu": cost.get("hfu"),
        "step_seconds": cost["step_seconds"],
        "tokens_per_step": float(sizes.tokens[0]),
        "start_seconds": start_seconds,
        "peak_memory_bytes": peak,
        "predicted_memory_bytes": predicted.peak_bytes,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "peak_flops_per_second": device_peak(device, "bf16")[0],
    }
    if device.type == "cuda":
        result["time_share"] = shares(trainer, torch)
    return result


def shares(trainer: Any, torch: Any) -> dict[str, float]:
    """Return the shares of two steps' wall time by class of kernel, and print the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        for _ in range(2):
            trainer.train_step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    totals: dict[str, float] = defaultdict(float)
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    for event in kernels:
        kind = next(name for name, pattern in CLASSES.items() if re.search(pattern, event.key))
        totals[kind] += event.self_device_time_total / 1e6 / seconds
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:25]:
        print(f"  {event.self_device_time_total / 2e3:9.2f} ms {event.count // 2:6d} x {event.key[:110]}", file=sys.stderr)
    return {**{kind: totals[kind] for kind in CLASSES}, "idle": max(0.0, 1 - sum(totals.values()))}


def show(name: str, row: dict[str, Any]) -> None:
    mfu = "MFU unknown" if row["mfu"] is None else f"MFU {row['mfu']:.1%}, HFU {row['hfu']:.1%}"
    goal = "" if row.get("goal") is None else f" (goal {row['goal']:.0%})"
    memory = f"{row['peak_memory_bytes'] / 2**30:.1f} GiB, predicted {row['predicted_memory_bytes'] / 2**30:.1f}"
    pace = f"{row['tokens_per_second']:,.0f} tokens/s, {mfu}{goal}"
    print(f"{name}: {pace}; {memory}; three steps at first in {row['start_seconds']:.0f} s")
    print("  " + ", ".join(f"{kind} {share:.1%}" for kind, share in row.get("time_share", {}).items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text of at least a megabyte")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of a tokenizer")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--cases", help="their numbers, with commas between; all by default")
    parser.add_argument("--results", type=Path, help="where the results are written as JSON, after every case")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        case = Case(**json.loads(arguments.one))
        print(json.dumps(train_once(case, str(arguments.text), str(arguments.tokenizer), arguments.length)))
        return
    chosen = CASES if arguments.cases is None else [CASES[int(number)] for number in arguments.cases.split(",")]
    rows: dict[str, dict[str, Any]] = {}
    for case in chosen:
        fields = {name: getattr(case, name) for name in Case.__slots__}
        words = ["--text", str(arguments.text), "--tokenizer", str(arguments.tokenizer), "--length", str(arguments.length)]
        done = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(fields), *words], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            print(f"{case.name}: failed:\n{done.stderr[-3000:]}", flush=True)
            continue
        print("\n".join(line for line in done.stderr.splitlines() if " ms " in line))
        rows[case.name] = {**json.loads(done.stdout.splitlines()[-1]), "goal": case.goal}
        show(case.name, rows[case.name])
        if arguments.results:
            command = "python benchmarks/large_models.py --text tinyshakespeare/input.txt --tokenizer stories260k/hf --results FILE"
            machine = f"one {rows[case.name]['device']}, nothing else running"
            head = heading(command, machine, ("torch", "transformers", "peft"))
            arguments.results.write_text(json.dumps({**head, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
