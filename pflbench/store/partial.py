"""Partial folders: where a run is computed, and by which process.

    runs/<id>.partial                         nobody computes the run
    runs/<id>.<host>-<pid>-<4 hex>.partial    this process of this machine computes it, or ended without a word

A process computes only in a folder of its own name. It takes another folder over by renaming it, which succeeds for one
process alone. If the former owner lives after all, its next write fails, because its path is gone. So where locks do
not hold, two processes may do the same work, but they cannot damage each other's files.

An owner touches the file `alive` in its folder every 10 seconds. All ages are differences of times that the file
system gives, so the machines' clocks do not matter.
"""

import contextlib
import functools
import hashlib
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
import threading
from pathlib import Path

from pflbench import files
from pflbench.errors import RunBusy

_BEAT = 10.0  # seconds between two signs of life
# Seconds without a sign of life until another process takes the folder over. A client of NFS trusts the names that it
# has seen for up to 60 s; after a shorter time, a stopped owner could go on writing by them.
_STALE = 60.0
SIGN = "alive"
"""The file of an owner's signs of life."""
_OWNED = re.compile(r"[^.]+\.(?P<host>[\w-]+)-(?P<pid>\d{1,9})-[0-9a-f]{4}\.partial", re.ASCII)


def run_of(path: Path) -> str:
    """Return the id of the run whose folder is `path`: its record, a replaced record, or a partial folder."""
    return path.name.partition(".")[0] if path.suffix in (".partial", ".old") else path.name


def of_run(out: Path, run: str) -> list[Path]:
    """Return the partial folders of `run` in folder `out`."""
    return sorted(path for path in out.glob(f"{run}.*") if path.suffix == ".partial")


def newest(path: Path) -> int:
    """Return the round of the newest checkpoint in a partial folder; 0 without a checkpoint."""
    return max((int(p.stem) for p in (path / "checkpoint").glob("*.json") if p.stem.isdecimal()), default=0)


def own(out: Path, run: str) -> Path:
    """Return the path of a new partial folder of this process."""
    return out / f"{run}.{_host()}-{os.getpid()}-{secrets.token_hex(2)}.partial"


def abandoned(out: Path, run: str) -> list[Path]:
    """Return the partial folders of `run`, which no process computes in. The caller holds the run's lock.

    Raises `RunBusy` when one of them has an owner that may live. That happens where locks do not hold.
    """
    found = of_run(out, run)
    for path in found:
        owner = _OWNED.fullmatch(path.name)
        if owner is None or (owner["host"] == _host() and _ended(int(owner["pid"]))):
            continue
        age = _age(path)
        if age < _STALE:
            raise RunBusy(
                f"run {run} is computed by {owner['host']}-{owner['pid']}, last sign of life {age:.0f} s ago; "
                f"wait for it to end, or for {_STALE:.0f} s without a sign of life"
            )
    return found


def take_over(path: Path, mine: Path) -> None:
    """Rename the abandoned folder `path` to `mine`. Raises `RunBusy` when another process is faster."""
    try:
        path.rename(mine)
    except FileNotFoundError:
        raise RunBusy(f"run {run_of(path)} was just taken over by another process; wait for it to end") from None


def discard(path: Path) -> None:
    """Delete an abandoned folder, or one's own, unless another process takes it over first."""
    mine = own(path.parent, run_of(path))
    with contextlib.suppress(FileNotFoundError):
        path.rename(mine)
        # These mark what can be published and resumed. A kill during the rest must not leave them behind.
        for mark in (mine / "run.json", *(mine / "checkpoint").glob("*.json")):
            mark.unlink(missing_ok=True)
        shutil.rmtree(mine)


def discard_ended(out: Path, run: str) -> None:
    """Delete the partial folders of `run` whose owners were processes of this machine and have ended."""
    for path in of_run(out, run):
        owner = _OWNED.fullmatch(path.name)
        if owner is not None and owner["host"] == _host() and _ended(int(owner["pid"])):
            with contextlib.suppress(OSError):  # another user's
                discard(path)


def give_back(path: Path) -> None:
    """Rename one's own folder so that everybody may resume the run at once; do nothing if it is not there any more."""
    # The rename fails if there is such a folder. Then the folder keeps its name, and is taken over a minute later.
    with contextlib.suppress(OSError):
        (path / SIGN).unlink(missing_ok=True)
        path.rename(path.with_name(f"{run_of(path)}.partial"))


def give_back_of(out: Path, run: str, pid: int | None) -> None:
    """Give back the folders of `run` that process `pid` of this machine, which has ended, could not give back."""
    for path in of_run(out, run):
        owner = _OWNED.fullmatch(path.name)
        if owner is not None and owner["host"] == _host() and int(owner["pid"]) == pid:
            give_back(path)


class Life:
    """The signs of life of a folder's owner."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    def begin(self, folder: Path) -> None:
        """Show signs of life in `folder` from now on. It never makes a folder or a file that was renamed or deleted."""
        sign = folder / SIGN
        sign.touch()
        threading.Thread(target=self._beat, args=(sign,), daemon=True).start()

    def _beat(self, sign: Path) -> None:
        while not self._ended.wait(_BEAT):
            with contextlib.suppress(OSError):
                os.utime(sign)

    def end(self) -> None:
        """Show no more signs of life."""
        self._ended.set()


@functools.cache
def _host() -> str:
    """Return the name of this machine, and on Linux a digest of its boot and of its table of processes.

    Machines and containers may have equal names. The digest tells whether a pid is one of the pids that we see.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "-", platform.node())[:40] or "host"
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        table = boot + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return name
    return f"{name}-{hashlib.sha256(table.encode()).hexdigest()[:6]}"


def _ended(pid: int) -> bool:
    """Return whether process `pid` of this machine has ended, as far as the system tells; a zombie has."""
    if sys.platform != "linux":
        return False
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (ProcessLookupError, FileNotFoundError):
        return True
    except OSError:  # it is another user's
        return False
    return stat.rpartition(")")[2].split()[0] in "ZX"


def _age(path: Path) -> float:
    """Return the seconds since the last sign of life in a partial folder."""
    try:
        last = path.stat().st_ctime  # a rename counts, too: a new owner comes before its first sign
        with contextlib.suppress(FileNotFoundError), (path / SIGN).open("rb") as sign:
            last = max(last, os.fstat(sign.fileno()).st_mtime)  # NFS asks its server when a file is opened
    except FileNotFoundError:
        raise RunBusy(f"run {run_of(path)} was just taken over by another process; wait for it to end") from None
    with files.writing(path.parent), tempfile.TemporaryFile(dir=path.parent) as new:
        return max(0.0, os.fstat(new.fileno()).st_mtime - last)
