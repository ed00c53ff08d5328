"""Downloads through torchvision. Each ends with a complete folder, or with an error and no files."""

import contextlib
import http.client
import socket
import sys
import tarfile
import threading
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from pflbench import files

PROBE_SECONDS = 5.0
READ_SECONDS = 30.0

_FAILURES = (OSError, RuntimeError, EOFError, ValueError, tarfile.TarError, zlib.error, http.client.HTTPException)


class DownloadError(Exception):
    """A failed download; the message is the reason, one line without a full stop."""


def probe(url: str) -> None:
    """Raise `DownloadError` unless `url` answers within `PROBE_SECONDS`."""
    reasons: list[str] = ["no answer"]

    def ask() -> None:
        try:
            # A plain GET, whose body is not read: it uses proxies, and some servers refuse HEAD.
            with urllib.request.urlopen(url, timeout=PROBE_SECONDS):  # noqa: S310 (the addresses are torchvision's)
                reasons.clear()
        except _FAILURES as error:
            reasons[:] = [_reason(error)]

    # A thread, because no time-out covers the name look-up, which can hang for minutes on a broken network.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    for reason in tuple(reasons):
        raise DownloadError(reason)


def fetch(source: Callable[..., object], url: str, data_dir: Path, folder: str) -> None:
    """Let the torchvision dataset class `source` download itself, and put its `folder` into `data_dir`.

    `url` is probed first, so that a machine without network fails within seconds. The folder appears complete and
    checked, by one rename, or not at all. Two processes may do this at once. Raises `DownloadError`.
    """
    probe(url)
    try:
        with files.scratch(data_dir / folder) as scratch:
            # Some versions of torchvision print to stdout, which is for our tables only.
            with _socket_timeout(READ_SECONDS), contextlib.redirect_stdout(sys.stderr):
                source(root=str(scratch), download=True)
            files.place(scratch / folder, data_dir / folder)
    except _FAILURES as error:
        raise DownloadError(_reason(error)) from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # torchvision has no time-out. This one covers each connect and each read, not the complete download.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: BaseException) -> str:
    # URLError wraps the error that has the real reason.
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split()) or type(error).__name__
