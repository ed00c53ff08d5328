"""A worker on another machine: it gets the run's work once, and then jobs with everything that they need."""

import hashlib
import importlib
import inspect
import io
import pickle
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

Arrays = Sequence[np.ndarray[Any, Any]]


def packed(value: Any, pickler: type[pickle.Pickler]) -> list[np.ndarray[Any, Any]]:
    """Return `value` as arrays, the pickled object first. `pickler` may pickle classes by value, such as a script's."""

    class Pickler(pickler):  # type: ignore[misc, valid-type]
        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is Tensor:
                return _tensor, (obj.detach().numpy(),)
            return super().reducer_override(obj) if hasattr(pickler, "reducer_override") else NotImplemented

    stream = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    Pickler(stream, protocol=5, buffer_callback=buffers.append).dump(value)
    arrays = [np.frombuffer(buffer.raw(), dtype=np.uint8) for buffer in buffers]
    return [np.frombuffer(stream.getvalue(), dtype=np.uint8), *arrays]


def unpacked(arrays: Arrays) -> Any:
    """Return the value that was `packed`."""
    return pickle.loads(arrays[0].tobytes(), buffers=[array.data for array in arrays[1:]])  # noqa: S301


def _tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor. Images stay in the memory that all workers of a node share, which cannot be written to."""
    if array.dtype.kind == "f" and not array.flags.writeable:
        array = array.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that it must not be written to
        return torch.from_numpy(array)


_SOURCE = "source of "


def code(algorithm: Algorithm) -> dict[str, str]:
    """Return what a node must have, too: the versions of packages, and the fingerprints of the method's sources.

    A class of a script or a function is sent to the node, so its source is not among them.
    """
    local = ("__main__" if "<locals>" in cls.__qualname__ else cls.__module__ for cls in type(algorithm).__mro__[:-1])
    return {**versions(), **{f"{_SOURCE}{name}": _source(name) for name in ("pflbench", *local) if name != "__main__"}}


def _source(module: str) -> str:
    """Return the fingerprint of the source of a module, or of all of pflbench that computes runs."""
    if module == "pflbench":
        return source_fingerprint(Algorithm())
    return hashlib.sha256(inspect.getsource(importlib.import_module(module)).encode()).hexdigest()


def agree(wanted: Mapping[str, str]) -> None:
    """Raise `UsageError` when this node's code is not the `wanted` one; `ModuleNotFoundError` if a part is missing."""
    here = versions()
    for name in sorted({*here, *wanted}, key=lambda name: (name.startswith(_SOURCE), name)):
        if name.startswith(_SOURCE):
            here[name] = _source(name.removeprefix(_SOURCE))
        if here.get(name) != wanted.get(name):
            if name.startswith(_SOURCE):
                raise UsageError(f"another {name}; install the same version there")
            found = f"{here.get(name, 'absent')} and not {wanted.get(name, 'absent')}"
            raise UsageError(f"{name} {found}; install the same version there")


class Node:
    """Does the jobs of one run, in its own process on any machine.

    `arrays` is the packed work; `wanted` is the `code` at home. Raises `UsageError` when this machine has other code,
    or has no such device; `ModuleNotFoundError` when a package is missing.
    """

    def __init__(self, arrays: Arrays, wanted: Mapping[str, str], device: str) -> None:
        agree(wanted)
        torch.set_num_threads(1)
        self._devices = TYPES[device]()
        at = self._devices.of(0)
        self._exact = at.exact()  # for the life of this process
        self._exact.__enter__()
        work: Work = unpacked(arrays)
        self._work = work.on(at)
        self._round = -1
        self._received: list[Tensor] = []

    def identity(self) -> dict[str, Any]:
        """Return what this worker is: its processor and devices, and the digest of a probe (`Work.probe`)."""
        return {"processor": processor(), "devices": self._devices, "probe": self._work.probe()}

    def do(self, number: int, common: Arrays, job: bytes) -> bytes:
        """Return the pickled result of a pickled job. `common` are the tensors that the jobs of `number` share."""
        if number != self._round:
            self._round, self._received = number, [torch.from_numpy(array.copy()) for array in common]
        return outcome(self._work, Unpickler(io.BytesIO(job), self._received).load())
