"""MLflow's "saved view" of a front: scatter, parallel coordinates and columns, as one tag of the experiment.

The format is the user interface's own and undocumented (seen in 3.16 to 3.18), so whoever writes the tag does it as a
best effort: the report among the artifacts shows the same without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, urlencode

FRONT_COLOR, OTHER_COLOR = "#d7191c", "#b8b8b8"
TAG_PREFIX = "mlflow.sharedViewState."
# MLflow draws no more runs than this in one scatter chart.
MAX_RUNS = 100


def view_key(search: str) -> str:
    """Return the name under which the view of a search stands in the URL."""
    return f"pareto-{search}"


def runs_url(base: str, experiment_id: str, search: str) -> str:
    """Return the address that opens the view; the plain address of an experiment opens an onboarding page."""
    query = {
        "viewStateShareKey": view_key(search),
        "workflowType": "machine_learning",
        "compareRunsMode": "CHART",
    }
    return f"{base.rstrip('/')}/#/experiments/{quote(experiment_id)}/runs?{urlencode(query)}"


def saved_view(
    *,
    search: str,
    metrics: Sequence[str],
    other_metrics: Sequence[str],
    knobs: Sequence[str],
    common_knobs: Sequence[str],
    is_ascending: bool,
    time_ms: int,
) -> tuple[str, str]:
    """Return key and value of the experiment's tag.

    Args:
        search: name of the search; the view shows its trials and no others.
        metrics: tracked names of the two or three objectives; the first sorts the table and is the y axis.
        other_metrics: tracked names of the further columns.
        knobs: params that differ between trials, as columns.
        common_knobs: those of them that every trial has, for the parallel coordinates.
        is_ascending: whether the first objective is minimised.
        time_ms: now, in Unix milliseconds.
    """
    state = {
        # Only trials carry these tags; without them the table shows one collapsed row, the search itself.
        "searchFilter": f"tags.kind = 'trial' and tags.`paretune.search` = '{search}'",
        "orderByKey": f"metrics.`{metrics[0]}`",
        "orderByAsc": is_ascending,
        "selectedColumns": [
            "tags.`pareto`",
            *(f"metrics.`{m}`" for m in (*metrics, *other_metrics)),
            *(f"params.`{knob}`" for knob in knobs),
        ],
        "compareRunSections": [_section(search)],
        "compareRunCharts": _charts(metrics, common_knobs),
        "isAccordionReordered": True,
        "runsHiddenMode": "SHOW_ALL",
        "autoRefreshEnabled": True,
        "hideEmptyCharts": True,
        "groupBy": None,
    }
    envelope = {
        "name": f"Pareto front of {search}",
        "createdAt": time_ms,
        "updatedAt": time_ms,
        "state": json.dumps(state),
    }
    return TAG_PREFIX + view_key(search), json.dumps(envelope)


def _section(search: str) -> dict[str, Any]:
    return {
        "uuid": "front",
        "name": f"Pareto front of {search}",
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
        # One chart a row: the names of a parallel-coordinates chart's axes need the width.
        "columns": 1,
        "cardHeight": 330,
    }


def _charts(metrics: Sequence[str], common_knobs: Sequence[str]) -> list[dict[str, Any]]:
    chart = {"metricSectionId": "front", "deleted": False, "isGenerated": False}
    scatters = [
        {
            **chart,
            "type": "SCATTER",
            "uuid": f"scatter-{metric}",
            "runsCountToCompare": MAX_RUNS,
            "xaxis": {"key": metric, "type": "METRIC"},
            "yaxis": {"key": metrics[0], "type": "METRIC"},
        }
        for metric in metrics[1:]
    ]
    parallel = {
        **chart,
        "type": "PARALLEL",
        "uuid": "parallel",
        "showAllRuns": True,
        "runsCountToCompare": MAX_RUNS,
        "selectedParams": list(common_knobs),
        "selectedMetrics": list(metrics),
    }
    return [*scatters, parallel]
