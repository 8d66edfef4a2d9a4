"""What trials of one process share of the base, and what each has for itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import batch_of, make
from memory_grid import Case

from trainables.loss import TrainingLoss
from trainables.mesh import World
from trainables.model import BaseModel, build, trainable
from trainables.optim import make_optimizer


def storages(module: torch.nn.Module, *, trained: bool) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in module.parameters() if p.requires_grad == trained}


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_trials_with_an_adapter_hold_the_frozen_weights_once(family: str, precision: str) -> None:
    case = Case(family=family, adapter="all-linear", precision=precision)
    base = case.base()
    first, second = (build(case.config(1), base, World.alone()) for _ in range(2))
    frozen = storages(first, trained=False)
    # PEFT keeps beside the head that it trains the one that was there.
    assert len(frozen & storages(second, trained=False)) >= len(frozen) - 2
    assert not storages(first, trained=True) & storages(second, trained=True)
    assert not storages(first, trained=True) & storages(base.module, trained=True)
    if precision == "fp32":
        assert len(frozen - storages(base.module, trained=True)) <= 2, "not even a first copy"


@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_a_decoder_that_becomes_a_classifier_stays_causal(family: str, tmp_path: Path) -> None:
    """Of a family without formulas, what it was saved as tells."""
    make(family, "causal-lm").save_pretrained(tmp_path)
    base = BaseModel.load(str(tmp_path), None, "sequence-classification", ("a", "b"))
    assert type(base.module).__name__.endswith("ForSequenceClassification")
    assert base.shape.causal


@pytest.mark.parametrize("adapter", ["none", "all-linear"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_training_leaves_the_base_as_it_was(family: str, adapter: str) -> None:
    case = Case(family=family, adapter=adapter)
    base = case.base()
    before = {name: value.clone() for name, value in base.module.state_dict().items()}
    module = build(case.config(1), base, World.alone())
    optimizer = make_optimizer(trainable(module), case.config(1).recipe)
    TrainingLoss(case.task)(module, batch_of(case.task, torch.randint(3, 97, (4, 16)))).backward()
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in base.module.state_dict().items())
    assert all(p.requires_grad for p in base.module.parameters()), "the next trial may train all of it"


def test_what_the_pretrained_weights_lack_is_drawn_for_each_trial() -> None:
    case = Case(family="bert", adapter="all-linear")
    base = case.base()
    object.__setattr__(base, "new_parameters", ("classifier.weight", "classifier.bias"))
    head = base.module.classifier.weight.clone()
    module = build(case.config(1), base, World.alone())
    drawn = [p for name, p in trainable(module).items() if "classifier" in name and p.dim() > 1]
    assert drawn
    assert all(not torch.equal(p, head) for p in drawn)
    assert torch.equal(base.module.classifier.weight, head)
