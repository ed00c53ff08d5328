"""`pflbench runs`: what is in folders of records."""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence

import click

from pflbench.cli import options
from pflbench.spec import RunSpec
from pflbench.store import listing

_SHOWN = ("algo", "dataset", "clients", "partition", "alpha", "classes_per_client", "join_ratio", "rounds", "seed")


@click.command("runs")
@options.runs
@options.as_json
def command(runs: tuple[str, ...], as_json: bool) -> None:
    """List runs: finished, unfinished, and failed ones.

    RUNS are run folders, folders of them, or ids of runs in the folder `runs`  [default: runs].
    """
    found = listing.entries(options.records(runs))
    if as_json:
        click.echo(json.dumps([_plain(entry) for entry in found]))
        return
    import rich.box
    from rich.table import Table

    from pflbench.cli.display import console, percent

    table = Table(box=rich.box.SIMPLE_HEAD)
    for name in ("id", "status", "method", "setting", "seed", "rounds", "accuracy"):
        table.add_column(name, justify="right" if name in ("seed", "rounds", "accuracy") else "left")
    settings = iter(_settings([entry.spec for entry in found if entry.spec is not None]))
    for entry in found:
        spec = entry.spec
        rounds = "-" if entry.rounds is None else str(entry.rounds)
        if spec is None:
            described = ["-", entry.reason or "-", "-", rounds]
        else:
            described = [spec.algo, next(settings), str(spec.seed), f"{rounds}/{spec.rounds}"]
        table.add_row(entry.id, entry.status, *described, percent(entry.accuracy))
    if found:
        console().print(table)
    states = Counter(entry.status for entry in found)
    counted = ", ".join(f"{count} {status}" for status, count in states.most_common())
    click.echo(f"{len(found)} runs" + (f": {counted}" if counted else ""))


def _settings(specs: Sequence[RunSpec]) -> list[str]:
    """Return each run's dataset, clients, partition, join ratio, and the other settings that differ among the runs."""
    from pflbench.sweep.suite import differences

    return [
        f"{spec.dataset}: {spec.describe_partition()}, join ratio {spec.join_ratio:g}" + "".join(f", {d}" for d in more)
        for spec, more in zip(specs, differences(specs, _SHOWN), strict=True)
    ]


def _plain(entry: listing.Entry) -> dict[str, object]:
    values = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    return {**values, "path": str(entry.path), "spec": None if entry.spec is None else entry.spec.to_dict()}
