"""`pflbench export`: records as files for pandas and others."""

import click

from pflbench.cli import options
from pflbench.cli.report import load
from pflbench.files import check_out


@click.command("export")
@options.runs
@options.where
@click.option("--format", "kind", metavar="TEXT", default="csv", help="csv or parquet  [default: csv]")
@options.out("export", "the tables")
def command(runs: tuple[str, ...], where: tuple[str, ...], methods: tuple[str, ...], kind: str, out: str) -> None:
    """Write tidy tables for pandas and others: runs, rounds, evaluations and clients.

    RUNS are run folders, folders of them, or ids of runs in the folder `runs`  [default: runs].
    """
    from pflbench.reports import frames

    folder = options.folder("out", out)
    check_out(folder)
    for path in frames.export(load(runs, where, methods), folder, kind):
        click.echo(path)
