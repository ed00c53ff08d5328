"""States in files, and the checkpoints that hold them together.

    checkpoint/000003-000012.safetensors   client 3's state after round 12, written by whoever computed it
    checkpoint/server-000012.safetensors   the server's state after round 12
    checkpoint/000012.json                 the checkpoint of round 12: which of these files belong to it
    checkpoint/upload-000003.safetensors   client 3's upload, until the next checkpoint

A checkpoint names each of its files with its SHA-256, and has one of its own: what was cut short or changed is found
out. It is written after everything that it names, and appears by one rename. Clients whose state never changed have no
file. The two newest checkpoints are kept. Nothing is pickled.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from safetensors.torch import save

from pflbench.core.params import Params, State
from pflbench.errors import RunError

KEEP = 2
LOGS = ("rounds.jsonl", "clients.jsonl")
_STATE = re.compile(r"(initial|server-\d{6,}|\d{6,}-\d{6,})\.safetensors")


@dataclasses.dataclass(frozen=True)
class Saved:
    """A state in a file of the checkpoint folder."""

    file: str
    sha256: str


def digest(state: State) -> str:
    """Return the SHA-256 of a state: of the file that it would be saved as."""
    return hashlib.sha256(_encode(state)).hexdigest()


def save_state(state: State, folder: Path, file: str) -> Saved:
    """Write `state` to `folder/file`."""
    data = _encode(state)
    _write(folder / file, data)
    return Saved(file, hashlib.sha256(data).hexdigest())


def load_state(path: Path) -> State:
    """Return the state in file `path`; its tensors are mapped from the file, not copied."""
    state: State = {}
    with safe_open(path, "pt") as file:
        for part in json.loads(file.metadata()["parts"]):
            state[part] = {}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            part, name = key.split("/", 1)
            state[part][name] = file.get_tensor(key)
    return state


class Stored(Mapping[str, Params]):
    """A message's parts in file `path`, read whenever they are asked for and held by nobody else.

    A round's uploads are then no bigger in memory than the one that is being read.
    """

    def __init__(self, parts: Mapping[str, Params], path: Path) -> None:
        self.path = path
        self._names = list(parts)
        _write(path, _encode(parts))

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, part: str) -> Params:
        return load_state(self.path)[part]


def _encode(state: Mapping[str, Params]) -> bytes:
    # Cloned because safetensors refuses tensors that share memory; parts without tensors are kept by name.
    tensors = {f"{part}/{name}": t.contiguous().clone() for part, ps in state.items() for name, t in ps.items()}
    return save(tensors, metadata={"parts": json.dumps(list(state))})


def _write(path: Path, data: bytes) -> None:
    with writing(path.parent):
        # A file that a checkpoint names, or that is mapped, is never written to.
        partial = path.with_name(f"writing-{path.name}")
        partial.write_bytes(data)
        partial.rename(path)


class ClientStates(Mapping[int, State]):
    """The states of all clients by number, read from their files when they are asked for.

    `kept` has the states that differ from `initial`; those that are `Saved` lie in `folder`.
    """

    def __init__(self, clients: int, initial: State, kept: "dict[int, State | Saved]", folder: Path | None) -> None:
        self.kept = kept
        self.folder = folder
        self._clients = clients
        self._initial = initial

    def __len__(self) -> int:
        return self._clients

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._clients))

    def stored(self, client: int) -> State | Saved:
        """Return a client's state as it is kept, without reading a file."""
        return self.kept.get(client, self._initial)

    def __getitem__(self, client: int) -> State:
        if client not in range(self._clients):
            raise KeyError(client)
        state = self.stored(client)
        if isinstance(state, Saved):
            assert self.folder is not None  # noqa: S101
            return load_state(self.folder / state.file)
        return state

    def digests(self) -> list[str]:
        """Return the SHA-256 of every client's state."""
        untouched = digest(self._initial)
        changed = {c: s.sha256 if isinstance(s, Saved) else digest(s) for c, s in self.kept.items()}
        return [changed.get(client, untouched) for client in self]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after `round`.

    `untested` is the line of that round when its evaluation is still to be done. `basis` is what must not have changed:
    data, method, versions. `logs` has the length and the SHA-256 of each log file up to then.
    """

    round: int
    server: Saved
    initial: Saved
    clients: dict[int, Saved]
    basis: dict[str, str]
    logs: dict[str, tuple[int, str]]
    untested: dict[str, Any] | None

    def write(self, folder: Path) -> None:
        """Write the checkpoint, whose files must be there, and drop all but the newest ones."""
        content = json.dumps(dataclasses.asdict(self))
        text = json.dumps({"sha256": hashlib.sha256(content.encode()).hexdigest(), "content": content})
        partial = folder / "writing"
        partial.write_text(text, encoding="utf-8")
        partial.rename(folder / f"{self.round:06}.json")
        for old in checkpoints(folder)[KEEP:]:
            old.unlink()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the checkpoint in file `path`. Raises `RunError` when the file is damaged."""
        try:
            outer = json.loads(path.read_text(encoding="utf-8"))
            if hashlib.sha256(outer["content"].encode()).hexdigest() != outer["sha256"]:
                raise ValueError
            found: dict[str, Any] = json.loads(outer["content"])
            found_files = [found["server"]["file"], found["initial"]["file"]]
            found_files += [saved["file"] for saved in found["clients"].values()]
            if not (all(map(_STATE.fullmatch, found_files)) and found["logs"].keys() == set(LOGS)):
                raise ValueError  # a name such as ../x would lead out of the folder
            if found["round"] != int(path.stem):
                raise ValueError
            return cls(
                found["round"],
                Saved(**found["server"]),
                Saved(**found["initial"]),
                {int(client): Saved(**saved) for client, saved in found["clients"].items()},
                found["basis"],
                {name: (length, sha) for name, (length, sha) in found["logs"].items()},
                found["untested"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise RunError(f"{path} is damaged, or of another version") from None

    def files(self) -> list[Saved]:
        """Return all its files."""
        return [self.server, self.initial, *self.clients.values()]

    def verify(self, run: Path) -> None:
        """Raise `RunError` when a state or a log in the run's folder `run` is missing or damaged."""
        self.verify_states(run / "checkpoint")
        self._verify([(run / name, length, sha) for name, (length, sha) in self.logs.items()])

    def verify_states(self, folder: Path) -> None:
        """Raise `RunError` when a state in the checkpoint folder `folder` is missing or damaged."""
        self._verify([(folder / saved.file, None, saved.sha256) for saved in self.files()])

    @staticmethod
    def _verify(wanted: Iterable[tuple[Path, int | None, str]]) -> None:
        for path, length, sha in wanted:
            try:
                found = path.read_bytes()[:length]
            except OSError:
                found = b""
            if hashlib.sha256(found).hexdigest() != sha or length not in (None, len(found)):
                raise RunError(f"{path} is missing or damaged")


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, the newest first."""
    return sorted(folder.glob("[0-9]*.json"), reverse=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path`, such as a full disk, into a `RunError` that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"cannot write {path} ({reason}); what is there is good: mend that, then --resume") from None
