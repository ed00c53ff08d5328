"""Worker processes on this machine."""

import contextlib
import io
import pickle
import signal
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Self

import torch

from pflbench.engine.executors.children import begin_child, end_children, signals_deferred, start_child
from pflbench.engine.executors.wire import Unpickler, common, dumps
from pflbench.engine.work import Job, Result, Work
from pflbench.errors import PflbenchError, RunError


class Processes:
    """Computes the jobs in worker processes of one thread each.

    On Linux the workers are forked: they share the data with this process, start at once, and know the networks and
    methods that a script or a notebook defines. Elsewhere they are spawned, and the data is in shared memory.
    If a worker dies, the run ends with `RunError`. If this process dies, the workers end themselves.
    """

    def __init__(self, work: Work, workers: int) -> None:
        self._work = work
        self._wanted = workers
        self._workers: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> Self:
        try:
            with signals_deferred():
                for _ in range(self._wanted):
                    connection, process = start_child(_serve, self._work, daemon=True)
                    self._workers[connection] = process
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        end_children(self._workers.items())

    def map(self, jobs: Sequence[Job]) -> list[Result | Exception]:
        """Return the results of `jobs`, in their order. The result of a job that failed is its exception."""
        # Jobs are popped from the end: the largest first.
        waiting = sorted(range(len(jobs)), key=lambda i: self._work.size(jobs[i]))
        sent: dict[Connection, dict[int, int]] = {connection: {} for connection in self._workers}
        shared = common(jobs)
        idle = list(self._workers)
        doing: dict[Connection, int] = {}
        results: dict[int, Result | Exception] = {}
        while waiting or doing:
            while waiting and idle:
                connection = idle.pop()
                doing[connection] = waiting.pop()
                with self._death(connection, jobs[doing[connection]]):
                    connection.send_bytes(dumps(jobs[doing[connection]], shared, sent[connection]))
            ready = wait(list(doing))
            for connection in [c for c in doing if c in ready]:
                with self._death(connection, jobs[doing[connection]]):
                    result = pickle.loads(connection.recv_bytes())  # noqa: S301
                results[doing.pop(connection)] = result
                idle.append(connection)
        return [results[i] for i in range(len(jobs))]

    @contextlib.contextmanager
    def _death(self, connection: Connection, job: Job) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            process = self._workers[connection]
            process.join()
            code = process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise RunError(
                f"worker process {process.pid} died ({how}) in round {job.round}, client {job.client}; "
                "if memory ran out, use fewer --workers"
            ) from None


def _serve(work: Work, connection: Connection) -> None:
    """Do jobs until the connection closes. The body of a worker process."""
    begin_child(signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    work = work.private()
    received: list[torch.Tensor] = []
    while True:
        try:
            job = Unpickler(io.BytesIO(connection.recv_bytes()), received).load()
        except (EOFError, OSError):
            return
        connection.send_bytes(_outcome(work, job))


def _outcome(work: Work, job: Job) -> bytes:
    """Return the pickled result of `job`, or the pickled error that it raised."""
    try:
        return dumps(work(job))
    except Exception as error:
        if not isinstance(error, PflbenchError):  # a bug in a method: its author needs the worker's traceback
            note = f"In a worker, round {job.round}, client {job.client}:\n{traceback.format_exc()}"
            try:
                pickle.loads(pickle.dumps(error))  # noqa: S301
            except Exception:
                error = RuntimeError(repr(error))
            error.add_note(note)
        return dumps(error)
