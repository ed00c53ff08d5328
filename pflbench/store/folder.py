"""A run's folder: its logs line by line, its checkpoints, and in the end its record.

While a run is computed, its folder is `runs/<id>.partial`. The folder is renamed to `runs/<id>` when everything is
written, so a record at `runs/<id>` is complete. A run can be resumed from `runs/<id>.partial`: lines are appended to
its `rounds.jsonl`, `evaluations.jsonl` and `clients.jsonl`, and the newest good checkpoint says how many of the lines
count.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pflbench import files
from pflbench.errors import RunBusy, RunError, at_least_one
from pflbench.store import schema
from pflbench.store.checkpoint import LOGS, Checkpoint, checkpoints
from pflbench.store.memory import Notice
from pflbench.store.provenance import outdated
from pflbench.store.record import Record, Row
from pflbench.store.states import ClientStates, StateRef, load_state, save_state

if TYPE_CHECKING:
    import filelock

    from pflbench.core.algorithm import Algorithm
    from pflbench.core.params import State


@dataclasses.dataclass(frozen=True)
class Folder:
    """Stores runs in folder `out`.

    A run whose record exists is computed again only with `force`. A checkpoint is written every
    `checkpoint_every` rounds. Resuming is opt-in: without `resume`, an interrupted run restarts from round 1, which is
    what you want after changing code or data.
    """

    out: Path
    force: bool = False
    resume: bool = False
    checkpoint_every: int = 1

    def __post_init__(self) -> None:
        """Raise `UsageError` when `checkpoint_every` is below 1."""
        at_least_one("checkpoint_every", self.checkpoint_every)

    def find(self, run: str, algorithm: "Algorithm", notice: Notice) -> Record | None:
        """Return the record of `run` if the run needs no computing, else None.

        A run with a record is computed with `force`, and with `resume` if a forced run was interrupted. `notice` gets a
        remark if the present code may give other numbers.
        """
        interrupted = (self.out / f"{run}.partial").exists()
        if self.force or not (self.out / run).exists() or (self.resume and interrupted):
            return None
        record = Record.load(self.out / run)
        if what := outdated(record.to_dict(), algorithm):
            notice(f"run {record.id} was made with {what}; --force runs it again")
        return record

    @contextlib.contextmanager
    def open(
        self, record: Record, algorithm: "Algorithm", initial: "State", notice: Notice
    ) -> "Iterator[Writer | Record]":
        """Lock the run against other processes, and yield its writer; or the record, if it has appeared meanwhile.

        To resume an interrupted run, its rows and states are read into `record`. The system frees the lock when this
        process ends for any reason. Raises `RunBusy` when another process computes the run; `RunError` when no
        checkpoint is good, or when the checkpoint is of other data or of another pflbench.
        """
        import filelock

        try:
            with lock(self.out, record.id).acquire(timeout=0):
                writer = Writer(self, record)
                if not self.force:
                    # An earlier process may have been killed between the last write and the rename.
                    writer.publish_complete()
                if found := self.find(record.id, algorithm, notice):
                    yield found
                else:
                    with files.writing(writer.folder):
                        writer.start(initial, notice)
                    yield writer
        except filelock.Timeout:
            raise RunBusy(f"run {record.id} is being computed by another process; wait for it to end") from None


def lock(out: Path, run: str) -> "filelock.BaseFileLock":
    """Return the lock of a run."""
    import filelock

    locks = out / ".locks"
    with files.writing(locks):
        locks.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(locks / run)


class Writer:
    """Writes one run's folder. `states` is the folder of its states and uploads."""

    def __init__(self, store: Folder, record: Record) -> None:
        self._record = record
        self._resume = store.resume and not store.force
        self._every = store.checkpoint_every
        self._final = store.out / record.id
        self.folder = store.out / f"{record.id}.partial"
        self.states = self.folder / "checkpoint"
        self._logs = {name: (0, hashlib.sha256()) for name in LOGS}
        self._known: set[str] = set()
        self._server: tuple[int, StateRef] | None = None  # the newest written state, after its round

    def start(self, initial: "State", notice: Notice) -> None:
        """Make the folder, or read the files of an interrupted run in it."""
        found = checkpoints(self.states)
        if self._resume and found:
            self._read(found, notice)
            return
        if self.folder.exists():
            # run.json marks a complete folder, so it is deleted first: a kill during the rest must not leave it behind.
            (self.folder / "run.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder)
        self.states.mkdir(parents=True)
        self._initial = save_state(initial, self.states, "initial.safetensors")
        self._record.client_states = ClientStates(self._record.spec.clients, initial, {}, self.states)
        for name in LOGS:
            self._append(name, [])

    def _read(self, found: list[Path], notice: Notice) -> None:
        for path in (self.folder, self.states, *self.folder.iterdir(), *self.states.iterdir()):
            if path.is_symlink():  # we would write to its target
                raise RunError(f"{path} is a symbolic link, which no run makes; --force starts from round 1")
        good = self._newest_good(found, notice)
        basis = {"device": "cpu", **good.basis}  # before there were devices, all was computed on the CPU
        if changed := [name for name, sha in self._basis().items() if basis.get(name) != sha]:
            what = ", ".join(changed)
            raise RunError(f"{self.folder}: {what} changed since it was written; --force starts from round 1")
        record = self._record
        rows = {"rounds.jsonl": record.rounds, "evaluations.jsonl": record.evaluations, "clients.jsonl": record.clients}
        for name, (length, _) in good.logs.items():
            os.truncate(self.folder / name, length)
            data = (self.folder / name).read_bytes()
            self._logs[name] = (length, hashlib.sha256(data))
            rows[name].extend(json.loads(line) for line in data.decode().splitlines())
        for newer in found[: found.index(self.states / f"{good.round:06}.json")]:
            newer.unlink()
        self._initial = good.initial
        self._known = {ref.file for ref in good.files()}
        record.server = load_state(self.states / good.server.file)
        first = load_state(self.states / good.initial.file)
        record.client_states = ClientStates(record.spec.clients, first, dict(good.clients), self.states)
        notice(f"resuming run {record.id} after round {good.round}")

    def _newest_good(self, found: list[Path], notice: Notice) -> Checkpoint:
        for path in found:
            try:
                checkpoint = Checkpoint.read(path)
                checkpoint.verify(self.folder)
            except RunError as error:
                notice(f"checkpoint of round {int(path.stem)} cannot be used: {error}")
            else:
                return checkpoint
        raise RunError(f"{self.folder} has no checkpoint that can be used; --force starts from round 1")

    def add_round(self, row: Row) -> None:
        """Append a round's line."""
        with files.writing(self.folder):
            self._append("rounds.jsonl", [row])

    def add_evaluation(self, row: Row, clients: list[Row]) -> None:
        """Append an evaluation's line, and the lines of its clients."""
        with files.writing(self.folder):
            self._append("clients.jsonl", clients)
            self._append("evaluations.jsonl", [row])

    def checkpoint(self) -> None:
        """Write a checkpoint if one is due after the last round."""
        if len(self._record.rounds) % self._every == 0:
            with files.writing(self.folder):
                named = self._checkpoint()
                self._delete_all_but(named | self._known)
                self._known = named

    def _append(self, name: str, rows: list[Row]) -> None:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with (self.folder / name).open("ab") as file:
            file.write(data)
        length, sha = self._logs[name]
        sha.update(data)
        self._logs[name] = (length + len(data), sha)

    def _basis(self) -> dict[str, str]:
        """Return what must be equal in a run and its checkpoint, in addition to the spec."""
        device = {
            name: value
            for name, value in self._record.machine.get("device", {"type": "cpu"}).items()
            if name != "count"
        }
        return {**self._record.fingerprints, **self._record.versions, "device": ", ".join(device.values())}

    def _checkpoint(self) -> set[str]:
        """Write a checkpoint; return the names of its files."""
        record, number = self._record, len(self._record.rounds)
        assert isinstance(record.client_states, ClientStates)  # noqa: S101
        changed = record.client_states.changed
        clients = {client: ref for client, ref in changed.items() if isinstance(ref, StateRef)}
        if self._server is None or self._server[0] != number:
            self._server = number, save_state(record.server, self.states, f"server-{number:06}.safetensors")
        logs = {name: (length, sha.hexdigest()) for name, (length, sha) in self._logs.items()}
        made = Checkpoint(number, self._server[1], self._initial, clients, self._basis(), logs)
        made.write(self.states)
        return {ref.file for ref in made.files()}

    def _delete_all_but(self, named: set[str]) -> None:
        """Delete the state files that are not in `named`."""
        for path in self.states.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()

    def finish(self) -> None:
        """Write the rest and give the folder its final name, in place of an older record of the same run."""
        with files.writing(self.folder):
            self._finish()

    def _finish(self) -> None:
        import pyarrow.parquet as pq

        record = self._record
        named = self._checkpoint()
        for path in checkpoints(self.states):
            if path.name != f"{len(record.rounds):06}.json":
                path.unlink()
        self._delete_all_but(named)
        for name, rows, columns in (
            ("clients", record.clients, schema.clients_columns(record.spec)),
            ("samples", record.samples, schema.SAMPLES),
        ):
            pq.write_table(schema.table(rows, columns), self.folder / f"{name}.parquet")
        files.write(self.folder / "run.json", (json.dumps(record.to_dict(), indent=2) + "\n").encode())
        self._publish()
        assert isinstance(record.client_states, ClientStates)  # noqa: S101
        record.client_states.folder = self._final / "checkpoint"
        record.path = self._final

    def publish_complete(self) -> None:
        """Rename the folder to its final name if it is complete."""
        if (self.folder / "run.json").exists():
            with files.writing(self.folder):
                self._publish()

    def _publish(self) -> None:
        old = self._final.with_suffix(".old")
        if old.exists():
            shutil.rmtree(old)
        (self.folder / "clients.jsonl").unlink(missing_ok=True)
        if self._final.exists():
            self._final.rename(old)
        self.folder.rename(self._final)
        if old.exists():
            shutil.rmtree(old)
