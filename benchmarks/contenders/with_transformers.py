"""(c) `Trainer.hyperparameter_search` of transformers with Optuna and two directions; one process, two threads."""

from __future__ import annotations

import time
from typing import Any

import torch
from optuna.samplers import TPESampler
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from benchmarks.contenders.task import MODEL, Run, Task, config_of, suggest
from trainables.data import TokenTable
from trainables.hub import resolve_model
from trainables.mesh import World
from trainables.model import build
from trainables.tokenization import load_tokenizer


class Clock(TrainerCallback):
    """Times the training of a trial."""

    seconds = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self._started


def rows_of(table: TokenTable, indices: Any) -> list[dict[str, Any]]:
    assert table.labels is not None  # of a classified row
    return [{"input_ids": table.row(i)[0].tolist(), "labels": int(table.labels[i])} for i in map(int, indices)]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    run = Run.from_command_line()
    torch.set_num_threads(2)
    task, clock = Task(run.data), Clock()
    train, evaluation = task.data.train, task.data.evaluation
    params: dict[str, Any] = {}

    def model_init(trial: Any) -> Any:
        if trial is None:  # the Trainer itself asks for a model first, to see what it is
            return task.base.module
        params.clear()
        params.update(suggest(trial))
        trainer.train_dataset = rows_of(train, task.data.subset(params["dataset_fraction"]))
        return build(config_of(params), task.base, World.alone())

    def hp_space(_: Any) -> dict[str, Any]:
        # The model comes first, and with it all that is proposed.
        named = {"per_device_train_batch_size": params["global_batch_size"], "num_train_epochs": params["epochs"]}
        return {"learning_rate": params["learning_rate"], **named}

    def objectives(metrics: dict[str, float]) -> tuple[float, float]:
        run.finished(params, metrics["eval_accuracy"], clock.seconds)
        return metrics["eval_accuracy"], clock.seconds

    trainer = Trainer(
        model_init=model_init,
        args=TrainingArguments(
            output_dir=run.scratch,
            use_cpu=True,
            seed=0,
            per_device_eval_batch_size=32,
            # What the others have too: batches of rows of one length, and the same schedule.
            train_sampling_strategy="group_by_length",
            warmup_steps=0.1,
            optim="adamw_torch_fused",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        data_collator=DataCollatorWithPadding(load_tokenizer(resolve_model(MODEL["name"]), None)),
        train_dataset=rows_of(train, range(train.num_rows)),
        eval_dataset=rows_of(evaluation, evaluation.lengths.argsort()),
        compute_metrics=accuracy,
        callbacks=[clock],
    )
    trainer.hyperparameter_search(
        hp_space=hp_space,
        compute_objective=objectives,
        direction=["maximize", "minimize"],
        backend="optuna",
        n_trials=10_000,
        sampler=TPESampler(seed=run.seed),
        timeout=run.seconds_left,
    )


if __name__ == "__main__":
    main()
