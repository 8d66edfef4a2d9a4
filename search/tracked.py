"""A search read back from MLflow alone, as its directory is not here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from search.endpoint import SQLITE, absolute_uri, problem_with, redacted
from search.ledger import SearchState
from search.mirror import CONFIRMED_TAG, DATA_TAG, DEVICE_TAG, RECORD_TAG, REFERENCE_TAG, SEARCH_TAG, spec_of
from search.record import TrialRecord
from search.tracking import TrackingError, client_of, in_words

RUNS_PER_REQUEST = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundSearch:
    """A search as MLflow alone knows it."""

    name: str
    run_id: str
    spec_yaml: str
    reference: dict[str, float] | None
    records: tuple[TrialRecord, ...]
    data_fingerprint: str | None
    device: dict[str, Any] | None
    """What its workers' device was found to be."""


def load_search(uri: str, name: str) -> FoundSearch:
    """Read the latest search of this name, or the search with this parent run id, from MLflow alone.

    Raises:
        TrackingError: MLflow does not answer, does not know it, or cannot be understood.
    """
    uri = absolute_uri(uri)
    problem = problem_with(uri, timeout_seconds=10)
    if problem is None and uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).exists():
        problem = f"{uri.removeprefix(SQLITE)} does not exist"
    if problem is not None:
        raise TrackingError(problem)
    with in_words(uri):
        client = client_of(uri)
        parents = list(_search_runs(client, "tags.kind = 'search'"))
        named = [run for run in parents if name in (run.info.run_id, run.data.tags.get(SEARCH_TAG))]
        if not named:
            known = ", ".join(sorted({run.data.tags.get(SEARCH_TAG, "") for run in parents})) or "none"
            raise TrackingError(f"no search named '{name}' in {redacted(uri)}; there are: {known}")
        parent = max(named, key=lambda run: run.info.start_time)
        children = list(_search_runs(client, f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"))
        # Runs below those of the trials, of this search or of another one of its name.
        confirming = list(
            _search_runs(client, f"tags.kind = 'confirmation' and tags.`{SEARCH_TAG}` = '{parent.data.tags[SEARCH_TAG]}'")
        )
    try:
        return _search_of(parent, children, confirming)
    except (TypeError, KeyError, ValueError) as error:
        raise TrackingError(f"'{name}' in {redacted(uri)} was written by another version of paretune: {error}") from error


def _search_of(parent: Any, children: Sequence[Any], confirming: Sequence[Any]) -> FoundSearch:
    """Return what a search's runs say."""
    state = SearchState()
    trials = {run.info.run_id for run in children}
    for run in children:
        if RECORD_TAG in run.data.tags:
            record = TrialRecord.from_dict(json.loads(run.data.tags[RECORD_TAG]))
            state.records[record.number] = record
    for run in confirming:
        if run.data.tags["mlflow.parentRunId"] in trials and CONFIRMED_TAG in run.data.tags:
            state.apply(json.loads(run.data.tags[CONFIRMED_TAG]))
    tags = parent.data.tags
    return FoundSearch(
        name=tags[SEARCH_TAG],
        run_id=parent.info.run_id,
        spec_yaml=spec_of(tags),
        reference=json.loads(tags[REFERENCE_TAG]) if REFERENCE_TAG in tags else None,
        records=tuple(sorted(state.records.values(), key=lambda record: record.number)),
        data_fingerprint=next((run.data.tags[DATA_TAG] for run in children if DATA_TAG in run.data.tags), None),
        device=json.loads(tags[DEVICE_TAG]) if DEVICE_TAG in tags else None,
    )


def _search_runs(client: Any, filter_string: str) -> Iterator[Any]:
    experiments = [e.experiment_id for e in client.search_experiments()]
    token: str | None = None
    while True:
        page = client.search_runs(experiments, filter_string, max_results=RUNS_PER_REQUEST, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
