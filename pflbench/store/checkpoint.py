"""Checkpoints: the files that together are the state of a run after a round.

    checkpoint/000003-000012.safetensors    client 3's state after round 12, written by the process that computed it
    checkpoint/server-000012.safetensors    the server's state after round 12
    checkpoint/000012.json                  the checkpoint of round 12: which of these files belong to it
    checkpoint/upload-000003-0.safetensors  client 3's upload, until the next checkpoint

A checkpoint names each of its files with its SHA-256, and has a SHA-256 of its contents, so that truncated or changed
files are detected. It is written after all files that it names, and appears by one rename. Clients whose state never
changed have no file. A run has its two newest checkpoints on disk. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pflbench import files
from pflbench.errors import RunError
from pflbench.store.states import StateRef

KEEP = 2
_LOGS_1 = {"rounds.jsonl", "clients.jsonl"}  # of schema 1
LOGS = ("rounds.jsonl", "evaluations.jsonl", "clients.jsonl")
_STATE = re.compile(r"(initial|server-\d{6,}|\d{6,}-\d{6,})\.safetensors")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a run needs to continue after `round`.

    `basis` has what must not change before the run continues: data, method, versions. `logs` has the length and the
    SHA-256 of each log file after `round`.
    """

    round: int
    server: StateRef
    initial: StateRef
    clients: dict[int, StateRef]
    basis: dict[str, str]
    logs: dict[str, tuple[int, str]]

    def write(self, folder: Path) -> None:
        """Write the checkpoint, whose files must exist, and delete all but the newest checkpoints."""
        content = json.dumps(dataclasses.asdict(self))
        text = json.dumps({"sha256": hashlib.sha256(content.encode()).hexdigest(), "content": content})
        files.write(folder / f"{self.round:06}.json", text.encode())
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
            found_files += [ref["file"] for ref in found["clients"].values()]
            if not (all(map(_STATE.fullmatch, found_files)) and set(found["logs"]) in (set(LOGS), _LOGS_1)):
                raise ValueError  # a name such as ../x would leave the folder
            if found["round"] != int(path.stem):
                raise ValueError
            return cls(
                found["round"],
                StateRef(**found["server"]),
                StateRef(**found["initial"]),
                {int(client): StateRef(**ref) for client, ref in found["clients"].items()},
                found["basis"],
                {name: (length, sha) for name, (length, sha) in found["logs"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise RunError(f"{path} is damaged, or of another version") from None

    def files(self) -> list[StateRef]:
        """Return all its files."""
        return [self.server, self.initial, *self.clients.values()]

    def verify(self, run: Path) -> None:
        """Raise `RunError` when a state or a log in the run's folder `run` is missing or damaged."""
        self.verify_states(run / "checkpoint")
        self._verify([(run / name, length, sha) for name, (length, sha) in self.logs.items()])

    def verify_states(self, folder: Path) -> None:
        """Raise `RunError` when a state in the checkpoint folder `folder` is missing or damaged."""
        self._verify([(folder / ref.file, None, ref.sha256) for ref in self.files()])

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
