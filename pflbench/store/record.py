"""One run on disk: what was run, on what, and what came out.

    runs/<id>/run.json          schema, spec, status, summary, fingerprints, versions, machine
    runs/<id>/rounds.jsonl      a line per round
    runs/<id>/clients.parquet   round, client, n, accuracy, ... of every client at every evaluation
    runs/<id>/samples.parquet   client, class, training and test samples of it
    runs/<id>/checkpoint/       the final state of server and clients (pflbench/checkpoint.py)

While a run goes on its folder is `runs/<id>.partial`; it gets its name when everything is written. What stands at
`runs/<id>` is therefore complete. What stands at `runs/<id>.partial` can be resumed: `rounds.jsonl` and
`clients.jsonl`, which are appended to, and the newest good checkpoint, which says how much of them counts. Nothing here
is pickled.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pflbench.core.params import State
from pflbench.errors import RunBusy, RunError, UsageError
from pflbench.spec import RunSpec
from pflbench.store.checkpoint import (
    LOGS,
    Checkpoint,
    ClientStates,
    Saved,
    checkpoints,
    digest,
    load_state,
    save_state,
    writing,
)

if TYPE_CHECKING:
    import filelock

    from pflbench.core.algorithm import Algorithm

SCHEMA = 1
_TIMES = ("seconds", "busy_seconds")


@dataclasses.dataclass
class Record:
    """One run.

    `rounds` has a dict per round; `clients` a dict per client and evaluation; accuracies are fractions. `samples` has a
    dict for each client and class (`Federation.counts`).

    `server` and `client_states` are the final states; a record that was loaded from disk reads them with `load_states`.
    `path` is its folder, None when it was not written.
    """

    spec: RunSpec
    status: str = "running"
    reason: str | None = None
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    clients: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples: list[dict[str, int]] = dataclasses.field(default_factory=list, repr=False)
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    server: State = dataclasses.field(default_factory=dict, repr=False)
    client_states: Mapping[int, State] = dataclasses.field(default_factory=dict, repr=False)
    path: Path | None = None

    @property
    def id(self) -> str:
        """The name of the run's folder."""
        return self.spec.id

    @property
    def summary(self) -> dict[str, Any]:
        """The headline: the last evaluation, the mean of the last five, the best on test (named so), and the costs."""
        tested = [r for r in self.rounds if "accuracy" in r]
        costs = {
            "rounds": len(self.rounds),
            "bytes_up": sum(r["bytes_up"] for r in self.rounds),
            "bytes_down": sum(r["bytes_down"] for r in self.rounds),
            **{name: sum(r[name] for r in self.rounds) for name in _TIMES},
        }
        if not tested:
            return costs
        names = ("accuracy", "accuracy_mean", "accuracy_std", "accuracy_worst10", "global_accuracy")
        last = {name: tested[-1][name] for name in names}
        tail = tested[-5:]
        last5 = {n: None if last[n] is None else sum(r[n] for r in tail) / len(tail) for n in names}
        best = max(tested, key=lambda r: r["accuracy"])
        return {
            "last": last,
            "last5": last5,
            "best_on_test": {"round": best["round"], "accuracy": best["accuracy"]},
            **costs,
        }

    def states_fingerprint(self) -> str:
        """Return the SHA-256 of the final states of the server and of all clients."""
        assert isinstance(self.client_states, ClientStates)  # noqa: S101
        return hashlib.sha256(json.dumps([digest(self.server), self.client_states.digests()]).encode()).hexdigest()

    def metrics_fingerprint(self) -> str:
        """Return the SHA-256 of all metrics but the times."""
        rounds = [{k: v for k, v in r.items() if k not in _TIMES} for r in self.rounds]
        return hashlib.sha256(json.dumps([rounds, self.clients], sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return what `run.json` holds."""
        return {
            "schema": SCHEMA,
            "id": self.id,
            "status": self.status,
            "reason": self.reason,
            "summary": self.summary,
            "spec": self.spec.to_dict(),
            "fingerprints": self.fingerprints,
            "versions": self.versions,
            "machine": self.machine,
        }

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the record in folder `path`, without its states. Raises `UsageError` when it cannot be read."""
        import pyarrow.parquet as pq

        try:
            run = json.loads((path / "run.json").read_text(encoding="utf-8"))
            if run["schema"] != SCHEMA:
                raise UsageError(
                    f"{path}: record schema {run['schema']} is not {SCHEMA}; use the pflbench that wrote it"
                )
            rounds = [json.loads(line) for line in (path / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
            clients, samples = (pq.read_table(path / f"{name}.parquet").to_pylist() for name in ("clients", "samples"))
            spec = RunSpec.from_dict(run["spec"])
            rest = {name: run[name] for name in ("status", "reason", "fingerprints", "versions", "machine")}
            record = cls(spec=spec, rounds=rounds, clients=clients, samples=samples, path=path, **rest)
            if (record.metrics_fingerprint(), spec.id) != (record.fingerprints["metrics"], run["id"]):
                raise ValueError("its files do not belong together or are damaged")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: not a readable record ({error}); move it away or use --force") from None
        return record

    def load_states(self) -> None:
        """Read the final states from the record's folder, clients' when they are asked for.

        Raises `RunError` for damaged files.
        """
        if self.path is None:
            raise UsageError("the record was not written to disk, so there is nothing to read")
        folder = self.path / "checkpoint"
        newest = Checkpoint.read(next(iter(checkpoints(folder)), folder))
        newest.verify_states(folder)
        self.server = load_state(folder / newest.server.file)
        initial = load_state(folder / newest.initial.file)
        self.client_states = ClientStates(self.spec.clients, initial, dict(newest.clients), folder)


class Writer:
    """Writes one run's folder: its logs round by round, checkpoints, and in the end the rest."""

    def __init__(self, out: Path, record: Record, every: int) -> None:
        self._record = record
        self._every = every
        self._final = out / record.id
        self._partial = out / f"{record.id}.partial"
        self.states = self._partial / "checkpoint"
        self._logs = {name: (0, hashlib.sha256()) for name in LOGS}
        self._known: set[str] = set()
        self._server: tuple[int, Saved] | None = None  # the newest that was written, and its round

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run against other processes. The system frees the lock when this process ends, however it ends."""
        import filelock

        try:
            with _lock(self._final.parent, self._record.id).acquire(timeout=0):
                yield
        except filelock.Timeout:
            raise RunBusy(f"run {self._record.id} is being computed by another process; wait for it to end") from None

    def start(
        self, initial: State, *, resume: bool, notice: Callable[[str], None]
    ) -> tuple[dict[int, State | Saved], dict[str, Any] | None]:
        """Make the folder, or with `resume` go on with what an interrupted run left in it.

        Fills the record with what was done, and returns the clients' states that differ from `initial`, and the line of
        the last round if its evaluation is still to be done. Raises
        `RunError` when there are checkpoints but no good one, or when they are of other data or another pflbench.
        """
        with writing(self._partial):
            return self._start(initial, resume=resume, notice=notice)

    def _start(
        self, initial: State, *, resume: bool, notice: Callable[[str], None]
    ) -> tuple[dict[int, State | Saved], dict[str, Any] | None]:
        found = checkpoints(self.states)
        if not (resume and found):
            if self._partial.exists():
                shutil.rmtree(self._partial)
            self.states.mkdir(parents=True)
            self._initial = save_state(initial, self.states, "initial.safetensors")
            for name in LOGS:
                self._append(name, [])
            return {}, None
        for path in (self._partial, self.states, *self._partial.iterdir(), *self.states.iterdir()):
            if path.is_symlink():  # we would write to where it leads
                raise RunError(f"{path} is a symbolic link, which no run makes; --force starts anew")
        good = self._newest_good(found, notice)
        if changed := [name for name, sha in self._basis().items() if good.basis.get(name) != sha]:
            raise RunError(f"{self._partial}: {', '.join(changed)} changed since it was written; --force starts anew")
        for name, (length, _) in good.logs.items():
            os.truncate(self._partial / name, length)
            data = (self._partial / name).read_bytes()
            self._logs[name] = (length, hashlib.sha256(data))
            lines = [json.loads(line) for line in data.decode().splitlines()]
            (self._record.rounds if name == "rounds.jsonl" else self._record.clients).extend(lines)
        for newer in found[: found.index(self.states / f"{good.round:06}.json")]:
            newer.unlink()
        self._initial = good.initial
        self._known = {saved.file for saved in good.files()}
        self._record.server = load_state(self.states / good.server.file)
        notice(f"resuming run {self._record.id} after round {good.round}")
        return dict(good.clients), good.untested

    def _newest_good(self, found: list[Path], notice: Callable[[str], None]) -> Checkpoint:
        for path in found:
            try:
                checkpoint = Checkpoint.read(path)
                checkpoint.verify(self._partial)
            except RunError as error:
                notice(f"checkpoint of round {int(path.stem)} cannot be used: {error}")
            else:
                return checkpoint
        raise RunError(f"{self._partial} has no checkpoint that can be used; --force starts anew")

    def add_round(self, row: dict[str, Any], tested: list[dict[str, Any]]) -> None:
        """Append a round's line, and those of the clients that were tested in it."""
        with writing(self._partial):
            self._append("clients.jsonl", tested)
            self._append("rounds.jsonl", [row])

    def checkpoint(self, number: int, untested: dict[str, Any] | None) -> None:
        """Write a checkpoint of round `number` if one is due. `untested` is its line if it is to be tested."""
        if number % self._every == 0:
            with writing(self._partial):
                named = self._checkpoint(number, untested)
                self._sweep(self.states, named | self._known)
                self._known = named

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with (self._partial / name).open("ab") as file:
            file.write(data)
        length, sha = self._logs[name]
        sha.update(data)
        self._logs[name] = (length + len(data), sha)

    def _basis(self) -> dict[str, str]:
        """Return what a run must have in common with its checkpoint, besides the spec."""
        return {**self._record.fingerprints, **self._record.versions}

    def _checkpoint(self, number: int, untested: dict[str, Any] | None) -> set[str]:
        """Write a checkpoint; return the names of its files."""
        record = self._record
        assert isinstance(record.client_states, ClientStates)  # noqa: S101
        clients = {client: saved for client, saved in record.client_states.kept.items() if isinstance(saved, Saved)}
        if self._server is None or self._server[0] != number:
            self._server = number, save_state(record.server, self.states, f"server-{number:06}.safetensors")
        logs = {name: (length, sha.hexdigest()) for name, (length, sha) in self._logs.items()}
        made = Checkpoint(number, self._server[1], self._initial, clients, self._basis(), logs, untested)
        made.write(self.states)
        return {saved.file for saved in made.files()}

    @staticmethod
    def _sweep(states: Path, named: set[str]) -> None:
        """Delete the states that no checkpoint of the run names any more."""
        for path in states.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()

    def finish(self, untested: dict[str, Any] | None) -> None:
        """Write the rest and give the folder its final name, in place of an older record of the same run.

        `untested` is the line of a round whose evaluation diverged.
        """
        with writing(self._partial):
            self._finish(untested)

    def _finish(self, untested: dict[str, Any] | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        record = self._record
        number = len(record.rounds) + (untested is not None)
        named = self._checkpoint(number, untested)
        for path in checkpoints(self.states):
            if path.name != f"{number:06}.json":
                path.unlink()
        self._sweep(self.states, named)
        schema = pa.schema(
            {
                "round": pa.int32(),
                "client": pa.int32(),
                "n": pa.int32(),
                "accuracy": pa.float64(),
                "global_accuracy": pa.float64(),
            }
        )
        pq.write_table(pa.Table.from_pylist(record.clients, schema=schema), self._partial / "clients.parquet")
        pq.write_table(pa.Table.from_pylist(record.samples), self._partial / "samples.parquet")
        text = json.dumps(record.to_dict(), indent=2)
        (self._partial / "writing").write_text(text + "\n", encoding="utf-8")
        (self._partial / "writing").rename(self._partial / "run.json")
        self._publish()
        assert isinstance(record.client_states, ClientStates)  # noqa: S101
        record.client_states.folder = self._final / "checkpoint"
        record.path = self._final

    def publish_complete(self) -> bool:
        """Give a folder in which everything is written its final name; return whether there was one."""
        complete = (self._partial / "run.json").exists()
        if complete:
            with writing(self._partial):
                self._publish()
        return complete

    def _publish(self) -> None:
        old = self._final.with_suffix(".old")
        if old.exists():
            shutil.rmtree(old)
        if self._final.exists():
            self._final.rename(old)
        self._partial.rename(self._final)
        (self._final / "clients.jsonl").unlink(missing_ok=True)
        if old.exists():
            shutil.rmtree(old)


def _lock(out: Path, run: str) -> "filelock.BaseFileLock":
    import filelock

    locks = out / ".locks"
    with writing(locks):
        locks.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(locks / run)


def is_busy(out: Path, run: str) -> bool:
    """Return whether a process computes the run with this id now."""
    import filelock

    try:
        with _lock(out, run).acquire(timeout=0):
            return False
    except filelock.Timeout:
        return True


def check_out(out: Path) -> None:
    """Raise `UsageError` when runs cannot be written below `out`. Nothing is created."""
    existing = out
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UsageError(f"out: {existing} is a file, not a folder; choose another --out")
    try:
        with tempfile.TemporaryFile(dir=existing):  # asked by trying: /proc and read-only mounts refuse even root
            pass
    except OSError as error:
        raise UsageError(f"out: {existing} cannot be written to ({error.strerror}); choose another --out") from None


def versions() -> dict[str, str]:
    """Return the versions of everything that results may depend on."""
    names = ("pflbench", "torch", "torchvision", "numpy", "pyarrow", "safetensors")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def outdated(run: Mapping[str, Any], algorithm: "Algorithm") -> str | None:
    """Return in what the code that made a record differs from this one; None if in nothing.

    `run` has the record's fingerprints and versions, as in run.json; `algorithm` is its method, as it is now.
    """
    if run.get("fingerprints", {}).get("algorithm") != source_fingerprint(algorithm):
        return f"another source of {algorithm.name} or of pflbench"
    was, now = run.get("versions", {}), versions()
    for name in sorted({*was, *now}):
        if was.get(name) != now.get(name):
            return f"{name} {was.get(name, 'absent')} and not {now.get(name, 'absent')}"
    return None


def machine(executor: str, workers: int) -> dict[str, Any]:
    """Return on what the run was computed, and by which commit of pflbench where that is known."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "executor": executor,
        "workers": workers,
        "git_commit": _commit(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    here = Path(__file__).parents[1]
    if not (here.parent / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return None


def source_fingerprint(algorithm: "Algorithm") -> str:
    """Return the SHA-256 of the source of a method: of the modules of its classes, and of the core that computes it."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *(root / "core").glob("*.py"), *(root / "engine").rglob("*.py")]):
        digest.update(path.read_bytes())
    for cls in type(algorithm).__mro__[:-1]:
        try:
            digest.update(inspect.getsource(sys.modules[cls.__module__]).encode())
        except (OSError, TypeError, KeyError):  # defined in a prompt
            digest.update(f"{cls.__module__}.{cls.__qualname__}".encode())
    return digest.hexdigest()
