"""The grid of a comparison of methods, and what is said of its cells; `tests/integration/test_compare.py` runs one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from synthetic import ACCURACY, SECONDS, confirmed_event, results_of, synthetic_events
from tiny import make_spec

from search.compare import (
    LADDER,
    RATES,
    _add,
    _with_points,
    confirm_best,
    further_rates,
    grid_spec,
    parse_fractions,
    search,
)
from search.comparison import METHODS, Cell, Comparison, Method, cells_of, configs_of, pair_of, pairs_of, render, rows_of, write
from search.confidence import confirmed, told_apart
from search.errors import NoResult, UserError
from search.ledger import Ledger, replay
from search.record import TrialRecord, TrialState
from search.report import write_report
from search.results import Results
from search.store import Store
from spaces.config import TrialConfig
from spaces.presets import usual_rate
from spaces.spec import SearchSpec


@pytest.mark.parametrize(
    ("text", "method", "name"),
    [
        ("none", Method(adapter="none"), "full"),
        ("lora", Method(adapter="lora", rank=16), "lora 16"),
        ("lora:4", Method(adapter="lora", rank=4), "lora 4"),
        (" dora:8 ", Method(adapter="dora", rank=8), "dora 8"),
        ("lora:16:nf4", Method(adapter="lora", rank=16, quantization="nf4"), "lora 16 nf4"),
    ],
)
def test_a_method_is_read_and_named(text: str, method: Method, name: str) -> None:
    assert Method.parse(text) == method
    assert method.name == name


@pytest.mark.parametrize("text", ["", "lorra", "lora:0", "lora:x", "lora:4:nf3"])
def test_what_is_no_method_is_told_with_what_is_allowed(text: str) -> None:
    with pytest.raises(UserError, match=r"--methods: .* is no method; allowed: none lora .*lora:16:nf4"):
        Method.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("none:4", "none takes neither a rank nor a quantised base; allowed: none$"),
        ("ia3:4", "ia3 takes neither a rank nor a quantised base; allowed: ia3$"),
        ("vera:4:nf4", "vera takes a rank and no quantised base; allowed: vera:16$"),
        ("lora:4:nf4:8", "lora takes a rank and a base; allowed: lora:16:nf4$"),
    ],
)
def test_what_a_method_does_not_take_is_told(text: str, why: str) -> None:
    with pytest.raises(UserError, match=f"--methods: '{text}' is no method: {why}"):
        Method.parse(text)


@pytest.mark.parametrize("text", ["", "0", "0.1,2", "a"])
def test_shares_of_the_rows_are_checked(text: str) -> None:
    with pytest.raises(UserError, match="allowed: numbers above 0 and up to 1"):
        parse_fractions(text)
    assert parse_fractions("0.01,1") == (0.01, 1.0)


def test_the_grid_is_every_method_at_every_share_with_every_rate_and_nothing_else(tmp_path: Path) -> None:
    space = {"epochs": {"int": [1, 4]}, "global_batch_size": {"choice": [8, 32]}, "world_size": {"choice": [1, 2]}}
    fractions = (1.0, 0.1)
    spec = grid_spec(make_spec(tmp_path, space=space), [], METHODS, fractions).spec
    points = spec.sampler.points_to_evaluate or ()
    assert spec.budget.max_trials == len(points) == len(METHODS) * len(fractions) * len(RATES)
    configs = {TrialConfig.from_params(spec.space.first(**point)) for point in points}
    assert len(configs) == len(points)
    assert {(c.recipe.epochs, c.recipe.global_batch_size, c.layout.world_size) for c in configs} == {(4, 8, 1)}
    assert set(map(Method.of, configs)) == {*METHODS}
    rates = {c.recipe.learning_rate for c in configs if c.recipe.adapter == "dora"}
    assert rates == {factor * usual_rate("dora", 32) for factor in RATES}


def test_full_fine_tuning_alone_is_a_grid_too(tmp_path: Path) -> None:
    spec = grid_spec(make_spec(tmp_path, space={}), [], (Method(adapter="none"),), (1.0,)).spec
    assert spec.budget.max_trials == len(RATES)


def test_other_knobs_have_the_usual_value_or_the_first_and_limits_in_time_stay(tmp_path: Path) -> None:
    space = {"adapter": "none", "global_batch_size": {"int": [4, 64]}, "lora_alpha": {"log_uniform": [1, 64]}}
    path = make_spec(tmp_path, space=space, budget={"minutes": 3, "patience": 5}, name="my")
    spec = grid_spec(path, [], (METHODS[1], METHODS[1]), (1.0, 1.0)).spec
    assert (spec.space.global_batch_size.ends(), spec.space.lora_alpha.ends()) == ([16], [32.0])
    assert (spec.budget.max_trials, spec.budget.minutes, spec.budget.patience) == (len(RATES), 3, None)
    assert (spec.name, spec.sampler.method) == ("my-methods", "points")


@pytest.mark.parametrize("text", ["dora:16:int8", "lora:64"])
def test_a_method_that_nothing_can_train_is_refused(tmp_path: Path, text: str) -> None:
    """Of a model that is 32 wide."""
    with pytest.raises(UserError, match=r"--methods: (dora 16 int8: dora trains the norms|lora 64: rank 64 exceeds)"):
        grid_spec(make_spec(tmp_path, space={}), [], (METHODS[0], Method.parse(text)), (1.0,))


def test_usual_methods_that_a_model_cannot_be_trained_with_are_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "mixtral").mkdir()
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 97}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **shape, **experts}
    (tmp_path / "mixtral/config.json").write_text(json.dumps(config))
    model = {"name": str(tmp_path / "mixtral"), "task": "causal-lm", "max_length": 32}
    path = make_spec(tmp_path, space={}, model=model, objectives=[{"metric": "eval_loss"}, {"metric": "train_seconds"}])
    told: list[str] = []
    spec = grid_spec(path, [], None, (1.0,), told.append).spec
    kept = {Method.of(TrialConfig.from_params(spec.space.first(**point))).name for point in spec.sampler.points_to_evaluate or ()}
    assert kept == {"full", "lora 4", "lora 16", "lora 16 nf4"}
    assert [line.split(": ")[:2] for line in told[:-1]] == [["left out", "dora 16"], ["left out", "bottleneck 16"]]


def test_a_method_is_held_against_the_adapter_knobs_and_the_workers_of_the_file(tmp_path: Path) -> None:
    given = {"strategy": "fsdp", "offload": "cpu", "adapter": "none", "lora_alpha": {"log_uniform": [1, 64]}}
    path = make_spec(tmp_path, space=given, resources={"gpus_per_worker": 1})
    named = (METHODS[0], Method.parse("lora:16"))
    assert grid_spec(path, [], named, (1.0,)).spec.space.adapter.ends() == ["none", "lora"]
    told: list[str] = []
    spec = grid_spec(path, [], None, (1.0,), told.append).spec
    assert [line.split(":")[1] for line in told[:-1]] == [" lora 16 nf4"], "which is not left to the host"
    assert spec.budget.max_trials == (len(METHODS) - 1) * len(RATES)
    path = make_spec(tmp_path, space={**given, "offload": "none", "adapter": "lora", "lora_target_modules": "query,value"})
    assert grid_spec(path, [], named, (1.0,)).spec.space.lora_target_modules.ends() == ["query,value"]


def test_objectives_without_a_score_are_refused(tmp_path: Path) -> None:
    objectives = [{"metric": "train_seconds"}, {"metric": "peak_memory_bytes"}]
    with pytest.raises(UserError, match="none says how good a model is"):
        grid_spec(make_spec(tmp_path, objectives=objectives), [], METHODS[:1], (1.0,))


def cell(method: Method, number: int, values: list[float]) -> Cell:
    events = [
        *synthetic_events(12),
        *(confirmed_event(number, s, accuracy=0.5, seconds=9.0, test=v) for s, v in enumerate(values, 1)),
    ]
    record = replay(events).records[number]
    return Cell(method=method, fraction=0.1, record=record, quality=confirmed(record, "accuracy"))


def test_the_best_is_named_with_what_the_seeds_do_not_tell_apart_from_it() -> None:
    cells = (
        cell(METHODS[0], 0, [0.70, 0.71, 0.72]),
        cell(METHODS[1], 1, [0.80, 0.81, 0.82]),
        cell(METHODS[2], 2, [0.79, 0.81, 0.83]),
        cell(METHODS[3], 4, []),
    )
    comparison = Comparison(name="c", objective=ACCURACY, cells=cells)
    assert [comparison.verdict(c) for c in cells] == ["behind", "best", "not told apart", "no result"]
    assert [row["verdict"] for row in rows_of(comparison)] == ["behind", "best", "not told apart", "no result"]
    text = render(comparison)
    assert "0.1 of the rows: lora 4; not told apart: lora 16" in text
    assert "3 further seeds, on the test rows" in text
    alone = Comparison(name="c", objective=ACCURACY, cells=cells[:2])
    assert "lora 4, told apart from the rest" in render(alone)
    worst = Comparison(name="c", objective=replace(ACCURACY, direction="minimize"), cells=cells[:2])
    assert worst.rivals(0.1) == [cells[0]]


def test_of_several_comparisons_each_has_to_be_surer() -> None:
    """Alone the second is told apart from the first, beside a third it is not: Bonferroni's level is 97.5 % then."""
    seeds = ([0.70, 0.71, 0.72], [0.741, 0.731, 0.721], [0.5, 0.51, 0.52])
    cells = tuple(cell(METHODS[i], i, list(scores)) for i, scores in enumerate(seeds))
    first, second = (quality for c in cells[:2] if (quality := c.quality) is not None)
    assert told_apart(first, second, 0.90)
    assert not told_apart(first, second, 0.95)
    level = next(x / 1000 for x in range(900, 1000) if not told_apart(first, second, x / 1000))
    with patch("search.comparison.LEVEL", level - 0.005):
        assert Comparison(name="c", objective=ACCURACY, cells=cells[:2]).rivals(0.1) == [cells[1]]
        assert Comparison(name="c", objective=ACCURACY, cells=cells).rivals(0.1) == [cells[1], cells[0]]


def test_with_one_further_seed_nothing_is_told_apart_and_that_is_said() -> None:
    cells = (cell(METHODS[0], 0, [0.70]), cell(METHODS[1], 1, [0.90]))
    text = render(Comparison(name="c", objective=ACCURACY, cells=cells))
    assert "with fewer than 2 further seeds nothing is told apart: --seeds 2 or more" in text
    assert "not told apart:" not in text
    text = render(Comparison(name="c", objective=ACCURACY, cells=(*cells, cell(METHODS[2], 2, [0.50, 0.51, 0.52]))))
    assert "nothing is told apart" not in text
    assert "0.1 of the rows: lora 4; not told apart:" in text, "seeds of one method that failed say nothing of the others"


def test_times_have_intervals_and_noise_is_told() -> None:
    cells = (cell(METHODS[0], 0, [0.70, 0.71, 0.72]), cell(METHODS[1], 1, [0.80, 0.81, 0.82]))
    record = cells[0].record
    assert record is not None
    noisy = replace(cells[0], record=replace(record, values={**record.values, "time_drift": 0.5}))
    comparison = Comparison(name="c", objective=ACCURACY, cells=(noisy, cells[1]))
    (row, _) = rows_of(comparison)
    known = confirmed(record, "train_seconds")
    assert known is not None
    assert (row["train_seconds"], row["train_seconds_half_width"]) == (known.estimate.mean, known.estimate.half_width)
    assert known.short_text in render(comparison)
    assert f"trial {record.number} is noisy: its pace changed by 50%" in render(comparison)


def test_a_method_without_a_result_is_told_with_the_reason() -> None:
    events = synthetic_events(12)
    records = replay(events).records
    trained = dict.fromkeys(pair_of(record.trial_config) for record in records.values())
    never = (Method(adapter="dora", rank=2), 0.5)
    cells = cells_of(list(records.values()), (SECONDS, ACCURACY), [*trained, never])
    assert {c.why for c in cells if c.method == never[0]} == {"not trained"}
    assert {(c.method, c.fraction) for c in cells} == {*trained, never}
    assert [c.fraction for c in cells] == sorted(c.fraction for c in cells)
    infeasible = next(record for record in records.values() if not record.feasible)
    own = next(c for c in cells if (c.method, c.fraction) == pair_of(infeasible.trial_config))
    assert (own.record, own.why) == (None, "world_size_within_cluster")
    comparison = Comparison(name="c", objective=ACCURACY, cells=tuple(cells))
    assert "no result: world_size_within_cluster" in render(comparison)


def test_of_rates_that_score_alike_the_one_with_the_least_loss_is_taken() -> None:
    plain = cell(METHODS[0], 0, [0.7, 0.8]).record
    assert plain is not None
    trial, records = plain.trial_config, []
    for i, loss in enumerate((0.26, 0.01, 0.07)):
        config = replace(trial, recipe=replace(trial.recipe, learning_rate=1e-3 * 2**i))
        records.append(replace(plain, number=i, config=config.to_dict(), values={**plain.values, "accuracy": 1.0, "eval_loss": loss}))
    (found,) = cells_of(records, (ACCURACY,), [pair_of(trial)])
    assert found.record is not None
    assert (found.record.number, found.is_at_edge) == (1, False)


@pytest.mark.parametrize(
    ("scores", "is_marked"), [((0.5, 0.6, 0.7), True), ((0.5, 0.7, 0.6), False), ((0.7, 0.6, 0.5), True), ((0.7,), False)]
)
def test_a_best_rate_at_the_edge_of_those_that_were_tried_is_marked(scores: tuple[float, ...], is_marked: bool) -> None:
    plain = cell(METHODS[0], 0, [0.7, 0.8]).record
    assert plain is not None
    trial, records = plain.trial_config, {}
    for i, score in enumerate(scores):
        config = replace(trial, recipe=replace(trial.recipe, learning_rate=1e-3 * 2**i))
        records[i] = replace(plain, number=i, config=config.to_dict(), values={**plain.values, "accuracy": score})
    (found,) = cells_of(list(records.values()), (ACCURACY,), [pair_of(trial)])
    assert found.record is not None
    assert found.record.values["accuracy"] == 0.7
    comparison = Comparison(name="c", objective=ACCURACY, cells=(found,))
    assert [row["is_rate_at_edge"] for row in rows_of(comparison)] == [is_marked]
    assert ("*: the lowest or the highest rate" in render(comparison)) == is_marked


def grown(store: Store, outcome: Callable[[str, float], float | str]) -> list[list[tuple[str, float]]]:
    """Let a comparison grow until no further rate is to be tried; return what it had trained, round by round.

    Args:
        store: of the comparison.
        outcome: of an adapter and a factor of its usual rate, the score, or what the trial failed by.
    """
    plain = cell(METHODS[0], 0, [0.7]).record
    assert plain is not None
    rounds = []
    while True:
        spec, records = store.load_spec().spec, {}
        assert spec.budget.max_trials == len(spec.sampler.points_to_evaluate or ())
        rounds.append([(c.recipe.adapter, c.recipe.learning_rate / usual_rate(c.recipe.adapter, 32)) for c in configs_of(spec)])
        assert len(set(rounds[-1])) == len(rounds[-1]), "nothing is tried twice"
        for number, (config, (adapter, factor)) in enumerate(zip(configs_of(spec), rounds[-1], strict=True)):
            found = outcome(adapter, factor)
            record = replace(plain, number=number, config=config.to_dict(), params={"dataset_fraction": 0.5}, confirmations=[])
            if isinstance(found, str):
                record = replace(record, state=TrialState.FAIL, values={}, error={"kind": found, "message": ""})
            else:
                record = replace(record, values={"accuracy": found})
            records[number] = record
        further = further_rates(spec, results_with(records))
        assert further_rates(spec, results_with(dict(list(records.items())[:-1]))) == [], "a limit came before all were trained"
        if not further:
            return rounds
        _with_points(store, spec, further, "rates")


def results_with(records: dict[int, TrialRecord]) -> Results:
    return SimpleNamespace(objectives=(ACCURACY,), state=SimpleNamespace(records=records))  # type: ignore[return-value]


@pytest.mark.parametrize("best", [2**-6, 2**-3, 2**-1, 1.0, 2.0, 4.0, 2**3.4, 2**9])
def test_rates_are_tried_beyond_the_ends_until_the_best_one_of_all_lies_between_two(tmp_path: Path, best: float) -> None:
    """Of a score with one peak, at `best` times the usual rate for full fine-tuning; that of LoRA is the middle one at once."""
    loaded = grid_spec(make_spec(tmp_path, space={}), [], METHODS[:2], (0.5,))
    store = Store.create(loaded)
    rounds = grown(store, lambda adapter, factor: -abs(math.log(factor / (best if adapter == "none" else 2.0))))
    factors = [factor for adapter, factor in rounds[-1] if adapter == "none"]
    assert len(rounds[-1]) == len(factors) + len(RATES)
    peak = min(LADDER, key=lambda factor: abs(math.log(factor / best)))
    assert min(factors, key=lambda factor: abs(math.log(factor / best))) == pytest.approx(peak)
    assert peak in (LADDER[0], LADDER[-1]) or min(factors) < 0.9 * peak < 1.1 * peak < max(factors)
    assert len(factors) <= len(RATES) + abs(LADDER.index(peak) - LADDER.index(2.0)), "no more than needed"
    assert _add(store, loaded.spec) is None


@pytest.mark.parametrize("failing", LADDER)
@pytest.mark.parametrize("best", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("kind", ["worker_lost", "diverged"])
def test_a_rate_that_failed_is_not_tried_again(tmp_path: Path, failing: float, best: float, kind: str) -> None:
    store = Store.create(grid_spec(make_spec(tmp_path, space={}), [], METHODS[:1], (0.5,)))
    grown(store, lambda _, factor: kind if factor == pytest.approx(failing) else -abs(math.log(factor / best)))


def test_where_all_rates_diverged_lower_ones_are_tried(tmp_path: Path) -> None:
    store = Store.create(grid_spec(make_spec(tmp_path, space={}), [], METHODS[:1], (0.5,)))
    rounds = grown(store, lambda _, factor: "diverged" if factor > 0.3 else -factor)
    assert min(factor for _, factor in rounds[-1]) == pytest.approx(0.125)
    others = Store.create(grid_spec(make_spec(tmp_path / "others", space={}), [], METHODS[:1], (0.5,)))
    assert len(grown(others, lambda *_: "worker_lost")) == 1


def test_a_comparison_that_is_cut_off_while_it_is_lengthened_goes_on_with_further_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create(grid_spec(make_spec(tmp_path, space={}), [], METHODS[:1], (0.5,)))
    ledger = Ledger(store.ledger_path)
    ledger.append("search_started", name=store.name)
    ledger.append("search_finished", reason="trials")
    assert replay(ledger.events()).finished
    point, spec = {"adapter": "none", "dataset_fraction": 0.5, "learning_rate": 8 * usual_rate("none", 32)}, store.load_spec().spec
    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_spec", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _with_points(store, spec, [point], "rates")
    assert not replay(ledger.events()).finished, "so the same command looks for further points again"
    assert point not in (store.load_spec().spec.sampler.points_to_evaluate or ())
    assert _with_points(store, spec, [point], "rates")
    assert (store.load_spec().spec.sampler.points_to_evaluate or ())[-1] == point


def test_a_comparison_of_which_nothing_succeeded_tries_lower_rates_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, rounds = grid_spec(make_spec(tmp_path, space={}), [], METHODS[:1], (0.5,)), []
    root = tmp_path / "runs" / str(loaded.spec.name)

    def diverge(*_: object) -> Store:
        store = Store(root=root) if root.exists() else Store.create(loaded)
        ledger, spec = Ledger(store.ledger_path), store.load_spec().spec
        if not ledger.events():
            ledger.append("search_started", name=store.name)
        rounds.append(len(configs_of(spec)))
        for number, config in enumerate(configs_of(spec)):
            params = {"dataset_fraction": 0.5}
            ledger.append("trial_started", number=number, params=params, config=config.to_dict(), command="", predicted={})
            error = {"kind": "diverged", "message": "not finite"}
            ledger.append("trial_finished", number=number, state="FAIL", values={}, error=error, constraints={})
        ledger.append("search_finished", reason="trials")
        raise NoResult("no trial succeeded")

    monkeypatch.setattr("search.compare.start", diverge)
    monkeypatch.setattr("search.compare.resume", diverge)
    store = search(loaded, lambda _: None)
    assert rounds == [3, 4, 5, 6]
    with pytest.raises(NoResult, match="nothing to compare"):
        confirm_best(store, num_seeds=1, say=print)


def test_what_ends_a_search_before_its_trials_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = grid_spec(make_spec(tmp_path, space={}), [], METHODS[:1], (0.5,))

    def refuse(*_: object) -> Store:
        Ledger(Store.create(loaded).ledger_path).append("search_started", name="tiny")
        raise NoResult("the untrained model cannot be evaluated")

    monkeypatch.setattr("search.compare.start", refuse)
    with pytest.raises(NoResult, match="untrained"):
        search(loaded, lambda _: None)


def test_the_domains_of_the_data_are_columns(tmp_path: Path) -> None:
    scored = cell(METHODS[0], 0, [0.7, 0.8])
    assert scored.record is not None
    record = replace(scored.record, values={**scored.record.values, "accuracy.law": 0.5, "accuracy.art": 0.9})
    comparison = Comparison(name="c", objective=ACCURACY, cells=(replace(scored, record=record), cell(METHODS[3], 4, [])))
    assert [(row["accuracy.art"], row["accuracy.law"]) for row in rows_of(comparison)] == [(0.9, 0.5), (None, None)]
    heading, first, *_ = render(comparison).splitlines()
    assert heading.split()[3:5] == ["accuracy.art", "accuracy.law"]
    assert " 0.9 " in first
    table, _ = write(comparison, tmp_path)
    assert "accuracy.art,accuracy.law" in table.read_text()


def test_of_every_domain_it_is_told_which_method_is_the_best_there() -> None:
    """The one that is the best over all is behind on one of two domains, by seeds that tell it."""

    def scored(method: Method, law: list[float], art: list[float]) -> Cell:
        both = list(zip(law, art, strict=True))
        events = synthetic_events(12) + [
            confirmed_event(0, seed, accuracy=0.5, seconds=9.0, test=(one + other) / 2) for seed, (one, other) in enumerate(both, 1)
        ]
        record = replay(events).records[0]
        done = [
            replace(c, test={**c.test, "accuracy.law": one, "accuracy.art": other})
            for c, (one, other) in zip(record.confirmations, both, strict=True)
        ]
        record = replace(record, confirmations=done, values={**record.values, "accuracy.law": 0.1, "accuracy.art": 0.1})
        return Cell(method=method, fraction=0.1, record=record, quality=confirmed(record, "accuracy"))

    cells = (scored(METHODS[0], [0.80, 0.81, 0.82], [0.9, 0.91, 0.92]), scored(METHODS[1], [0.90, 0.91, 0.92], [0.3, 0.31, 0.32]))
    comparison = Comparison(name="c", objective=ACCURACY, cells=cells)
    assert [comparison.rivals(0.1, domain) for domain in (None, "law", "art")] == [[cells[0]], [cells[1]], [cells[0]]]
    text = render(comparison)
    assert "0.1 of the rows: full, told apart from the rest" in text
    assert "0.1 of the rows, accuracy on law: lora 4, told apart from the rest" in text
    assert "0.1 of the rows, accuracy on art: full, told apart from the rest" in text
    assert "0.810 ± 0.025" in text


def test_table_and_picture_are_written(tmp_path: Path) -> None:
    comparison = Comparison(name="c", objective=ACCURACY, cells=(cell(METHODS[0], 0, [0.7, 0.8]), cell(METHODS[3], 4, [])))
    table, picture = write(comparison, tmp_path)
    assert len(table.read_text().splitlines()) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_report_of_a_comparison_says_which_method_is_the_best_and_that_of_another_search_does_not(tmp_path: Path) -> None:
    events = synthetic_events(12)
    records = [r for r in replay(events).records.values() if r.state is TrialState.COMPLETE]
    methods, fractions = (list(dict.fromkeys(part)) for part in zip(*(pair_of(r.trial_config) for r in records), strict=True))
    spec = grid_spec(make_spec(tmp_path, space={}), [], methods, fractions).spec
    events += [confirmed_event(records[0].number, seed, accuracy=0.5, seconds=9.0, test=0.7 + seed / 100) for seed in (1, 2)]
    plain = write_report(results_of(replay(events), spec, tmp_path / "plain"))
    assert "methods_csv" not in plain
    assert "Which method" not in plain["html"].read_text()
    events.append({"event": "compared", "time": events[-1]["time"] + 1})
    paths = write_report(results_of(replay(events), spec, tmp_path / "compared"))
    page = paths["html"].read_text().partition("<script")[0]
    assert "Which method is the best for how much data?" in page
    assert f"<td>{Method.of(records[0].trial_config).name}</td><td>0.715 ± 0.064</td>" in page
    assert "2 further seeds, on the test rows" in page
    assert "data:image/png;base64," in page
    assert len(paths["methods_csv"].read_text().splitlines()) > len(methods)
    assert paths["methods_png"].read_bytes().startswith(b"\x89PNG")


def spec_of(path: Path, methods: str, *fractions: float, **values: object) -> SearchSpec:
    given = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    return grid_spec(path, given, tuple(map(Method.parse, methods.split(","))), fractions).spec


def test_a_comparison_of_something_else_is_left_alone_and_the_same_one_in_another_order_goes_on(tmp_path: Path) -> None:
    path = make_spec(tmp_path)
    store = Store.create(grid_spec(path, [], (Method.parse("lora:4"), Method.parse("lora:16:nf4")), (1.0,)))
    Ledger(store.ledger_path).append("search_started", name=store.name)
    before = store.ledger_path.read_bytes(), store.spec_path.read_bytes()
    assert _add(store, spec_of(path, "lora:16:nf4,lora:4", 1.0)) is None
    assert _add(store, spec_of(path, "lora:4", 1.0)) is None, "a part of it"
    for named, value in (("space.epochs", 7), ("data.holdout", 0.3), ("sampler.seed", 7)):
        wrong = spec_of(path, "lora:4,dora:4", 1.0, **{named: value})
        with pytest.raises(UserError, match=f"with other {named.removesuffix('.holdout')}; give this one --set name="):
            _add(store, wrong)
    assert (store.ledger_path.read_bytes(), store.spec_path.read_bytes()) == before


def test_a_comparison_that_a_limit_ended_goes_on_with_a_later_one(tmp_path: Path) -> None:
    path = make_spec(tmp_path, space={})
    store = Store.create(grid_spec(path, ["budget.minutes=1"], METHODS[:1], (0.5,)))
    ledger = Ledger(store.ledger_path)
    ledger.append("search_started", name=store.name)
    ledger.append("search_finished", reason="1 minute used up")
    assert _add(store, grid_spec(path, ["budget.minutes=1"], METHODS[:1], (0.5,)).spec) is None
    longer = _add(store, grid_spec(path, ["budget.minutes=600"], METHODS[:1], (0.5,)).spec)
    assert longer is not None
    assert (longer["num_trials"], longer["num_further"]) == (len(RATES), 0)
    assert store.load_spec().spec.budget.minutes == 600
    assert not replay(ledger.events()).finished


def test_a_later_limit_in_dollars_brings_its_price(tmp_path: Path) -> None:
    path = make_spec(tmp_path, space={})
    store = Store.create(grid_spec(path, [], METHODS[:1], (0.5,)))
    Ledger(store.ledger_path).append("search_started", name=store.name)
    priced = ["budget.dollars=5", "resources.price_per_device_hour=2"]
    assert _add(store, grid_spec(path, priced, METHODS[:1], (0.5,)).spec) is not None
    spec = store.load_spec().spec
    assert (spec.budget.dollars, spec.resources.price_per_device_hour) == (5, 2)
    assert _add(store, grid_spec(path, priced, METHODS[:1], (0.5,)).spec) is None


def test_without_methods_and_shares_it_is_those_of_the_comparison_that_is_there(tmp_path: Path) -> None:
    path, said = make_spec(tmp_path, space={}), []
    store = Store.create(grid_spec(path, [], (Method.parse("none"), Method.parse("lora:4")), (0.5,), said.append))
    assert said == [line for line in said if line.startswith("6 trainings: ")] != []
    Ledger(store.ledger_path).append("search_started", name=store.name)
    assert _add(store, grid_spec(path, [], (Method.parse("dora:4"),), (0.25,)).spec) is not None
    said.clear()
    assert _add(store, grid_spec(path, [], None, None, said.append).spec) is None
    assert said == []
    asked = grid_spec(path, [], None, (0.125,)).spec
    assert {method.name for method, _ in pairs_of(asked)} == {"full", "lora 4", "dora 4"}


def test_other_strategies_than_the_first_say_nothing_to_a_comparison(tmp_path: Path) -> None:
    space = {"strategy": {"choice": ["ddp", "fsdp"]}, "offload": "cpu"}
    path = make_spec(tmp_path, space=space, resources={"gpus_per_worker": 1})
    spec = grid_spec(path, [], METHODS[:1], (0.5,)).spec
    assert (spec.space.strategy.ends(), spec.space.offload.ends()) == (["ddp"], ["none"])


def test_a_comparison_gets_the_methods_and_shares_that_it_lacks_and_no_others(tmp_path: Path) -> None:
    path = make_spec(tmp_path, space={})
    store = Store.create(grid_spec(path, [], (Method.parse("none"), Method.parse("lora:4")), (0.5,)))
    Ledger(store.ledger_path).append("search_started", name=store.name)
    first = configs_of(store.load_spec().spec)
    added = _add(store, spec_of(path, "lora:4,bottleneck:8,lora:8:nf4", 0.25, 0.5))
    assert added is not None
    lacking = [(Method.parse(m), f) for m, f in [("lora:4", 0.25), ("bottleneck:8", 0.25), ("lora:8:nf4", 0.25)]]
    lacking += [(Method.parse(m), 0.5) for m in ("bottleneck:8", "lora:8:nf4")]
    assert added["why"].endswith("lora 4 (0.25), bottleneck 8 (0.25), lora 8 nf4 (0.25), bottleneck 8 (0.5), lora 8 nf4 (0.5)")
    spec = store.load_spec().spec
    configs = configs_of(spec)
    assert configs[: len(first)] == first, "what was trained is what it was"
    assert len(set(configs)) == len(configs) == spec.budget.max_trials == added["num_trials"]
    assert pairs_of(spec) == [(Method.parse("none"), 0.5), (Method.parse("lora:4"), 0.5), *lacking]
    assert added["num_further"] == len(lacking) * len(RATES)
    assert _add(store, spec_of(path, "bottleneck:8", 0.5)) is None
