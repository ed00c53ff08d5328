"""The parts of training: batches, losses, SGD and its settings."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pflbench.core.models import Net
from pflbench.core.params import Params

TRAIN = "train"
"""The stream whose losses are the round's training loss in the record."""


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """A batch: samples `x` as the network takes them, labels `y` [n], and `index` [n], their rows in the client's data.

    `stream` names the pass over the data to which the batch belongs.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    stream: str

    def __len__(self) -> int:
        return len(self.y)


Loss = Callable[[Net, Batch], Tensor]
"""(net, batch) -> the loss of the batch, a scalar."""
Transform = Callable[[Params, Params], Params]
"""(gradients, parameters) -> the gradients that the step uses."""
Direction = Callable[..., Params]
"""(parameters, batch, ...) -> what a step subtracts, by name."""


def cross_entropy(net: Net, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    return F.cross_entropy(net(batch.x), batch.y, reduction="none").mean()


def proximal(to: Params, weight: float) -> Transform:
    """Return the transform that adds the gradient of `weight` / 2 ||w - `to`||^2: a pull towards `to`."""
    return lambda grads, now: {name: grad + weight * (now[name] - to[name]) for name, grad in grads.items()}


@dataclasses.dataclass(frozen=True)
class SGD:
    """How a client trains: `epochs` over its data in batches of `batch_size`, each in a new random order if `shuffle`.

    `drop_last` drops an incomplete last batch, unless it is the only one.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    shuffle: bool = True
    drop_last: bool = False

    def samples(self, n: int) -> int:
        """Return how many of `n` samples an epoch uses."""
        return n // self.batch_size * self.batch_size if self.drop_last and n >= self.batch_size else n

    def steps(self, n: int) -> int:
        """Return how many steps training takes on `n` samples."""
        return self.epochs * math.ceil(self.samples(n) / self.batch_size)

    def order(self, n: int, random: np.random.RandomState) -> Iterator[Tensor]:
        """Yield the rows of every batch."""
        for _ in range(self.epochs):
            rows = torch.from_numpy(random.permutation(n)) if self.shuffle else torch.arange(n)
            yield from torch.split(rows[: self.samples(n)], self.batch_size)


class Optimiser:
    """SGD with momentum and weight decay: the same bits as `torch.optim.SGD`.

    The first use of `torch.optim` would import torch's compiler, which takes seconds.
    """

    def __init__(self, settings: SGD) -> None:
        self._momentum = settings.momentum
        self._decay = settings.weight_decay
        self._lr = settings.lr
        self._velocity: list[Tensor] = []
        self._names: list[str] = []

    def direction(self, grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the direction of a step, which subtracts lr times it. It is valid until the next call."""
        if self._decay:
            grads = [g.add(p, alpha=self._decay) for g, p in zip(grads, parameters, strict=True)]
        if self._momentum and not self._velocity:
            grads = self._velocity = [g.clone() for g in grads]
        elif self._momentum:
            grads = [v.mul_(self._momentum).add_(g) for v, g in zip(self._velocity, grads, strict=True)]
        return grads

    def step(self, grads: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        """Update `parameters` by a step, in place."""
        for p, g in zip(parameters, self.direction(grads, parameters), strict=True):
            p.add_(g, alpha=-self._lr)

    def stepped(self, grads: Params, now: Params) -> Params:
        """Return the parameters of `grads` after a step."""
        self._names = self._names or list(grads)
        by = self.direction([grads[name] for name in self._names], [now[name] for name in self._names])
        return {name: now[name].sub(d, alpha=self._lr) for name, d in zip(self._names, by, strict=True)}


@dataclasses.dataclass
class Counts:
    """A client's work: steps of SGD, samples in passes through the body, and the losses of training."""

    steps: int = 0
    forward: int = 0
    backward: int = 0
    loss_sum: float = 0.0
    samples: int = 0


def finite(values: Iterable[Tensor]) -> bool:
    """Return whether all numbers in `values` are finite."""
    found = [t.isfinite().all() for t in values]
    return not found or bool(torch.stack(found).all())
