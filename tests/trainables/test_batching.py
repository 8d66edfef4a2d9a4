"""Batches are a function of the recipe: brute force over what every rank is dealt."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_data import task_data

from spaces.config import Layout, Recipe, TrialConfig
from spaces.packing import Packing
from trainables.batching import Batch, BatchPlan, collate, cuts, evaluation_batches
from trainables.data import TaskData, TokenTable
from trainables.mesh import World
from trainables.tokenization import Encoded

NUM_ROWS = 53


def data(num_rows: int = NUM_ROWS) -> TaskData:
    rng = np.random.default_rng(1)
    # Each row's first token is its own number, so that rows can be told apart after collation.
    rows = [Encoded(input_ids=[i + 1, *rng.integers(100, 200, size=rng.integers(2, 40))], targets=None) for i in range(num_rows)]
    table = TokenTable.build(rows, [i % 2 for i in range(num_rows)])
    return task_data("sequence-classification", table, table, ("a", "b"))


def config(world_size: int, micro: int, *, epochs: float = 2.0, fraction: float = 1.0, seed: int = 0) -> TrialConfig:
    recipe = Recipe(
        learning_rate=1,
        global_batch_size=8,
        dataset_fraction=fraction,
        epochs=epochs,
        warmup_fraction=0,
        weight_decay=0,
        precision="fp32",
        seed=seed,
        adapter="none",
    )
    return TrialConfig(recipe=recipe, layout=Layout(world_size=world_size, strategy="ddp", micro_batch_size=micro))


def rows_of_step(plan: BatchPlan, step: int, world_size: int) -> list[int]:
    """The real rows that all ranks together are dealt in a step; dummies have no label."""
    rows = []
    for rank in range(world_size):
        for batch in plan.micro_batches(step, rank):
            rows += [int(batch.input_ids[row, 0]) for row in batch.positions]
    return sorted(rows)


@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_every_layout_trains_the_same_rows_in_every_step(world_size: int, micro: int) -> None:
    reference, plan = BatchPlan(config(1, 8), data()), BatchPlan(config(world_size, micro), data())
    assert plan.num_steps == reference.num_steps
    for step in range(plan.num_steps):
        assert rows_of_step(plan, step, world_size) == rows_of_step(reference, step, 1)
        counts = {len(plan.micro_batches(step, rank)) for rank in range(world_size)}
        assert len(counts) == 1, "ranks would wait for each other for ever"
        assert counts == {-(-len(rows_of_step(plan, step, world_size)) // (world_size * micro))}


def by_tokens(world_size: int, budget: int, *, epochs: float = 2.0) -> TrialConfig:
    made = config(world_size, 1, epochs=epochs)
    return replace(made, layout=replace(made.layout, micro_batch_size=None, micro_batch_tokens=budget))


@pytest.mark.parametrize("packing", [None, Packing(first_position=0)])
@pytest.mark.parametrize("budget", [1, 30, 60, 100, 10_000])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_budget_trains_the_same_rows_and_is_kept_by_all_but_single_rows(
    world_size: int, budget: int, packing: Packing | None
) -> None:
    reference, plan = BatchPlan(config(1, 8), data()), BatchPlan(by_tokens(world_size, budget), data(), packing)
    sizes = plan.sizes()
    assert plan.num_steps == reference.num_steps
    for step in range(plan.num_steps):
        rows = rows_of_step(reference, step, 1)
        dealt = [plan.micro_batches(step, rank) for rank in range(world_size)]
        real = [b for rank in dealt for b in rank if len(b.targets)]
        assert sum(len(b.targets) for b in real) == len(rows) == sizes.rows[step]
        seen = sorted(int(row[0]) for b in real for row in rows_of(b))
        assert seen == rows, "every row once"
        assert all(b.input_ids.numel() <= budget or b.num_rows == 1 for b in real)
        assert {len(rank) for rank in dealt} == {int(sizes.micro_batches[step])}, "ranks would wait for each other for ever"
        assert sizes.micro_tokens[step] == max(b.input_ids.numel() for b in real)
        assert int(sizes.micro_rows[step]) in {b.num_rows for b in real if b.input_ids.numel() == sizes.micro_tokens[step]}
        assert len(real) == min(len(rows), world_size * sizes.micro_batches[step]), "no rank is idle that need not be"


def rows_of(batch: Batch) -> list[torch.Tensor]:
    """The real rows of a batch, laid end to end or not."""
    if batch.packed is None:
        return list(batch.input_ids)
    return list(torch.tensor_split(batch.input_ids[0], batch.packed.starts[1:]))


def every_cut(lengths: list[int], num_parts: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(1, len(lengths)), num_parts - 1))


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8).map(sorted),
    budget=st.integers(1, 60),
    num_ranks=st.integers(1, 3),
    is_padded=st.booleans(),
)
def test_a_global_batch_is_cut_into_the_fewest_and_most_even_parts(
    lengths: list[int], budget: int, num_ranks: int, is_padded: bool
) -> None:
    """Against all ways to cut it."""

    def largest(ends: tuple[int, ...]) -> int:
        """Tokens of the largest part of several rows."""
        parts = [lengths[a:b] for a, b in itertools.pairwise((0, *ends, len(lengths)))]
        return max((len(p) * p[-1] if is_padded else sum(p) for p in parts if len(p) > 1), default=0)

    found = tuple(cuts(lengths, budget, num_ranks, is_padded=is_padded))
    fewest = next(n for n in range(1, 9) if any(largest(ends) <= budget for ends in every_cut(lengths, n)))
    wanted = min(len(lengths), -(-fewest // num_ranks) * num_ranks)
    assert len(found) + 1 == wanted
    assert largest(found) == min(largest(ends) for ends in every_cut(lengths, wanted))


def test_the_fullest_steps_are_the_largest_of_one_pass_and_of_several() -> None:
    sizes = BatchPlan(by_tokens(1, 150), data()).sizes()
    is_single = sizes.micro_batches == 1
    assert {int(n) for n in sizes.micro_batches} >= {1, 2}
    found = {bool(is_single[step]): step for step in sizes.fullest}
    assert list(sizes.fullest) == sorted(sizes.fullest)
    assert 0 not in sizes.fullest
    for kind, step in found.items():
        assert sizes.micro_tokens[step] == sizes.micro_tokens[1:][is_single[1:] == kind].max()
    assert len(found) == 2
    (only,) = BatchPlan(by_tokens(1, 10**6), data()).sizes().fullest
    assert only == 1 + int(np.argmax(BatchPlan(by_tokens(1, 10**6), data()).sizes().padded_tokens[1:]))


@pytest.mark.parametrize("epochs", [0.5, 1.0, 2.0, 2.5])
def test_every_row_is_trained_once_per_epoch(epochs: float) -> None:
    plan = BatchPlan(config(2, 4, epochs=epochs), data())
    counts = Counter(row for step in range(plan.num_steps) for row in rows_of_step(plan, step, 2))
    assert sum(counts.values()) == round(epochs * NUM_ROWS)
    assert set(counts.values()) <= {int(epochs), int(epochs) + 1}


@pytest.mark.parametrize(("epochs", "fraction", "distinct"), [(2.0, 1.0, NUM_ROWS), (3.0, 0.5, 27), (0.25, 1.0, 13), (1.5, 0.2, 11)])
def test_rows_that_are_trained_again_are_no_more_data(epochs: float, fraction: float, distinct: int) -> None:
    plan = BatchPlan(config(2, 2, epochs=epochs, fraction=fraction), data())
    seen = {row for step in range(plan.num_steps) for row in rows_of_step(plan, step, 2)}
    assert plan.num_distinct_rows == len(seen) == distinct


def test_another_seed_is_another_order_of_the_same_rows() -> None:
    a, b = BatchPlan(config(1, 8, seed=0), data()), BatchPlan(config(1, 8, seed=1), data())
    in_order = [[rows_of_step(plan, step, 1) for step in range(plan.num_steps)] for plan in (a, b)]
    assert in_order[0] != in_order[1]


def test_the_sizes_are_those_of_the_batches() -> None:
    plan = BatchPlan(config(2, 2), data())
    sizes = plan.sizes()
    for step in range(plan.num_steps):
        real = [b for rank in range(2) for b in plan.micro_batches(step, rank) if len(b.targets)]
        assert sizes.rows[step] == sum(len(b.input_ids) for b in real)
        assert sizes.targets[step] == sum(len(b.targets) for b in real) == plan.num_targets(step)
        assert sizes.micro_targets[step] == max(len(b.targets) for b in real)
        masks = [torch.ones_like(b.input_ids) if b.attention_mask is None else b.attention_mask for b in real]
        lengths = [mask.sum(1) for mask in masks]
        assert sizes.tokens[step] == sum(int(each.sum()) for each in lengths)
        assert sizes.padded_tokens[step] == sum(b.input_ids.numel() for b in real)
        assert sizes.squared_lengths[step] == sum(float((each.double() ** 2).sum()) for each in lengths)


def test_buckets_by_length_save_most_of_the_padding() -> None:
    plan, sizes = BatchPlan(config(1, 8), data()), BatchPlan(config(1, 8), data()).sizes()
    assert plan.num_steps > 10
    assert 1 - sizes.tokens.sum() / sizes.padded_tokens.sum() < 0.15  # unsorted: about 0.4


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_rows_are_disjoint_and_complete(world_size: int) -> None:
    table = data().evaluation
    shares = []
    for rank in range(world_size):
        world = World(rank=rank, world_size=world_size, device=torch.device("cpu"), control_group=None)
        shares.append(evaluation_batches(table, world, training_tokens=1))
    assert len({len(share) for share in shares}) == 1
    rows = np.concatenate([batch for share in shares for batch in share])
    assert sorted(rows) == list(range(NUM_ROWS))


@pytest.mark.parametrize("training_tokens", [1_000, 4_000, 100_000])
def test_what_fits_to_train_fits_to_evaluate(training_tokens: int) -> None:
    table = data(num_rows=4_000).evaluation
    world = World(rank=0, world_size=1, device=torch.device("cuda"), control_group=None)
    batches = evaluation_batches(table, world, training_tokens=training_tokens)
    padded = [len(rows) * table.lengths[rows].max() for rows in batches]
    limit = min(training_tokens, 16_384)
    assert 0.9 * limit < max(padded) <= limit
    wide = evaluation_batches(table, world, training_tokens=100, vocab_size=100_000)
    assert max(len(rows) * table.lengths[rows].max() for rows in wide) <= 100


def test_a_batch_without_rows_is_one_row_that_counts_nothing() -> None:
    batch = collate(data().train, np.zeros(0, dtype=np.int64), 0)
    assert batch.input_ids.shape[0] == 1
    assert len(batch.targets) == len(batch.positions) == 0
