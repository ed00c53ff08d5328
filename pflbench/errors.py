"""What can go wrong, for people: every message is one line that names the value and the remedy."""

import difflib
from collections.abc import Iterable


class PflbenchError(Exception):
    """Base of all errors that pflbench raises on purpose; `exit_code` is the command line's."""

    exit_code = 1


class UsageError(PflbenchError):
    """The user's input cannot be used: a value, a file, a combination. Nothing was written."""

    exit_code = 2


class MethodError(PflbenchError):
    """A method's code breaks the contract: it asks for a part that is missing, or returns what cannot be used."""


class RunError(PflbenchError):
    """A run that had begun cannot continue: a worker died, or another process holds the record."""


class RunBusy(RunError):  # noqa: N818
    """Another process computes the same run."""


class Diverged(RunError):  # noqa: N818
    """Training left the finite numbers. The message names the round, the client and the quantity."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a `name` that is none of the `known` ones, with the nearest as a suggestion.

    `kind` is the noun in the message, for example "algorithm".
    """
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(names) or 'none'}"
    return UsageError(f"unknown {kind} {name!r}; {hint}")
