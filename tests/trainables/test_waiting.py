"""In a step of one rank no operation needs a value from the device, for which a GPU would stand still until its host goes on.

What copies between device and host (`.cpu()`, `.tolist()`) is no such operation where both are one: a GPU alone would show it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory_grid import Case
from torch.utils._python_dispatch import TorchDispatchMode
from unequal_rows import base_of, data_of

from spaces.blueprint import FAMILIES
from spaces.packing import NOT_PACKED
from trainables.loop import Trainer
from trainables.mesh import World

aten = torch.ops.aten
# What needs a value, or a size that follows from values: https://docs.pytorch.org/docs/stable/generated/torch.cuda.set_sync_debug_mode.html
READS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.equal,
    aten.unique_dim,
    aten._unique2,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
}


class ReadsBack(TorchDispatchMode):
    """Collects the operations after which a host waits for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        is_chosen = packet in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if packet in READS or is_chosen:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_next_steps_batches_are_made_before_anything_waits_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(family="llama", adapter="all-linear")
    trainer = Trainer(case.config(1), case.data(6), case.base(), World.alone(), checkpoints=None)
    made, collect = [], trainer._collect_losses
    monkeypatch.setattr("trainables.loop.CHECK_STEPS", 1)  # every step ends with a look at its loss
    micro_batches = trainer._plan.micro_batches

    def noted(step: int, rank: int) -> Any:
        made.append(step)
        return micro_batches(step, rank)

    def after(*_: Any) -> None:
        assert made == list(range(min(trainer.step + 1, trainer.num_steps))), "each once, and the next one's too"
        collect()

    monkeypatch.setattr(trainer._plan, "micro_batches", noted)
    monkeypatch.setattr(trainer, "_collect_losses", after)
    while trainer.step < trainer.num_steps:
        trainer.train_step()
    assert trainer.num_steps > 2


METHODS = ("lora", "dora", "vera", "ia3", "oft", "bottleneck")
CASES = [
    *(Case(family=f) for f in FAMILIES if f not in NOT_PACKED),
    *(Case(family=f, adapter="all-linear", method=m) for f in ("llama", "bert") for m in METHODS),
    Case(family="llama", adapter="all-linear", method="prefix"),
    Case(family="llama", adapter="all-linear", precision="bf16"),
    *(Case(family="llama", adapter="all-linear", precision="bf16", quantization=q) for q in ("nf4", "int8", "float8")),
    Case(family="bert", precision="bf16"),
    Case(family="llama", recomputation="full"),
]
# Of one length, of several, and of several that are padded.
LAYOUTS = {"equal": (7,) * 32, "packed": (3, 7, 7, 7, 12, 12, 19) * 4, "padded": (3, 7, 7, 7, 12, 12, 19) * 4}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.family}-{c.method}-{c.precision}-{c.quantization}")
def test_nothing_in_a_step_waits_for_the_device(case: Case, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if layout == "padded":
        if case.method == "prefix":
            pytest.skip("a prefix is padded behind a sliding window alone")
        monkeypatch.setattr("trainables.loop.packing_for", lambda *_: None)
    trainer = Trainer(case.config(1), data_of(case.task, LAYOUTS[layout]), base_of(case), World.alone(), checkpoints=None)
    seen = []
    while trainer.step < trainer.num_steps - 1:
        is_followed = trainer.step == 0 or trainer._is_to_be_followed()
        with ReadsBack() as reads:
            trainer.train_step()
        if not is_followed:
            seen.append(trainer.step)
            assert reads.found == [], case
    assert seen
