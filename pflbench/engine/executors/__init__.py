"""Who computes the clients' work: this process, or worker processes. The results are the same bits.

A task carries everything that its result depends on, so any worker may take it at any time.
"""

import contextlib
import copy
import dataclasses
import io
import pickle
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from pflbench.core.algorithm import Algorithm, Message, State
from pflbench.core.client import Bench, Counts, Local
from pflbench.core.models import Net
from pflbench.core.params import Params, fingerprint, tensor_digest
from pflbench.engine import evaluation
from pflbench.engine.evaluation import Score
from pflbench.engine.executors.children import begin_child, end_children, signals_held, start_child
from pflbench.errors import PflbenchError, RunError
from pflbench.federation import Federation
from pflbench.spec import RunSpec
from pflbench.store.checkpoint import Saved, Stored, load_state, save_state


@dataclasses.dataclass(frozen=True)
class Task:
    """Work for one client in `round`: to train, or with `test` to be tested. `last` is its score before, if any."""

    test: bool
    round: int
    client: int
    down: Message
    state: State | Saved
    last: Score | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training gave: the upload, the client's new state, the counts for the record, and the worker's `seconds`."""

    up: Message
    state: State | Saved
    counts: Counts
    seconds: float


class Work:
    """Computes tasks of one run, in whichever process it is.

    With a folder, `states`, clients' states and uploads are read and written there by the process that needs them;
    without, they travel with the tasks and results.
    """

    def __init__(
        self, spec: RunSpec, algorithm: Algorithm, federation: Federation, net: Net, states: Path | None = None
    ) -> None:
        self.spec = spec
        self.algorithm = algorithm
        self.federation = federation
        self.bench = Bench(net, spec.precision)
        self.states = states
        self._digests: dict[int, tuple[torch.Tensor, str]] = {}

    def private(self) -> "Work":
        """Return the same work with a network of its own."""
        return Work(self.spec, self.algorithm, self.federation, copy.deepcopy(self.bench.net), self.states)

    def size(self, task: Task) -> int:
        """Return roughly how many samples a task passes through the network: the longest work is begun first."""
        data = self.federation.clients[task.client]
        return len(data.test) if task.test else 3 * max(self.spec.local_epochs, 1) * len(data.train)

    def __call__(self, task: Task) -> Any:
        """Return the `Trained` or the `Score` of `task`."""
        began = time.perf_counter()
        data = self.federation.clients[task.client]
        local = Local(self.bench, data.train, self.federation.classes, self.spec, round=task.round, client=task.client)
        state = task.state
        if isinstance(state, Saved):
            assert self.states is not None  # noqa: S101
            state = load_state(self.states / state.file)
        if not task.test:
            up, new = self.algorithm.local_update(local, task.down, state)
            kept: State | Saved = new
            tensors = up.tensors
            if self.states is not None:
                kept = save_state(new, self.states, f"{task.client:06}-{task.round:06}.safetensors")
                tensors = Stored(tensors, self.states / f"upload-{task.client:06}.safetensors")
            up = Message(tensors, up.weight, task.client)
            return Trained(up, kept, local.counts, time.perf_counter() - began)
        own = self.algorithm.personalised(local, task.down, state)
        whole = self.algorithm.global_model(task.down)
        if whole is not None and whole.keys() != own.keys():
            whole = None
        score = self._score(task, own, whole)
        return dataclasses.replace(score, seconds=time.perf_counter() - began)

    def _score(self, task: Task, own: Params, whole: Params | None) -> Score:
        """Test the client's models, but no model that is the last evaluation's or has just been tested."""
        split = self.federation.clients[task.client].test
        self._note_digests(task.down)
        mine, everyones = self._fingerprint(own), None if whole is None else self._fingerprint(whole)
        if task.last is not None and task.last.models[0] == mine:
            correct, loss = task.last.correct, task.last.loss
        else:
            correct, loss = evaluation.test(self.bench, own, split)
        if whole is None or everyones == mine:
            globally = None if whole is None else correct
        elif task.last is not None and task.last.models[1] == everyones:
            globally = task.last.global_correct
        else:
            globally, _ = evaluation.test(self.bench, whole, split)
        return Score(task.client, len(split), correct, loss, globally, (mine, everyones))

    def _note_digests(self, down: Message) -> None:
        """Have the digests of the tensors in `down` at hand: most clients are sent the same ones."""
        before, self._digests = self._digests, {}
        for tensor in (t for part in down.tensors.values() for t in part.values()):
            known = before.get(id(tensor))
            self._digests[id(tensor)] = known or (tensor, tensor_digest(tensor))  # held, so that its id stays its own

    def _fingerprint(self, model: Params) -> str:
        return fingerprint(model, lambda t: self._digests[id(t)][1] if id(t) in self._digests else tensor_digest(t))


class Executor(Protocol):
    """Runs tasks; a context manager that frees its processes."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def map(self, tasks: Sequence[Task]) -> list[Any]:
        """Return the results of `tasks`, in the order of `tasks`. That of a task that failed is its exception."""
        ...


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for the clients' and the server's work: sums then have one order, whatever the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Serial:
    """Computes the tasks in this process, one by one."""

    def __init__(self, work: Work, workers: int) -> None:  # noqa: ARG002
        self._work = work.private()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, tasks: Sequence[Task]) -> list[Any]:
        """Return the results of `tasks`, in the order of `tasks`. That of a task that failed is its exception."""

        def result(task: Task) -> Any:
            try:
                return self._work(task)
            except Exception as error:
                return error

        with torch.random.fork_rng(devices=[]):
            return [result(task) for task in tasks]


class Processes:
    """Computes the tasks in worker processes of one thread each.

    On Linux they are forked: they share the data with this process, start at once, and know networks and methods that
    were defined in a script or a notebook. Elsewhere they are spawned, and the data is in shared memory.
    A dead worker ends the run with `RunError`; when this process dies, the workers end themselves.
    """

    def __init__(self, work: Work, workers: int) -> None:
        self._work = work
        self._wanted = workers
        self._workers: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> Self:
        try:
            with signals_held():
                for _ in range(self._wanted):
                    connection, process = start_child(_serve, self._work, daemon=True)
                    self._workers[connection] = process
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        end_children(self._workers.items())

    def map(self, tasks: Sequence[Task]) -> list[Any]:
        """Return the results of `tasks`, in the order of `tasks`. That of a task that failed is its exception."""
        # Popped from the end: the largest first.
        waiting = sorted(range(len(tasks)), key=lambda i: self._work.size(tasks[i]))
        sent: dict[Connection, dict[int, int]] = {connection: {} for connection in self._workers}
        common = _common(tasks)
        idle = list(self._workers)
        doing: dict[Connection, int] = {}
        results: list[Any] = [None] * len(tasks)
        while waiting or doing:
            while waiting and idle:
                connection = idle.pop()
                doing[connection] = waiting.pop()
                with self._death(connection, tasks[doing[connection]]):
                    connection.send_bytes(_dumps(tasks[doing[connection]], common, sent[connection]))
            ready = wait(list(doing))
            for connection in [c for c in doing if c in ready]:
                with self._death(connection, tasks[doing[connection]]):
                    result = pickle.loads(connection.recv_bytes())  # noqa: S301
                results[doing.pop(connection)] = result
                idle.append(connection)
        return results

    @contextlib.contextmanager
    def _death(self, connection: Connection, task: Task) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            process = self._workers[connection]
            process.join()
            code = process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise RunError(
                f"worker process {process.pid} died ({how}) in round {task.round}, client {task.client}; "
                "if memory ran out, use fewer --workers"
            ) from None


def _serve(work: Work, connection: Connection) -> None:
    """Do tasks until the connection closes. The body of a worker process."""
    begin_child(signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    work = work.private()
    received: list[torch.Tensor] = []
    while True:
        try:
            task = _Unpickler(io.BytesIO(connection.recv_bytes()), received).load()
        except (EOFError, OSError):
            return
        connection.send_bytes(_outcome(work, task))


def _outcome(work: Work, task: Task) -> bytes:
    """Return the pickled result of `task`, or the pickled error that came instead."""
    try:
        return _dumps(work(task))
    except Exception as error:
        if not isinstance(error, PflbenchError):  # a fault in a method's code: its author needs the worker's traceback
            note = f"In a worker, round {task.round}, client {task.client}:\n{traceback.format_exc()}"
            try:
                pickle.loads(pickle.dumps(error))  # noqa: S301
            except Exception:
                error = RuntimeError(repr(error))
            error.add_note(note)
        return _dumps(error)


def _common(tasks: Sequence[Task]) -> set[int]:
    """Return the ids of the tensors that several clients are sent, such as those of the global model."""
    count = Counter(id(t) for task in tasks for part in task.down.tensors.values() for t in part.values())
    return {tensor for tensor, times in count.items() if times > 1}


class _Pickler(pickle.Pickler):
    """Sends tensors by value through the pipe, and not as shared-memory files, of which there may be too few.

    Those whose ids are in `common` go to a worker once: `sent` has the numbers of those that this worker got before, by
    id. They must stay alive meanwhile.
    """

    def __init__(self, stream: io.BytesIO, common: AbstractSet[int], sent: dict[int, int]) -> None:
        super().__init__(stream, protocol=5)
        self._common = common
        self._sent = sent

    def persistent_id(self, obj: Any) -> Any:
        if id(obj) not in self._common or type(obj) is not torch.Tensor:
            return None
        if id(obj) in self._sent:
            return self._sent[id(obj)]
        self._sent[id(obj)] = len(self._sent)
        return len(self._sent) - 1, obj.detach().numpy()

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is torch.Tensor:
            return torch.from_numpy, (obj.detach().numpy(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    """Reads what `_Pickler` wrote; `received` has the tensors of this round, by number."""

    def __init__(self, stream: io.BytesIO, received: list[torch.Tensor]) -> None:
        super().__init__(stream)
        self._received = received

    def persistent_load(self, pid: Any) -> torch.Tensor:
        if isinstance(pid, int):
            return self._received[pid]
        number, array = pid
        del self._received[number:]  # a new round's numbers begin at 0 again
        tensor: torch.Tensor = torch.from_numpy(array)
        self._received.append(tensor)
        return tensor


def _dumps(value: Any, common: AbstractSet[int] = frozenset(), sent: dict[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, common, {} if sent is None else sent).dump(value)
    return stream.getvalue()


EXECUTORS: dict[str, Callable[[Work, int], Executor]] = {"processes": Processes, "serial": Serial}
