"""MLflow's user interface on the searches of a directory, for as long as `paretune ui` runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

from search.errors import UserError

# Evaluation jobs of MLflow's own, which no search uses; each would be a process more.
ENVIRONMENT = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
HOST = "127.0.0.1"


def serve(database: Path, port: int) -> int:
    """Run MLflow's server until it ends or this process is asked to; return its exit code, 0 when asked.

    Raises:
        UserError: there is no database, or the port is taken.
    """
    if not database.exists():
        raise UserError(f"{database}: there is no tracking database; a search with the default tracking writes it")
    with socket.socket() as probe:
        # As the server itself will: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; another `paretune ui` may run: try --port {port + 1}") from error
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{database}", "--workers", "1"]
    # In a session of its own: the server's workers outlive it unless the whole group is ended.
    server = subprocess.Popen(
        [*command, "--host", HOST, "--port", str(port)], env={**os.environ, **ENVIRONMENT}, start_new_session=True
    )
    asked = False

    def end(_: int, __: FrameType | None) -> None:
        nonlocal asked
        asked = True
        os.killpg(server.pid, signal.SIGTERM)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, end)
    print(f"MLflow: http://{HOST}:{port} in some seconds; Ctrl-C ends it", flush=True)
    code = server.wait()
    return 0 if asked else code
