"""The command line. Each command is a module of this package, which is imported when the command is used."""

import importlib
import importlib.metadata
import signal
import sys
from typing import Any

import click

from pflbench.cli.signals import Stop, fail
from pflbench.errors import unknown

COMMANDS = {
    "compare": "compare",
    "describe": "describe",
    "export": "export",
    "list": "listing",  # a submodule `list` would hide Python's `list` in this module
    "partition": "partition",
    "report": "report",
    "run": "run",
    "runs": "runs",
    "sweep": "sweep",
}
"""The module of each command."""


class _Commands(click.Group):
    """The group of commands; each module defines its command as `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"pflbench.cli.{COMMANDS[cmd_name]}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise unknown("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted:
        try:
            found = importlib.metadata.version("pflbench")
        except importlib.metadata.PackageNotFoundError:
            found = "of a checkout that is not installed"
        click.echo(f"pflbench {found}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
def cli() -> None:
    """Benchmark personalised federated learning."""


def main() -> None:
    """Run the command line. Every error except a bug of pflbench is one line; exit code 2 means bad input."""
    stop = Stop()
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job ignores SIGINT: leave that
        signal.signal(signal.SIGINT, stop)
    try:
        code = cli.main(prog_name="pflbench", standalone_mode=False)
    except BaseException as error:
        fail(error, stop.number)
    sys.exit(code if isinstance(code, int) else 0)
