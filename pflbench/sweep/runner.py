"""Sweeps: a grid of runs, of which those that are missing are computed, several at once."""

import dataclasses
import itertools
import json
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pflbench.core import registry
from pflbench.engine.executors.children import begin_child, end_children, signals_held, start_child
from pflbench.errors import PflbenchError, RunBusy, UsageError, unknown
from pflbench.spec import RunSpec
from pflbench.store.record import is_busy, outdated

_TABLES = ("base", "grid", "algorithm", "include", "exclude")
_RETRY = 2.0  # seconds between looks at a run that another sweep computes


def suites() -> dict[str, Path]:
    """Return the files of the ready suites by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "suites").glob("*.toml"))}


@dataclasses.dataclass(frozen=True)
class Suite:
    """A grid of runs.

    Every combination of the lists in `grid` is a run, with the settings of `base`, which those of `algorithm` for the
    run's method override, unless they are in the grid. `include` adds runs (their settings over `base`), `exclude`
    leaves out those that have all settings of one of its entries. The key `set` holds hyperparameters.
    """

    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    algorithm: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    include: Sequence[Mapping[str, Any]] = ()
    exclude: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def from_toml(cls, values: Mapping[str, Any], where: Path) -> "Suite":
        """Return the suite that file `where` holds. Raises `UsageError` for what it cannot mean."""
        for name in values:
            if name not in _TABLES:
                raise unknown(f"table in {where}", name, _TABLES)
        kinds = {"base": dict, "grid": dict, "algorithm": dict, "include": list, "exclude": list}
        for name, value in values.items():
            if not isinstance(value, kinds[name]):
                shape = f"tables, [[{name}]]" if kinds[name] is list else f"a table, [{name}]"
                raise UsageError(f"{where}: {name} must be {shape}")
        return cls(
            base=_plain(values.get("base", {}), where),
            grid=_plain(values.get("grid", {}), where),
            algorithm={name: _plain(table, where) for name, table in values.get("algorithm", {}).items()},
            include=[_plain(entry, where) for entry in values.get("include", [])],
            exclude=[_plain(entry, where) for entry in values.get("exclude", [])],
        )

    def specs(self) -> list[RunSpec]:
        """Return the runs, each once. Raises `UsageError` for unknown names and impossible values."""
        names = list(self.grid)
        for name, values in self.grid.items():
            if not isinstance(values, list | tuple) or not values:
                raise UsageError(f"grid: {name} must be a list of values, {name} = [...]")
        found: dict[str, RunSpec] = {}
        for values in itertools.product(*self.grid.values()) if names else ():
            given = dict(zip(names, values, strict=True))
            algo = given.get("algo", self.base.get("algo", RunSpec.algo))
            self._add(found, {**self.base, **self.algorithm.get(str(algo), {}), **given})
        for entry in self.include:
            self._add(found, {**self.base, **entry})
        return list(found.values())

    def _add(self, found: dict[str, RunSpec], values: dict[str, Any]) -> None:
        hyperparameters = values.pop("set", {})
        spec = RunSpec.from_dict({**values, "hyperparameters": hyperparameters})
        settings = {**spec.to_dict(), "set": hyperparameters}
        for entry in self.exclude:
            if strange := [name for name in entry if name not in settings]:
                raise unknown("setting in exclude", strange[0], settings)
        if not any(all(settings[name] == value for name, value in entry.items()) for entry in self.exclude):
            found.setdefault(spec.id, spec)


def _plain(values: Any, where: Path) -> dict[str, Any]:
    """Return a table with underscores in its names, as `RunSpec` has them."""
    if not isinstance(values, dict):
        raise UsageError(f"{where}: {values!r} is not a table of settings")
    return {
        name.replace("-", "_"): _plain(value, where) if isinstance(value, dict) else value
        for name, value in values.items()
    }


@dataclasses.dataclass(frozen=True)
class Event:
    """What happened to a run.

    `kind` is "started", "round" (with its line), "done", "failed" (with the reason), or "there": another sweep did it.
    """

    kind: str
    spec: RunSpec
    row: Mapping[str, Any] | None = None
    reason: str | None = None


def plan(
    specs: Sequence[RunSpec], data_dir: Path | None, notice: Callable[[str], None], *, download: bool = True
) -> list[RunSpec]:
    """Return `specs` as they will be run, with all defaults resolved, each once."""
    from pflbench.engine.engine import resolve

    told: set[str] = set()

    def once(text: str) -> None:
        if text not in told:
            told.add(text)
            notice(text)

    known: dict[str, str] = {}  # to look at a folder of images takes seconds
    out: dict[str, RunSpec] = {}
    for spec in specs:
        named = dataclasses.replace(spec, dataset=known.get(spec.dataset, spec.dataset))
        made = resolve(named, data_dir=data_dir, notice=once, download=download)
        known[spec.dataset] = made.dataset
        out[made.id] = made
    return list(out.values())


def status(spec: RunSpec, out: Path) -> str | None:
    """Return the status of the record of `spec` in `out`, with the reason if it is not "finished"; None without one."""
    path = out / spec.id / "run.json"
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return "finished" if run["status"] == "finished" else f"{run['status']}: {run['reason']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path} cannot be read; move it away"


def of_other_code(specs: Sequence[RunSpec], out: Path) -> dict[str, str]:
    """Return in what the code that made the finished records of `specs` differs from this one, by id."""
    found = {}
    for spec in specs:
        run = json.loads((out / spec.id / "run.json").read_text(encoding="utf-8"))
        if what := outdated(run, registry.algorithm(spec.algo)(**spec.hyperparameters)):
            found[spec.id] = what
    return found


def run(
    specs: Sequence[RunSpec],
    out: Path,
    *,
    jobs: int,
    data_dir: Path | None = None,
    retry: bool = False,
    on_event: Callable[[Event], None] = lambda _: None,
) -> dict[str, str]:
    """Compute those of the resolved `specs` whose record is not in `out`, `jobs` at once, each with one worker.

    An interrupted run goes on from its newest checkpoint. A run that another process computes is waited for. With
    `retry`, runs that failed are computed again, and interrupted ones from the beginning. Returns
    why runs failed, by id; the others are not stopped by that.
    """
    found = {spec.id: status(spec, out) for spec in specs}
    failed = {run: text for run, text in found.items() if text not in (None, "finished") and not retry}
    waiting = deque(spec for spec in specs if found[spec.id] != "finished" and spec.id not in failed)
    active: dict[Connection, tuple[RunSpec, BaseProcess]] = {}
    later: list[RunSpec] = []

    def end(spec: RunSpec, kind: str, reason: str | None) -> None:
        if reason is not None:
            failed[spec.id] = reason
        on_event(Event(kind, spec, reason=reason))

    try:
        while waiting or active or later:
            while waiting and len(active) < jobs:
                spec = waiting.popleft()
                text = status(spec, out)
                if text != found[spec.id]:  # another sweep was faster
                    end(spec, "there", None if text == "finished" else text)
                elif is_busy(out, spec.id):
                    later.append(spec)
                else:
                    with signals_held():
                        connection, process = start_child(_compute, spec, out, data_dir, retry, duplex=False)
                        active[connection] = spec, process
                    on_event(Event("started", spec))
            if not active and later:  # what is left is computed elsewhere
                time.sleep(_RETRY)
                waiting.extend(later)
                later.clear()
                continue
            for ready in wait(list(active)) if active else ():
                assert isinstance(ready, Connection)  # noqa: S101
                spec, process = active[ready]
                try:
                    kind, value = ready.recv()
                except EOFError:
                    process.join()
                    kind, value = "failed", f"its process ended with exit code {process.exitcode}"
                if kind == "round":
                    on_event(Event("round", spec, row=value))
                    continue
                del active[ready]
                process.join()
                ready.close()
                if kind == "busy":
                    later.append(spec)
                else:
                    end(spec, kind, value)
    finally:
        # Their workers end with them; their checkpoints are good.
        end_children((connection, process) for connection, (_, process) in active.items())
    return failed


def _compute(spec: RunSpec, out: Path, data_dir: Path | None, retry: bool, to: Connection) -> None:
    """Compute one run, in a process of its own, and tell how it goes."""
    # The sweep ends its runs; without one, this would wait for a reader for ever, and keep the run to itself.
    begin_child(signal.SIG_DFL)
    from pflbench.engine import engine

    began: list[RunSpec] = []
    try:
        record = engine.run(
            spec,
            workers=1,
            out=out,
            resume=not retry,
            force=retry,
            data_dir=data_dir,
            on_start=began.append,
            on_round=lambda row: to.send(("round", row)),
        )
    except RunBusy:
        to.send(("busy", None))
    except PflbenchError as error:
        to.send(("failed", str(error).replace("--force starts anew", "sweep --retry starts anew")))
    except Exception as error:
        to.send(("failed", f"{type(error).__name__}: {error}"))
    else:
        if record.status != "finished":
            to.send(("failed", f"{record.status}: {record.reason}"))
        else:
            to.send(("done" if began else "there", None))


def labels(specs: Sequence[RunSpec]) -> list[str]:
    """Return a few words for each run: its method, and what differs among the runs (of its method: hyperparameters)."""

    def flat(spec: RunSpec) -> dict[str, str]:
        values = spec.to_dict()
        own = {f"{spec.algo} {name}": str(value) for name, value in values.pop("hyperparameters").items()}
        return {name: str(value) for name, value in values.items() if name != "algo"} | own

    values = [flat(spec) for spec in specs]
    seen: dict[str, set[str]] = {}
    for settings in values:
        for name, value in settings.items():
            seen.setdefault(name, set()).add(value)
    varying = [name for name, found in seen.items() if len(found) > 1]
    return [
        " ".join([s.algo, *(f"{name.split()[-1]} {v[name]}" for name in varying if name in v)])
        for s, v in zip(specs, values, strict=True)
    ]
