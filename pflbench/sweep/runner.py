"""Sweeps: they compute the runs of a suite that have no record yet, several at once."""

import dataclasses
import json
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pflbench.engine.experiment import Experiment, prepare
from pflbench.spec import RunSpec
from pflbench.store.provenance import outdated
from pflbench.sweep.places import Place

_LOOK = 2.0  # seconds between two checks for the record of a run that another process computes
_TRIES = 3  # workers that may die of one run
_PAUSES = (2.0, 30.0)  # seconds until such a run is tried again: the first pause, and the longest


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to a run.

    `kind` is "started", "round" or "evaluation" (with its line), "done", "failed" (with the reason), "there" (another
    process has computed the run), or "lost" (its worker died, with how; it is started again).
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
    place: Place,
    *,
    retry: bool = False,
    on_event: Callable[[Event], None] = lambda _: None,
) -> dict[str, str]:
    """Compute the `runs` that have no record in `out`, as many at once as `place` has room for.

    An interrupted run continues from its newest checkpoint. The sweep waits for a run that another process computes.
    With `retry`, failed runs are computed again, and interrupted runs from the beginning.
    Returns the reasons of the failed runs, by id. The other runs continue after a failure.
    """
    return _Sweep(runs, out, place, on_event, retry=retry).run()


class _Sweep:
    """The runs of a sweep: waiting for room, active, or computed elsewhere, by other processes."""

    def __init__(
        self,
        runs: Sequence[Experiment],
        out: Path,
        place: Place,
        on_event: Callable[[Event], None],
        *,
        retry: bool,
    ) -> None:
        self._out, self._place, self._on_event = out, place, on_event
        self._found = {run.id: status(run, out) for run in runs}
        self._failed = {run: text for run, text in self._found.items() if text not in (None, "finished") and not retry}
        self._waiting = deque(r for r in runs if self._found[r.id] != "finished" and r.id not in self._failed)
        self._active: dict[Any, Experiment] = {}
        self._elsewhere: list[tuple[Experiment, float]] = []  # with the time of the next try
        self._pause: defaultdict[str, float] = defaultdict(lambda: _PAUSES[0])
        self._lost: Counter[str] = Counter()

    def run(self) -> dict[str, str]:
        while self._waiting or self._active or self._elsewhere:
            while self._waiting and len(self._active) < self._place.room():
                self._start(self._waiting.popleft())
            if self._active:
                for ready in self._place.wait(list(self._active), _LOOK if self._elsewhere or self._waiting else None):
                    self._hear(ready)
            elif self._elsewhere or self._waiting:
                time.sleep(_LOOK)
            self._look_elsewhere()
        return self._failed

    def _start(self, run: Experiment) -> None:
        if not self._recorded(run):
            self._log(run).unlink(missing_ok=True)
            self._active[self._place.start(run)] = run
            self._on_event(Event("started", run))

    def _hear(self, handle: Any) -> None:
        """Handle one message of a run."""
        run = self._active[handle]
        kind, value = self._place.message(handle)
        if kind in ("round", "evaluation"):
            self._on_event(Event(kind, run, row=value))
            return
        del self._active[handle]
        if kind == "busy":
            # Only the process that computes a run tries its lock. If the sweep tried it, it would hold the lock for a
            # moment, and a run that starts in this moment would fail.
            self._elsewhere.append((run, time.monotonic() + self._pause[run.id]))
            self._pause[run.id] = min(2 * self._pause[run.id], _PAUSES[1])
        elif kind == "lost" and self._lost[run.id] < _TRIES - 1:
            self._lost[run.id] += 1
            self._waiting.appendleft(run)
            self._on_event(Event("lost", run, reason=value))
        elif kind == "lost":
            self._end(run, "failed", f"{value}; {_TRIES} workers died of this run")
        elif kind == "failed":
            self._fail(run, *value)
        else:
            self._end(run, kind, None)

    def _fail(self, run: Experiment, reason: str, trace: str | None) -> None:
        """End a run that failed; write the traceback of a bug to a file."""
        log = self._log(run)
        if trace is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(trace, encoding="utf-8")
            reason = f"{reason}; {log} has the traceback"
        self._end(run, "failed", reason)

    def _log(self, run: Experiment) -> Path:
        return self._out / ".logs" / f"{run.id}.log"

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
