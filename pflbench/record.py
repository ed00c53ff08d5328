"""One run on disk: what was run, on what, and what came out.

    runs/<id>/run.json          schema, spec, status, summary, fingerprints, versions, machine
    runs/<id>/rounds.jsonl      a line per round
    runs/<id>/clients.parquet   round, client, n, accuracy, ... of every client at every evaluation
    runs/<id>/checkpoint/       the final state of server and clients

While a run goes on its folder is `runs/<id>.partial`; it gets its name when everything is written. What stands at
`runs/<id>` is therefore complete. Nothing here is pickled.
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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from pflbench import params
from pflbench.errors import RunError, UsageError
from pflbench.params import Params, State
from pflbench.spec import RunSpec

if TYPE_CHECKING:
    from pflbench.algorithm import Algorithm
    from pflbench.evaluate import Score

SCHEMA = 1
_STATE = Path("checkpoint") / "state.safetensors"


@dataclasses.dataclass
class Record:
    """One run. `rounds` has a dict per round; `clients` a dict per client and evaluation; accuracies are fractions.

    `server` and `client_states` are the final states; a record that was loaded from disk reads them with `load_states`.
    `path` is its folder, None when it was not written.
    """

    spec: RunSpec
    status: str = "running"
    reason: str | None = None
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    clients: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    server: State = dataclasses.field(default_factory=dict, repr=False)
    client_states: dict[int, State] = dataclasses.field(default_factory=dict, repr=False)
    path: Path | None = None

    @property
    def id(self) -> str:
        """The name of the run's folder."""
        return self.spec.id

    def add_scores(self, round: int, scores: "list[Score]") -> None:  # noqa: A002
        """Keep every client's scores of one evaluation."""
        for s in scores:
            whole = None if s.global_correct is None else s.global_correct / s.n
            self.clients.append(
                {"round": round, "client": s.client, "n": s.n, "accuracy": s.correct / s.n, "global_accuracy": whole}
            )

    @property
    def summary(self) -> dict[str, Any]:
        """The headline: the last evaluation, the mean of the last five, the best on test (named so), and the costs."""
        tested = [r for r in self.rounds if "accuracy" in r]
        costs = {
            "rounds": len(self.rounds),
            "bytes_up": sum(r["bytes_up"] for r in self.rounds),
            "bytes_down": sum(r["bytes_down"] for r in self.rounds),
            "seconds": sum(r["seconds"] for r in self.rounds),
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

    def states(self) -> Params:
        """Return the final states of server and clients as one level: `server/part/name`, `client/3/part/name`."""
        out = params.flatten(self.server, "server")
        for client, state in sorted(self.client_states.items()):
            out |= params.flatten(state, f"client/{client}")
        return out

    def parts(self) -> list[str]:
        """Return the parts of the final states, also those without tensors: `server/part`, `client/3/part`."""
        clients = [f"client/{client}/{part}" for client, state in sorted(self.client_states.items()) for part in state]
        return [*(f"server/{part}" for part in self.server), *clients]

    def metrics_fingerprint(self) -> str:
        """Return the SHA-256 of all metrics but the seconds."""
        rounds = [{k: v for k, v in r.items() if k != "seconds"} for r in self.rounds]
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
            clients = pq.read_table(path / "clients.parquet").to_pylist()
            spec = RunSpec.from_dict(run["spec"])
            rest = {name: run[name] for name in ("status", "reason", "fingerprints", "versions", "machine")}
            record = cls(spec=spec, rounds=rounds, clients=clients, path=path, **rest)
            if (record.metrics_fingerprint(), spec.id) != (record.fingerprints["metrics"], run["id"]):
                raise ValueError("its files do not belong together or are damaged")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}: not a readable record ({error}); move it away or use --force") from None
        return record

    def load_states(self) -> None:
        """Read `server` and `client_states` from the record's folder."""
        from safetensors import safe_open

        if self.path is None:
            raise UsageError("the record was not written to disk, so there is nothing to read")
        self.server, self.client_states = {}, {}
        with safe_open(self.path / _STATE, "pt") as file:
            for key in (*json.loads(file.metadata()["parts"]), *file.keys()):
                head, rest = key.split("/", 1)
                state = self.server
                if head == "client":
                    client, rest = rest.split("/", 1)
                    state = self.client_states.setdefault(int(client), {})
                part, _, name = rest.partition("/")
                tensors = state.setdefault(part, {})
                if name:
                    tensors[name] = file.get_tensor(key)


class Writer:
    """Writes one run's folder, round by round; used as a context manager that holds the run's lock."""

    def __init__(self, out: Path, record: Record) -> None:
        self._record = record
        self._final = out / record.id
        self._partial = out / f"{record.id}.partial"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run against other processes. The system frees the lock when this process ends, however it ends."""
        import filelock

        try:
            locks = self._final.parent / ".locks"
            locks.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(locks / self._record.id).acquire(timeout=0):
                yield
        except filelock.Timeout:
            raise RunError(f"run {self._record.id} is being computed by another process; wait for it to end") from None

    def start(self) -> None:
        """Make the folder of the run in progress, in place of one that an interrupted run left."""
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir()

    def add_round(self, row: dict[str, Any]) -> None:
        """Append a line to rounds.jsonl."""
        with (self._partial / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        """Write the rest and give the folder its final name, in place of an older record of the same run."""
        import pyarrow as pa
        import pyarrow.parquet as pq
        from safetensors.torch import save_file

        (self._partial / _STATE.parent).mkdir()
        # Clients that never took part share the initial tensors, which safetensors refuses: each gets its own.
        tensors = {name: t.clone(memory_format=torch.contiguous_format) for name, t in self._record.states().items()}
        save_file(tensors, self._partial / _STATE, metadata={"parts": json.dumps(self._record.parts())})
        (self._partial / "rounds.jsonl").touch()
        schema = pa.schema(
            {
                "round": pa.int32(),
                "client": pa.int32(),
                "n": pa.int32(),
                "accuracy": pa.float64(),
                "global_accuracy": pa.float64(),
            }
        )
        pq.write_table(pa.Table.from_pylist(self._record.clients, schema=schema), self._partial / "clients.parquet")
        text = json.dumps(self._record.to_dict(), indent=2)
        (self._partial / "run.json").write_text(text + "\n", encoding="utf-8")
        if self._final.exists():
            old = self._final.with_suffix(".old")
            if old.exists():
                shutil.rmtree(old)
            self._final.rename(old)
            self._partial.rename(self._final)
            shutil.rmtree(old)
        else:
            self._partial.rename(self._final)
        self._record.path = self._final


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
    here = Path(__file__).parent
    if not (here.parent / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return None


def source_fingerprint(algorithm: "Algorithm") -> str:
    """Return the SHA-256 of the source of a method's class and of the classes it builds on."""
    digest = hashlib.sha256()
    for cls in type(algorithm).__mro__[:-1]:
        try:
            digest.update(inspect.getsource(cls).encode())
        except (OSError, TypeError):  # defined in a prompt
            digest.update(f"{cls.__module__}.{cls.__qualname__} {sys.version}".encode())
    return digest.hexdigest()
