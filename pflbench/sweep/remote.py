"""Where the runs of a sweep are computed: an actor of a Ray cluster for each run.

An actor has no access to the sweep's folder. It computes its run in a folder of its own, and sends this folder from
time to time and in the end. So a run whose node is lost continues from the folder that was sent last.
"""

import contextlib
import dataclasses
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pflbench import files
from pflbench.engine.cluster import (
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
from pflbench.engine.executors.node import code, packed
from pflbench.engine.experiment import Experiment, load_dataset
from pflbench.errors import PflbenchError, UsageError
from pflbench.store import partial
from pflbench.store.folder import Folder, Writer
from pflbench.store.locks import locked
from pflbench.store.record import Record
from pflbench.sweep.away import Away, pack, unpack
from pflbench.sweep.places import Message, failed


class Hold:
    """A run's partial folder at home, while an actor computes the run. Raises `RunBusy` as `Folder.open` does.

    With `anew`, what an interrupted run left is deleted.
    """

    def __init__(self, out: Path, run: Experiment, *, anew: bool) -> None:
        self._out, self._run = out, run
        self._life = partial.Life()
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(out, run.id))
            found = partial.abandoned(out, run.id)
            found.sort(key=lambda path: ((path / "run.json").exists(), partial.newest(path)))
            self.folder = partial.own(out, run.id)
            if found and not anew:
                partial.take_over(found.pop(), self.folder)
            else:
                with files.writing(self.folder):
                    self.folder.mkdir(parents=True)
            with files.writing(self.folder):
                self._life.begin(self.folder)
            for path in found:
                partial.discard(path)
            self._stack = stack.pop_all()

    def packed(self) -> bytes | None:
        """Return the folder of an interrupted run, packed; None if there is nothing to continue."""
        return pack(self.folder) if partial.newest(self.folder) else None

    def replace(self, data: bytes) -> None:
        """Replace the folder by a packed one."""
        old, new, life = self.folder, partial.own(self._out, self._run.id), partial.Life()
        with files.writing(new):
            unpack(data, new)
            life.begin(new)
        self._life.end()
        self.folder, self._life = new, life
        partial.discard(old)

    def publish(self, data: bytes) -> None:
        """Give the packed record its final name."""
        self.replace(data)
        self._life.end()
        partial.give_back(self.folder)
        Writer(Folder(self._out), Record(self._run.id, self._run.spec)).publish_complete()

    def close(self) -> None:
        """Let others compute the run."""
        self._life.end()
        if partial.newest(self.folder):
            partial.give_back(self.folder)
        elif self.folder.exists():
            partial.discard(self.folder)
        self._stack.close()


@dataclasses.dataclass(eq=False)
class _Active:
    """A run that an actor computes."""

    run: Experiment
    hold: Hold | None = None
    actor: Any = None
    ref: Any = None
    host: str | None = None
    message: Message | None = None


class Cluster:
    """Computes each run in an actor of the Ray cluster of `execution`, with a core or a share of a GPU."""

    def __init__(self, out: Path, execution: Execution, *, jobs: int | None = None, retry: bool = False) -> None:
        self._out, self._execution, self._jobs, self._retry = out, execution, jobs, retry
        self._stack = contextlib.ExitStack()
        self._active: set[_Active] = set()
        self._data: dict[str, Any] = {}  # the references to the datasets in Ray's store
        self._begun: set[str] = set()
        self.seconds = 60.0
        """Seconds between two sendings of an unfinished run's folder."""

    def __enter__(self) -> Self:
        self._stack.enter_context(connected(self._execution, self._jobs))
        return self

    def __exit__(self, *error: object) -> None:
        for active in list(self._active):
            self._end(active)
        self._stack.close()

    def room(self) -> int:
        """See `Place`. New nodes give more room."""
        has = room(self._execution.device)
        return has if self._jobs is None else min(self._jobs, has)

    def start(self, run: Experiment) -> _Active:
        """See `Place`."""
        active = _Active(run)
        self._active.add(active)
        try:
            active.hold = Hold(self._out, run, anew=self._retry and run.id not in self._begun)
            self._begun.add(run.id)
            self._send(active, active.hold)
        except PflbenchError as error:
            self._end(active, failed(error))
        return active

    def _send(self, active: _Active, hold: Hold) -> None:
        """Send a run to a new actor."""
        run = active.run
        name = run.spec.dataset
        if name not in self._data:
            self._data[name] = ray.put(packed(load_dataset(run.spec, run.data_dir), pickle.Pickler))
        # A copy has no data yet: the actor makes the clients of its own copy of the dataset.
        work = ray.put(packed(dataclasses.replace(run), cloudpickle.CloudPickler))
        device = self._execution.device
        active.actor = actor(device)
        active.ref = active.actor.begin.remote(
            Away.__module__, Away.__name__, work, self._data[name], code(run.algorithm), device, hold.packed(),
            self.seconds,
        )  # fmt: skip

    def wait(self, handles: Sequence[_Active], seconds: float | None) -> Sequence[_Active]:
        """See `Place`."""
        if found := [active for active in handles if active.message is not None]:
            return found
        refs = {active.ref: active for active in handles}
        ready, _ = ray.wait(list(refs), timeout=seconds)
        for ref in ready:
            self._receive(refs[ref])
        return [active for active in handles if active.message is not None]

    def _receive(self, active: _Active) -> None:
        """Handle what an actor sent; it becomes the run's message if it is for the sweep."""
        assert active.hold is not None  # noqa: S101
        try:
            found = ray.get(active.ref)
        except RayTaskError as error:  # of Python, such as a full disk there
            self._end(active, ("failed", (f"in its worker: {first_line(error)}", str(error))))
            return
        except RayError as error:
            where = f"worker on node {active.host}" if active.host else "worker"
            self._end(active, ("lost", f"{where} died ({type(error).__name__})"))
            return
        if active.host is None:
            active.host, _, reason = found
            if reason is not None:
                raise UsageError(f"executor: node {active.host} has {reason}")
        elif found[0] in ("folder", "record"):
            keep = active.hold.replace if found[0] == "folder" else active.hold.publish
            try:
                keep(found[1])
            except PflbenchError as error:
                self._end(active, failed(error))
                return
        elif found[0] in ("round", "evaluation"):
            active.message = found
        else:
            self._end(active, found)
            return
        active.ref = active.actor.call.remote("next")

    def _end(self, active: _Active, message: Message | None = None) -> None:
        """End a run's actor, and let others compute the run; `message` is its last one."""
        active.message = message
        self._active.discard(active)
        if active.actor is not None:
            ray.kill(active.actor)
        if active.hold is not None:
            active.hold.close()

    def message(self, handle: _Active) -> Message:
        """See `Place`."""
        assert handle.message is not None  # noqa: S101
        found, handle.message = handle.message, None
        return found
