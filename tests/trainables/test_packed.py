"""Rows laid end to end: each has the loss and the gradients that it has alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import config_of
from memory_grid import Case
from torch.nn import functional
from unequal_rows import LENGTHS, base_of, data_of, gradients
from varlen_kernel import kernels_of, varlen_on_cpu

from spaces.adapters import num_prefix_tokens
from spaces.blueprint import FAMILIES
from spaces.flops import flops_of_blueprint
from spaces.packing import NOT_PACKED, Packing, packing_of
from trainables import packed
from trainables.batching import BatchPlan, collate
from trainables.loss import TrainingLoss, evaluated
from trainables.mesh import World
from trainables.meter import FlopWatch
from trainables.model import BaseModel, build
from trainables.packed import ATTENTION, attention_by_rows, packing_for, takes_all_rows
from trainables.packed_rows import PackedRows

PACKED = [family for family in FAMILIES if family not in NOT_PACKED]


@pytest.mark.parametrize("recomputation", ["none", "full"])
@pytest.mark.parametrize("adapter", ["none", "all-linear"])
@pytest.mark.parametrize("family", PACKED)
def test_a_row_has_the_loss_and_the_gradients_that_it_has_alone(family: str, adapter: str, recomputation: str) -> None:
    case = Case(family=family, adapter=adapter, recomputation=recomputation)
    config, base, data = case.config(1), base_of(case), data_of(case.task)
    packing = packing_for(base.module, config, data)
    assert packing is not None
    module = build(config, base, World.alone()).train()
    together = collate(data.train, np.arange(len(LENGTHS)), 0, packing)
    assert together.input_ids.shape == (1, sum(LENGTHS))
    assert together.attention_mask is None
    loss, found = gradients(module, [together], case.task)
    alone, expected = gradients(module, [collate(data.train, np.array([i]), 0) for i in range(len(LENGTHS))], case.task)
    assert loss == pytest.approx(alone, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("family", PACKED)
def test_the_kernel_for_all_rows_computes_what_those_of_one_length_do(family: str) -> None:
    case = Case(family=family)
    config, base, data = case.config(1), base_of(case), data_of(case.task)
    module = build(config, base, World.alone()).train()
    batch = collate(data.train, np.arange(len(LENGTHS)), 0, packing_for(base.module, config, data))
    expected_loss, expected = gradients(module, [batch], case.task)
    with varlen_on_cpu(base.shape.head_dim) as called:
        built = build(config, base, World.alone())
        # Evaluation asks the built model, training the base.
        assert packing_for(built, config, data) == packing_for(base.module, config, data) is not None
        loss, found = gradients(built.train(), [batch], case.task)
    assert called == ["forward"] * base.shape.num_layers + ["backward"] * base.shape.num_layers
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("is_causal", [True, False])
def test_torch_takes_what_the_kernel_for_all_rows_is_given(is_causal: bool) -> None:
    """As far as shapes and types go, which need no GPU: torch's own operation, forward and backward, on tensors without values."""
    rows = PackedRows.of(np.array(LENGTHS), Packing(first_position=0)).to(torch.device("meta"))
    shapes = {"query": (1, 8, sum(LENGTHS), 16), "key": (1, 2, sum(LENGTHS), 16), "value": (1, 2, sum(LENGTHS), 16)}
    parts = {n: torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for n, shape in shapes.items()}
    attended = attention_by_rows(**parts, rows=rows, is_causal=is_causal, scale=None, in_one_kernel=True)
    assert attended.shape == (sum(LENGTHS), 8, 16)
    attended.sum().backward()
    assert [part.grad is not None and part.grad.shape == part.shape for part in parts.values()] == [True] * 3


@pytest.mark.parametrize("rows", [np.arange(len(LENGTHS)), np.array([1, 2, 3])])
def test_where_no_kernel_knows_shared_heads_they_are_repeated_and_learn_the_same(
    rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 on a GPU: rows that are laid end to end, and rows of one length, which transformers attends to."""
    case = Case(family="llama")
    config, base, data = case.config(1), base_of(case), data_of(case.task)
    assert base.shape.num_kv_heads < base.shape.num_heads
    module = build(config, base, World.alone()).train()
    batch = collate(data.train, rows, 0, packing_for(base.module, config, data))
    expected_loss, expected = gradients(module, [batch], case.task)
    attention, heads = functional.scaled_dot_product_attention, []

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        heads.append((key.shape[1], value.shape[1], bool(options.get("enable_gqa"))))
        return attention(query, key, value, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    with kernels_of("cpu", torch.bfloat16):
        loss, found = gradients(module, [batch], case.task)
    assert set(heads) == {(base.shape.num_heads, base.shape.num_heads, False)}
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


CPU = torch.device("cpu")


def test_a_kernel_that_a_device_lacks_or_that_is_wrong_is_not_used_and_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not takes_all_rows(CPU, torch.bfloat16, 8)
    assert not caplog.records, "nobody asked for it"
    right = packed._attention_to_all_rows
    with kernels_of("cpu", torch.float32), monkeypatch.context() as patch:
        patch.setattr("trainables.packed._attention_to_all_rows", lambda *_, **__: torch.cholesky(-torch.eye(2)))
        assert not takes_all_rows(CPU, torch.bfloat16, 8)
        assert not takes_all_rows(CPU, torch.float32, 8)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("attention goes row by row: torch's kernel for all rows fails with torch.float32 on cpu: cholesky")
    with varlen_on_cpu(16, torch.bfloat16) as called:
        assert takes_all_rows(CPU, torch.bfloat16, 16)
        assert called == [], "tried once"
    caplog.clear()
    # As a kernel that does not know where rows end.
    monkeypatch.setattr("trainables.packed._attention_to_all_rows", lambda *parts, **options: right(*parts, **options).roll(1, 0))
    with pytest.raises(AssertionError), varlen_on_cpu(16):
        pass
    assert "its results are off by 1" in caplog.text


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_no_row_sees_another(family: str) -> None:
    case = Case(family=family)
    base = base_of(case)
    first, other = data_of(case.task), data_of(case.task, seed=1)
    packing = packing_for(base.module, case.config(1), first)
    module = build(case.config(1), base, World.alone()).eval()
    num_tokens = sum(LENGTHS)
    # All rows but the third are others.
    ids = [other.train.row(i)[0] for i in range(len(LENGTHS))]
    ids[2] = first.train.row(2)[0]
    mixed = replace(first.train, input_ids=np.concatenate(ids))
    assert not np.array_equal(mixed.input_ids, first.train.input_ids)
    scores = []
    for table in (first.train, mixed):
        batch = collate(table, np.arange(len(LENGTHS)), 0, packing)
        assert batch.input_ids.numel() == num_tokens
        with torch.no_grad():
            logits = module(**batch.inputs()).logits
        scores.append(logits[2] if family == "bert" else logits[0, 10:17])
    assert torch.allclose(scores[0], scores[1], atol=1e-5)
    assert not torch.allclose(scores[0], scores[0].roll(1, 0)), "nothing to tell apart"


@pytest.mark.parametrize("family", ["llama", "bert", "roberta", "gemma3_text"])
def test_padded_batches_and_those_of_one_length_are_computed_as_ever(family: str) -> None:
    case = Case(family=family, changes=(("sliding_window", 4),) if family == "gemma3_text" else ())
    plain, ours, data = case.base(), base_of(case), data_of(case.task)
    assert ours.module.config._attn_implementation == ATTENTION
    assert packing_for(plain.module, case.config(1), data) is None
    for rows in (np.arange(len(LENGTHS)), np.array([1, 2, 3])):
        batch = collate(data.train, rows, 0)
        assert batch.packed is None
        assert (batch.attention_mask is None) == (len(rows) == 3)
        (loss, predicted), (expected, expected_predicted) = (
            evaluated(build(case.config(1), base, World.alone()).eval(), batch, case.task) for base in (ours, plain)
        )
        assert float(loss) == float(expected)
        assert torch.equal(predicted, expected_predicted)


METHODS = [("none", "lora"), *(("all-linear", method) for method in ("lora", "dora", "vera", "oft", "bottleneck"))]


@pytest.mark.parametrize(
    ("family", "adapter", "method"),
    [
        *((f, a, m) for f in ("llama", "bert", "gpt2", "distilbert") for a, m in METHODS if (f, m) != ("gpt2", "oft")),
        *((f, "all-linear", "prefix") for f in ("llama", "gpt2")),
    ],
)
def test_its_flops_are_those_of_the_formula(family: str, adapter: str, method: str) -> None:
    case = Case(family=family, adapter=adapter, method=method)
    config, base, data = case.config(1), base_of(case), data_of(case.task)
    batch = collate(data.train, np.arange(len(LENGTHS)), 0, packing_for(base.module, config, data))
    module = build(config, base, World.alone()).train()
    watch = FlopWatch(base.shape, num_prefix_tokens(config.recipe))
    with watch.forward(batch):
        loss = TrainingLoss(case.task)(module, batch)
    loss.backward()
    found, expected = watch.flops().model, flops_of_blueprint(case.blueprint(), config.recipe)
    assert found.per_token == pytest.approx(expected.per_token)
    assert found.per_target == pytest.approx(expected.per_target)
    assert found.per_squared_length == pytest.approx(expected.per_squared_length)


def test_which_rows_are_packed() -> None:
    llama, bert = ({"model_type": family} for family in ("llama", "bert"))
    trial = Case(family="llama").config(1)
    assert packing_of(llama, "causal-lm", trial, 100) is not None
    assert packing_of(llama, "sequence-classification", trial, 100) is None
    assert packing_of(bert, "sequence-classification", trial, 100) is not None
    assert packing_of({"model_type": "stablelm"}, "causal-lm", trial, 100) is None
    windowed = {"model_type": "mistral", "sliding_window": 64}
    assert packing_of(windowed, "causal-lm", trial, 64) is not None
    assert packing_of(windowed, "causal-lm", trial, 65) is None
    assert packing_of(windowed | {"use_sliding_window": False}, "causal-lm", trial, 65) is not None
    assert packing_of(windowed | {"model_type": "gemma3_text"}, "causal-lm", trial, 64) is not None
    assert packing_of(windowed | {"model_type": "gemma3_text"}, "causal-lm", trial, 65) is None
    prefixed = Case(family="llama", adapter="all-linear", method="prefix").config(1)
    assert packing_of(windowed, "causal-lm", prefixed, 57) is None, "the first of the eight keys of the prefix would not be seen"
    assert packing_of(windowed, "causal-lm", prefixed, 56) is not None
    roberta = packing_of({"model_type": "roberta", "pad_token_id": 1}, "sequence-classification", trial, 100)
    assert roberta is not None
    assert roberta.first_position == 2
    assert config_of(Case(family="llama").base().module)["model_type"] == "llama"


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_plan_knows_that_there_is_no_padding(task: str) -> None:
    case = Case(family="llama" if task == "causal-lm" else "bert", rows=4)
    data = data_of(task, lengths=(3, 9, 12, 5, 30, 8, 8, 8))
    packing = packing_for(base_of(case).module, case.config(1), data)
    packed, padded = BatchPlan(case.config(1), data, packing), BatchPlan(case.config(1), data)
    assert packed.sizes().padded_tokens.tolist() == packed.sizes().tokens.tolist()
    assert padded.sizes().padded_tokens.sum() > packed.sizes().padded_tokens.sum()
    for step in range(packed.num_steps):
        for ours, theirs in zip(packed.micro_batches(step, 0), padded.micro_batches(step, 0), strict=True):
            assert ours.targets.tolist() == theirs.targets.tolist()
            assert ours.row_of_targets(task).tolist() == theirs.row_of_targets(task).tolist()


def test_an_encoder_of_a_family_that_is_not_known_trains_padded(tmp_path: Path) -> None:
    """Its blocks are no blocks that transformers could recompute one by one."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    sizes = {"vocab_size": 97, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    AlbertForSequenceClassification(AlbertConfig(**sizes, intermediate_size=48, num_labels=3)).save_pretrained(tmp_path)
    data = data_of("sequence-classification")
    base = BaseModel.load(str(tmp_path), None, data.task, data.label_names)
    config = Case(family="bert").config(1)
    assert packing_for(base.module, config, data) is None
    module = build(config, base, World.alone())
    loss, found = gradients(module, [collate(data.train, np.arange(len(LENGTHS)), 0)], data.task)
    assert loss > 0
    assert found
