"""Files and folders that appear complete or not at all."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pflbench.errors import RunError, UsageError


def write(path: Path, data: bytes) -> None:
    """Write a file, or replace it: a reader sees the old contents or the new contents, never a part.

    If a process has mapped the old file into memory, it still sees the old contents.
    """
    partial = path.with_name(f"writing-{path.name}")
    partial.write_bytes(data)
    partial.rename(path)


@contextlib.contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to `target`, on the same disk; it is always deleted at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as name:
        yield Path(name)


def place(made: Path, target: Path) -> None:
    """Rename the folder `made` to `target`; if another process has made `target` first, keep that."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path`, such as a full disk, into a `RunError` that names the remedy."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"cannot write {path} ({reason}); the files written so far are good: correct this, then use --resume"
        ) from None


def check_out(out: Path) -> None:
    """Raise `UsageError` when runs cannot be written below `out`. Nothing is created."""
    existing = out
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"out: {existing} is a file, not a folder; choose another --out")
    try:
        with tempfile.TemporaryFile(dir=existing):  # try it: permissions do not tell of /proc and read-only mounts
            pass
    except OSError as error:
        raise UsageError(f"out: {existing} cannot be written to ({error.strerror}); choose another --out") from None
