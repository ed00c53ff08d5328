"""What a worker does, in its own process."""

import io
import pickle
import signal
import traceback
from multiprocessing.connection import Connection

import torch

from pflbench.core.device import Device
from pflbench.engine.children import begin_child
from pflbench.engine.executors.wire import Unpickler, dumps
from pflbench.engine.work import Job, Work
from pflbench.errors import PflbenchError


def serve(work: Work, device: Device, connection: Connection) -> None:
    """Do jobs on `device` until the connection closes. The body of a worker process."""
    begin_child(signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)
    received: list[torch.Tensor] = []
    with device.exact():
        work = work.on(device)
        while True:
            try:
                job = Unpickler(io.BytesIO(connection.recv_bytes()), received).load()
            except (EOFError, OSError):
                return
            connection.send_bytes(outcome(work, job))


def outcome(work: Work, job: Job) -> bytes:
    """Return the pickled result of `job`, or the pickled error that it raised."""
    try:
        return dumps(work(job))
    except Exception as error:
        if not isinstance(error, PflbenchError):  # a bug in a method: its author needs the worker's traceback
            note = f"In a worker, round {job.round}, client {job.client}:\n{traceback.format_exc()}"
            try:
                pickle.loads(pickle.dumps(error))  # noqa: S301
            except Exception:
                error = RuntimeError(repr(error))
            error.add_note(note)
        return dumps(error)
