"""Tables for the terminal: rich where it is installed, plain text else."""

from __future__ import annotations

from collections.abc import Sequence


def render(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()
) -> str:
    """A table with the first column left-aligned and the others right-aligned."""
    try:
        table = _rich(title, columns, rows)
    except ImportError:
        table = _plain(title, columns, rows)
    return "\n".join([table, *notes])


def _rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


def _plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [tuple(columns), *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    justify = [str.ljust] + [str.rjust] * (len(columns) - 1)
    lines = [
        "  ".join(just(cell, width) for just, cell, width in zip(justify, row, widths, strict=True))
        for row in cells
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])
