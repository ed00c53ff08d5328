"""A run of a sweep that is computed on another machine: what happens there. Without Ray."""

import dataclasses
import io
import queue
import shutil
import tarfile
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from pflbench import files
from pflbench.core.device import TYPES
from pflbench.engine.execution import Execution
from pflbench.engine.executors.node import Arrays, agree, unpacked
from pflbench.engine.experiment import Experiment, federation_of
from pflbench.store import partial
from pflbench.store.folder import Folder
from pflbench.sweep.places import Message, Teller, ended, failed

SHARE = 20
"""An unfinished run's folder is sent at most in one of so many seconds."""


def pack(folder: Path) -> bytes:
    """Return a run's folder as a tar file, without signs of life and uploads."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != partial.SIGN and not path.name.startswith(("upload-", "writing-")):
                tar.add(path, str(path.relative_to(folder)))
    return stream.getvalue()


def unpack(data: bytes, folder: Path) -> None:
    """Write a packed folder to `folder`, which must not exist. It appears by one rename."""
    with files.scratch(folder) as made, tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(made / "all", filter="data")
        (made / "all").rename(folder)


class Away:
    """Computes one run in a folder of this machine, and gives its messages one by one.

    `run` is the packed experiment and `data` its packed dataset; `wanted` is the `code` at home. `folder` is the packed
    folder of an interrupted run. The folder is sent back every `seconds`, and in the end. Raises `UsageError` when this
    machine has other code or no such device; `ModuleNotFoundError` when a package is missing.
    """

    def __init__(
        self, run: Arrays, data: Arrays, wanted: Mapping[str, str], device: str, folder: bytes | None, seconds: float
    ) -> None:
        agree(wanted)
        self._run: Experiment = unpacked(run)
        self._data = data
        TYPES[device]()
        self._device, self._seconds = device, seconds
        here = Path(tempfile.gettempdir())
        partial.discard_ended(here, "pflbench")  # Ray kills workers, which then leave their folders behind
        self._out = partial.own(here, "pflbench")
        self._out.mkdir(mode=0o700)
        if folder is not None:
            unpack(folder, self._out / f"{self._run.id}.partial")
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._due = time.monotonic() + seconds

    def identity(self) -> None:
        """Begin to compute."""
        threading.Thread(target=self._compute, daemon=True).start()

    def next(self) -> Message:
        """Return the next message; wait for it. In addition to the messages of `Place`: "folder" and "record"."""
        return self._messages.get()

    def _compute(self) -> None:
        try:
            last = self._ended()
        except Exception as error:  # without a last message the sweep would wait forever
            last = failed(error)
        shutil.rmtree(self._out, ignore_errors=True)
        self._messages.put(last)

    def _ended(self) -> Message:
        federation = federation_of(self._run.spec, unpacked(self._data))
        run = dataclasses.replace(self._run, given_federation=federation)
        store, execution = Folder(self._out, resume=True), Execution("serial", device=self._device)
        last = ended(run, store, execution, Teller(self._tell))
        if (self._out / run.id).exists():
            self._messages.put(("record", pack(self._out / run.id)))
        else:
            self._send_folder()
        return last

    def _tell(self, message: Message) -> None:
        self._messages.put(message)
        if message[0] == "round" and time.monotonic() >= self._due:
            self._send_folder()

    def _send_folder(self) -> None:
        began = time.monotonic()
        for folder in partial.of_run(self._out, self._run.id):
            self._messages.put(("folder", pack(folder)))
        now = time.monotonic()
        self._due = now + max(self._seconds, SHARE * (now - began))
