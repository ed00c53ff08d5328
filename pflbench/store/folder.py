"""A run's folder: its logs line by line, its checkpoints, and in the end its record.

While a run is computed, its folder is a partial folder (`partial.py`). The folder is renamed to `runs/<id>` when
everything is written, so a record at `runs/<id>` is complete. A run can be resumed from a partial folder: lines are
appended to its `rounds.jsonl`, `evaluations.jsonl` and `clients.jsonl`, and the newest good checkpoint says how many of
the lines count.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pflbench import files
from pflbench.errors import RunBusy, RunError, at_least_one
from pflbench.store import partial, schema
from pflbench.store.checkpoint import LOGS, Checkpoint, checkpoints
from pflbench.store.locks import locked
from pflbench.store.memory import Notice
from pflbench.store.provenance import outdated
from pflbench.store.record import Record, Row
from pflbench.store.states import ClientStates, StateRef, load_state, save_state

if TYPE_CHECKING:
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
        if self.force or not (self.out / run).exists() or (self.resume and partial.of_run(self.out, run)):
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

        To resume an interrupted run, its rows and states are read into `record`. When the block ends without a record,
        everybody may resume the run. Raises `RunBusy` when another process computes the run, or takes it over during
        the block; `RunError` when no checkpoint is good, or when the checkpoint is of other data or of another
        pflbench.
        """
        with locked(self.out, record.id):
            writer = Writer(self, record)
            # An earlier process may have been killed between the last write and the rename.
            if not self.force and writer.publish_complete():
                writer = Writer(self, record)
            if found := self.find(record.id, algorithm, notice):
                yield found
            else:
                with writer.computing():
                    writer.start(initial, notice)
                    yield writer


class Writer:
    """Writes one run's folder, a partial folder of this process. `states` is the folder of its states and uploads.

    Raises `RunBusy` when the run has a partial folder whose owner may live.
    """

    def __init__(self, store: Folder, record: Record) -> None:
        self._record = record
        self._resume = store.resume and not store.force
        self._every = store.checkpoint_every
        self._final = store.out / record.id
        self._replaced = _stamp(self._final)  # the record in whose place ours comes
        self._abandoned = partial.abandoned(store.out, record.id)
        self._life = partial.Life()
        self._begun = self._published = False
        self.folder = partial.own(store.out, record.id)
        self.states = self.folder / "checkpoint"
        self._logs = {name: (0, hashlib.sha256()) for name in LOGS}
        self._known: set[str] = set()
        self._server: tuple[int, StateRef] | None = None  # the newest written state, after its round

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Give the folder back if the block does not publish it. Raises `RunBusy` if another process took it over."""
        try:
            yield
        except Exception:
            # All writes and reads fail then, in this process and in its workers, each with its own error.
            if self._begun and not self._published and not self.folder.exists():
                raise RunBusy(
                    f"run {self._record.id} was taken over by another process ({self.folder} is gone); "
                    "nothing was damaged; wait for it to end"
                ) from None
            raise
        finally:
            self._life.end()
            partial.give_back(self.folder)

    def start(self, initial: "State", notice: Notice) -> None:
        """Make the folder, or take over the folder of an interrupted run and read its files."""
        with files.writing(self.folder):
            furthest = max(self._abandoned, key=partial.newest, default=None)
            if self._resume and furthest is not None and partial.newest(furthest):
                self._take(furthest)
                self._read(notice)
            else:
                self.folder.mkdir()
                self._begun = True
                self.states.mkdir()
                self._life.begin(self.folder)
                self._initial = save_state(initial, self.states, "initial.safetensors")
                self._record.client_states = ClientStates(self._record.spec.clients, initial, {}, self.states)
                for name in LOGS:
                    self._append(name, [])
            # They are deleted once this run's folder shows signs of life: to delete them may take minutes.
            for path in self._abandoned:
                partial.discard(path)

    def _take(self, found: Path) -> None:
        partial.take_over(found, self.folder)
        self._abandoned.remove(found)
        self._begun = True

    def _read(self, notice: Notice) -> None:
        for path in (self.folder, *self.folder.iterdir(), *self.states.iterdir()):
            if path.is_symlink():  # we would write to its target
                what = f"{path.name} in the folder of run {self._record.id}"
                raise RunError(f"{what} is a symbolic link, which no run makes; --force starts from round 1")
        self._life.begin(self.folder)
        found = checkpoints(self.states)
        good = self._newest_good(found, notice)
        basis = {"device": "cpu", **good.basis}  # before there were devices, all was computed on the CPU
        if changed := [name for name, sha in self._basis().items() if basis.get(name) != sha]:
            what = ", ".join(changed)
            raise RunError(f"run {self._record.id}: {what} changed since it was written; --force starts from round 1")
        record = self._record
        rows = {"rounds.jsonl": record.rounds, "evaluations.jsonl": record.evaluations, "clients.jsonl": record.clients}
        # If the former owner still lives, it may be in the middle of writing a file: we write to other files.
        for path in (*self.folder.iterdir(), *self.states.glob("writing-*")):
            if path.is_file() and path.name not in (*LOGS, partial.SIGN):
                path.unlink()
        for name, (length, _) in good.logs.items():
            data = (self.folder / name).read_bytes()[:length]
            files.write(self.folder / name, data)
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
        raise RunError(f"run {self._record.id} has no checkpoint that can be used; --force starts from round 1")

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

    def publish_complete(self) -> bool:
        """Publish an abandoned folder if it is complete; return whether there was one."""
        complete = next((path for path in self._abandoned if (path / "run.json").exists()), None)
        if complete is None:
            return False
        with self.computing(), files.writing(complete):
            self._take(complete)
            self._publish()
        return True

    def _publish(self) -> None:
        """Rename the folder to its final name.

        If another process has published this run since the start, then its record stays: it is equal.
        """
        self._life.end()
        for name in ("clients.jsonl", partial.SIGN):
            (self.folder / name).unlink(missing_ok=True)
        old = self.folder.with_suffix(".old")  # a name of this process alone
        if _stamp(self._final) in (None, self._replaced):
            with contextlib.suppress(FileNotFoundError):
                self._final.rename(old)
            try:
                self.folder.rename(self._final)
            except OSError:
                with contextlib.suppress(OSError):
                    old.rename(self._final)
                if not self.folder.exists() or _stamp(self._final) in (None, self._replaced):
                    raise
        self._published = True
        partial.discard(self.folder)  # only if another process was first
        for path in self._final.parent.glob(f"{self._final.name}.*"):
            if path.suffix == ".old":
                shutil.rmtree(path, ignore_errors=True)


def _stamp(record: Path) -> tuple[int, int] | None:
    """Return what tells a record from another one that comes in its place; None without a record."""
    with contextlib.suppress(OSError):
        found = (record / "run.json").stat()
        return found.st_ino, found.st_mtime_ns
    return None
