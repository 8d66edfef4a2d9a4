"""The time of a trial's step, measured before the trial: the real step at the real shapes, a few dozen times."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from spaces.config import TrialConfig
from spaces.fidelity import PROFILE_STEPS as NUM_STEPS
from trainables.data import TaskData
from trainables.loop import Trainer, memory_errors
from trainables.mesh import World
from trainables.meter import compile_seconds, disturbance, mean_parts
from trainables.model import BaseModel
from trainables.step_time import fit_steady, steady_steps


def measure_step(config: TrialConfig, data: TaskData, base: BaseModel, world: World) -> dict[str, Any]:
    """Train some steps of a trial and return what they took, in plain values; nothing is kept of what was learned.

    The steps are those of a trial on all the data, whose batches are as long as those of any share of it, and as many epochs as it
    takes. The last ones are the fullest of that trial, where these are none of the others: there is the peak of the memory. Every
    rank must call it.

    Raises:
        OutOfMemory: on the rank that ran out.
    """
    recipe = config.recipe
    rows_per_epoch = len(data.subset(1.0))
    epochs = math.ceil(NUM_STEPS * recipe.global_batch_size / rows_per_epoch)
    long_enough = replace(config, recipe=replace(recipe, dataset_fraction=1.0, epochs=float(epochs)))
    with memory_errors():
        trainer = Trainer(long_enough, data, base, world, checkpoints=None)
        later = [step for step in trainer.sizes.fullest if step >= NUM_STEPS]
        for step in (*range(NUM_STEPS - len(later)), *later):
            trainer.step = step
            trainer.train_step()
    # The later ones are larger than what is at their places in the sizes, and on a CPU their tensors were followed.
    parts = trainer.step_parts()[: NUM_STEPS - len(later)]
    seconds = [sum(step) for step in parts]
    time = fit_steady(seconds, trainer.sizes)
    step_seconds = float(time.of(trainer.sizes.padded_tokens[:NUM_STEPS]).mean())
    return {
        "compile_seconds": compile_seconds(seconds, trainer.sizes, config),
        "fixed_seconds": time.fixed_seconds,
        "seconds_per_token": time.seconds_per_token,
        "step_seconds": step_seconds,
        "tokens_per_second": float(trainer.sizes.tokens[:NUM_STEPS].mean()) / step_seconds,
        "num_steps": len(steady_steps(seconds)),
        "part_seconds": mean_parts(parts),
        **disturbance(parts, trainer.sizes, world),
        "num_nodes": len(set(world.gather(world.node_id))),
        "peak_memory_bytes": max(world.gather(trainer.memory.peak_bytes())),
    }
