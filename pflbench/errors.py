"""The errors of pflbench. Every message is one line that names the value and the remedy."""

import difflib
from collections.abc import Iterable


class PflbenchError(Exception):
    """Base of all errors that pflbench raises; `exit_code` is the exit code of the command line."""

    exit_code = 1


class UsageError(PflbenchError):
    """The user's input cannot be used: a value, a file, a combination. Nothing was written."""

    exit_code = 2


class MethodError(PflbenchError):
    """A method's code breaks the contract: it asks for a missing part, or returns a value that cannot be used."""


class RunError(PflbenchError):
    """A started run cannot continue: for example, a worker died, or a checkpoint is damaged."""


class RunBusy(RunError):  # noqa: N818
    """Another process computes the same run."""


class Diverged(RunError):  # noqa: N818
    """A number of the training is not finite. The message names the round, the client and the quantity."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a `name` that is not among the `known` names, with the nearest one as a suggestion.

    `kind` is the noun in the message, for example "algorithm".
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(names) or 'none'}"
    return UsageError(f"unknown {kind} {name!r}; {hint}")


def at_least_one(name: str, value: int) -> None:
    """Raise `UsageError` when setting `name` is below 1."""
    if value < 1:
        raise UsageError(f"{name}: {value} is out of bounds; it must be >= 1")
