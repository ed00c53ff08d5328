"""Files that appear complete or not at all."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pflbench.errors import RunError, UsageError


def write(path: Path, data: bytes) -> None:
    """Write a file, in place of an older one: a reader sees the old contents or the new, never a part.

    A file that a process has mapped into memory is not changed by this.
    """
    partial = path.with_name(f"writing-{path.name}")
    partial.write_bytes(data)
    partial.rename(path)


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`, on the same disk; it is deleted in every case."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        yield Path(name)


def place(made: Path, target: Path) -> None:
    """Give the folder `made` its final name; if another process was faster, its folder stays."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path`, such as a full disk, into a `RunError` that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"cannot write {path} ({reason}); what is written so far is good: mend that, then --resume"
        ) from None


def check_out(out: Path) -> None:
    """Raise `UsageError` when runs cannot be written below `out`. Nothing is created."""
    existing = out
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"out: {existing} is a file, not a folder; choose another --out")
    try:
        with tempfile.TemporaryFile(dir=existing):  # asked by trying: /proc and read-only mounts refuse even root
            pass
    except OSError as error:
        raise UsageError(f"out: {existing} cannot be written to ({error.strerror}); choose another --out") from None
