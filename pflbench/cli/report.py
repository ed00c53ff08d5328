"""`pflbench report`: records as tables, statistics and plots."""

import datetime as dt
from typing import TYPE_CHECKING

import click

from pflbench.cli import options
from pflbench.errors import UsageError
from pflbench.files import check_out

if TYPE_CHECKING:
    from pflbench.published import Published
    from pflbench.reports import Runs


@click.command("report")
@options.runs
@options.where
@click.option("--metric", metavar="TEXT", default="accuracy", help="accuracy, accuracy_mean, accuracy_worst10, "
              "accuracy_std or global_accuracy; own_accuracy, own_accuracy_mean, ..., of the clients' own models; or "
              "mixed_accuracy, of the own models of a round's participants and the deployed models of the others  "
              "[default: accuracy]")  # fmt: skip
@options.selection
@click.option("--target", metavar="FLOAT", help="compare costs up to this accuracy, a fraction  [default: 90 % of the "
              "best method's]")  # fmt: skip
@click.option("--columns", metavar="NAMES", help="settings that are the columns of a table, the outer heads first, "
              "such as alpha,join_ratio  [default: dataset,alpha, and join_ratio if it differs]")  # fmt: skip
@click.option("--published", metavar="SUITE", multiple=True, help="a suite, ready or a TOML file, whose published "
              "figures are shown beside those of the runs; may be repeated")  # fmt: skip
@click.option(
    "--title", metavar="TEXT", default="pflbench report", help="title of the page  [default: pflbench report]"
)
@options.out("report", "the report")
def command(
    runs: tuple[str, ...],
    where: tuple[str, ...],
    methods: tuple[str, ...],
    metric: str,
    selection: str,
    target: str | None,
    columns: str | None,
    published: tuple[str, ...],
    title: str,
    out: str,
) -> None:
    """Turn records into tables, statistics and plots: report.html, and files for papers.

    RUNS are run folders, folders of them, or ids of runs in the folder `runs`  [default: runs].
    """
    from pflbench.cli.display import console
    from pflbench.engine.cores import cores
    from pflbench.reports import render
    from pflbench.reports import report as reporting

    folder = options.folder("out", out)
    check_out(folder)
    found = load(runs, where, methods, None if columns is None else [name.strip() for name in columns.split(",")])
    limit = None if target is None else options.fraction("target", target)
    made = reporting.make(found, metric, selection, limit, [figures(name) for name in dict.fromkeys(published)])
    files = reporting.write(made, folder, workers=cores(), title=title, date=dt.date.today().isoformat())
    shown = console()
    for table in made.tables:
        shown.print(render.terminal(table))
        for note in table.notes:
            shown.print(note, highlight=False, style="dim")
    for held in made.published:
        shown.print(f"Published: {held.source}.", highlight=False)
        for note in held.notes:
            shown.print(note, highlight=False, style="dim")
    shown.print(f"{len(found.runs)} runs; " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)


def figures(name: str) -> "Published":
    """Return the published figures of suite `name`. Raises `UsageError` when it has none."""
    from pflbench.cli.sweep import read_suite

    found = read_suite(name).published
    if found is None:
        raise UsageError(f"published: the suite {name!r} has no table [published]")
    return found


def load(
    runs: tuple[str, ...], where: tuple[str, ...], methods: tuple[str, ...], columns: list[str] | None = None
) -> "Runs":
    """Return the records of `runs`, folders or ids, and tell the user which folders were left out.

    `where` and `methods` are the values of the options that select runs.
    """
    from pflbench.reports import frames

    wanted: dict[str, list[str]] = {}
    for name, value in (*(options.assignment(text, "where") for text in where), *(("algo", algo) for algo in methods)):
        wanted.setdefault(name, []).append(value)
    found = frames.load(*options.records(runs), columns=columns, where=wanted)
    for path, reason in found.left_out.itertuples(index=False):
        options.notice(f"left out {path}: {reason}")
    return found
