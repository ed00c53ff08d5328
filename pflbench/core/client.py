"""A client in a round: its data, and the functions that methods call to train on it.

All training loops of pflbench are in this module.
"""

import contextlib
import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pflbench.core import params
from pflbench.core.device import Replica, chunks, numbers, plain
from pflbench.core.models import Net
from pflbench.core.params import Params
from pflbench.core.training import (
    SGD,
    TRAIN,
    Batch,
    Counts,
    Direction,
    Loss,
    Optimiser,
    Transform,
    cross_entropy,
    finite,
)
from pflbench.errors import Diverged, MethodError
from pflbench.federation import Split
from pflbench.rng import rng

if TYPE_CHECKING:
    from pflbench.core.algorithm import Setup


class Client:
    """One client in one round.

    `id` is its number, `n` the number of its training samples, `y` their labels [n], `setup` is what server and clients
    know of the federation, `protocol` is how clients train in this round. Functions take and return parameters. The
    client stores nothing between calls except `counts`, the work so far, and `trained`, the network that `sgd` or
    `descend` returned last: the client's own model (`RunSpec.tested`). It is empty before.

    Every draw is keyed by (seed, stream, round, client). A `stream` names a pass over the data: with the same stream,
    every method gets the same batches.
    """

    def __init__(
        self, replica: Replica, train: Split, setup: "Setup", protocol: SGD, *, seed: int, key: tuple[int, ...]
    ) -> None:
        """`key` has the round and the client, and the number of the exchange from the second exchange on."""
        self._replica = replica
        self._x = train.x
        self._seed = seed
        self._key = key
        self._passes: Counter[str] = Counter()
        self.id = key[1]
        self.setup = setup
        self.protocol = protocol
        self.y = train.y
        self.n = len(train)
        self._counts = Counts()
        self._losses: list[tuple[Tensor, int]] = []  # of batches, with their samples: not yet in the counts
        self.trained: Params = {}
        # The user's network may draw random numbers, for example for dropout.
        torch.manual_seed(int(rng(seed, "torch", *key).randint(2**31)))

    @property
    def counts(self) -> Counts:
        """The work so far. Reading it waits for the device."""
        for value, (_, samples) in zip(numbers([value for value, _ in self._losses]), self._losses, strict=True):
            self._counts.loss_sum += value * samples
        self._losses.clear()
        return self._counts

    @overload
    def sgd(
        self, start: Params, *, loss: Loss = ..., trainable: Collection[str] | None = ...,
        transform: Transform | None = ..., config: SGD | None = ..., stream: str = ...,
    ) -> Params: ...  # fmt: skip

    @overload
    def sgd(
        self, start: Params, *, extra: Params, loss: Loss = ..., trainable: Collection[str] | None = ...,
        transform: Transform | None = ..., config: SGD | None = ..., stream: str = ...,
    ) -> tuple[Params, Params]: ...  # fmt: skip

    def sgd(
        self,
        start: Params,
        *,
        extra: Params | None = None,
        loss: Loss = cross_entropy,
        trainable: Collection[str] | None = None,
        transform: Transform | None = None,
        config: SGD | None = None,
        stream: str = TRAIN,
    ) -> Params | tuple[Params, Params]:
        """Return `start` after SGD on the client's training data.

        `config` is by default the protocol. `loss(net, batch)` returns the scalar to minimise. `trainable` has the
        names of the parameters and buffers that change, by default all. `transform(gradients, parameters)` returns the
        gradients that the step uses; `proximal` returns such a transform. `extra` has tensors that are trained together
        with the network: the loss reads them from `net.extra`, and the trained tensors are returned as a second value.

        Raises `Diverged` when the loss or a parameter is not finite, `MethodError` when the loss is not a scalar or
        `trainable` has a name that is not in `start`.
        """
        config = config or self.protocol
        if unknown := [name for name in trainable or () if name not in start]:
            raise MethodError(f"trainable: the model has no parameter {unknown[0]!r}; it has {', '.join(start)}")
        net = self._replica.load(start)
        self._replica.loaded = {}
        net.extra = {name: t.clone() for name, t in (extra or {}).items()}
        chosen = {name: p for name, p in net.named_parameters() if trainable is None or name in trainable}
        for name, p in net.named_parameters():
            p.requires_grad_(name in chosen)
        for t in net.extra.values():
            t.requires_grad_()
        if not chosen and not net.extra:
            self._note_trained(start)
            return start if extra is None else (start, extra)
        leaves = [*chosen.values(), *net.extra.values()]
        parameters = [p.detach() for p in leaves]
        optimiser = Optimiser(config)
        net.train()
        x, step_net = self._x, net
        if loss is cross_entropy and all(map(params.in_head, chosen)) and plain(net.body):
            # The body is frozen and plain, so its features are the same in every epoch.
            x, step_net = self._features(net), Net(nn.Identity(), net.head)
        losses: list[Tensor] = []
        samples = 0
        with self._counted(net):
            for index in self._order(config, stream):
                batch = self._batch(x, index, stream)
                with self._replica.forward():
                    value = loss(step_net, batch)
                self._check_scalar(value)
                grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
                if transform is not None:
                    named = dict(zip(chosen, grads, strict=False))
                    used = transform(named, dict(zip(chosen, parameters, strict=False)))
                    grads = (*(used[name] for name in chosen), *grads[len(chosen) :])
                optimiser.step(grads, parameters)
                losses.append(value.detach() * len(batch))
                samples += len(batch)
                self._counts.steps += 1
        total = float(sum(numbers(losses)))
        if not math.isfinite(total):
            raise Diverged(f"client {self.id}: the loss ({stream}) is {total}; lower lr")
        if stream == TRAIN:
            self.counts.loss_sum += total
            self._counts.samples += samples
        done = params.read(net)
        trained = {name: t.detach() for name, t in net.extra.items()}
        self._check_finite({**done, **trained}, stream)
        if trainable is not None:
            done = {name: t if name in trainable else start[name] for name, t in done.items()}
        self._note_trained(done)
        return done if extra is None else (done, trained)

    def descend(
        self,
        start: Params,
        direction: Direction,
        *,
        batches: int = 1,
        config: SGD | None = None,
        stream: str = TRAIN,
    ) -> Params:
        """Return `start` after steps w - lr * `direction`(w, batch, ...), for methods without a plain gradient step.

        `direction` gets the parameters and the next `batches` batches, and returns what is subtracted, by name. It
        computes its gradients with `grad(..., train_mode=True)`. Momentum and weight decay treat it as a gradient.

        A step uses `batches` batches; leftover batches are dropped. A client with fewer batches than one step needs
        repeats its data. Running statistics are those of the last gradient. Raises `Diverged` when the parameters are
        not finite.
        """
        config = config or self.protocol
        least = math.ceil(batches / max(dataclasses.replace(config, epochs=1).steps(self.n), 1))
        config = dataclasses.replace(config, epochs=max(config.epochs, least) if config.epochs else 0)
        optimiser = Optimiser(config)
        now = start
        for indices in zip(*[iter(self._order(config, stream))] * batches, strict=False):
            drawn = [self._batch(self._x, index, stream) for index in indices]
            change = direction(now, *drawn)
            buffers = {name: t for name, t in self._replica.statistics().items() if name in now}
            now = now | buffers | optimiser.stepped(change, now)
            self._counts.steps += 1
        self._check_finite(now, stream)
        self._note_trained(now)
        return now

    def batches(self, *, stream: str, config: SGD | None = None) -> Iterator[Batch]:
        """Yield the training data once, in batches. `config`, by default the protocol, gives their size and order."""
        once = dataclasses.replace(config or self.protocol, epochs=1)
        for index in self._order(once, stream):
            yield self._batch(self._x, index, stream)

    def grad(
        self,
        at: Params,
        batch: Batch,
        *,
        loss: Loss = cross_entropy,
        trainable: Collection[str] | None = None,
        train_mode: bool = False,
        exact: bool = False,
    ) -> Params:
        """Return the gradient of the `loss` of one batch at parameters `at`, in evaluation mode unless `train_mode`.

        `trainable` has the names of the parameters of the gradient, by default all. With `exact` nothing is computed in
        bf16. In training mode, the loss of a batch of the stream "train" is part of the training loss.
        """
        net = self._replica.load(at).train(train_mode)
        named = {name: p for name, p in net.named_parameters() if trainable is None or name in trainable}
        for name, p in net.named_parameters():
            p.requires_grad_(name in named)
        with self._counted(net), contextlib.nullcontext() if exact else self._replica.forward():
            # A first layer may work in place, and the batch may be used again.
            value = loss(net, dataclasses.replace(batch, x=batch.x.clone()))
        self._check_scalar(value)
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
        if train_mode and batch.stream == TRAIN:
            self._losses.append((value.detach(), len(batch)))
            self._counts.samples += len(batch)
        return dict(zip(named, grads, strict=True))

    def features(self, model: Params) -> Tensor:
        """Return the features [n, d] of all training samples, in their stored order, in evaluation mode."""
        return self._features(self._replica.load(model).eval())

    def loss(self, model: Params) -> float:
        """Return the mean cross-entropy of the training samples under `model`, in evaluation mode.

        Raises `MethodError` when there are no samples.
        """
        if not self.n:
            raise MethodError(f"client {self.id}: a loss needs samples, but this part of the client has none")
        net = self._replica.load(model).eval()
        sums: list[Tensor] = []
        with self._counted(net), torch.no_grad(), self._replica.forward():
            for rows in chunks(self.n):
                logits = net(self._replica.batch(self._x, rows))
                sums.append(F.cross_entropy(logits, self.y[rows], reduction="none").sum())
        return float(sum(numbers(sums))) / self.n

    def part(self, share: float, *, stream: str, every_round: bool = True) -> "tuple[Client, Client]":
        """Return this client with a random `share` of its samples (rounded up), and this client with the other samples.

        The samples are drawn in every round, or once for all rounds. Each `stream` has an independent draw. The work of
        both parts is counted in this client's `counts`.
        """
        key = self._key if every_round else (self.id,)
        order = torch.from_numpy(rng(self._seed, "parts", stream, *key).permutation(self.n))
        cut = math.ceil(share * self.n)
        return self._subset(order[:cut].sort().values), self._subset(order[cut:].sort().values)

    def rng(self, *key: str | int) -> np.random.RandomState:
        """Return a generator of this round and client, for a method's draws: the same for the same `key`."""
        return rng(self._seed, "random", *key, *self._key)

    def _subset(self, index: Tensor) -> "Client":
        index = self._replica.device.to(index)
        subset = copy.copy(self)
        subset._x, subset.y, subset.n = self._x[index], self.y[index], len(index)
        return subset

    def _note_trained(self, model: Params) -> None:
        """Note that `model` was trained, unless it is no whole network. The parts of a client share `trained`."""
        if model.keys() == self.setup.model.keys():
            self.trained.clear()
            self.trained.update(model)

    def _check_scalar(self, value: Tensor) -> None:
        if not isinstance(value, Tensor) or value.dim():
            what = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"
            raise MethodError(f"client {self.id}: a loss must be a scalar tensor, such as a mean; this one {what}")

    def _check_finite(self, model: Params, stream: str) -> None:
        if not finite(model.values()):
            raise Diverged(f"client {self.id}: the parameters ({stream}) are not finite; lower lr")

    @contextlib.contextmanager
    def _counted(self, net: Net) -> Iterator[None]:
        """Count every sample of every pass through the body of `net`, with any parameters.

        A pass with gradients counts as a backward pass, too.
        """

        def count(_body: nn.Module, _inputs: object, features: Tensor) -> None:
            self._counts.forward += len(features)
            self._counts.backward += len(features) if torch.is_grad_enabled() else 0

        hook = net.body.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()

    def _features(self, net: Net) -> Tensor:
        with self._counted(net), torch.no_grad(), self._replica.forward():
            found = torch.cat([net.body(self._replica.batch(self._x, rows)) for rows in chunks(self.n)])
        return found.to(self._replica.dtype)

    def _batch(self, x: Tensor, index: Tensor, stream: str) -> Batch:
        """Return the batch of the rows `index` of `x`, the client's samples or their features."""
        return Batch(self._replica.batch(x, index), self.y[index], index, stream)

    def _order(self, config: SGD, stream: str) -> Sequence[Tensor]:
        """Return the rows of each batch. Every pass over a stream in a round has another order."""
        generator = rng(self._seed, "batches", stream, self._passes[stream], *self._key)
        self._passes[stream] += 1
        rows = list(config.order(self.n, generator))
        # One copy to the device for all batches: a copy for each would wait for the device in every step.
        return torch.split(self._replica.device.to(torch.cat(rows)), [len(r) for r in rows]) if rows else ()


def class_counts(client: Client) -> Tensor:
    """Return the client's number of training samples of each class [classes]."""
    return client.y.bincount(minlength=client.setup.classes)


def class_means(client: Client, features: Tensor) -> Tensor:
    """Return the mean of the client's `features` [n, d] in each class [classes, d], zeros where it has no samples."""
    sums = features.new_zeros(client.setup.classes, features.shape[1]).index_add_(0, client.y, features)
    return sums / class_counts(client).clamp(min=1)[:, None]


def prototypes(client: Client, model: Params) -> Tensor:
    """Return the mean feature of the training samples of each class [classes, d], zeros for a class without samples.

    Features are computed in evaluation mode.
    """
    return class_means(client, client.features(model))
