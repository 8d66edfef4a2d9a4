"""Where an MLflow tracking URI leads, checked in a moment and without importing MLflow."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from spaces.loading import LoadedSpec, SpecError
from spaces.spec import SearchSpec

SQLITE = "sqlite:///"
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
DEFAULT_PORTS = {"http": 80, "https": 443, **DATABASE_PORTS}
# MLflow looks these up in the user's own configuration.
CONFIGURED = ("databricks", "databricks-uc", "uc")


def tracking_uri(spec: SearchSpec) -> str:
    """Return the MLflow tracking URI: the spec's, the environment's, or one SQLite file beside the searches."""
    default = f"sqlite:///{Path(spec.directory).absolute() / 'mlflow.db'}"
    return spec.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def absolute_uri(uri: str) -> str:
    """Return the URI with a SQLite path made absolute, so that it means the same file in every working directory."""
    if not uri.startswith(SQLITE):
        return uri
    return f"{SQLITE}{Path(uri.removeprefix(SQLITE)).absolute()}"


def is_http(uri: str) -> bool:
    """Return whether a server answers at this URI; every other store is opened by this process itself."""
    return uri.startswith(("http://", "https://"))


def check_no_credentials(loaded: LoadedSpec) -> None:
    """Check that the file has no password, which would be written with the search.

    Raises:
        SpecError: it has one.
    """
    if (uri := loaded.spec.tracking.uri or "") != redacted(uri):
        allowed = "a URI without them; MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI, have them"
        raise SpecError([loaded.locate(f"tracking.uri: credentials, which would be written with the search; allowed: {allowed}")])


def redacted(uri: str) -> str:
    """Return the URI without the credentials in it, fit for a message."""
    return re.sub(r"://[^/@]*@", "://***@", uri)


def problem_with(uri: str, timeout_seconds: float) -> str | None:
    """Return in one line why the tracking store cannot be used, or None if it looks usable."""
    shown = redacted(uri)
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if is_http(uri) or scheme in DATABASE_PORTS:
        return _server_problem(uri, shown, timeout_seconds)
    if scheme == "sqlite":
        return _sqlite_problem(uri, shown)
    if uri in CONFIGURED or scheme in CONFIGURED:
        return None
    misspelt = re.match(r"(https?)(?::/?|/+)([^:/].*)", shown)
    if misspelt is not None:
        return f"tracking.uri: {shown} is no URI; did you mean '{misspelt[1]}://{misspelt[2]}'?"
    if scheme in ("", "file"):
        path = Path(urlsplit(uri).path).absolute()
        return (
            f"tracking.uri: {shown} is a file store, which MLflow 3 no longer writes; "
            f"use {SQLITE}{path}/mlflow.db, after `mlflow migrate-filestore` if it holds runs"
        )
    return f"tracking.uri: unknown scheme in {shown}; allowed: http(s)://, sqlite:///, postgresql://, mysql://, databricks"


def _server_problem(uri: str, shown: str, timeout_seconds: float) -> str | None:
    """Return why no connection can be made; what answers there is seen by the first request."""
    parts = urlsplit(uri)
    try:
        host, port = parts.hostname, parts.port or DEFAULT_PORTS[parts.scheme.partition("+")[0]]
    except ValueError as error:
        return f"tracking.uri: {shown} is not a URI ({error})"
    if host is None:
        return f"tracking.uri: no host in {shown}"
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return None  # Only the proxy can reach it.
    try:
        with socket.create_connection((host, port), timeout=timeout_seconds):
            return None
    except OSError as error:
        return (
            f"tracking.uri: {shown} is not reachable ({error.strerror or error}); start the server, "
            "or leave tracking.uri out to use a SQLite file"
        )


def _sqlite_problem(uri: str, shown: str) -> str | None:
    if not uri.startswith(SQLITE) or uri == SQLITE:
        return f"tracking.uri: no path in {shown}; allowed: sqlite:///relative/path.db or sqlite:////absolute/path.db"
    path = Path(uri.removeprefix(SQLITE)).absolute()
    if not path.exists():
        # The first search makes the directory; what must be there is one that can be written into.
        parent = next(p for p in path.parents if p.exists())
        if not parent.is_dir():
            return f"tracking.uri: {parent} is not a directory"
        return None if os.access(parent, os.W_OK | os.X_OK) else f"tracking.uri: {parent} cannot be written to"
    if not os.access(path, os.R_OK | os.W_OK):
        return f"tracking.uri: {path} cannot be written to"
    try:
        # Not read-only: what a killed writer left half done is taken back by whoever opens the file next.
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    except sqlite3.Error as error:
        return f"tracking.uri: {path} cannot be opened as a SQLite database ({error})"
    return None
