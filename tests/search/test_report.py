from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import pytest
from matplotlib.figure import Figure as Drawing
from synthetic import OBJECTIVES, confirmed_event, numbers_on_front, results_of, synthetic_events, without_mfu

from search.advice import noise_lines, recommendation, recommendation_lines, recommended
from search.figures import Point, front_figure
from search.ledger import SearchState, replay
from search.pareto import front
from search.picture import draw_png
from search.record import TrialRecord, TrialState
from search.report import write_report
from search.scaling import Law
from spaces.config import TrialConfig
from spaces.loading import parse_spec
from spaces.space import SpaceSpec
from spaces.spec import Objective

SPEC = parse_spec(
    """
name: made-up
model: {name: somewhere, task: sequence-classification}
data: {train: rows.csv}
space:
  learning_rate: {log_uniform: [1e-4, 1e-2]}
  global_batch_size: {choice: [16, 32, 64]}
  strategy: {choice: [ddp, fsdp]}
""",
    "spec.yaml",
)
STATE = replay([{**e, "data": {"text": "</script><b>"}} if "data" in e else e for e in synthetic_events(24)])
RECORDS = list(STATE.records.values())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_report(results_of(STATE, SPEC, tmp_path_factory.mktemp("report") / "new"))


class Cells(HTMLParser):
    """Collects the text of the first table, as a reader without JavaScript sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1].append(data)


def test_the_page_needs_no_network_and_carries_plotly_once(written: dict[str, Path]) -> None:
    page = written["html"].read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)
    assert page.count("plotly.js v") == 1
    assert page.count("Plotly.newPlot(") == 8
    assert 1e6 < len(page) < 1e7


def test_the_front_can_be_read_without_javascript(written: dict[str, Path]) -> None:
    cells = Cells()
    cells.feed(written["html"].read_text(encoding="utf-8").partition("<script")[0])
    heading, *rows = cells.rows
    assert {"trial", "accuracy", "train seconds", "mfu", "test accuracy", "learning rate", "strategy"} <= set(heading)
    assert {int(row[0]) for row in rows} == numbers_on_front(RECORDS)
    assert all(len(row) == len(heading) for row in rows)


def test_what_further_seeds_say_stands_in_the_advice_the_table_and_the_figure(tmp_path: Path) -> None:
    members = front(RECORDS, OBJECTIVES)
    chosen = members[0]  # to the further seeds all are alike
    events = [
        confirmed_event(r.number, seed, accuracy=0.9, seconds=10.0 + seed, test=0.7 + 0.01 * seed)
        for r in members
        for seed in (1, 2, 3)
    ]
    paths = write_report(results_of(replay([*synthetic_events(24), *events]), SPEC, tmp_path))
    page = paths["html"].read_text(encoding="utf-8")
    before = page.partition("<script")[0]
    assert (
        f"Take trial {chosen.number} of made-up: accuracy 0.720 ± 0.025 (test, 3 seeds) at train_seconds 12.0 ± 2.5 s (3 seeds)"
        in before
    )
    assert f"not told apart from trial {chosen.number} in accuracy (0.720 ± 0.025): trial" in before
    assert "mean and 95% interval over further seeds, each trained alone, scored on the test rows" in before
    cells = Cells()
    cells.feed(before)
    heading, *rows = cells.rows
    place = heading.index("confirmed accuracy")
    assert {row[place] for row in rows} == {"0.720 ± 0.025"}
    assert '"error_x"' in page.replace("\\", "")
    assert paths["png"].stat().st_size > 10_000
    with paths["confirmations_csv"].open() as file:
        told = [(int(r["trial"]), int(r["seed"]), float(r["test_accuracy"])) for r in csv.DictReader(file)]
    assert told == sorted((e["number"], e["seed"], e["test"]["accuracy"]) for e in events)
    known = json.loads(paths["json"].read_text())["front"][0]["confirmed"]["accuracy"]
    assert (known["mean"], known["num_seeds"], known["split"]) == (pytest.approx(0.72), 3, "test")


def test_what_others_wrote_is_text_and_not_markup(written: dict[str, Path]) -> None:
    page = written["html"].read_text(encoding="utf-8")
    assert "&lt;spec&gt;.yaml" in page
    assert "&lt;/script&gt;&lt;b&gt;" in page
    assert "</script><b>" not in page


def test_the_head_recommends(written: dict[str, Path]) -> None:
    head = written["html"].read_text(encoding="utf-8").partition("<h2>")[0]
    assert recommendation(front(RECORDS, OBJECTIVES), OBJECTIVES, "made-up") in head
    assert "3 pruned, 2 infeasible, 3 out of memory, 1 diverged" in head


def test_the_tables_hold_what_is_known(written: dict[str, Path]) -> None:
    with written["trials_csv"].open() as file:
        trials = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in trials] == [r.number for r in RECORDS]
    assert float(trials[0]["accuracy"]) == RECORDS[0].values["accuracy"]
    assert float(trials[0]["test_accuracy"]) == 0.71
    with written["front_csv"].open() as file:
        assert {int(row["trial"]) for row in csv.DictReader(file)} == numbers_on_front(RECORDS)
    data = json.loads(written["json"].read_text())
    assert [member["number"] for member in data["front"]] == [member.number for member in front(RECORDS, OBJECTIVES)]
    assert data["reference"] == STATE.reference
    assert data["hypervolume"] > 0


def test_what_was_predicted_stands_beside_what_was_measured(written: dict[str, Path]) -> None:
    with written["calibration_csv"].open() as file:
        rows = list(csv.DictReader(file))
    complete = [r for r in RECORDS if r.state is TrialState.COMPLETE]
    assert [int(row["trial"]) for row in rows if row["what"] == "train_seconds"] == [r.number for r in complete]
    for row in rows:
        assert float(row["error"]) == pytest.approx(float(row["predicted"]) / float(row["measured"]) - 1)
    memory = [float(row["error"]) for row in rows if row["what"] == "tensor_bytes"]
    assert memory == pytest.approx([510 / 500 - 1] * len(complete)), "without what is around the tensors"
    told = json.loads(written["json"].read_text())["calibration"]
    assert [(str(r["number"]), r["what"], str(r["error"])) for r in told] == [(r["trial"], r["what"], r["error"]) for r in rows]
    page = written["html"].read_text(encoding="utf-8")
    assert f"tensor bytes from a formula: {len(complete)} trials, median error 2.0%, largest 2.0%" in page
    assert "How much memory does it take, and why?" in page


def test_a_front_without_mfu_says_why(tmp_path: Path, written: dict[str, Path]) -> None:
    state = replay(without_mfu(synthetic_events(24), "no bf16 peak known for Tesla T4"))
    members = front(list(state.records.values()), OBJECTIVES)
    line = f"no MFU of trial {', '.join(str(r.number) for r in members)}: no bf16 peak known for Tesla T4"
    assert recommendation_lines(members, OBJECTIVES, "made-up")[-1] == line
    paths = write_report(results_of(state, SPEC, tmp_path))
    assert f"<p class='note'>{line}</p>" in paths["html"].read_text(encoding="utf-8")
    assert "no MFU" not in written["html"].read_text(encoding="utf-8")


def test_what_more_data_gives_stands_in_the_report_and_in_its_table(tmp_path: Path) -> None:
    law = Law(scale=20.0, pre_learned=0.0, exponent=0.4, floor=0.5)
    sizes = (500, 1000, 2000, 4000, 8000)
    config = TrialConfig.from_params({**SpaceSpec().first(), "adapter": "none"}).to_dict()
    records = {
        n: TrialRecord(
            number=n,
            state=TrialState.COMPLETE,
            params={},
            config=config,
            values={"accuracy": 0.1 * n, "train_seconds": float(n + 1), "eval_loss": law.loss(rows)},
            details={"distinct_rows": rows, "train_rows": 8000},
        )
        for n, rows in enumerate(sizes)
    }
    paths = write_report(results_of(SearchState(records=records), SPEC, tmp_path))
    page = paths["html"].read_text(encoding="utf-8")
    assert "more data, full fine-tuning: a power law through 5 sizes" in page.partition("<script")[0], "without JavaScript too"
    assert "Does more data pay?" in page
    with paths["scaling_csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["trial"], int(row["rows"])) for row in rows] == [(str(n), size) for n, size in enumerate(sizes)] + [
        ("", 8000),
        ("", 16000),
    ]
    for row in rows:
        assert float(row["law_loss"]) == pytest.approx(law.loss(int(row["rows"])), rel=1e-3)
        assert float(row["low"]) <= float(row["law_loss"]) <= float(row["high"])
    (told,) = json.loads(paths["json"].read_text())["scaling"]
    assert told["law"]["kind"] == "power"


def test_a_search_without_a_law_says_why(tmp_path: Path) -> None:
    paths = write_report(results_of(SearchState(records={r.number: r for r in RECORDS[:3]}), SPEC, tmp_path))
    assert "no law for lora of any rank: 3 of at least 4 different sizes" in paths["html"].read_text(encoding="utf-8")
    with paths["scaling_csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    assert all(row["law"] == "" and row["eval_loss"] for row in rows)


def test_the_picture_is_a_picture(written: dict[str, Path]) -> None:
    header = written["png"].read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") > 1000


def test_members_too_close_for_labels_share_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Drawing] = []
    monkeypatch.setattr(Drawing, "savefig", lambda self, *_, **__: drawn.append(self))
    places = [(2.0, 0.2), (20.0, 0.56), (20.2, 0.57), (20.3, 0.58), (30.0, 0.9)]
    points = tuple(Point(number=n, x=x, y=y, on_front=True, hover=()) for n, (x, y) in enumerate(places))
    figure = replace(front_figure(STATE, [], OBJECTIVES), points=points, confirmed=())
    draw_png(figure, results_of(STATE, SPEC), tmp_path / "front.png")
    labels = drawn[0].axes[0].texts
    assert [label.get_text() for label in labels] == ["trial 0", "trial 1, 2, 3", "trial 4"]
    assert not any(one.get_window_extent().overlaps(other.get_window_extent()) for one, other in combinations(labels, 2))


@pytest.mark.parametrize("num_trials", [0, 1])
def test_a_search_that_found_nothing_has_a_report_too(tmp_path: Path, num_trials: int) -> None:
    failed = TrialRecord(number=0, state=TrialState.FAIL, params={}, error={"kind": "diverged", "message": "nan"})
    state = SearchState(records={0: failed} if num_trials else {})
    paths = write_report(results_of(state, SPEC, tmp_path))
    assert "Nothing to recommend" in paths["html"].read_text(encoding="utf-8")
    assert all(path.stat().st_size > 0 for path in paths.values())


def test_three_objectives_and_prices_of_zero_can_be_drawn(tmp_path: Path) -> None:
    records = {
        n: TrialRecord(
            number=n,
            state=TrialState.COMPLETE,
            params={"learning_rate": 1e-3},
            values={"accuracy": 0.1 * n, "train_seconds": float(n), "peak_memory_bytes": 3.0 - n},
        )
        for n in range(3)
    }
    memory = Objective(metric="peak_memory_bytes", direction="minimize", reference=None)
    paths = write_report(results_of(SearchState(records=records), SPEC, tmp_path, (*OBJECTIVES, memory)))
    assert len(paths) == 8


def test_a_noisy_member_is_named() -> None:
    members = front(RECORDS, OBJECTIVES)
    assert noise_lines(members) == []
    chosen = recommended(members, OBJECTIVES)
    assert chosen is not None
    other = next(r for r in members if r is not chosen)
    for record, place in ((chosen, 1), (other, -1)):
        noisy = replace(record, values={**record.values, "time_drift": 0.5})
        lines = recommendation_lines([noisy if r is record else r for r in members], OBJECTIVES, "made-up")
        assert lines[0].startswith(f"Take trial {chosen.number} of")
        assert lines[place].startswith(f"trial {record.number} is noisy: its pace changed by 50%")


def test_the_recommendation_is_one_sentence() -> None:
    members = [
        TrialRecord(number=n, state=TrialState.COMPLETE, params={}, values={"accuracy": a, "train_seconds": s}, test=t)
        for n, a, s, t in ((3, 0.5, 10.0, {}), (7, 0.86, 20.0, {"accuracy": 0.84}), (9, 0.9, 90.0, {}))
    ]
    assert recommendation(members, OBJECTIVES, "banking") == (
        "Take trial 9 of banking: accuracy 0.9 at train_seconds 90 s, the best on the front; "
        "the knee of the 3 is trial 7, accuracy 0.86 (0.84 on the test file) at train_seconds 20 s, 22% of that."
    )
    assert recommendation(members[:1], OBJECTIVES, "banking").endswith("the best on the front.")
    assert recommendation([], OBJECTIVES, "banking").startswith("Nothing to recommend")
