"""The command `paretune`. Heavy imports are inside the verbs: `--help` answers at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from search.store import Store

app = typer.Typer(
    name="paretune",
    help="Find the accuracy-versus-training-time Pareto front of fine-tuning.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# Exit codes, as documented in docs/cli.md.
FAILURE, USAGE, NOTHING_FITS, NO_RESULT, INTERRUPTED = 1, 2, 3, 4, 130

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC.yaml", help="The search as a YAML file.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a search, or the path of its directory.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one value of the file: model.name=...")]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget", metavar="AMOUNT", help="Instead of the file's: 50trials, 30m, 2h, 8gpu-hours, 40usd; the first reached ends."
    ),
]
Directory = Annotated[Path, typer.Option("--directory", help="Where the searches are.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", help="Read the search from this MLflow server instead of its directory.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show nothing while the search runs.")]
RUNS = Path("paretune-runs")


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn every error that the user can mend into its lines on standard error and an exit code."""
    from search.cluster import ClusterError
    from search.interruption import Interrupted
    from search.ledger import LedgerError
    from search.session import NoResult, NothingFits
    from search.store import StoreError
    from search.tracking import TrackingError
    from spaces.loading import SpecError

    try:
        yield
    except SpecError as error:
        _fail(USAGE, *error.lines)
    except (ClusterError, StoreError, TrackingError, LedgerError, NothingFits) as error:
        _fail(USAGE, str(error))
    except NoResult as error:
        _fail(NO_RESULT, str(error))
    except Interrupted as interrupted:
        _fail(interrupted.exit_code, str(interrupted))
    except KeyboardInterrupt:
        _fail(INTERRUPTED, "interrupted")


def _fail(code: int, *lines: str) -> None:
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    raise typer.Exit(code)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


@app.callback(invoke_without_command=True)
def _version(version_: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version_:
        from importlib.metadata import version

        print(f"paretune {version('paretune')}")
        raise typer.Exit


@app.command()
def validate(spec: SpecPath, set_: Set = None) -> None:
    """Check a file, and say every error in it at once; that the local data are there, but not what is in them."""
    from spaces.loading import check_local_data, load_spec

    with _clear_errors():
        check_local_data(load_spec(spec, set_ or ()))
        print(f"{spec}: valid")


@app.command()
def schema() -> None:
    """Print the JSON schema of the file, for editors."""
    from spaces.loading import json_schema

    _print_json(json_schema())


@app.command()
def plan(
    spec: SpecPath,
    set_: Set = None,
    device: Annotated[str | None, typer.Option(help="Plan for these GPUs instead of this machine: h100-sxm.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of such GPUs.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs in each node.")] = 1,
    price: Annotated[float | None, typer.Option(min=0, help="Dollars per GPU and hour, as resources.price_per_device_hour.")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Training rows, where the data are not on this machine.")] = None,
    json_: Json = False,
) -> None:
    """Show the resolved file, and which layouts this machine or rented GPUs can run; nothing is started."""
    from search.plan import Rental, make_plan, render_plan
    from spaces.estimate import GpuCluster
    from spaces.hardware import UnknownDevice, device_named
    from spaces.loading import load_spec

    with _clear_errors():
        rental = None
        given = {
            "--nodes": nodes != 1,
            "--gpus-per-node": gpus_per_node != 1,
            "--price": price is not None,
            "--rows": rows is not None,
        }
        if device is None and any(given.values()):
            _fail(USAGE, f"{', '.join(option for option, there in given.items() if there)}: says nothing without --device")
        if device is not None:
            try:
                cluster = GpuCluster(device=device_named(device), num_nodes=nodes, gpus_per_node=gpus_per_node)
            except UnknownDevice as error:
                _fail(USAGE, str(error))
            rental = Rental(cluster=cluster, num_rows=rows)
        # A price is part of the file: a budget in dollars needs it.
        priced = [] if price is None else [f"resources.price_per_device_hour={price}"]
        planned = make_plan(load_spec(spec, [*(set_ or ()), *priced]), rental)
        if json_:
            _print_json(planned)
        else:
            print(render_plan(planned))
        if planned["num_feasible_layouts"] == 0:
            raise typer.Exit(NOTHING_FITS)


@app.command()
def profile(spec: SpecPath, set_: Set = None, quiet: Quiet = False, json_: Json = False) -> None:
    """Time the step of all that the space can propose, each alone; searches then predict a trial's time from it."""
    from search.profiling import profile_space, render_profiles
    from spaces.loading import load_spec

    with _clear_errors():
        rows = profile_space(load_spec(spec, set_ or ()), lambda line: None if quiet else print(line, file=sys.stderr))
        if json_:
            _print_json(rows)
        else:
            print(render_profiles(rows))


@app.command()
def search(spec: SpecPath, set_: Set = None, budget: Budget = None, quiet: Quiet = False, json_: Json = False) -> None:
    """Search: train the trials, and record them and their front in MLflow."""
    from search.console import SearchView
    from search.session import start
    from spaces.loading import load_spec

    with _clear_errors():
        loaded = load_spec(spec, set_ or (), budget or ())
        with SearchView(loaded.spec, quiet=quiet) as view:
            store = start(loaded, view)
        _show_calibration(store, json_)
        _show_front(store.name, Path(loaded.spec.directory), json_)


@app.command()
def resume(name: Name, directory: Directory = RUNS, quiet: Quiet = False, json_: Json = False) -> None:
    """Go on with a search that was interrupted or killed."""
    from search.console import SearchView
    from search.session import resume as resume_search
    from search.store import Store

    with _clear_errors():
        store = Store.open(name, directory)
        with SearchView(store.load_spec().spec, quiet=quiet) as view:
            resume_search(store, view)
        _show_calibration(store, json_)
        _show_front(str(store.root), directory, json_)


def _show_calibration(store: Store, json_: bool) -> None:
    from search.calibration import render_calibration
    from search.ledger import Ledger, replay

    text = render_calibration(list(replay(Ledger(store.ledger_path).events()).records.values()))
    if text and not json_:
        print(f"{text}\n")


@app.command()
def front(name: Name, directory: Directory = RUNS, tracking_uri: TrackingUri = None, json_: Json = False) -> None:
    """Print the Pareto front of a search."""
    with _clear_errors():
        _show_front(name, directory, json_, tracking_uri)


def _show_front(name: str, directory: Path, json_: bool, tracking_uri: str | None = None) -> None:
    from search.results import front_as_json, load_results, render_front

    results = load_results(name, directory, tracking_uri)
    if json_:
        _print_json(front_as_json(results))
    else:
        print(render_front(results))


@app.command()
def pick(
    name: Name,
    max_time: Annotated[float | None, typer.Option(min=0, help="Largest train_seconds.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(min=0, max=1, help="Smallest accuracy, from 0 to 1.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Largest eval_loss.")] = None,
    max_memory: Annotated[float | None, typer.Option(min=0, help="Largest peak memory of a rank, in GiB.")] = None,
    knee: Annotated[
        bool, typer.Option("--knee", help="Take the knee of the members within the limits, not the best in the first objective.")
    ] = False,
    directory: Directory = RUNS,
    tracking_uri: TrackingUri = None,
    json_: Json = False,
) -> None:
    """Choose one member of the front, and print its configuration and the command that reproduces it."""
    from search.results import load_results, pick_as_json, pick_one, render_pick

    limits = {
        "train_seconds": ("<=", max_time),
        "accuracy": (">=", min_accuracy),
        "eval_loss": ("<=", max_loss),
        "peak_memory_bytes": ("<=", None if max_memory is None else max_memory * 2**30),
    }
    with _clear_errors():
        results = load_results(name, directory, tracking_uri)
        record = pick_one(results, {k: (op, v) for k, (op, v) in limits.items() if v is not None}, at_knee=knee)
        if json_:
            _print_json(pick_as_json(results, record))
        else:
            print(render_pick(results, record))


@app.command()
def confirm(
    name: Name,
    seeds: Annotated[int, typer.Option(metavar="N", help="Further seeds of each trial.")] = 3,
    trials: Annotated[str | None, typer.Option(metavar="ID,ID", help="These trials instead of the members of the front.")] = None,
    directory: Directory = RUNS,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Train the members of the front again with further seeds, each alone, and score them on the test rows."""
    from search.confirm import ConfirmError
    from search.confirm import confirm as confirm_trials
    from search.store import Store

    with _clear_errors():
        store = Store.open(name, directory)
        try:
            say = (lambda _: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))
            failures = confirm_trials(store, num_seeds=seeds, trials=trials, say=say)
        except ConfirmError as error:
            _fail(USAGE, str(error))
        _show_front(str(store.root), directory, json_)
        if failures:
            _fail(FAILURE, *failures)


@app.command()
def compare_methods(
    spec: SpecPath,
    set_: Set = None,
    methods: Annotated[
        str | None, typer.Option(metavar="METHOD,METHOD", help="none, lora:16, dora:16, lora:16:nf4 and so on, with commas.")
    ] = None,
    fractions: Annotated[str | None, typer.Option(metavar="SHARE,SHARE", help="Of the training rows: 0.01,0.1,1.")] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Further seeds of the best of each method and share.")] = 3,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Tell which way to fine-tune is the best for how much data: a grid of trials, the best of each confirmed."""
    from search import compare
    from search.confirm import ConfirmError
    from search.console import SearchView

    with _clear_errors():
        if seeds < 1:
            _fail(USAGE, f"--seeds {seeds}: at least one further seed; from 2 on there is an interval")
        try:
            chosen = compare.METHODS if methods is None else tuple(map(compare.Method.parse, methods.split(",")))
            loaded = compare.grid_spec(spec, set_ or (), chosen, compare.parse_fractions(fractions))
            say = (lambda _: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))
            with SearchView(loaded.spec, quiet=quiet) as view:
                store = compare.search(loaded, view)
            comparison, files, failures = compare.confirm_best(store, chosen, num_seeds=seeds, say=say)
        except (compare.CompareError, ConfirmError) as error:
            _fail(USAGE, str(error))
        if json_:
            _print_json(compare.rows_of(comparison))
        else:
            print(compare.render(comparison), *map(str, files), sep="\n")
        if failures:
            _fail(FAILURE, *failures)


@app.command()
def export(
    name: Name,
    trial: Annotated[int, typer.Argument(metavar="TRIAL", min=0, help="Number of a trial of the front.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the adapter to the weights, so that transformers alone loads them.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", help="A new directory for it, instead of one below the search's.")
    ] = None,
    directory: Directory = RUNS,
    json_: Json = False,
) -> None:
    """Write a trial's model for transformers and PEFT: safetensors, tokenizer, and a card that says where it is from."""
    from search.export import ExportError
    from search.export import export as export_trial
    from search.store import Store

    with _clear_errors():
        try:
            exported = export_trial(Store.open(name, directory), trial, merge=merge, output=output)
        except ExportError as error:
            _fail(USAGE, str(error))
        if json_:
            _print_json(exported.to_dict())
        else:
            print(exported.text)


@app.command()
def report(name: Name, directory: Directory = RUNS, tracking_uri: TrackingUri = None) -> None:
    """Write the report again: one HTML file that works offline, with tables and a picture beside it."""
    from search.results import load_results, write_results

    with _clear_errors():
        for path in write_results(load_results(name, directory, tracking_uri)):
            print(path)


@app.command()
def ui(
    directory: Directory = RUNS,
    port: Annotated[int, typer.Option(help="Port on the loopback interface.")] = 5000,
) -> None:
    """Open MLflow's user interface on the searches of a directory, on this machine only."""
    from search.ui import UiError, serve

    try:
        raise typer.Exit(serve(directory.absolute() / "mlflow.db", port))
    except UiError as error:
        _fail(USAGE, str(error))


@app.command()
def doctor(directory: Directory = RUNS, json_: Json = False) -> None:
    """Check this machine: versions, devices, packages, disk, Ray's address and token, the tracking store."""
    from search.doctor import examine, render

    findings = examine(directory)
    if json_:
        _print_json(findings)
    else:
        print(render(findings))
    if any(finding["status"] == "error" for finding in findings):
        raise typer.Exit(FAILURE)


def main(run: Callable[[], Any] = app) -> None:
    """Run the command line; the entry point of the installed command."""
    run()


if __name__ == "__main__":
    main()
