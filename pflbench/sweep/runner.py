"""Sweeps: they compute the runs of a suite that have no record yet, several at once."""

import dataclasses
import json
import signal
import time
import traceback
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from pflbench.engine.children import begin_child, end_children, signals_deferred, start_child
from pflbench.engine.execution import Execution
from pflbench.engine.experiment import Experiment, prepare
from pflbench.engine.observers import Observer
from pflbench.engine.runner import run_experiment
from pflbench.errors import PflbenchError, RunBusy
from pflbench.spec import RunSpec
from pflbench.store import partial
from pflbench.store.folder import Folder
from pflbench.store.provenance import outdated

_LOOK = 2.0  # seconds between two checks for the record of a run that another process computes
_PAUSES = (2.0, 30.0)  # seconds until such a run is tried again: the first pause, and the longest


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to a run.

    `kind` is "started", "round" or "evaluation" (with its line), "done", "failed" (with the reason), or "there"
    (another process has computed the run).
    """

    kind: str
    run: Experiment
    row: Mapping[str, Any] | None = None
    reason: str | None = None


def plan(
    specs: Sequence[RunSpec], data_dir: Path | None, notice: Callable[[str], None], *, download: bool = True
) -> list[Experiment]:
    """Return the runs that `specs` describe, with all defaults resolved, each once."""
    told: set[str] = set()

    def once(text: str) -> None:
        if text not in told:
            told.add(text)
            notice(text)

    known: dict[str, str] = {}  # resolving a folder of images takes seconds
    out: dict[str, Experiment] = {}
    for spec in specs:
        named = dataclasses.replace(spec, dataset=known.get(spec.dataset, spec.dataset))
        made = prepare(named, data_dir=data_dir, notice=once, download=download)
        known[spec.dataset] = made.spec.dataset
        out[made.id] = made
    return list(out.values())


def status(run: Experiment, out: Path) -> str | None:
    """Return "finished", or the status and the reason, from the record of `run` in `out`; None without a record."""
    path = out / run.id / "run.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return "finished" if found["status"] == "finished" else f"{found['status']}: {found['reason']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path} cannot be read; move it away"


def of_other_code(runs: Sequence[Experiment], out: Path) -> dict[str, str]:
    """Return, by run id, how the present code differs from the code that made the finished records of `runs`."""
    found = {}
    for run in runs:
        record = json.loads((out / run.id / "run.json").read_text(encoding="utf-8"))
        if what := outdated(record, run.algorithm):
            found[run.id] = what
    return found


def compute(
    runs: Sequence[Experiment],
    out: Path,
    *,
    jobs: int,
    retry: bool = False,
    on_event: Callable[[Event], None] = lambda _: None,
) -> dict[str, str]:
    """Compute the `runs` that have no record in `out`, `jobs` at once, each with one worker.

    An interrupted run continues from its newest checkpoint. The sweep waits for a run that another process computes.
    With `retry`, failed runs are computed again, and interrupted runs from the beginning.
    Returns the reasons of the failed runs, by id. The other runs continue after a failure.
    """
    return _Sweep(runs, out, on_event, retry=retry).run(jobs)


class _Sweep:
    """The runs of a sweep: waiting for a process, active in a process, or computed elsewhere, by other processes."""

    def __init__(
        self,
        runs: Sequence[Experiment],
        out: Path,
        on_event: Callable[[Event], None],
        *,
        retry: bool,
    ) -> None:
        self._out, self._on_event, self._retry = out, on_event, retry
        self._found = {run.id: status(run, out) for run in runs}
        self._failed = {run: text for run, text in self._found.items() if text not in (None, "finished") and not retry}
        self._waiting = deque(r for r in runs if self._found[r.id] != "finished" and r.id not in self._failed)
        self._active: dict[Connection, tuple[Experiment, BaseProcess]] = {}
        self._elsewhere: list[tuple[Experiment, float]] = []  # with the time of the next try
        self._pause: defaultdict[str, float] = defaultdict(lambda: _PAUSES[0])

    def run(self, jobs: int) -> dict[str, str]:
        try:
            while self._waiting or self._active or self._elsewhere:
                while self._waiting and len(self._active) < jobs:
                    self._start(self._waiting.popleft())
                if self._active:
                    for ready in wait(list(self._active), _LOOK if self._elsewhere else None):
                        assert isinstance(ready, Connection)  # noqa: S101
                        self._hear(ready)
                elif self._elsewhere:
                    time.sleep(_LOOK)
                self._look_elsewhere()
        finally:
            # Their workers end with them. Their checkpoints are not damaged by this.
            end_children((connection, process) for connection, (_, process) in self._active.items())
            for run, process in self._active.values():
                partial.give_back_of(self._out, run.id, process.pid)
        return self._failed

    def _start(self, run: Experiment) -> None:
        if not self._recorded(run):
            with signals_deferred():
                connection, process = start_child(_compute, run, self._out, self._retry, duplex=False)
                self._active[connection] = run, process
            self._on_event(Event("started", run))

    def _hear(self, connection: Connection) -> None:
        """Read one message of a run's process."""
        run, process = self._active[connection]
        try:
            kind, value = connection.recv()
        except EOFError:
            process.join()
            partial.give_back_of(self._out, run.id, process.pid)
            kind, value = "failed", f"its process ended with exit code {process.exitcode}"
        if kind in ("round", "evaluation"):
            self._on_event(Event(kind, run, row=value))
            return
        del self._active[connection]
        process.join()
        connection.close()
        if kind == "busy":
            # Only the process that computes a run tries its lock. If the sweep tried it, it would hold the lock for a
            # moment, and a run that starts in this moment would fail.
            self._elsewhere.append((run, time.monotonic() + self._pause[run.id]))
            self._pause[run.id] = min(2 * self._pause[run.id], _PAUSES[1])
        else:
            self._end(run, kind, value)

    def _look_elsewhere(self) -> None:
        """End the runs whose record another process has written; let the others wait until their next try is due."""
        runs, self._elsewhere = self._elsewhere, []
        for run, due in runs:
            if not self._recorded(run):
                if due <= time.monotonic():
                    self._waiting.append(run)
                else:
                    self._elsewhere.append((run, due))

    def _recorded(self, run: Experiment) -> bool:
        """End the run if another process has written its record since the sweep began; return whether it has."""
        text = status(run, self._out)
        if text == self._found[run.id]:
            return False
        self._end(run, "there", None if text == "finished" else text)
        return True

    def _end(self, run: Experiment, kind: str, reason: str | None) -> None:
        if reason is not None:
            self._failed[run.id] = reason
        self._on_event(Event(kind, run, reason=reason))


class _Teller(Observer):
    """Sends what happens in a run to the sweep."""

    def __init__(self, to: Connection) -> None:
        self.began = False
        self._to = to

    def start(self, experiment: Experiment) -> None:  # noqa: ARG002
        self.began = True

    def round(self, row: dict[str, Any]) -> None:
        self._to.send(("round", row))

    def evaluation(self, row: dict[str, Any]) -> None:
        self._to.send(("evaluation", row))


def _compute(run: Experiment, out: Path, retry: bool, to: Connection) -> None:
    """Compute one run in this child process and send its events."""
    # The child ends with the sweep: alone it would wait forever for a reader of its events, and hold the run's lock.
    begin_child(signal.SIG_DFL)
    torch.set_num_threads(1)  # the run's share of the cores; a fork also has no threads of the sweep's process
    log = out / ".logs" / f"{run.id}.log"
    log.unlink(missing_ok=True)
    teller = _Teller(to)
    try:
        store = Folder(out, force=retry, resume=not retry)
        record = run_experiment(run, execution=Execution(workers=1), store=store, observers=[teller])
    except RunBusy:
        to.send(("busy", None))
    except PflbenchError as error:
        to.send(("failed", str(error).replace("--force starts from", "sweep --retry starts from")))
    except Exception as error:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(traceback.format_exc(), encoding="utf-8")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        to.send(("failed", f"{reason}; {log} has the traceback"))
    else:
        if record.status != "finished":
            to.send(("failed", f"{record.status}: {record.reason}"))
        else:
            to.send(("done" if teller.began else "there", None))
