"""The command line: ``entropy-attn info | bench | compare | demo | report``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f"the command line needs the package {error.name}: pip install 'entropy-attn[bench]'"
    ) from error

app = typer.Typer(
    help="Block-sparse attention guided by entropy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
console = Console()

Results = Annotated[
    Path | None,
    typer.Option(help="Folder of the result store [default: ENTROPY_ATTN_RESULTS or the repo's]."),
]
Root = Annotated[Path, typer.Option(help="Repository whose README and docs are filled.")]


@app.command()
def info() -> None:
    """Show the backends with the reason for each, the versions and the machine."""
    import entropy_attn as ea
    from entropy_attn.benchmarks.environment import environment

    table = Table(title=f"entropy-attn {ea.__version__}: backends", title_justify="left")
    for column in ("backend", "available", "version", "what it is, or why it is not here"):
        table.add_column(column, overflow="fold")
    for state in ea.backends():
        mark = "[green]yes[/]" if state.available else "[red]no[/]"
        table.add_row(state.name, mark, state.version or "–", escape(state.reason))
    console.print(table)
    machine = Table(title="machine", show_header=False, title_justify="left")
    for name, value in environment().items():
        if value is not None:
            machine.add_row(name, escape(str(value)))
    console.print(machine)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="A suite, or 'all'; 'list' names them.")],
    quick: Annotated[bool, typer.Option("--quick", help="Finish within a minute.")] = False,
    out: Results = None,
    share: Annotated[
        str, typer.Option(help="Of the training runs, 2/4 for the second of four processes.")
    ] = "1/1",
    against: Annotated[
        str | None,
        typer.Option(help="A commit in the store to compare with; fails where we are slower."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Leave out what this commit has measured on this machine."),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A part of the names of the cases to run; may be given several times."),
    ] = None,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(
            help="A Python file that registers baselines of yours.", exists=True, dir_okay=False
        ),
    ] = None,
) -> None:
    """Run a suite of measurements and append its records to the result store.

    Without a GPU a small form runs that checks the suite rather than measures the kernels. Suites
    of training runs always go on where they were cut off, others with --resume; several processes
    can share training runs.
    """
    from entropy_attn.benchmarks.registry import SUITES, Share
    from entropy_attn.benchmarks.resume import why_not
    from entropy_attn.benchmarks.store import Store

    try:
        part = Share.parse(share)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error

    if suite == "list":
        for each in SUITES.values():
            console.print(f"[bold]{each.name}[/]: {each.summary}")
        return
    if suite != "all" and suite not in SUITES:
        raise typer.BadParameter(f"{suite!r} is not one of {', '.join(SUITES)}, all, list")
    names = list(SUITES) if suite == "all" else [suite]
    store = Store(out)
    if part != Share() and not all(SUITES[name].trains for name in names):
        able = ", ".join(each.name for each in SUITES.values() if each.trains)
        raise typer.BadParameter(f"--share is for the suites {able}; others measure speed")
    whole = [name for name in names if not SUITES[name].has_cases]
    if only and whole:
        raise typer.BadParameter(
            f"--only chooses cases, and {', '.join(whole)} has none to choose from: name another "
            "suite, or leave --only out"
        )
    for path in plugin or []:
        console.print(f"{path}: {', '.join(_load_plugin(path))}", markup=False, highlight=False)
    if resume and why_not() is not None:
        console.print(f"[yellow]--resume leaves nothing out: {why_not()}[/]")
    before = [r for name in names for r in store.load(name)] if against is not None else []
    old = [] if against is None else _chosen(before, against)
    chosen = tuple(only or ())
    failures = sum(_run_suite(name, quick, store, part, resume, chosen) for name in names)
    console.print(f"records: {store.directory}")
    if against is not None:
        known = Counter(r.suite for r in before)
        new = [r for name in names for r in store.load(name)[known[name] :]]
        failures += _show_changes(old, new)
    if failures:
        console.print(f"[red]{failures} measurements of this package are wrong or failed[/]")
        raise typer.Exit(1)


@app.command()
def compare(
    old: Annotated[str, typer.Argument(help="A commit, or a part of a machine's name.")],
    new: Annotated[str, typer.Argument(help="Likewise.")],
    suite: Annotated[str, typer.Option(help="A suite, or 'all'.")] = "all",
    results: Results = None,
) -> None:
    """Compare two commits, or two machines, by what the result store has of both."""
    from entropy_attn.benchmarks.registry import SUITES
    from entropy_attn.benchmarks.store import Store

    if suite != "all" and suite not in SUITES:
        raise typer.BadParameter(f"{suite!r} is not one of {', '.join(SUITES)}, all")
    store = Store(results)
    records = [r for name in (SUITES if suite == "all" else [suite]) for r in store.load(name)]
    if _show_changes(_chosen(records, old), _chosen(records, new)):
        raise typer.Exit(1)


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer budgets, shorter text.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for pictures and records.")] = Path(
        "demo_output"
    ),
    text: Annotated[
        Path | None, typer.Option(help="A text file to read instead of Python's own prose.")
    ] = None,
) -> None:
    """Run SmolLM2-135M on real prose, dense and sparse: quality, density, time and pictures."""
    from entropy_attn.benchmarks.demo import run_demo
    from entropy_attn.benchmarks.model import ModelNotFound

    try:
        with _progress() as progress:
            outcome = run_demo(device=_device(), quick=quick, out=out, text=text, progress=progress)
    except (ModelNotFound, FileNotFoundError) as error:
        console.print(f"[red]{escape(str(error))}[/]")
        raise typer.Exit(1) from error
    console.print(outcome.table())
    for line in outcome.notes():
        console.print(escape(line))


@app.command()
def report(
    results: Results = None,
    root: Root = Path(),
    machine: Annotated[
        str | None, typer.Option(help="Whose page is made [default: the last that ran attention].")
    ] = None,
) -> None:
    """Fill the tables of README and docs, draw the pictures and make docs/report.html.

    All of it comes from the result store.
    """
    from entropy_attn.benchmarks import report as reporting
    from entropy_attn.benchmarks.page import write_page
    from entropy_attn.benchmarks.store import Store
    from entropy_attn.benchmarks.suites.crossover import DATA_FILE, write_crossover

    store = Store(results)
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if not page.exists():
            continue
        before = page.read_text(encoding="utf-8")
        after = reporting.fill(before, store)
        if after != before:
            page.write_text(after, encoding="utf-8")
            console.print(f"filled {page}")
    for path in reporting.draw(store, root / "docs" / "images"):
        console.print(f"drew {path}")
    page = root / "docs" / "report.html"
    if page.parent.exists() and write_page(store, page, machine):
        console.print(f"wrote {page}")
    data = root / "entropy_attn" / "backend" / DATA_FILE
    if points := write_crossover(store, data):
        console.print(f"{points} points in {data}")


def _load_plugin(path: Path) -> list[str]:
    from entropy_attn.benchmarks.plugins import load_plugin

    try:
        return load_plugin(path)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--plugin") from error


def _chosen(records: list, which: str) -> list:
    from entropy_attn.benchmarks.compare import choose

    try:
        return choose(records, which)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _show_changes(old: list, new: list) -> int:
    """Print what became better and worse; returns how many measurements of ours are worse."""
    from entropy_attn.benchmarks.compare import compare as compare_records

    changes = compare_records(old, new)
    table = Table(title="changes beyond the noise", title_justify="left")
    for column in ("measured", "old", "new", "gain", "noise"):
        table.add_column(column, overflow="fold")
    for change in changes:
        if change.verdict == "same":
            continue
        values = [f"{r.result[change.metric.name]:.4g}" for r in (change.old, change.new)]
        colour = {"better": "green", "worse": "red"}[change.verdict] if change.is_ours else "dim"
        cells = (escape(f"{change.new.suite}: {change.name}"), *values)
        table.add_row(*cells, f"{change.gain:.3f} x", f"{change.noise:.1%}", style=colour)
    if table.row_count:
        console.print(table)
    same = len(changes) - table.row_count
    console.print(f"{len(changes)} measurements in both, {same} the same within the noise")
    return sum(change.is_ours and change.verdict == "worse" for change in changes)


def _run_suite(name: str, quick: bool, store, share, resume: bool, only: tuple[str, ...]) -> int:
    """Run one suite; returns how many measurements of this package are wrong or failed."""
    from entropy_attn.benchmarks.model import ModelNotFound
    from entropy_attn.benchmarks.registry import SUITES, Context
    from entropy_attn.benchmarks.resume import measured
    from entropy_attn.benchmarks.store import Record

    failures = rows = 0
    with _progress() as progress:
        cpu = SUITES[name].measures_cpu
        done = {"is_measured": measured(store, name)} if resume else {}
        context = Context(
            _device(), quick, store.directory, progress, share, cpu, only=only, **done
        )
        if context.form == "small":
            console.print(f"[yellow]{name}: no GPU, so this is the small form[/]")
        try:
            for row in SUITES[name].run(context):
                rows += 1
                status = row.result["status"]
                # An absent contestant is no measurement and must not hide an older one.
                if status != "unavailable":
                    store.append(Record(name, row.config, row.result))
                failures += row.is_ours and status in ("wrong", "failed")
                colour = {"ok": "default", "unavailable": "dim"}.get(status, "red")
                console.print(f"[{colour}]{escape(row.text)}[/]", highlight=False)
        except (ImportError, ModelNotFound) as error:  # of "all", the other suites can still run
            console.print(f"[red]{name} needs more than is here: {escape(str(error))}[/]")
            failures += 1
            return failures
    if only and not rows:
        left = " that is left to measure" if resume else ""
        console.print(f"[yellow]{name}: no case{left} has {' or '.join(map(repr, only))} in its "
                      "name[/]", highlight=False)  # fmt: skip
    return failures


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _progress() -> Iterator:
    """A callable that shows what is going on; plain lines where the output is no terminal."""
    if console.is_terminal:
        with console.status("") as status:
            yield lambda text: status.update(escape(text))
    else:
        yield lambda text: console.print(f"... {escape(text)}", style="dim", highlight=False)


def main() -> None:
    """What the installed command runs."""
    app()


if __name__ == "__main__":
    main()
