"""The command line. Each command is a module of this package, which is imported when the command is needed."""

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
    "list": "listing",  # a module `list` would take the place of Python's `list` in this one
    "partition": "partition",
    "report": "report",
    "run": "run",
    "sweep": "sweep",
}
"""The module of each command."""


class _Commands(click.Group):
    """The commands; the module of each has it as `command`."""

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
    """Run the command line. Every error except a bug of pflbench is one line; bad input has exit code 2."""
    stop = Stop()
    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores SIGINT
        signal.signal(signal.SIGINT, stop)
    try:
        code = cli.main(prog_name="pflbench", standalone_mode=False)
    except BaseException as error:
        fail(error, stop.number)
    sys.exit(code if isinstance(code, int) else 0)
