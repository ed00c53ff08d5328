"""Child processes. They start while signals are deferred, and they end with their parent."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the block ends: interrupting it would leak a child process.

    A signal during the start of a child would also run the parent's handler in the child.
    """
    # We set handlers instead of the thread's mask. With a mask, another thread, such as one of OpenMP's, takes the
    # signal, and Python still runs the handler in the main thread.
    if threading.current_thread() is not threading.main_thread():  # handlers interrupt the main thread alone
        yield
        return
    came: list[int] = []
    try:
        with contextlib.ExitStack() as handlers:
            for number in _SIGNALS:
                if signal.getsignal(number) is not None:  # None: Python did not set this handler and cannot restore it
                    before = signal.signal(number, lambda number, _frame: came.append(number))
                    handlers.callback(signal.signal, number, before)
            yield
    finally:
        for held in dict.fromkeys(came):
            signal.raise_signal(held)


def start_child(
    target: Callable[..., None], *args: Any, duplex: bool = True, daemon: bool = False
) -> tuple[Connection, BaseProcess]:
    """Start a process that calls `target` with `args` and its end of a pipe; return ours, and the process.

    The process is forked on Linux and spawned elsewhere. The caller defers signals until it has stored the child.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ours, theirs = context.Pipe(duplex)
    process = context.Process(target=target, args=(*args, theirs), daemon=daemon)  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        # Python 3.12 warns when a process with threads forks. Children use none of this process's threads and locks.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    return ours, process


def end_children(children: Iterable[tuple[Connection, BaseProcess]]) -> None:
    """Kill the processes, wait for their end, and close the pipes to them."""
    with signals_deferred():
        for connection, process in children:
            process.kill()
            process.join()
            connection.close()


def begin_child(on_sigterm: signal.Handlers) -> None:
    """Make this process, a child, leave SIGINT to its parent, and end as soon as the parent ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
