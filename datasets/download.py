"""Downloads through torchvision that end: in a complete folder, or in an error and nothing left behind."""

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
    """A download that did not work; the message is the reason, one line without a full stop."""


def probe(url: str) -> None:
    """Return if `url` answers within `PROBE_SECONDS`, else raise `DownloadError`."""
    reasons: list[str] = ["no answer"]

    def ask() -> None:
        try:
            # A plain GET, closed unread: it honours proxies, and some servers refuse HEAD.
            with urllib.request.urlopen(url, timeout=PROBE_SECONDS):  # noqa: S310 (torchvision's own addresses)
                reasons.clear()
        except _FAILURES as error:
            reasons[:] = [_reason(error)]

    # In a thread because no time-out covers the name look-up, which can hang for minutes on a broken network.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    for reason in tuple(reasons):
        raise DownloadError(reason)


def fetch(source: Callable[..., object], url: str, data_dir: Path, folder: str) -> None:
    """Let the torchvision dataset class `source` download itself, and put its `folder` into `data_dir`.

    `url` is asked first, so that a machine without network knows within seconds. The folder appears complete and
    checked, by one rename, or not at all. Two processes may do this at once. Raises `DownloadError`.
    """
    probe(url)
    try:
        with files.scratch(data_dir / folder) as scratch:
            # torchvision prints to stdout in some versions; stdout belongs to our own tables.
            with _socket_timeout(READ_SECONDS), contextlib.redirect_stdout(sys.stderr):
                source(root=str(scratch), download=True)
            files.place(scratch / folder, data_dir / folder)
    except _FAILURES as error:
        raise DownloadError(_reason(error)) from error


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    # torchvision offers no time-out of its own. It covers each connect and each read, not the whole download.
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: BaseException) -> str:
    # URLError wraps the error that says something.
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split()) or type(error).__name__
