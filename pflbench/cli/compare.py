"""`pflbench compare`: two runs side by side."""

import dataclasses
import json

import click

from pflbench.cli import options


@click.command("compare")
@click.argument("run_a")
@click.argument("run_b")
@options.selection
@options.as_json
def command(run_a: str, run_b: str, selection: str, as_json: bool) -> None:
    """Show what differs between two runs: settings, versions, data, results.

    RUN_A and RUN_B are run folders, or ids of runs in the folder `runs`.
    """
    from pflbench.reports.compare import compare

    a, b = options.records((run_a, run_b))
    found = compare(a, b, selection)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
        return

    import rich.box
    from rich.table import Table

    from pflbench.cli.display import console, percent

    out = Table("", *found.runs, box=rich.box.SIMPLE_HEAD)
    for name, values in found.differences.items():
        out.add_row(name, *(("-" if v is None else str(v)[:24]) for v in values))
    if not found.differences:
        out.add_row("nothing differs", "", "")
    out.add_section()
    for name, pair in found.metrics.items():
        out.add_row(name, *(percent(None if value != value else value) for value in pair))  # NaN
    console().print(out)
    click.echo(found.test)
