"""`pflbench report`: records as tables, statistics and plots."""

from typing import TYPE_CHECKING

import click

from pflbench.cli import options

if TYPE_CHECKING:
    from pflbench.reports import Runs


@click.command("report")
@options.runs
@click.option("--metric", metavar="TEXT", default="accuracy", help="accuracy, accuracy_mean, accuracy_worst10, "
              "accuracy_std or global_accuracy  [default: accuracy]")  # fmt: skip
@options.selection
@click.option("--target", metavar="FLOAT", help="compare costs up to this accuracy, a fraction  [default: 90 % of the "
              "best method's]")  # fmt: skip
@options.out("report", "the report")
def command(runs: tuple[str, ...], metric: str, selection: str, target: str | None, out: str) -> None:
    """Turn records into tables, statistics and plots: report.html, and files for papers.

    RUNS are run folders, folders of them, or ids of runs in the folder `runs`  [default: runs].
    """
    from pflbench.cli.display import console
    from pflbench.engine.cores import cores
    from pflbench.reports import render
    from pflbench.reports import report as reporting

    folder = options.folder("out", out)
    found = load(runs)
    made = reporting.make(found, metric, selection, None if target is None else options.fraction("target", target))
    files = reporting.write(made, folder, workers=cores())
    shown = console()
    for table in made.tables:
        shown.print(render.terminal(table))
        for note in table.notes:
            shown.print(note, highlight=False, style="dim")
    shown.print(f"{len(found.runs)} runs; " + ", ".join(map(str, files)), highlight=False, soft_wrap=True)


def load(runs: tuple[str, ...]) -> "Runs":
    """Return the records of `runs`, folders or ids, and tell the user which folders were left out."""
    from pflbench.reports import frames

    found = frames.load(*options.records(runs))
    for path, reason in found.left_out.itertuples(index=False):
        options.notice(f"left out {path}: {reason}")
    return found
