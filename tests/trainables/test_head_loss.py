"""Head and loss as one operation, in parts, against the cross entropy of all logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import batch_of
from memory_grid import DISTINCT, ENCODERS, Case, error, measured
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional

from spaces.memory import rank_memory
from trainables import head_loss as operation
from trainables.head_loss import differentiate, head_loss, head_scores
from trainables.loss import TrainingLoss, scored_loss
from trainables.mesh import World
from trainables.model import build, trainable
from trainables.parallelize import autocast

NUM_TARGETS, WIDTH, VOCAB = 40, 16, 50
SCALE = 0.1


@pytest.mark.parametrize("at_once", [1, 7, 40, 1000])
@pytest.mark.parametrize(("is_bf16", "tolerance"), [(False, 1e-6), (True, 1e-2)])
@pytest.mark.parametrize("trains_head", [True, False])
def test_in_parts_it_is_the_cross_entropy_of_all_logits(
    at_once: int, is_bf16: bool, tolerance: float, trains_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation, "targets_at_once", lambda _: at_once)
    torch.manual_seed(0)
    hidden = torch.randn(NUM_TARGETS, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=trains_head)
    targets = torch.randint(0, VOCAB, (NUM_TARGETS,))
    inputs = [hidden, weight] if trains_head else [hidden]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
        expected = functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")
        loss = head_loss(hidden, weight, targets, differentiate)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for found, wanted in zip(torch.autograd.grad(loss * SCALE, inputs), torch.autograd.grad(expected * SCALE, inputs), strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).norm() / wanted.norm() < tolerance


def test_large_scores_overflow_nothing() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 0.0, 1.0]])
    targets = torch.tensor([1, 2])
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    loss, gradient = differentiate(logits, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.268941, -0.268941]]))


@pytest.mark.parametrize("family", sorted(set(DISTINCT) - ENCODERS))
@pytest.mark.parametrize("adapter", ["none", "all-linear"])
def test_every_decoder_learns_what_its_logits_say(family: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied heads and heads of their own; Gemma 2 caps its scores, and is left alone."""
    monkeypatch.setattr(operation, "targets_at_once", lambda _: 10)
    called: list[int] = []
    monkeypatch.setattr("trainables.loss.head_loss", lambda *args, **named: called.append(1) or head_loss(*args, **named))
    case = Case(family=family, adapter=adapter)
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    batch = batch_of("causal-lm", ids, [12, 9, 5], num_prompt=3)
    gradients, losses = [], []
    for compute in (TrainingLoss("causal-lm"), lambda module, batch: scored_loss(module, batch, "causal-lm")[0]):
        module = build(case.config(1), case.base(), World.alone())
        loss = compute(module, batch)
        (loss * SCALE).backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in trainable(module).items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert bool(called) == (family != "gemma2")
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapter", ["none", "all-linear"])
def test_a_batch_without_targets_is_connected_to_every_parameter(adapter: str) -> None:
    case = Case(family="llama", adapter=adapter)
    config, world = case.config(1), World.alone()
    module = build(config, case.base(), world)
    batch = batch_of("causal-lm", torch.randint(3, 97, (1, 8)), num_prompt=8)
    assert len(batch.targets) == 0
    with autocast(config, world):
        loss = TrainingLoss("causal-lm")(module, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in trainable(module).values())


def test_a_head_with_a_bias_has_all_its_logits() -> None:
    case = Case(family="llama")
    module = build(case.config(1), case.base(), World.alone())
    module.lm_head.bias = nn.Parameter(torch.randn(97))
    batch = case.batch()
    assert TrainingLoss("causal-lm")(module, batch).item() == scored_loss(module, batch, "causal-lm")[0].item()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["gemma", "gpt2"])
@pytest.mark.parametrize("num_passes", [1, 2])
def test_the_gradients_of_a_tied_head_are_predicted(precision: str, family: str, num_passes: int) -> None:
    """A wide matrix and a short batch: the sum of what it gets as head and as embedding is the peak."""
    changes = (("vocab_size", 6000),)
    case = Case(family=family, precision=precision, rows=1, length=8, num_micro_batches=num_passes, changes=changes)
    assert abs(error(case, 1, measured(case, case.config(1), World.alone())[0])) < 0.02


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_head_with_an_adapter_is_predicted_with_all_its_logits(precision: str) -> None:
    case = Case(family="llama", adapter="some", precision=precision, changes=(("vocab_size", 4000),))
    config = case.config(1)
    config = replace(config, recipe=replace(config.recipe, adapter_target_modules=("q_proj", "v_proj", "lm_head")))
    peak = measured(case, config, World.alone())[0]
    targets = case.rows * (case.length - 1)
    assert abs(rank_memory(case.blueprint(), config, case.length, targets).peak_bytes / peak - 1) < 0.03


def test_the_last_part_compiles_nothing_again() -> None:
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(differentiate, backend=counter, dynamic=True)
    for num_targets in (300, 280, 2, 250):
        logits, targets = torch.randn(num_targets, VOCAB), torch.randint(0, VOCAB, (num_targets,))
        torch.testing.assert_close(compiled(logits.clone(), targets), differentiate(logits, targets))
    assert counter.frame_count == 1


@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_scores_in_parts_are_those_of_all_logits(at_once: int, is_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operation, "targets_at_once", lambda _: at_once)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(NUM_TARGETS, WIDTH), torch.randn(VOCAB, WIDTH), torch.randint(0, VOCAB, (NUM_TARGETS,))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
        logits = functional.linear(hidden, weight)
        loss, predicted = head_scores(hidden, weight, targets)
    torch.testing.assert_close(loss, functional.cross_entropy(logits.float(), targets, reduction="sum"), rtol=1e-5, atol=0)
    assert torch.equal(predicted, logits.argmax(-1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ["none", "all-linear"])
def test_the_memory_of_the_parts_is_predicted(precision: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer targets together than there are, and less memory than all of them take."""
    case = Case(family="llama", adapter=adapter, precision=precision, changes=(("vocab_size", 4000),))
    whole = measured(case, case.config(1), World.alone())[0]
    monkeypatch.setattr("spaces.memory.LOGITS_BYTES", 20 * 8 * 4000)
    peak = measured(case, case.config(1), World.alone())[0]
    assert peak < 0.9 * whole
    assert -0.06 < error(case, 1, peak) < 0.08
