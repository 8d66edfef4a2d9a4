"""The command `paretune`. Heavy imports are inside the verbs: `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.options import (
    FAILURE,
    NOTHING_FITS,
    RUNS,
    USAGE,
    Budget,
    Directory,
    Json,
    Name,
    Quiet,
    Set,
    SpecPath,
    TrackingUri,
    Trials,
    clear_errors,
    fail,
    print_json,
    teller,
)

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


@app.callback(invoke_without_command=True)
def _version(version_: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version_:
        from importlib.metadata import version

        print(f"paretune {version('paretune')}")
        raise typer.Exit


@app.command()
def validate(spec: SpecPath, set_: Set = None) -> None:
    """Check a file, and say every error in it at once; that the local data are there, but not what is in them."""
    from search.endpoint import check_no_credentials
    from spaces.loading import check_local_data, load_spec

    with clear_errors():
        loaded = load_spec(spec, set_ or ())
        check_no_credentials(loaded)
        check_local_data(loaded)
        print(f"{spec}: valid")


@app.command()
def schema() -> None:
    """Print the JSON schema of the file, for editors."""
    from spaces.loading import json_schema

    print_json(json_schema())


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
    from search.endpoint import check_no_credentials
    from search.plan import Rental, make_plan, render_plan
    from spaces.estimate import GpuCluster
    from spaces.hardware import UnknownDevice, device_named
    from spaces.loading import check_local_data, load_spec

    with clear_errors():
        rental = None
        given = {
            "--nodes": nodes != 1,
            "--gpus-per-node": gpus_per_node != 1,
            "--price": price is not None,
            "--rows": rows is not None,
        }
        if device is None and any(given.values()):
            fail(USAGE, f"{', '.join(option for option, there in given.items() if there)}: says nothing without --device")
        if device is not None:
            try:
                cluster = GpuCluster(device=device_named(device), num_nodes=nodes, gpus_per_node=gpus_per_node)
            except UnknownDevice as error:
                fail(USAGE, str(error))
            rental = Rental(cluster=cluster, num_rows=rows)
        # A price is part of the file: a budget in dollars needs it.
        priced = [] if price is None else [f"resources.price_per_device_hour={price}"]
        loaded = load_spec(spec, [*(set_ or ()), *priced])
        check_no_credentials(loaded)
        if rental is None:  # on other machines data may be where they are not here
            check_local_data(loaded)
        planned = make_plan(loaded, rental)
        if json_:
            print_json(planned)
        else:
            print(render_plan(planned))
        if planned["num_feasible_layouts"] == 0:
            raise typer.Exit(NOTHING_FITS)


@app.command()
def profile(spec: SpecPath, set_: Set = None, quiet: Quiet = False, json_: Json = False) -> None:
    """Time the step of all that the space can propose, each alone; searches then predict a trial's time from it."""
    from search.profiling import profile_space, render_profiles
    from spaces.loading import load_spec

    with clear_errors():
        rows = profile_space(load_spec(spec, set_ or ()), teller(quiet=quiet))
        if json_:
            print_json(rows)
        else:
            print(render_profiles(rows))


@app.command()
def search(spec: SpecPath, set_: Set = None, budget: Budget = None, quiet: Quiet = False, json_: Json = False) -> None:
    """Search: train the trials, and record them and their front in MLflow."""
    from spaces.loading import load_spec

    with clear_errors():
        # Before the imports that take seconds.
        loaded = load_spec(spec, set_ or (), budget or ())
        from search.console import SearchView
        from search.session import start

        with SearchView(loaded.spec, quiet=quiet) as view:
            store = start(loaded, view)
        _show_front(store.name, Path(loaded.spec.directory), json_)
        _show_calibration(store, json_)


@app.command()
def resume(name: Name, directory: Directory = RUNS, budget: Budget = None, quiet: Quiet = False, json_: Json = False) -> None:
    """Go on with a search that was interrupted or killed, or has a later end now."""
    from search.console import SearchView
    from search.lengthening import command_of_comparison, deliver_rest, give_budget, why_nothing_is_left
    from search.session import resume as resume_search
    from search.store import Store

    with clear_errors():
        store = Store.open(name, directory)
        if budget:
            give_budget(store, budget)
        if why := why_nothing_is_left(store):
            print(f"{store.name} has ended: {why}; --budget gives it a later end", file=sys.stderr)
            deliver_rest(store)
        else:
            with SearchView(store.load_spec().spec, quiet=quiet) as view:
                resume_search(store, view)
        _show_front(str(store.root), directory, json_)
        if not why:
            _show_calibration(store, json_)
        if own := command_of_comparison(store):
            print(f"a comparison of methods: `{own}` goes on with its further rates and seeds", file=sys.stderr)


def _show_calibration(store: Store, json_: bool) -> None:
    from search.calibration import calibrate, summary_lines

    lines = summary_lines(calibrate(list(store.state().records.values())))
    if lines and not json_:
        print("\n".join(["predicted and measured (of each trial in the report):", *lines]))


@app.command()
def front(name: Name, directory: Directory = RUNS, tracking_uri: TrackingUri = None, json_: Json = False) -> None:
    """Print the Pareto front of a search."""
    with clear_errors():
        _show_front(name, directory, json_, tracking_uri)


def _show_front(name: str, directory: Path, json_: bool, tracking_uri: str | None = None) -> None:
    from search.rendering import render_front
    from search.results import front_as_json, load_results

    results = load_results(name, directory, tracking_uri)
    if json_:
        print_json(front_as_json(results))
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
    from search.rendering import render_pick
    from search.results import load_results, pick_as_json, pick_one

    limits = {
        "train_seconds": ("<=", max_time),
        "accuracy": (">=", min_accuracy),
        "eval_loss": ("<=", max_loss),
        "peak_memory_bytes": ("<=", None if max_memory is None else max_memory * 2**30),
    }
    with clear_errors():
        results = load_results(name, directory, tracking_uri)
        record = pick_one(results, {k: (op, v) for k, (op, v) in limits.items() if v is not None}, at_knee=knee)
        if json_:
            print_json(pick_as_json(results, record))
        else:
            print(render_pick(results, record))


@app.command()
def confirm(
    name: Name,
    seeds: Annotated[int, typer.Option(metavar="N", help="Further seeds of each trial.")] = 3,
    trials: Trials = None,
    directory: Directory = RUNS,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Train the members of the front again with further seeds, each alone, and score them on the test rows."""
    from search.confirm import confirm as confirm_trials
    from search.store import Store

    with clear_errors():
        store = Store.open(name, directory)
        failures = confirm_trials(store, num_seeds=seeds, trials=trials, say=teller(quiet=quiet))
        _show_front(str(store.root), directory, json_)
        if failures:
            fail(FAILURE, *failures)


@app.command()
def compare_methods(
    spec: SpecPath,
    set_: Set = None,
    methods: Annotated[
        str | None, typer.Option(metavar="METHOD,METHOD", help="none, lora:16, bottleneck:16, lora:16:nf4 and so on, with commas.")
    ] = None,
    fractions: Annotated[str | None, typer.Option(metavar="SHARE,SHARE", help="Of the training rows: 0.01,0.1,1.")] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Further seeds of the best of each method and share.")] = 3,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Tell which way to fine-tune is the best for how much data: a grid of trials, the best of each confirmed."""
    from search import compare, comparison
    from search.console import SearchView
    from search.interruption import Interrupted
    from search.provenance import own_command

    with clear_errors():
        if seeds < 1:
            fail(USAGE, f"--seeds {seeds}: at least one further seed; from 2 on there is an interval")
        try:
            chosen = None if methods is None else tuple(map(comparison.Method.parse, methods.split(",")))
            say = teller(quiet=quiet)
            shares = None if fractions is None else compare.parse_fractions(fractions)
            loaded = compare.grid_spec(spec, set_ or (), chosen, shares, say)
            with SearchView(loaded.spec, quiet=quiet) as view:
                store = compare.search(loaded, view)
            found, files, failures = compare.confirm_best(store, num_seeds=seeds, say=say)
        except Interrupted as left:
            # Not with what goes on with its parts, the search and the confirmation.
            raise Interrupted(left.signum, own_command()) from left
        if json_:
            print_json(comparison.rows_of(found))
        else:
            print(comparison.render(found), *map(str, files), sep="\n")
        if failures:
            fail(FAILURE, *failures)


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
    from search.export import export as export_trial
    from search.store import Store

    with clear_errors():
        exported = export_trial(Store.open(name, directory), trial, merge=merge, output=output, say=teller(quiet=json_))
        if json_:
            print_json(exported.to_dict())
        else:
            print(exported.text)


@app.command()
def evaluate(
    name: Name,
    tasks: Annotated[str, typer.Option(metavar="TASK,TASK", help="Tasks or groups: arc_easy,hellaswag.")],
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Rows of each task; by default all.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Directory of further tasks' YAML files.")] = None,
    trials: Trials = None,
    directory: Directory = RUNS,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Score the members of the front, and the untrained model, on tasks of lm-evaluation-harness."""
    from search import harness
    from search.store import Store

    with clear_errors():
        store = Store.open(name, directory)
        names = tuple(task for text in tasks.split(",") if (task := text.strip()))
        request = harness.Request(tasks=names, limit=limit, include_path=include_path)
        found = harness.evaluate(store, request, trials=trials, say=teller(quiet=quiet))
        if json_:
            print_json(harness.rows_of(found))
        else:
            print(harness.render(found, [o.metric for o in store.load_spec().spec.resolved_objectives()]))


@app.command()
def report(name: Name, directory: Directory = RUNS, tracking_uri: TrackingUri = None) -> None:
    """Write the report again: one HTML file that works offline, with tables and a picture beside it."""
    from search.report import write_report
    from search.results import load_results

    with clear_errors():
        for path in write_report(load_results(name, directory, tracking_uri)).values():
            print(path)


@app.command()
def ui(
    directory: Directory = RUNS,
    port: Annotated[int, typer.Option(help="Port on the loopback interface.")] = 5000,
) -> None:
    """Open MLflow's user interface on the searches of a directory, on this machine only."""
    from search.ui import serve

    with clear_errors():
        raise typer.Exit(serve(directory.absolute() / "mlflow.db", port))


@app.command()
def doctor(directory: Directory = RUNS, json_: Json = False) -> None:
    """Check this machine: versions, devices, packages, disk, Ray's address and token, the tracking store."""
    from search.doctor import examine, render

    findings = examine(directory)
    if json_:
        print_json(findings)
    else:
        print(render(findings))
    if any(finding["status"] == "error" for finding in findings):
        raise typer.Exit(FAILURE)


def main() -> None:
    """Run the command line; the entry point of the installed command."""
    app()


if __name__ == "__main__":
    main()
