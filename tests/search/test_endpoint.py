from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.endpoint import absolute_uri, problem_with, redacted


@pytest.fixture
def open_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("scheme", ["http", "https", "postgresql", "postgresql+psycopg2", "mysql+pymysql"])
def test_a_port_that_answers_is_enough_for_now(scheme: str, open_port: int) -> None:
    assert problem_with(f"{scheme}://user:secret@127.0.0.1:{open_port}/mlflow", 5) is None


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_server_that_is_not_there_is_named_without_its_password(scheme: str, closed_port: int) -> None:
    problem = problem_with(f"{scheme}://user:secret@127.0.0.1:{closed_port}", 5)
    assert problem is not None
    assert problem.startswith(f"tracking.uri: {scheme}://***@127.0.0.1:{closed_port} is not reachable (Connection refused)")
    assert "secret" not in problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://127.0.0.1:no", "not a URI"),
        ("http://", "no host"),
        ("ftp://127.0.0.1", "unknown scheme"),
        ("file:///data/mlruns", "sqlite:////data/mlruns/mlflow.db"),
        ("/data/mlruns", "migrate-filestore"),
        ("./mlruns", "is a file store"),
        ("http//host:5000", "did you mean 'http://host:5000'"),
        ("https:/host", "did you mean 'https://host'"),
        ("https/host", "did you mean 'https://host'"),
        ("httpstore", "is a file store"),
        ("sqlite://", "no path"),
        ("sqlite:///", "no path"),
    ],
)
def test_what_is_no_tracking_uri_is_refused_with_the_remedy(uri: str, words: str) -> None:
    problem = problem_with(uri, 1)
    assert problem is not None
    assert words in problem


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile", "uc"])
def test_what_mlflow_finds_by_itself_is_left_to_it(uri: str) -> None:
    assert problem_with(uri, 1) is None


def test_a_sqlite_file_may_be_new_or_there(tmp_path: Path) -> None:
    path = tmp_path / "not yet" / "there 100%?" / "mlflow.db"
    uri = f"sqlite:///{path}"
    assert problem_with(uri, 1) is None
    assert not path.parent.exists()
    path.parent.mkdir(parents=True)
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE runs (id)")
    connection.commit()
    connection.close()
    assert problem_with(uri, 1) is None


def test_what_a_killed_writer_left_half_done_is_taken_back(tmp_path: Path) -> None:
    """A journal is left that whoever opens the file next has to play back, which writes."""
    path = tmp_path / "mlflow.db"
    die = "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('PRAGMA cache_size = 1');"
    die += "c.execute('CREATE TABLE runs (id)'); c.execute('INSERT INTO runs VALUES (1)'); c.execute('BEGIN');"
    die += "c.executemany('INSERT INTO runs VALUES (?)', [('x' * 999,)] * 999); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", die, str(path)], check=False).returncode == 9
    assert Path(f"{path}-journal").stat().st_size > 0
    assert problem_with(f"sqlite:///{path}", 1) is None
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT id FROM runs").fetchall() == [(1,)]


def test_another_file_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("these are notes, and long enough to have a header that SQLite can look at" * 4)
    problem = problem_with(f"sqlite:///{tmp_path}/mlflow.db", 1)
    assert problem is not None
    assert "cannot be opened as a SQLite database" in problem
    problem = problem_with(f"sqlite:///{tmp_path}/mlflow.db/deeper/mlflow.db", 1)
    assert problem is not None
    assert "is not a directory" in problem


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///runs/mlflow.db") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert absolute_uri(f"sqlite:///{tmp_path}/mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("http://host") == "http://host"


def test_credentials_are_not_shown() -> None:
    assert redacted("postgresql://user:pass@host/db") == "postgresql://***@host/db"
    assert redacted("https://user:pass@host/a@b") == "https://***@host/a@b"
    assert redacted("sqlite:////a@b/c.db") == "sqlite:////a@b/c.db"
