"""The executor without workers."""

import contextlib
from collections.abc import Sequence
from typing import Any, Self

import torch

from pflbench.core.device import Devices
from pflbench.engine.work import Job, Result, Work


class Serial:
    """Computes the jobs in this process, one by one."""

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.devices.of(0).exact())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def describe(self) -> dict[str, Any]:
        """See `Executor`."""
        return {"workers": 1, "device": self.devices.describe()}

    def start(self, work: Work) -> None:
        """Compute the jobs of `work` from now on."""
        self._work = work.on(self.devices.of(0))

    def map(self, jobs: Sequence[Job]) -> list[Result | Exception]:
        """Return the results of `jobs`, in their order. The result of a job that failed is its exception."""

        def result(job: Job) -> Result | Exception:
            try:
                return self._work(job)
            except Exception as error:
                return error

        with torch.random.fork_rng(devices=[]):
            return [result(job) for job in jobs]
