"""How fast a trial trains: real tokens per second of paretune's loop, of transformers' `Trainer` and of TRL's `SFTTrainer`.

On a machine that does nothing else, with the two data sets in the working directory:

    pip install -e '.[bench]'
    python benchmarks/throughput.py --banking77 banking77/train.csv --gsm8k gsm8k/train.jsonl --model stories260k/hf \
        --results benchmarks/results/throughput.json

The rules:

- The same model, weights and adapter, the same rows, epochs, batch size, AdamW, schedule, clipping and precision; one core.
- Each training is a process of its own; in every round all contenders train, in turn, and every other round backwards.
- The clock runs from the first step to the end of the last, with the loading of batches and without evaluation and saving.
- Tokens are real ones: padding earns nothing, and prompts count although the loss does not.
- The others have the model as transformers loads it and LoRA as PEFT makes it, and the best settings that their documentation offers
  on a CPU: rows of one length together, fused AdamW, no recomputation, no logging. Packing without flash attention, which no CPU has,
  computes the scores of all pairs of a packed row, and takes several times as long. `Trainer` is measured as it comes too: batches of
  rows as they fall.
- All are scored on the same evaluation rows by the same code: who is fast and learns less has not won.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.front_times import ratios  # noqa: E402
from benchmarks.heading import heading  # noqa: E402
from spaces.config import TrialConfig  # noqa: E402
from spaces.inputs import DataSpec, ModelSpec  # noqa: E402
from spaces.space import SpaceSpec  # noqa: E402

CONTENDERS = {
    "paretune": "paretune's loop",
    "padded": "paretune's loop, rows padded in buckets of like length",
    "trainer": "transformers' Trainer, rows of one length together",
    "trainer_default": "transformers' Trainer as it comes",
    "trl": "TRL's SFTTrainer",
}
GOALS = {"padded": 1.0, "trainer": 1.5, "trainer_default": 1.5, "trl": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One training."""

    data: str
    """`banking77` or `gsm8k`."""
    adapter: str
    learning_rate: float
    fraction: float
    """Of the training rows, so that it takes some ten seconds."""
    batch_size: int
    max_length: int

    @property
    def name(self) -> str:
        return f"{self.data}, {'full' if self.adapter == 'none' else self.adapter}"

    @property
    def contenders(self) -> list[str]:
        """Who can train it: TRL classifies nothing."""
        return [name for name in CONTENDERS if name != "trl" or self.data != "banking77"]

    def model(self, causal_model: str) -> ModelSpec:
        if self.data == "banking77":
            return ModelSpec(name="embedded:all-MiniLM-L6-v2", task="sequence-classification", max_length=self.max_length)
        return ModelSpec(name=causal_model, task="causal-lm", max_length=self.max_length)

    def config(self) -> TrialConfig:
        space = {
            "adapter": self.adapter,
            "learning_rate": self.learning_rate,
            "global_batch_size": self.batch_size,
            "dataset_fraction": self.fraction,
            "lora_rank": 16,
        }
        return TrialConfig.from_params(SpaceSpec.model_validate(space).first())


CASES = [
    Case(data="banking77", adapter="none", learning_rate=2e-4, fraction=0.15, batch_size=16, max_length=96),
    Case(data="banking77", adapter="lora", learning_rate=2e-3, fraction=0.15, batch_size=16, max_length=96),
    Case(data="gsm8k", adapter="none", learning_rate=3e-3, fraction=0.3, batch_size=16, max_length=512),
    Case(data="gsm8k", adapter="lora", learning_rate=1e-2, fraction=0.3, batch_size=16, max_length=512),
]


def train_once(case: Case, contender: str, data_path: str, causal_model: str, threads: int) -> dict[str, float]:
    """Train in this process; return seconds, real tokens and the loss on the evaluation rows."""
    import torch

    from trainables.evaluation import evaluate
    from trainables.hub import resolve_model
    from trainables.mesh import World
    from trainables.model import BaseModel
    from trainables.preparation import prepare

    torch.set_num_threads(threads)
    model, config = case.model(causal_model), case.config()
    data = prepare(model, DataSpec(train=data_path))
    base = BaseModel.load(resolve_model(model.name), None, model.task, data.label_names)
    as_it_comes = partial(_trainer, sampling="random")
    known: dict[str, Callable[..., Any]] = {"paretune": _paretune, "padded": _padded, "trainer": _trainer, "trl": _trl}
    train = as_it_comes if contender == "trainer_default" else known[contender]
    module, seconds = train(config, data, base)
    rows = data.subset(config.recipe.dataset_fraction)
    scores = evaluate(module, config, data, data.evaluation, World.alone())
    return {"seconds": seconds, "tokens": int(data.train.lengths[rows].sum()), "eval_loss": scores["eval_loss"]}


def _paretune(config: TrialConfig, data: Any, base: Any) -> tuple[Any, float]:
    from trainables.loop import Trainer
    from trainables.mesh import World

    trainer = Trainer(config, data, base, World.alone(), None)
    started = time.perf_counter()
    while trainer.step < trainer.num_steps:
        trainer.train_step()
    return trainer.module, time.perf_counter() - started


def _padded(config: TrialConfig, data: Any, base: Any) -> tuple[Any, float]:
    base.module.set_attn_implementation("sdpa")  # transformers' own, which knows no rows that are laid end to end
    return _paretune(config, data, base)


def _trainer(config: TrialConfig, data: Any, base: Any, sampling: str = "group_by_length") -> tuple[Any, float]:
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, Trainer, TrainingArguments

    from trainables.tokenization import load_tokenizer

    tokenizer = load_tokenizer(base.name, base.revision)
    is_causal = data.task == "causal-lm"
    if is_causal and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    with tempfile.TemporaryDirectory() as directory:
        return _fit(
            Trainer(
                model=_module(config, base),
                args=TrainingArguments(**_arguments(config, directory) | {"train_sampling_strategy": sampling}),
                data_collator=DataCollatorForSeq2Seq(tokenizer) if is_causal else DataCollatorWithPadding(tokenizer),
                train_dataset=_rows(config, data),
            )
        )


def _trl(config: TrialConfig, data: Any, base: Any) -> tuple[Any, float]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from trainables.tokenization import load_tokenizer

    tokenizer = load_tokenizer(base.name, base.revision)
    with tempfile.TemporaryDirectory() as directory:
        # `bf16` is its default.
        arguments = SFTConfig(**_arguments(config, directory), max_length=None, gradient_checkpointing=False, bf16=False)
        return _fit(
            SFTTrainer(
                model=_module(config, base),
                args=arguments,
                processing_class=tokenizer,
                train_dataset=Dataset.from_list(_rows(config, data)),
            )
        )


def _module(config: TrialConfig, base: Any) -> Any:
    """Return what the libraries' documentation gives to a trainer: the model as it is loaded, with PEFT's LoRA."""
    import transformers
    from peft import LoraConfig, get_peft_model

    from trainables.adapters import TASK_TYPES
    from trainables.hub import class_for

    recipe = config.recipe
    transformers.set_seed(recipe.seed)
    kind = getattr(transformers, class_for(base.module.config.to_dict(), base.task) or "")
    # The same configuration, without dropout.
    module = kind.from_pretrained(base.name, config=base.module.config, attn_implementation="sdpa")
    if recipe.adapter == "none":
        return module
    adapter = LoraConfig(
        r=recipe.adapter_rank, lora_alpha=recipe.adapter_alpha, target_modules="all-linear", task_type=TASK_TYPES[base.task]
    )
    return get_peft_model(module, adapter)


def _rows(config: TrialConfig, data: Any) -> list[dict[str, Any]]:
    """Return the training rows as both libraries want them; a causal model's labels are its input, of which they shift the loss."""
    table = data.train
    rows = []
    for index in map(int, data.subset(config.recipe.dataset_fraction)):
        ids, targets = table.row(index)
        labels = int(table.labels[index]) if table.labels is not None else targets.tolist()
        rows.append({"input_ids": ids.tolist(), "labels": labels})
    return rows


def _arguments(config: TrialConfig, directory: str) -> dict[str, Any]:
    recipe = config.recipe
    return {
        "output_dir": directory,
        "use_cpu": True,
        "seed": recipe.seed,
        "learning_rate": recipe.learning_rate,
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": recipe.global_batch_size,
        "warmup_steps": recipe.warmup_fraction,
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "group_by_length",
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def _fit(trainer: Any) -> tuple[Any, float]:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return trainer.model, clock.seconds


def run_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run every contender of every case in turn, each in a process of its own; return what was measured."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {c.name: {n: [] for n in c.contenders} for c in CASES}
    for number in range(arguments.rounds):
        for index, case in enumerate(CASES):
            contenders = [name for name in case.contenders if name in ("paretune", *arguments.against)]
            for contender in contenders if number % 2 == 0 else contenders[::-1]:
                words = ["--one", str(index), contender, "--threads", str(arguments.threads)]
                paths = ["--banking77", str(arguments.banking77), "--gsm8k", str(arguments.gsm8k), "--model", str(arguments.model)]
                done = subprocess.run([sys.executable, __file__, *words, *paths], capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise SystemExit(f"{case.name}: {CONTENDERS[contender]} failed:\n{done.stderr[-3000:]}")
                row = json.loads(done.stdout.splitlines()[-1])
                found[case.name][contender].append(row)
                pace = row["tokens"] / row["seconds"]
                print(f"round {number} {case.name} {contender}: {pace:,.0f} tokens/s, loss {row['eval_loss']:.4f}", flush=True)
    return {name: summary({n: rows for n, rows in runs.items() if rows}) for name, runs in found.items()}


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return each contender's pace and loss, and the ratios of ours to theirs, round by round."""
    paces = {name: [r["tokens"] / r["seconds"] for r in rows] for name, rows in runs.items()}
    result: dict[str, Any] = {}
    for name, rows in runs.items():
        result[name] = {"tokens_per_second": paces[name], "eval_loss": [row["eval_loss"] for row in rows]}
        if name != "paretune":
            result[name] |= {"times_as_fast": ratios(paces["paretune"], paces[name]), "goal": GOALS[name]}
    return result


def show(cases: dict[str, Any]) -> None:
    for case, rows in cases.items():
        print(case)
        for name, row in rows.items():
            text = (
                f"  {CONTENDERS[name]}: {np.median(row['tokens_per_second']):,.0f} tokens/s, loss {np.median(row['eval_loss']):.4f}"
            )
            if "times_as_fast" in row:
                r = row["times_as_fast"]
                text += f"; ours is {r['mean']:.2f} times as fast ({r['low']:.2f} to {r['high']:.2f}; goal {row['goal']:g})"
            print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--banking77", type=Path, required=True, help="banking77's train.csv")
    parser.add_argument("--gsm8k", type=Path, required=True, help="gsm8k's train.jsonl")
    parser.add_argument("--model", type=Path, required=True, help="a small causal language model")
    parser.add_argument("--against", nargs="+", choices=list(CONTENDERS)[1:], default=list(CONTENDERS)[1:], help="by default all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="where the results are written as JSON")
    parser.add_argument("--one", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        case = CASES[int(arguments.one[0])]
        path = str(arguments.banking77 if case.data == "banking77" else arguments.gsm8k)
        print(json.dumps(train_once(case, arguments.one[1], path, str(arguments.model), arguments.threads)))
        return
    cases = run_all(arguments)
    show(cases)
    if arguments.results:
        command = "python benchmarks/throughput.py --banking77 banking77/train.csv --gsm8k gsm8k/train.jsonl --model stories260k/hf"
        command += f" --against {' '.join(arguments.against)} --rounds {arguments.rounds}"
        machine = f"{psutil.cpu_count()} cores, no GPU, {arguments.threads} thread(s) used"
        packages = ("torch", "transformers", "peft", *(name for name in ("trl",) if name in arguments.against))
        head = heading(f"{command} --results FILE", machine, packages)
        arguments.results.write_text(json.dumps({**head, "cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
