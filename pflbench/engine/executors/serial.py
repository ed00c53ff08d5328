"""The executor without worker processes."""

from collections.abc import Sequence
from typing import Self

import torch

from pflbench.engine.work import Job, Result, Work


class Serial:
    """Computes the jobs in this process, one by one."""

    def __init__(self, work: Work, workers: int) -> None:  # noqa: ARG002
        self._work = work.private()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, jobs: Sequence[Job]) -> list[Result | Exception]:
        """Return the results of `jobs`, in their order. The result of a job that failed is its exception."""

        def result(job: Job) -> Result | Exception:
            try:
                return self._work(job)
            except Exception as error:
                return error

        with torch.random.fork_rng(devices=[]):
            return [result(job) for job in jobs]
