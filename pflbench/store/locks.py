"""The lock of a run, and the file systems on which it may not hold."""

import contextlib
import errno
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

from pflbench import files
from pflbench.errors import RunBusy

_NETWORK = ("nfs*", "lustre", "gpfs", "beegfs*", "cifs", "smb3", "fuse.*", "ceph")
"""Types of file systems whose locks may be off, or may hold on one machine only."""
_MOUNTS = Path("/proc/self/mountinfo")


@contextlib.contextmanager
def locked(out: Path, run: str) -> Iterator[None]:
    """Hold the lock of `run` in folder `out`. The system frees it when this process ends for any reason.

    Raises `RunBusy` when another process has it.
    """
    import filelock

    folder = out / ".locks"
    with files.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / run)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise RunBusy(f"run {run} is being computed by another process; wait for it to end") from None
    except OSError as error:
        # A network file system without a lock service. The names of the partial folders then do the lock's work.
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
    try:
        yield
    finally:
        lock.release()


def network(path: Path) -> str | None:
    """Return the type of the network file system that holds `path`, which need not exist; None for a local one.

    Only Linux tells; elsewhere None.
    """
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    place, found, depth = path.resolve(), None, 0
    for line in lines:
        mount, _, system = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount.split()[4]))
        if place.is_relative_to(point) and len(point.parts) >= depth:  # of two at one point, the later hides the other
            found, depth = system.split()[0], len(point.parts)
    return found if found and any(fnmatch.fnmatchcase(found, pattern) for pattern in _NETWORK) else None
