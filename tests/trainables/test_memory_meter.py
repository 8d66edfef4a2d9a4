"""What a rank holds, against torch's own tracker and closed forms."""

from __future__ import annotations

import pytest
import torch
from families import batch_of
from memory_grid import Case
from torch.distributed._tools.mem_tracker import MemTracker

from trainables.loss import TrainingLoss
from trainables.memory_meter import LiveBytes, MemoryMeter
from trainables.mesh import World
from trainables.model import build, trainable
from trainables.optim import make_optimizer

CPU = torch.device("cpu")


def train_step(case: Case, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    ids = torch.arange(case.rows * case.length).reshape(case.rows, case.length) % 90 + 3
    loss = TrainingLoss(case.task)(module, batch_of(case.task, ids))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_the_tensors_of_a_step_are_those_that_torchs_own_tracker_sees(family: str, recomputation: str) -> None:
    """Where all weights train: theirs cannot follow frozen ones."""
    case = Case(family=family, recomputation=recomputation)
    config = case.config(1)
    module = build(config, case.base(), World.alone())
    optimizer = make_optimizer(trainable(module), config.recipe)
    train_step(case, module, optimizer)
    tracker = MemTracker()
    tracker.track_external(module, optimizer)
    with tracker:
        train_step(case, module, optimizer)
    theirs = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    meter = MemoryMeter(CPU, module, optimizer)
    with meter.follow():
        train_step(case, module, optimizer)
    measured = meter.measured()
    assert measured is not None
    assert measured.tensor_bytes == pytest.approx(theirs, rel=0.02)
    trained = sum(p.numel() for p in trainable(module).values())
    assert measured.weights_bytes == sum(4 * t.numel() for t in {t.data_ptr(): t for t in state(module)}.values())
    assert measured.optimizer_bytes == pytest.approx(8 * trained, rel=0.01), "two moments, and a step count each"
    assert measured.around_bytes > 50e6, "the libraries alone"


def state(module: torch.nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_of_the_steps_that_are_followed_the_fullest_counts() -> None:
    module = torch.nn.Linear(4, 4)
    meter = MemoryMeter(CPU, module, torch.optim.AdamW(module.parameters()))
    assert meter.measured() is None, "nothing was followed yet"
    held = []
    for num_rows in (100, 1000, 10):
        with meter.follow():
            module(torch.ones(num_rows, 4)).sum().backward()
        measured = meter.measured()
        assert measured is not None
        held.append(measured.tensor_bytes)
    assert held[0] < held[1] == held[2]


def test_a_storage_counts_once_and_only_while_it_lives() -> None:
    with LiveBytes() as tensors:
        kept = torch.ones(1000)
        for _ in range(5):
            view = kept.view(10, 100)[0]
            passing = torch.ones(500)
            del passing
        assert view.numel() == 100
    assert tensors.peak == 4 * (1000 + 500)
