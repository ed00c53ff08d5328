"""The interface of executors. Every executor gives the same bits."""

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from pflbench.engine.work import Job, Result, Work


class Executor(Protocol):
    """Computes jobs; a context manager that frees its processes. Entering it raises `UsageError` when it cannot."""

    def __enter__(self) -> Self: ...

    def describe(self) -> dict[str, Any]:
        """Return what a record says of the workers: their number, and their "device"."""
        ...

    def start(self, work: Work) -> None:
        """Compute the jobs of `work` from now on."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def map(self, jobs: Sequence[Job]) -> list[Result | Exception]:
        """Return the results of `jobs`, in their order. The result of a job that failed is its exception."""
        ...


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread for the clients' and the server's work: sums then have the same order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
