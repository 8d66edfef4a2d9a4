"""docs/metering.md explains every number: whoever adds one to the metrics or to MLflow must explain it there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fake_runs import mirrored
from synthetic import confirmed_event, results_of, synthetic_events

from search.ledger import replay
from search.publication import search_metrics
from spaces.loading import parse_spec
from spaces.metrics import METRICS

PAGE = Path(__file__).parents[1] / "docs" / "metering.md"
ROW = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
EXPLAINED = {name: cells for name, *cells in ROW.findall(PAGE.read_text(encoding="utf-8"))}
SPEC = parse_spec("{name: s, model: {name: m, task: sequence-classification}, data: {train: t.csv}}", "spec.yaml")


def tracked() -> set[str]:
    """Return the names of all that a search with confirmations writes to MLflow."""
    events = [*synthetic_events(24), *(confirmed_event(0, seed, accuracy=0.8, seconds=9.0, test=0.7) for seed in (1, 2))]
    scores = {"arc_easy/acc": {"value": 0.3, "stderr": 0.1}}
    told = {"event": "harness_scored", "task": "arc_easy", "limit": None, "scores": scores}
    events += [{**events[-1], **told, "number": number} for number in (None, 0)]
    names = {key for run in mirrored(events).runs.values() for key, *_ in run["metrics"]}
    return names | set(search_metrics(results_of(replay(events), SPEC)))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_has_a_row_with_its_unit(name: str) -> None:
    assert EXPLAINED[name][0] == (METRICS[name].unit or "-")


def test_every_name_in_mlflow_has_a_row_or_a_row_for_its_prefix() -> None:
    names = {name for name in tracked() if name not in {metric.tracked_name for metric in METRICS.values()}}
    prefixes = {name.partition("/")[0] for name in names}
    assert prefixes == {"train", "reference", "predicted", "memory", "confirmed", "test", "harness", "front", "budget"}, (
        "this test reads all of them"
    )
    assert {name for name in names if name not in EXPLAINED and f"{name.partition('/')[0]}/" not in EXPLAINED} == set()


def test_the_sections_of_mlflow_are_named() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [m.section for m in METRICS.values() if f"`{m.section}/`" not in page] == []
