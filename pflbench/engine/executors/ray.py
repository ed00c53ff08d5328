"""Workers on the nodes of a Ray cluster."""

import contextlib
import pickle
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor

from pflbench.core.device import Devices
from pflbench.engine.cluster import (
    GetTimeoutError,
    RayError,
    RayTaskError,
    actor,
    cloudpickle,
    connected,
    first_line,
    ray,
    room,
)
from pflbench.engine.execution import Execution
from pflbench.engine.executors.node import Node, code, packed
from pflbench.engine.executors.pool import Link, Pool, WorkerDied
from pflbench.engine.executors.wire import common, dumps
from pflbench.engine.experiment import Experiment
from pflbench.engine.work import Job, Result, Work
from pflbench.errors import RunError, UsageError
from pflbench.store.memory import Notice

_FIRST = 300.0  # seconds in which the first worker must be ready: a node may read torch from a slow disk
_OTHERS = 30.0  # seconds to wait for another worker after the last one was ready
_ANSWER = 2.0  # seconds in which an idle worker answers
_ROOM = 60.0  # seconds to wait for a core when all workers are lost


class Ray(Pool):
    """Computes the jobs in actors on the nodes of a Ray cluster, of one core or a share of a GPU each.

    The actors have no access to the run's folder: this process reads and writes all states. Every actor trains the
    run's network for two steps first. Those whose bits differ from the largest group's are not used, and are named.
    Actors on new nodes join at the next round.
    """

    remote = True

    def __init__(self, experiment: Experiment, execution: Execution, notice: Notice) -> None:
        super().__init__(notice)
        self._experiment = experiment
        self._execution = execution
        self._stack = contextlib.ExitStack()
        self._links: list[RayLink] = []
        self._joining: dict[Any, Any] = {}  # actors by the reference to their identity
        self._unfit = 0  # workers with other code or other bits
        self._number = 0
        self._common: Any = None
        self._shared: dict[int, Tensor] = {}
        self._numbers: dict[int, int] = {}  # the places in `_common` of the tensors in `_shared`
        self._probe: str | None = None

    def __enter__(self) -> Self:
        with self._stack:
            self._stack.enter_context(connected(self._execution, self._execution.workers))
            _ = self._experiment.setup  # it is sent with the work
            self._packed = ray.put(packed(Work(self._experiment, None), cloudpickle.CloudPickler))
            self._code = code(self._experiment.algorithm)
            self._grow()
            self._gather()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def describe(self) -> dict[str, Any]:
        """See `Executor`."""
        found: Devices = self._links[0].identity["devices"]
        processors = Counter(str(link.identity["processor"]) for link in self._links)
        return {
            "workers": len(self._links),
            "device": found.describe(),
            "nodes": len({link.node for link in self._links}),
            "processors": dict(processors),
        }

    def _grow(self) -> None:
        """Ask for as many actors as the cluster has room for."""
        has = room(self._execution.device)
        wanted = min(self._execution.workers or has, self._experiment.spec.clients)
        if self._unfit:  # else they would come again in every round
            wanted = min(wanted, has - self._unfit)
        for _ in range(wanted - len(self._links) - len(self._joining)):
            self._ask()

    def _ask(self) -> None:
        new = actor(self._execution.device)
        ref = new.begin.remote(Node.__module__, Node.__name__, self._packed, self._code, self._execution.device)
        self._joining[ref] = new

    def _gather(self) -> None:
        """Wait for the first actors, and keep the largest group of those that compute the same bits."""
        while self._joining:
            ready, _ = ray.wait(list(self._joining), timeout=_OTHERS if self._links else _FIRST)
            if not ready:
                break
            for ref in ready:
                link = self._joined(ref)
                if isinstance(link, str):
                    raise UsageError(f"executor: {link}")
                self._links.append(link)
        if not self._links:
            raise UsageError(f"executor: the Ray cluster started no worker in {_FIRST:g} s; see `ray status`")
        probes = Counter(link.identity["probe"] for link in self._links)
        self._probe = probes.most_common(1)[0][0]
        for link in list(self._links):
            if link.identity["probe"] != self._probe:
                self._refuse(link)
                self._links.remove(link)
        self._idle = list(self._links)

    def _joined(self, ref: Any) -> "RayLink | str":
        """Return the link to an actor that is ready, or why it cannot be used."""
        new = self._joining.pop(ref)
        try:
            host, node, found = ray.get(ref)
        except RayError as error:
            return f"a worker could not start: {first_line(error)}"
        if isinstance(found, str):
            self._unfit += 1
            return f"node {host} has {found}"
        return RayLink(self, new, host, node, found)

    def _refuse(self, link: "RayLink") -> None:
        """Say that an actor computes other bits, and end it."""
        self._notice(
            f"a worker on node {link.host} ({link.identity['processor']}) computes other bits than the others; "
            "it is not used"
        )
        self._unfit += 1
        ray.kill(link.actor)

    def _begin(self, jobs: Sequence[Job]) -> None:
        self._number += 1
        self._shared = common(jobs)
        self._numbers = {tensor: number for number, tensor in enumerate(self._shared)}
        self._common = ray.put([tensor.detach().numpy() for tensor in self._shared.values()])
        self._grow()

    def _ready(self, busy: Sequence[Link]) -> Sequence[Link]:
        working = {link.ref: link for link in self._links if link in busy}
        if not working and not self._joining:
            raise RunError("all workers are lost, and none could be started in their place; use --resume later")
        done, _ = ray.wait([*working, *self._joining], timeout=None if working else _ROOM)
        if not done:
            raise RunError(f"all workers are lost, and in {_ROOM:g} s no node had room for another; use --resume later")
        for ref in done:
            if ref in self._joining:
                link = self._joined(ref)
                if isinstance(link, str):
                    self._notice(f"{link}; it is not used")
                elif link.identity["probe"] != self._probe:
                    self._refuse(link)
                else:
                    self._links.append(link)
                    self._idle.append(link)
        return [working[ref] for ref in done if ref in working]

    def _lost(self, link: Link) -> None:
        assert isinstance(link, RayLink)  # noqa: S101
        self._links.remove(link)
        self._ask()
        # If its node is gone, idle workers are gone, too. They died of no job.
        answers = {other.actor.__ray_ready__.remote(): other for other in self._idle if isinstance(other, RayLink)}
        if answers:
            ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER)
        for ref, other in answers.items():
            try:
                ray.get(ref, timeout=0)
            except GetTimeoutError:
                continue
            except RayError:
                self._idle.remove(other)
                self._links.remove(other)
                self._ask()


class RayLink:
    """An actor that is ready: its host, Ray's node, and its identity as `Node.identity` returned it."""

    def __init__(self, pool: Ray, actor: Any, host: str, node: str, identity: dict[str, Any]) -> None:
        self.actor = actor
        self.host = host
        self.node = node
        self.identity = identity
        self.ref: Any = None
        self._pool = pool

    def send(self, job: Job) -> None:
        """See `Link`."""
        pool = self._pool
        self.ref = self.actor.call.remote("do", pool._number, pool._common, dumps(job, pool._shared, pool._numbers))

    def receive(self) -> Result | Exception:
        """See `Link`."""
        try:
            result: Result | Exception = pickle.loads(ray.get(self.ref))  # noqa: S301
        except RayTaskError:
            raise
        except RayError as error:
            raise WorkerDied(f"worker on node {self.host} died ({type(error).__name__})") from None
        return result
