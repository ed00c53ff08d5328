"""Workers that may die: each job is computed, by whichever worker."""

import abc
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self

from pflbench.engine.work import Job, Result, Train, Trained, Work
from pflbench.errors import RunError
from pflbench.store.memory import Notice


class WorkerDied(Exception):  # noqa: N818
    """A worker ended before it sent its result. The message says which worker, and how."""


class Link(Protocol):
    """The connection to one worker. Its methods raise `WorkerDied`."""

    def send(self, job: Job) -> None:
        """Give the worker a job."""
        ...

    def receive(self) -> Result | Exception:
        """Return the result of the worker's job; if the job failed, its exception."""
        ...


class Pool(abc.ABC):
    """Computes jobs with workers, the largest first.

    If a worker dies, another one computes its job: a job carries everything that its result depends on, so a second
    try has the same bits. If several workers die of one job, the run ends with `RunError`.

    A subclass starts the workers. With `remote`, the workers have no access to the run's folder: jobs and results
    carry states and uploads, and this process reads and writes their files.
    """

    tries: ClassVar[int] = 3
    """The number of workers that may die of one job."""
    remote: ClassVar[bool] = False

    def __init__(self, notice: Notice) -> None:
        self._notice = notice
        self._idle: list[Link] = []
        self._work: Work

    def __enter__(self) -> Self:
        return self

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """See `Executor`."""

    @abc.abstractmethod
    def __exit__(self, *error: object) -> None: ...

    def start(self, work: Work) -> None:
        """Compute the jobs of `work` from now on."""
        self._work = work

    @abc.abstractmethod
    def _begin(self, jobs: Sequence[Job]) -> None:
        """Prepare to send `jobs`."""

    @abc.abstractmethod
    def _ready(self, busy: Sequence[Link]) -> Sequence[Link]:
        """Wait until one of the workers in `busy` has a result or has died, or new workers are idle; return the former.

        Raises `RunError` if there are no workers, and none will come.
        """

    @abc.abstractmethod
    def _lost(self, link: Link) -> None:
        """Forget a worker that died; start another one if possible."""

    def map(self, jobs: Sequence[Job]) -> list[Result | Exception]:
        """Return the results of `jobs`, in their order. The result of a job that failed is its exception."""
        # Jobs are popped from the end: the largest first.
        waiting = sorted(range(len(jobs)), key=lambda i: self._work.size(jobs[i]))
        doing: dict[Link, int] = {}
        results: dict[int, Result | Exception] = {}
        deaths: Counter[int] = Counter()

        def lose(link: Link, death: WorkerDied) -> None:
            number = doing.pop(link)
            job = jobs[number]
            deaths[number] += 1
            text = f"{death} in round {job.round}, client {job.client}"
            if deaths[number] == self.tries:
                raise RunError(
                    f"{text}; {self.tries} workers died of this job; if memory ran out, use fewer --workers"
                ) from None
            self._notice(f"{text}; another worker computes this again")
            waiting.append(number)
            self._lost(link)

        self._begin(jobs)
        while len(results) < len(jobs):
            while waiting and self._idle:
                link = self._idle.pop()
                doing[link] = waiting.pop()
                try:
                    link.send(self._carried(jobs[doing[link]]))
                except WorkerDied as death:
                    lose(link, death)
            for link in self._ready(list(doing)):
                try:
                    result = link.receive()
                except WorkerDied as death:
                    lose(link, death)
                else:
                    job = jobs[number := doing.pop(link)]
                    results[number] = self._kept(job, result)
                    self._idle.append(link)
        return [results[i] for i in range(len(jobs))]

    def _carried(self, job: Job) -> Job:
        return self._work.carried(job) if self.remote else job

    def _kept(self, job: Job, result: Result | Exception) -> Result | Exception:
        if self.remote and isinstance(job, Train) and isinstance(result, Trained):
            return self._work.kept(job, result)
        return result
