"""An executor whose workers know nothing but a TCP connection: what `Ray` adds to `Pool`, without Ray."""

import multiprocessing
import os
import pickle
from multiprocessing.connection import Client, Listener, wait

from pflbench.core.device import Devices
from pflbench.engine.executors.node import Node, code, packed
from pflbench.engine.executors.pool import Pool, WorkerDied
from pflbench.engine.executors.wire import common, dumps
from pflbench.engine.work import Work

KEY = b"of this test"


class Tcp(Pool):
    """Workers that connect to this process. The work and the jobs come through the connection."""

    remote = True

    def __init__(self, experiment, execution, notice):
        super().__init__(notice)
        self._experiment, self._wanted = experiment, execution.workers or 2
        self._links, self._number, self._shared = [], 0, {}

    def __enter__(self):
        self._listener = Listener(("127.0.0.1", 0), authkey=KEY)
        _ = self._experiment.setup
        self._packed = [a.tobytes() for a in packed(Work(self._experiment, None), pickle.Pickler)]
        for _ in range(self._wanted):
            self._add()
        assert len({link.identity["probe"] for link in self._links}) == 1
        return self

    def __exit__(self, *error):
        for link in self._links:
            link.process.kill()
            link.process.join()
            link.connection.close()
        self._listener.close()

    def describe(self):
        return {"workers": len(self._links), "device": Devices().describe()}

    def _add(self):
        process = multiprocessing.get_context("fork").Process(target=work, args=(self._listener.address,))
        process.start()
        link = Link(self, self._listener.accept(), process)
        link.connection.send((self._packed, code(self._experiment.algorithm)))
        link.identity = link.connection.recv()
        self._links.append(link)
        self._idle.append(link)

    def _begin(self, jobs):
        self._number += 1
        self._shared = common(jobs)

    def _ready(self, busy):
        found = wait([link.connection for link in busy])
        return [link for link in busy if link.connection in found]

    def _lost(self, link):
        link.process.join()
        link.connection.close()
        self._links.remove(link)
        self._add()


class Link:
    def __init__(self, pool, connection, process):
        self.pool, self.connection, self.process = pool, connection, process

    def send(self, job):
        shared = self.pool._shared
        text = dumps(job, shared, {tensor: number for number, tensor in enumerate(shared)})
        try:
            self.connection.send((self.pool._number, [t.detach().numpy() for t in shared.values()], text))
        except OSError:
            raise WorkerDied("worker died (tcp)") from None

    def receive(self):
        try:
            return pickle.loads(self.connection.recv())
        except (EOFError, OSError):
            raise WorkerDied("worker died (tcp)") from None


def work(address):
    """Do jobs until the connection closes. The body of a worker process."""
    import numpy as np

    with Client(address, authkey=KEY) as connection:
        arrays, wanted = connection.recv()
        node = Node([np.frombuffer(a, dtype=np.uint8) for a in arrays], wanted, "cpu")
        connection.send(node.identity())
        while True:
            try:
                connection.send(node.do(*connection.recv()))
            except (EOFError, OSError):
                os._exit(0)
