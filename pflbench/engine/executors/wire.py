"""How processes send jobs and results to each other."""

import io
import pickle
from collections import Counter
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from pflbench.core.params import tensors
from pflbench.engine.work import Evaluate, Job


def common(jobs: Sequence[Job]) -> dict[int, Tensor]:
    """Return, by their ids, the tensors that several jobs carry, such as those of the global model."""

    def carried(job: Job) -> dict[int, Tensor]:
        model = job.global_model if isinstance(job, Evaluate) else None
        return {id(t): t for t in tensors({"received": job.received.content, "global": model or {}})}

    found: dict[int, Tensor] = {}
    count: Counter[int] = Counter()
    for job in jobs:
        found |= (here := carried(job))
        count.update(here.keys())
    return {number: tensor for number, tensor in found.items() if count[number] > 1}


class Pickler(pickle.Pickler):
    """Sends tensors by value through the pipe, not as shared-memory files: a system limits the number of these files.

    A worker gets a tensor whose id is in `shared` only once: `sent` has, by id, the numbers of the tensors that this
    worker has already. These tensors must stay alive meanwhile.
    """

    def __init__(self, stream: io.BytesIO, shared: Container[int], sent: dict[int, int]) -> None:
        super().__init__(stream, protocol=5)
        self._shared = shared
        self._sent = sent

    def persistent_id(self, obj: Any) -> Any:
        """Return what is sent for a shared tensor: its number, and its values the first time."""
        if id(obj) not in self._shared or type(obj) is not torch.Tensor:
            return None
        if id(obj) in self._sent:
            return self._sent[id(obj)]
        self._sent[id(obj)] = len(self._sent)
        return len(self._sent) - 1, obj.detach().numpy()

    def reducer_override(self, obj: Any) -> Any:
        """Return how a tensor is rebuilt."""
        if type(obj) is torch.Tensor:
            return torch.from_numpy, (obj.detach().numpy(),)
        return NotImplemented


class Unpickler(pickle.Unpickler):
    """Reads what `Pickler` wrote; `received` has the tensors of this round, by number."""

    def __init__(self, stream: io.BytesIO, received: list[torch.Tensor]) -> None:
        super().__init__(stream)
        self._received = received

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """Return the shared tensor for which `pid` was sent."""
        if isinstance(pid, int):
            return self._received[pid]
        number, array = pid
        del self._received[number:]  # a new round's numbers begin at 0 again
        tensor: torch.Tensor = torch.from_numpy(array)
        self._received.append(tensor)
        return tensor


def dumps(value: Any, shared: Container[int] = (), sent: dict[int, int] | None = None) -> bytes:
    """Return a value, pickled; see `Pickler`."""
    stream = io.BytesIO()
    Pickler(stream, shared, {} if sent is None else sent).dump(value)
    return stream.getvalue()
