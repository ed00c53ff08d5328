"""What the simulation of docs/scale.md needs from this machine, measured with pflbench's code; and real rounds."""

import contextlib
import dataclasses
import itertools
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from simulation import Costs, Part, Wire, sizes

import pflbench
from pflbench.core.algorithm import Message, Round, Upload
from pflbench.core.device import CPU, Devices
from pflbench.core.params import State
from pflbench.engine import executors
from pflbench.engine.children import end_children, start_child
from pflbench.engine.executors.base import one_thread
from pflbench.engine.executors.processes import Processes
from pflbench.engine.executors.wire import common, dumps
from pflbench.engine.experiment import Experiment, prepare
from pflbench.engine.work import Evaluate, Train, Work
from pflbench.store.folder import Folder, Writer
from pflbench.store.provenance import machine, versions
from pflbench.store.record import Record
from pflbench.store.states import StateRef, UploadFile, load_state, plain, save_state

SMALL = [16] * 20  # training samples of clients that train one step: the driver has much to do
UNEQUAL = sizes(100, 30, least=8)


class Through(Processes):
    """What the executor ray does, over pipes: states and uploads travel, and the driver alone touches files."""

    remote = True

    def _add(self, number: int) -> None:
        work, self._work = self._work, Work(self._work.experiment, None)
        super()._add(number)
        self._work = work


def noise(train: Sequence[int], classes: int = 10) -> pflbench.Federation:
    """Return clients with `train` samples each, and a third as many for testing, of the size of CIFAR's images."""
    random = np.random.RandomState(0)

    def drawn(n: int) -> tuple[np.ndarray, np.ndarray]:
        return random.randint(0, 256, (n, 3, 32, 32), dtype=np.uint8), random.randint(0, classes, n)

    clients = [(*drawn(n), *drawn(-(-n // 3))) for n in train]
    return pflbench.Federation.from_arrays(clients, classes=classes)


def settings(algo: str, clients: int, epochs: int) -> pflbench.RunSpec:
    return pflbench.RunSpec(
        algo=algo, dataset="synthetic10", clients=clients, join_ratio=1.0, rounds=7, eval_every=7, local_epochs=epochs
    )


def timed(function: Callable[[Any], object], arguments: Iterable[object]) -> float:
    """Return the CPU seconds of the fastest call: other programs may use the machine and its caches meanwhile."""
    seconds = []
    for argument in arguments:
        began = time.thread_time()
        kept = function(argument)
        seconds.append(time.thread_time() - began)
        del kept
    return min(seconds)


def part(content: State, folder: Path, write: Callable[[State, Path], object]) -> Part:
    """Measure what `content` costs when it is sent, and stored by `write`.

    Every call has its own copy: nothing is in a cache of the processor from the call before.
    """
    copies = [plain(pickle.loads(dumps(content))) for _ in range(16)]
    pickled = [dumps(copy) for copy in copies]
    paths = [folder / f"{number}.safetensors" for number in range(16)]
    found = Part(
        len(pickled[0]),
        pickle=timed(dumps, copies),
        unpickle=timed(pickle.loads, pickled),
        write=timed(lambda number: write(copies[number], paths[number]), range(16)),
        fetch=timed(lambda path: dumps(load_state(path)), paths),
    )
    for path in paths:
        path.unlink()
    return found


def write_state(content: State, path: Path) -> StateRef:
    return save_state(content, path.parent, path.name)


def measure(algo: str, classes: int = 10, epochs: int = 5) -> Costs:
    """Measure a method with the CNN."""
    small, large = 32, 128  # training samples of the two clients
    experiment = prepare(settings(algo, 2, epochs), noise((small, large), classes))
    algorithm, round_ = experiment.algorithm, Round(1, (0, 1), experiment.setup)
    server = plain(algorithm.init_server(experiment.setup))
    work = Work(experiment, None).on(CPU)
    state = experiment.init_client()

    def training(client: int) -> Train:
        return Train(1, client, Message(plain(algorithm.broadcast(round_, server, client).content)), state)

    with one_thread(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first = work(training(0))
        state, sent = first.state, first.upload
        short, long = (timed(work, [training(client)] * 3) for client in (0, 1))
        step = (long - short) / (epochs * (large - small) / 16)
        served = Message(plain(algorithm.serve(round_, server, 0).content))
        whole = server["model"] if server["model"].keys() == experiment.setup.model.keys() else None
        tests = [timed(work, [Evaluate(1, client, served, state, whole)] * 3) for client in (0, 1)]
        samples = [len(client.test) for client in experiment.federation.clients]
        sample = (tests[1] - tests[0]) / (samples[1] - samples[0])
        uploads = [
            Upload(UploadFile.write(sent.content, folder / f"upload-{i}.safetensors"), sent.weight, i % 2)
            for i in range(20)
        ]
        algorithm.aggregate(round_, server, uploads)  # as in a driver after its first round: memory is allocated
        return Costs(
            broadcast=part(training(0).received.content, folder, write_state),
            state=part(state, folder, write_state),
            upload=part(sent.content, folder, UploadFile.write),
            prepare=timed(lambda n: common([training(0) for _ in range(n)]), [200] * 3) / 200,
            add=timed(lambda sent: algorithm.aggregate(round_, server, sent), [uploads] * 3) / 20,
            checkpoint=checkpoint(experiment, state, sent.content, folder),
            fixed=max(0.0, short - step * epochs * small / 16),
            step=step,
            test=max(0.0, tests[0] - samples[0] * sample),
            sample=sample,
        )


def checkpoint(experiment: Experiment, state: State, content: State, folder: Path) -> float:
    """Return the seconds of a checkpoint for each participant: it deletes the files that are no longer needed."""
    record = Record(experiment.id, experiment.spec, versions=versions(), machine=machine("serial", {"workers": 1}))
    record.server = experiment.algorithm.init_server(experiment.setup)
    writer = Writer(Folder(folder / "runs"), record)
    writer.start(experiment.init_client(), print)
    seconds: dict[int, list[float]] = {0: [], 30: []}
    for number in range(1, 13):
        clients = 30 if number > 6 else 0
        for client in range(clients):
            ref = save_state(state, writer.states, f"{client:06}-{number:06}.safetensors")
            UploadFile.write(content, writer.states / f"upload-{client:06}-0.safetensors")
            record.client_states.changed[client] = StateRef(ref.file, ref.sha256)
        record.rounds.append({"round": number})
        began = time.thread_time()
        writer.checkpoint()
        seconds[clients].append(time.thread_time() - began)
    return max(0.0, min(seconds[30]) - min(seconds[0])) / 30


def _echo(connection: Connection) -> None:
    while True:
        connection.send_bytes(bytes(int(connection.recv_bytes())))


def pipe() -> Wire:
    """Measure what a message through a pipe costs this process."""
    connection, process = start_child(_echo, daemon=True)

    def answer(nbytes: int) -> None:
        connection.send_bytes(str(nbytes).encode())
        connection.recv_bytes()

    short = timed(answer, [300] * 1000)
    byte = (timed(answer, [3_500_000] * 30) - short) / 3_500_000
    end_children([(connection, process)])
    return Wire(short / 2, byte)


class Clock(pflbench.Observer):
    """Notes, at the end of every round, the time and the CPU seconds of this process and its workers (Linux)."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def round(self, row: dict) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        nanoseconds = [int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in children]
        self.times.append((time.perf_counter(), time.process_time() + sum(nanoseconds) / 1e9))


def real(algo: str, executor: str, workers: int, train: Sequence[int]) -> dict:
    """Return the seconds of the fastest round from the second round on, without evaluation, and its least CPU time."""
    clock = Clock()
    spec = settings(algo, len(train), 1)
    through = mock.patch.object(executors, "make", lambda _, how, notice: Through(how.workers, Devices(), notice))
    with tempfile.TemporaryDirectory() as out, through if executor == "through" else contextlib.nullcontext():
        pflbench.run(spec, noise(train), workers=workers, out=out, observers=[clock])
    seconds, cpu = (min(b - a for a, b in itertools.pairwise(column)) for column in zip(*clock.times, strict=True))
    case = {"algo": algo, "executor": executor, "workers": workers, "train": list(train)}
    return {**case, "seconds": seconds, "cpu": cpu}


CASES = [
    ("fedavg", "processes", 1, SMALL),
    ("fedavg", "through", 1, SMALL),
    ("fedas", "processes", 1, SMALL),
    ("fedas", "through", 1, SMALL),
    ("fedavg", "processes", 1, UNEQUAL),
    ("fedavg", "processes", 2, UNEQUAL),
    ("fedavg", "through", 2, UNEQUAL),
]


def least(a: Any, b: Any) -> Any:
    """Return a tree with the lesser one of the two numbers at each leaf: other programs only make things slower."""
    if isinstance(a, dict):
        return {key: least(a[key], b[key]) for key in a}
    if isinstance(a, list):
        return [least(x, y) for x, y in zip(a, b, strict=True)]
    return min(a, b)


def measure_all(methods: Sequence[str]) -> dict:
    """Return all that the tables need from this machine."""
    return {
        "pipe": dataclasses.asdict(pipe()),
        "costs": {str(n): {algo: dataclasses.asdict(measure(algo, n)) for algo in methods} for n in (10, 100)},
        "one_epoch": {algo: dataclasses.asdict(measure(algo, epochs=1)) for algo in ("fedavg", "fedas")},
        "rounds": [real(*case) for case in CASES],
    }
