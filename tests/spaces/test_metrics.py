from __future__ import annotations

import pytest

from spaces.metrics import METRICS, domain_accuracy, domain_of, in_order, is_learned, metric_of


def test_the_accuracy_of_a_domain_is_a_metric_like_the_accuracy():
    name = domain_accuracy("law.v2")
    assert name == "accuracy.law.v2"
    assert domain_of(name) == "law.v2"
    assert domain_of("accuracy") is None
    metric = metric_of(name)
    assert (metric.name, metric.direction, metric.tracked_name) == (name, "maximize", "eval/accuracy.law.v2")
    assert is_learned(name)


def test_known_metrics_come_in_the_order_of_the_table_and_unknown_ones_not_at_all():
    assert in_order(["mfu", "accuracy.b", "loss", "accuracy", "accuracy.a", "mfu"]) == ["accuracy", "mfu", "accuracy.a", "accuracy.b"]
    assert in_order(METRICS) == list(METRICS)
    with pytest.raises(KeyError):
        metric_of("loss")


def test_what_is_learned_does_not_follow_from_a_layout():
    assert [is_learned(m) for m in ("eval_loss", "custom", "train_loss", "train_seconds", "mfu", "loss")] == [True] * 3 + [False] * 3
