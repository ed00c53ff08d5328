"""`pflbench list`: the methods, datasets, models and partitions."""

import json
from typing import Any

import click

from pflbench.cli import options
from pflbench.core import registry
from pflbench.spec import MODELS


@click.command("list")
@click.argument("what", type=click.Choice(["algorithms", "datasets", "models", "partitions"]))
@options.as_json
def command(what: str, as_json: bool) -> None:
    """List what can be chosen: methods by family."""
    found = _found(what)
    width = max(map(len, found))
    if what == "algorithms":
        known: dict[str, dict[str, Any]] = {name: {"line": found[name], **registry.facts(name)} for name in found}
        if as_json:
            click.echo(json.dumps(known))
            return
        for family in dict.fromkeys(facts["family"] for facts in known.values()):
            click.echo(f"{family or 'no family'}:")
            for name, facts in known.items():
                if facts["family"] == family:
                    click.echo(f"  {name:{width}}  {found[name]}")
    elif as_json:
        click.echo(json.dumps(found))
    else:
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
