"""`pflbench list`: the methods, datasets, models and partitions."""

import json

import click

from pflbench.cli import options
from pflbench.core import registry
from pflbench.spec import MODELS


@click.command("list")
@click.argument("what", type=click.Choice(["algorithms", "datasets", "models", "partitions"]))
@options.as_json
def command(what: str, as_json: bool) -> None:
    """List what can be chosen."""
    found = _found(what)
    if as_json:
        click.echo(json.dumps(found))
        return
    width = max(map(len, found))
    for name, text in found.items():
        click.echo(f"{name:{width}}  {text}")


def _found(what: str) -> dict[str, str]:
    if what == "algorithms":
        return registry.algorithms()
    if what == "models":
        return MODELS
    if what == "datasets":
        from pflbench.datasets import DATASETS

        return DATASETS
    from pflbench.datasets.partitioners import PARTITIONS

    return PARTITIONS
