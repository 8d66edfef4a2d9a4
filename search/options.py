"""What the verbs of the command line share: options, exit codes, and how errors are told."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

# Exit codes, as documented in docs/cli.md.
FAILURE, USAGE, NOTHING_FITS, NO_RESULT, INTERRUPTED = 1, 2, 3, 4, 130

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The search as a YAML file.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a search, or the path of its directory.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one value of the file: model.name=...")]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        metavar="AMOUNT",
        help="Of the whole search, instead of its file's: 50trials, 30m, 2h, 8gpu-hours, 40usd; the first reached ends.",
    ),
]
Directory = Annotated[Path, typer.Option("--directory", help="Where the searches are.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", help="Read the search from this MLflow server instead of its directory.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show nothing while the search runs.")]
Trials = Annotated[str | None, typer.Option(metavar="ID,ID", help="These trials instead of the members of the front.")]
RUNS = Path("paretune-runs")


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn every error that the user can mend into its lines on standard error and an exit code."""
    from search.errors import NoResult, UserError
    from search.interruption import Interrupted
    from spaces.loading import SpecError

    try:
        yield
    except SpecError as error:
        fail(USAGE, *error.lines)
    except UserError as error:
        fail(USAGE, str(error))
    except NoResult as error:
        fail(NO_RESULT, str(error))
    except Interrupted as interrupted:
        fail(interrupted.exit_code, str(interrupted))
    except KeyboardInterrupt:
        fail(INTERRUPTED, "interrupted before anything was begun; the same command begins again")


def fail(code: int, *lines: str) -> None:
    """Print lines on standard error and leave.

    Raises:
        typer.Exit: always.
    """
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    raise typer.Exit(code)


def teller(*, quiet: bool) -> Callable[[str], None]:
    """Return what says a line on standard error; quiet, nothing."""
    return (lambda _: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))


def print_json(value: Any) -> None:
    """Print a value for programs."""
    print(json.dumps(value, indent=2, sort_keys=True))
