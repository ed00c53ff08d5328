"""`pflbench describe`: one method."""

import click

from pflbench import settings
from pflbench.cli.options import shown
from pflbench.core import registry


@click.command("describe")
@click.argument("algorithm")
def command(algorithm: str) -> None:
    """Describe a method: its paper, what is personal, which model is evaluated, its hyperparameters."""
    found = registry.describe(algorithm)
    click.echo(found.text)
    hyper = found.hyperparameters
    click.echo("Hyperparameters (--set name=value):" if hyper else "Hyperparameters: none.")
    for name, field in hyper.items():
        limits = settings.bounds(field)
        click.echo(f"  {name} = {shown(field.default)}  {field.metadata['doc']}{f' ({limits})' if limits else ''}")
