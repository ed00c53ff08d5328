"""A worker on another machine: it gets the run's work once, and then jobs with everything that they need."""

import hashlib
import inspect
import io
import pickle
import platform
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pflbench.core.algorithm import Algorithm
from pflbench.core.device import TYPES
from pflbench.engine.executors.wire import Unpickler
from pflbench.engine.executors.worker import outcome
from pflbench.engine.work import Work
from pflbench.errors import UsageError
from pflbench.store.provenance import processor, source_fingerprint, versions


def packed(work: Work, pickler: type[pickle.Pickler]) -> list[np.ndarray[Any, Any]]:
    """Return `work` as arrays, the pickled object first. `pickler` may pickle classes by value, such as a script's."""

    class Pickler(pickler):  # type: ignore[misc, valid-type]
        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is Tensor:
                return _tensor, (obj.detach().numpy(),)
            return super().reducer_override(obj) if hasattr(pickler, "reducer_override") else NotImplemented

    stream = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(work)
    arrays = [np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in buffers]
    return [np.frombuffer(stream.getvalue(), dtype=np.uint8), *arrays]


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor. Images stay in the memory that all workers of a node share, which cannot be written to."""
    if array.dtype.kind == "f" and not array.flags.writeable:
        array = array.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that it must not be written to
        return torch.from_numpy(array)


def sources(algorithm: Algorithm) -> dict[str, str]:
    """Return the fingerprints of the source of pflbench and of the method's modules, which a node must have, too.

    A class of a script or a function travels with the work.
    """
    found = {"pflbench": source_fingerprint(Algorithm())}
    for cls in type(algorithm).__mro__[:-1]:
        if cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__:
            text = inspect.getsource(sys.modules[cls.__module__])
            found[cls.__module__] = hashlib.sha256(text.encode()).hexdigest()
    return found


class Node:
    """Does the jobs of one run, in its own process on any machine.

    `arrays` are what `packed` returned; `wanted` has the versions that the run has at home. Raises `UsageError` when
    this machine has others, or has no such device; `ModuleNotFoundError` when a package is missing.
    """

    def __init__(self, arrays: Sequence[np.ndarray[Any, Any]], wanted: Mapping[str, str], device: str) -> None:
        here, there = versions(), dict(wanted)
        for name in sorted({*here, *there}):
            if here.get(name) != there.get(name):
                raise UsageError(f"{name} {here.get(name, 'absent')} and not {there.get(name, 'absent')}")
        torch.set_num_threads(1)
        self._devices = TYPES[device]()
        at = self._devices.of(0)
        self._exact = at.exact()
        self._exact.__enter__()
        work: Work = pickle.loads(arrays[0].tobytes(), buffers=[array.data for array in arrays[1:]])  # noqa: S301
        self._work = work.on(at)
        self._round = -1
        self._received: list[Tensor] = []

    def identity(self) -> dict[str, Any]:
        """Return what this worker is: its sources, its processor and devices, and the digest of a probe."""
        return {
            "sources": sources(self._work.experiment.algorithm),
            "processor": processor(),
            "devices": self._devices,
            "probe": self._work.probe(),
        }

    def do(self, number: int, common: Sequence[np.ndarray[Any, Any]], job: bytes) -> bytes:
        """Return the pickled result of a pickled job. `common` are the tensors that the jobs of `number` share."""
        if number != self._round:
            self._round, self._received = number, [torch.from_numpy(array.copy()) for array in common]
        return outcome(self._work, Unpickler(io.BytesIO(job), self._received).load())


def host() -> str:
    """Return this machine's name."""
    return platform.node()
