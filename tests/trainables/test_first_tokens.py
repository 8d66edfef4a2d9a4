"""An encoder whose last block ends at the first tokens learns what transformers' own does."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from memory_grid import ENCODERS, Case
from unequal_rows import LENGTHS, base_of, data_of, gradients

from spaces.architecture import ENCODERS as KNOWN
from trainables.adapters import add_adapter
from trainables.batching import Batch, collate
from trainables.mesh import World
from trainables.model import build
from trainables.packed import packing_for
from trainables.parallelize import blocks_of, recompute


def batches_of(case: Case, kind: str) -> list[Batch]:
    """Return the same rows, padded, laid end to end, or those of one length together."""
    data, base = data_of(case.task), base_of(case)
    if kind == "equal":
        return [collate(data.train, np.array(rows), 0) for rows in ((0,), (1, 2, 3), (4, 5), (6,))]
    packing = packing_for(base.module, case.config(1), data) if kind == "packed" else None
    return [collate(data.train, np.arange(len(LENGTHS)), 0, packing)]


def transformers_own(case: Case) -> Any:
    """Return the model as transformers computes it: all tokens of every block."""
    module: Any = copy.deepcopy(case.base().module)
    if case.adapter != "none":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.config(1).recipe.seed)
            module = add_adapter(module, case.config(1).recipe, case.task, ())
    recompute(module, case.config(1).layout)
    return module.train()


@pytest.mark.parametrize("kind", ["padded", "packed", "equal"])
@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize("adapter", ["none", "all-linear"])
@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_it_has_the_loss_and_the_gradients_of_the_whole_model(family: str, adapter: str, recomputation: str, kind: str) -> None:
    case = Case(family=family, adapter=adapter, recomputation=recomputation)
    loss, found = gradients(build(case.config(1), base_of(case), World.alone()).train(), batches_of(case, kind), case.task)
    alone, expected = gradients(transformers_own(case), batches_of(case, "padded"), case.task)
    assert loss == pytest.approx(alone, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("family", sorted(ENCODERS - {"distilbert"}))
def test_what_follows_the_last_attention_sees_one_token_a_row(family: str, kind: str) -> None:
    case = Case(family=family)
    module = build(case.config(1), base_of(case), World.alone())
    (batch,) = batches_of(case, kind)
    seen: list[int] = []
    for block in blocks_of(module):
        block.get_submodule("intermediate").register_forward_pre_hook(lambda _, x: seen.append(x[0].numel() // x[0].shape[-1]))
    with torch.no_grad():
        module(**batch.inputs())
    num_tokens = batch.input_ids.numel()
    assert seen == [*[num_tokens] * (len(seen) - 1), len(LENGTHS)]


def test_the_families_are_those_that_are_known() -> None:
    assert set(KNOWN) == ENCODERS
