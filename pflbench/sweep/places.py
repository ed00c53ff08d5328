"""Where the runs of a sweep are computed: a process of this machine for each run."""

import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from pflbench.engine.children import begin_child, end_children, signals_deferred, start_child
from pflbench.engine.cores import cores
from pflbench.engine.execution import PER_GPU, Execution
from pflbench.engine.experiment import Experiment
from pflbench.engine.observers import Observer
from pflbench.engine.runner import run_experiment
from pflbench.errors import PflbenchError, RunBusy
from pflbench.store import partial
from pflbench.store.folder import Folder

Message = tuple[str, Any]
"""A kind and a value: "round" or "evaluation" and its line; at the end "done", "there" (the record existed), "busy"
(another process computes the run), "lost" and how (the run can be started again), "failed" and (reason, traceback)."""


class Place(Protocol):
    """Where runs are computed, each by one worker. A context manager that ends them."""

    def room(self) -> int:
        """Return how many runs can be computed at once now."""
        ...

    def start(self, run: Experiment) -> Any:
        """Start a run and return its handle."""
        ...

    def wait(self, handles: Sequence[Any], seconds: float | None) -> Sequence[Any]:
        """Return the handles that have a message, after at most `seconds`."""
        ...

    def message(self, handle: Any) -> Message:
        """Return the next message of a run."""
        ...


class Here:
    """Computes each run in a process of this machine, on `device`."""

    def __init__(self, out: Path, *, jobs: int | None = None, retry: bool = False, device: str = "cpu") -> None:
        self._out, self._retry = out, retry
        self._devices = Execution(device=device).devices()
        self._jobs = jobs or (cores() if device == "cpu" else PER_GPU * self._devices.count)
        self._processes: dict[Connection, tuple[Experiment, BaseProcess, int]] = {}

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *error: object) -> None:
        # Their workers end with them. Their checkpoints are not damaged by this.
        end_children((connection, process) for connection, (_, process, _) in self._processes.items())
        for run, process, _ in self._processes.values():
            partial.give_back_of(self._out, run.id, process.pid)

    def room(self) -> int:
        """See `Place`."""
        return self._jobs

    def start(self, run: Experiment) -> Connection:
        """See `Place`."""
        taken = {slot for _, _, slot in self._processes.values()}
        slot = next(slot for slot in range(self._jobs) if slot not in taken)
        with signals_deferred():
            connection, process = start_child(
                _compute, run, self._out, self._retry, self._devices.type, slot % self._devices.count, duplex=False
            )
            self._processes[connection] = run, process, slot
        return connection

    def wait(self, handles: Sequence[Connection], seconds: float | None) -> Sequence[Any]:
        """See `Place`."""
        return wait(list(handles), seconds)

    def message(self, handle: Connection) -> Message:
        """See `Place`."""
        run, process, _ = self._processes[handle]
        try:
            kind, value = handle.recv()
        except (EOFError, OSError):  # OSError: killed in the middle of a message
            process.join()
            partial.give_back_of(self._out, run.id, process.pid)
            kind, value = "failed", (f"its process ended with exit code {process.exitcode}", None)
        if kind not in ("round", "evaluation"):
            del self._processes[handle]
            process.join()
            handle.close()
        return kind, value


class Teller(Observer):
    """Sends what happens in a run to the sweep."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self.began = False
        self._send = send

    def start(self, experiment: Experiment) -> None:  # noqa: ARG002
        """Note that the run is computed."""
        self.began = True

    def round(self, row: dict[str, Any]) -> None:
        """Send the line of a round."""
        self._send(("round", row))

    def evaluation(self, row: dict[str, Any]) -> None:
        """Send the line of an evaluation."""
        self._send(("evaluation", row))


def ended(run: Experiment, store: Folder, execution: Execution, teller: Teller) -> Message:
    """Compute a run and return its last message."""
    try:
        record = run_experiment(run, execution=execution, store=store, observers=[teller])
    except Exception as error:
        return failed(error)
    if record.status != "finished":
        return "failed", (f"{record.status}: {record.reason}", None)
    return ("done" if teller.began else "there"), None


def failed(error: Exception) -> Message:
    """Return the last message of a run that `error` ended."""
    if isinstance(error, RunBusy):
        return "busy", None
    if isinstance(error, PflbenchError):
        return "failed", (str(error).replace("--force starts from", "sweep --retry starts from"), None)
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return "failed", (reason, "".join(traceback.format_exception(error)))


def _compute(run: Experiment, out: Path, retry: bool, device: str, number: int, to: Connection) -> None:
    """Compute one run in this child process and send its messages."""
    # The child ends with the sweep: alone it would wait forever for a reader of its messages, and hold the run's lock.
    begin_child(signal.SIG_DFL)
    torch.set_num_threads(1)  # the run's share of the cores; a fork also has no threads of the sweep's process
    Execution(device=device).use_only(number)
    store = Folder(out, force=retry, resume=not retry)
    to.send(ended(run, store, Execution(workers=1, device=device), Teller(to.send)))
