"""Worker processes on this machine."""

import pickle
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch import Tensor

from pflbench.core.device import Devices
from pflbench.engine.children import end_children, signals_deferred, start_child
from pflbench.engine.executors.pool import Link, Pool, WorkerDied
from pflbench.engine.executors.wire import common, dumps
from pflbench.engine.executors.worker import serve
from pflbench.engine.work import Job, Result, Work
from pflbench.store.memory import Notice


class Processes(Pool):
    """Computes the jobs in worker processes of one thread each.

    On Linux the workers are forked: they share the data with this process, start at once, and know the networks and
    methods that a script or a notebook defines. Elsewhere they are spawned, and the data is in shared memory.
    If a worker dies, another one takes its place. If this process dies, the workers end themselves.
    """

    def __init__(self, workers: int, devices: Devices, notice: Notice) -> None:
        super().__init__(notice)
        self.workers = workers
        self.devices = devices
        self._links: dict[Connection, ProcessLink] = {}
        self._shared: dict[int, Tensor] = {}

    def describe(self) -> dict[str, Any]:
        """See `Executor`."""
        return {"workers": self.workers, "device": self.devices.describe()}

    def start(self, work: Work) -> None:
        """Start the workers, which compute the jobs of `work`."""
        super().start(work)
        with signals_deferred():
            for number in range(self.workers):
                self._add(number)

    def __exit__(self, *error: object) -> None:
        end_children((link.connection, link.process) for link in self._links.values())

    def _add(self, number: int) -> None:
        connection, process = start_child(serve, self._work, self.devices.of(number), daemon=True)
        link = self._links[connection] = ProcessLink(connection, process, number)
        link.shared = self._shared
        self._idle.append(link)

    def _begin(self, jobs: Sequence[Job]) -> None:
        self._shared = common(jobs)
        for link in self._links.values():
            link.shared, link.sent = self._shared, {}

    def _ready(self, busy: Sequence[Link]) -> Sequence[Link]:
        found = wait([link.connection for link in self._links.values() if link in busy])
        return [link for link in self._links.values() if link.connection in found]

    def _lost(self, link: Link) -> None:
        assert isinstance(link, ProcessLink)  # noqa: S101
        with signals_deferred():
            del self._links[link.connection]
            link.connection.close()
            self._add(link.number)


class ProcessLink:
    """The pipe to a worker process. `shared` has the tensors that several jobs carry, by id; `sent` those it has."""

    def __init__(self, connection: Connection, process: BaseProcess, number: int) -> None:
        self.connection = connection
        self.process = process
        self.number = number
        self.shared: dict[int, Tensor] = {}
        self.sent: dict[int, int] = {}

    def send(self, job: Job) -> None:
        """See `Link`."""
        try:
            self.connection.send_bytes(dumps(job, self.shared, self.sent))
        except OSError:
            raise self._death() from None

    def receive(self) -> Result | Exception:
        """See `Link`."""
        try:
            result: Result | Exception = pickle.loads(self.connection.recv_bytes())  # noqa: S301
        except (EOFError, OSError):
            raise self._death() from None
        return result

    def _death(self) -> WorkerDied:
        self.process.join()
        code = self.process.exitcode or 0
        return WorkerDied(
            f"worker process {self.process.pid} died ({f'signal {-code}' if code < 0 else f'exit code {code}'})"
        )
