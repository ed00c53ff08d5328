"""Workers on the nodes of a Ray cluster. Only this module imports Ray."""

import contextlib
import logging
import os
import pickle
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Self

import ray
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError
from torch import Tensor

from pflbench.core.device import Devices
from pflbench.engine.cores import cores
from pflbench.engine.execution import PER_GPU, Execution
from pflbench.engine.executors.node import packed, sources
from pflbench.engine.executors.pool import Link, Pool, WorkerDied
from pflbench.engine.executors.wire import common, dumps
from pflbench.engine.experiment import Experiment
from pflbench.engine.work import Job, Result, Work
from pflbench.errors import RunError, UsageError
from pflbench.store.memory import Notice
from pflbench.store.provenance import versions

_ANSWER = 10.0  # seconds in which the address must accept a connection
_FIRST = 300.0  # seconds in which the first worker must be ready: a node may read torch from a slow disk
_OTHERS = 30.0  # seconds to wait for another worker after the last one was ready
_ROOM = 60.0  # seconds to wait for a core when all workers are lost


@contextlib.contextmanager
def connected(address: str | None, cpus: int) -> Iterator[None]:
    """Connect to the cluster at `address`; with None, start Ray with `cpus` cores on this machine, and end it.

    Raises `UsageError` when nobody answers, or when this process uses Ray already.
    """
    if ray.is_initialized():
        raise UsageError("executor: this process uses Ray already; call ray.shutdown() first")
    if address is not None:
        _call(address)
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # its errors come as exceptions
    # Ray sets a handler of SIGTERM, and would send statistics of its use.
    before = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False} if address is None else {}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.CRITICAL,
            **own,
        )
    except (RayError, ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"the Ray cluster at {address}" if address else "Ray on this machine"
        raise UsageError(f"ray_address: cannot use {where}: {_first_line(error)}") from None
    finally:
        if before is not None and signal.getsignal(signal.SIGTERM) is not before:
            with contextlib.suppress(ValueError):  # not in the main thread: then Ray has set none
                signal.signal(signal.SIGTERM, before)
    try:
        yield
    finally:
        ray.shutdown()


def _call(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"ray_address: nobody answers at {address} ({_first_line(error)}); `ray status` on the head node shows "
            "its address"
        ) from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _actor() -> Any:
    """Return the actor's class. It is local, so that Ray sends its code: a node without pflbench can say so."""

    class Actor:
        def begin(self, arrays: Any, wanted: dict[str, str], device: str) -> Any:
            import socket

            host = socket.gethostname()
            try:
                from pflbench.engine.executors.node import Node
                from pflbench.errors import PflbenchError
            except ModuleNotFoundError as error:
                return host, f"no module {error.name!r}; install the same packages there"
            try:
                self._node = Node(arrays, wanted, device)
                return host, self._node.identity()
            except ModuleNotFoundError as error:
                return host, f"no module {error.name!r}; install the same packages there"
            except PflbenchError as error:
                return host, str(error)

        def do(self, number: int, common: Any, job: bytes) -> bytes:
            return self._node.do(number, common, job)

    return ray.remote(max_restarts=0, max_task_retries=0)(Actor)


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
        self._number = 0
        self._common: Any = None
        self._shared: dict[int, Tensor] = {}
        self._probe: str | None = None

    def __enter__(self) -> Self:
        execution = self._execution
        with self._stack:
            self._stack.enter_context(connected(execution.ray_address, execution.workers or cores()))
            self._actor = _actor()
            work = Work(self._experiment, None)
            _ = work.experiment.setup, work.experiment.federation, work.experiment.net
            self._packed = ray.put(packed(work, cloudpickle.CloudPickler))
            self._sources = sources(self._experiment.algorithm)
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
            "nodes": len({link.host for link in self._links}),
            "processors": dict(processors),
        }

    def _room(self) -> int:
        """Return how many actors the cluster has room for."""
        has = ray.cluster_resources()  # type: ignore[no-untyped-call, unused-ignore]
        room = has.get("CPU", 0) if self._execution.device == "cpu" else has.get("GPU", 0) * PER_GPU
        return min(self._execution.workers or int(room), self._experiment.spec.clients)

    def _grow(self) -> None:
        """Ask for as many actors as there is room for."""
        room = self._room()
        if not room and not self._links:
            kind = "cores" if self._execution.device == "cpu" else "GPUs"
            raise UsageError(f"ray_address: the Ray cluster has no {kind}")
        for _ in range(room - len(self._links) - len(self._joining)):
            self._ask()

    def _ask(self) -> None:
        device = self._execution.device
        share = {} if device == "cpu" else {"num_gpus": 1 / PER_GPU}
        actor = self._actor.options(num_cpus=1, **share).remote()
        self._joining[actor.begin.remote(self._packed, versions(), device)] = actor

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
        actor = self._joining.pop(ref)
        try:
            host, found = ray.get(ref)
        except RayError as error:
            return f"a worker could not start: {_first_line(error)}"
        if isinstance(found, str):
            return f"node {host} has {found}"
        for name, sha in self._sources.items():
            if found["sources"].get(name) != sha:
                return f"node {host} has another source of {name}; install the same version there"
        return RayLink(self, actor, host, found)

    def _refuse(self, link: "RayLink") -> None:
        """Say that an actor computes other bits, and end it."""
        self._notice(
            f"a worker on node {link.host} ({link.identity['processor']}) computes other bits than the others; "
            "it is not used"
        )
        ray.kill(link.actor)

    def _begin(self, jobs: Sequence[Job]) -> None:
        self._number += 1
        self._shared = common(jobs)
        self._common = ray.put([tensor.detach().numpy() for tensor in self._shared.values()])
        self._grow()

    def _ready(self, busy: Sequence[Link]) -> Sequence[Link]:
        working = {link.ref: link for link in self._links if link in busy}
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


class RayLink:
    """An actor that is ready: its host, and its identity as `Node.identity` returned it."""

    def __init__(self, pool: Ray, actor: Any, host: str, identity: dict[str, Any]) -> None:
        self.actor = actor
        self.host = host
        self.identity = identity
        self.ref: Any = None
        self._pool = pool

    def send(self, job: Job) -> None:
        """See `Link`."""
        pool = self._pool
        numbers = {tensor: number for number, tensor in enumerate(pool._shared)}
        self.ref = self.actor.do.remote(pool._number, pool._common, dumps(job, pool._shared, numbers))

    def receive(self) -> Result | Exception:
        """See `Link`."""
        try:
            result: Result | Exception = pickle.loads(ray.get(self.ref))  # noqa: S301
        except RayTaskError:
            raise
        except RayError as error:
            raise WorkerDied(f"worker on node {self.host} died ({type(error).__name__})") from None
        return result
