"""How the command line ends: signals, errors and exit codes."""

import math
import os
import signal
import sys
import time
from typing import NoReturn

import click

from pflbench.errors import PflbenchError

_REMEDY = "continue a run with --resume, and a sweep by starting it again"


class Terminated(BaseException):
    """SIGTERM as an exception, so that files are closed and worker processes are ended."""


class Stop:
    """The handler of SIGINT and SIGTERM: it raises an exception, but only one for several signals within 5 seconds.

    `timeout` sends its signal to the process and again to the process group. The second signal must not interrupt the
    code that ends the workers.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The number of the last signal."""
        self._last = -math.inf

    def __call__(self, number: int, _frame: object) -> None:
        """Raise the exception of signal `number`."""
        self.number = number
        before, self._last = self._last, time.monotonic()
        if self._last - before > 5:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def fail(error: BaseException, number: int | None) -> NoReturn:
    """End the process after `error`, with one line and the exit code of its kind; `number` is the last signal's."""
    # The signal's number is checked first: compiled code may replace the handler's exception by another one.
    if number == signal.SIGTERM:
        _end(f"terminated; {_REMEDY}", 143)
    if number == signal.SIGINT or isinstance(error, (KeyboardInterrupt, click.Abort)):
        _end(f"interrupted; {_REMEDY}", 130)
    if isinstance(error, PflbenchError):
        _end(str(error), error.exit_code)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        sys.exit(2)
    if isinstance(error, click.ClickException):
        _end(" ".join(error.format_message().split()), 2)
    if isinstance(error, BrokenPipeError):  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    raise error


def _end(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {' '.join(message.splitlines())}", err=True)
    sys.exit(code)
