"""What a method's client code works with. The only training loops of the project are here."""

import contextlib
import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pflbench.core import params
from pflbench.core.models import Net
from pflbench.core.params import Params
from pflbench.errors import Diverged
from pflbench.federation import Split
from pflbench.rng import rng
from pflbench.spec import RunSpec

Loss = Callable[..., Tensor]
"""(net, x, y, *beside) -> the loss of each sample [n]; the harness takes the mean."""
Correct = Callable[[str, Tensor, Tensor], Tensor]
"""(name, gradient, parameter) -> the gradient that is used."""
Batch = tuple[Tensor, Tensor]
"""Samples as the network takes them, and their labels [n]."""

_CHUNK = 128  # samples in a forward pass that needs no gradient
_PLAIN = (nn.Sequential, nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d, nn.Flatten)


def cross_entropy(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each sample [n]."""
    return F.cross_entropy(net(x), y, reduction="none")


def proximal(to: Params, weight: float) -> Correct:
    """Return what adds, for `Local.sgd`, the gradient of `weight` / 2 ||w - `to`||^2: a pull towards `to`."""
    return lambda name, grad, param: grad + weight * (param - to[name])


class _SGD:
    """SGD as `torch.optim.SGD` computes it, bit for bit, whose first use would import torch's compiler for seconds."""

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, momentum: float, weight_decay: float) -> None:
        self._parameters = [p.detach() for p in parameters]
        self._lr, self._momentum, self._weight_decay = lr, momentum, weight_decay
        self._buffers: list[Tensor] = []

    def step(self, grads: Sequence[Tensor]) -> None:
        if self._weight_decay:
            grads = [g.add(p, alpha=self._weight_decay) for g, p in zip(grads, self._parameters, strict=True)]
        if self._momentum and not self._buffers:
            grads = self._buffers = [g.clone() for g in grads]
        elif self._momentum:
            grads = [b.mul_(self._momentum).add_(g) for b, g in zip(self._buffers, grads, strict=True)]
        for p, g in zip(self._parameters, grads, strict=True):
            p.add_(g, alpha=-self._lr)


@dataclasses.dataclass
class Bench:
    """One process's copy of the network, and which parameters it holds: they are loaded only when they differ.

    With `precision` "bf16" what passes forward within `forward()` does so in bfloat16.
    """

    net: Net
    precision: str = "fp32"
    loaded: Params = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.net.to(memory_format=torch.channels_last)
        self.slots = params.slots(self.net)
        self.dtype = next(iter(self.slots.values())).dtype
        self.buffers = {
            n for n, _ in self.net.named_buffers() if n in self.slots
        }  # a network may change them in a test
        # Integers (how many batches a BatchNorm has seen) are nobody's state: they start anew with every load.
        self._counts = [(b, b.clone()) for b in self.net.buffers() if not b.is_floating_point()]

    def forward(self) -> contextlib.AbstractContextManager[object]:
        """Return the context for a forward pass."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", torch.bfloat16)

    def load(self, values: Params) -> Net:
        """Copy `values` into the network and return it."""
        for name, slot in self.slots.items():
            if name in self.buffers or self.loaded.get(name) is not values[name]:
                slot.copy_(values[name])
        for count, first in self._counts:
            count.copy_(first)
        self.loaded = dict(values)
        return self.net

    def batch(self, x: Tensor, index: Tensor | slice) -> Tensor:
        """Return samples `index` of `x` as the network takes them: floating-point, images channels-last."""
        images = x.dim() == 4
        rows = x.permute(0, 2, 3, 1) if images else x
        # A slice is copied: a network's first layer may work in place, and must not get the data itself.
        view = isinstance(index, slice)
        out = (rows[index] if isinstance(index, slice) else rows.index_select(0, index)).to(self.dtype, copy=view)
        if images:
            out = out.permute(0, 3, 1, 2)
        # uint8 0..255 to [-1, 1]: torchvision's ToTensor and Normalize(0.5, 0.5), as in PFLlib.
        return out.mul_(1 / 127.5).sub_(1) if x.dtype == torch.uint8 else out


@dataclasses.dataclass
class Counts:
    """What a client's work was: steps of SGD, samples passed through the body, and the losses of training."""

    steps: int = 0
    forward: int = 0
    backward: int = 0
    loss_sum: float = 0.0
    samples: int = 0


class Local:
    """The toolbox of one client in one round: its training data, and what can be done with them.

    `n` is the number of training samples, `y` their labels [n], `classes` and `clients` how many there are in the
    federation, `lr` the learning rate of this round. Everything random is keyed by (seed, purpose, round, client).
    `counts` has what was done so far.
    """

    def __init__(self, bench: Bench, train: Split, classes: int, spec: RunSpec, *, round: int, client: int) -> None:  # noqa: A002
        self._bench = bench
        self._x = train.x
        self._spec = spec
        self._key = (round, client)
        self._calls: Counter[str] = Counter()
        self.y = train.y
        self.n = len(train)
        self.classes = classes
        self.clients = spec.clients
        self.lr = spec.lr * spec.lr_decay ** (round - 1)
        self.counts = Counts()
        self._descending: str | None = None
        # A network of the user's may draw, for dropout say.
        torch.manual_seed(int(rng(spec.seed_of("order"), "torch", *self._key).randint(2**31)))

    def sgd(
        self,
        start: Params,
        *,
        epochs: int | None = None,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        batch_size: int | None = None,
        only: Callable[[str], bool] | None = None,
        loss: Loss = cross_entropy,
        beside: Sequence[Tensor] = (),
        correct: Correct | None = None,
        purpose: str = "train",
    ) -> Params:
        """Return `start` after `epochs` of SGD on the client's training data.

        What is not given is the protocol's. `only` selects the parameters (and buffers) that change; `loss` gives one
        value per sample; `beside` are tensors with a row for each training sample [n, ...], whose rows of the batch
        the loss gets, too. `correct` returns the gradient that is used: `proximal` makes one. Parameters that `start`
        has beyond the network's are trained with them; the loss finds them in `net.free`, by name, and may write to
        those that `only` leaves out: running statistics of a second network. `purpose` names the stream of batch
        orders: two methods that train for the same purpose see the same batches.
        Raises `Diverged` when the loss is not finite.
        """
        spec = self._spec
        net = self._bench.load(start)
        self._bench.loaded = {}
        net.free = {name: t.clone() for name, t in start.items() if name not in self._bench.slots}
        trainable = (*net.named_parameters(), *net.free.items())
        chosen = {name: p for name, p in trainable if only is None or only(name)}
        for name, p in trainable:
            p.requires_grad_(name in chosen)
        if not chosen:
            return start
        optimiser = _SGD(
            chosen.values(),
            lr=self.lr if lr is None else lr,
            momentum=spec.momentum if momentum is None else momentum,
            weight_decay=spec.weight_decay if weight_decay is None else weight_decay,
        )
        net.train()
        x, step_net = self._x, net
        if loss is cross_entropy and all(map(_in_head, chosen)) and all(type(m) in _PLAIN for m in net.body.modules()):
            # The body is frozen and plain, so its features are the same in every epoch.
            x, step_net = self._features(net), Net(nn.Identity(), net.head)
        total = torch.zeros((), dtype=torch.float64)
        samples = 0
        with self._counted(net):
            for index in self._orders(spec.local_epochs if epochs is None else epochs, batch_size, purpose):
                y = self.y[index]
                with self._bench.forward():
                    value = loss(step_net, self._bench.batch(x, index), y, *(rows[index] for rows in beside)).mean()
                grads = torch.autograd.grad(value, list(chosen.values()), allow_unused=True, materialize_grads=True)
                if correct is not None:
                    named = zip(chosen.items(), grads, strict=True)
                    grads = tuple(correct(name, grad, p.detach()) for (name, p), grad in named)
                optimiser.step(grads)
                total += value.detach() * len(y)
                samples += len(y)
                self.counts.steps += 1
        if not math.isfinite(total):
            raise Diverged(f"client {self._key[1]}: the loss ({purpose}) is {float(total)}; lower lr")
        if purpose == "train":
            self.counts.loss_sum += float(total)
            self.counts.samples += samples
        done = params.read(net) | {name: t.detach() for name, t in net.free.items()}
        if not all(bool(t.isfinite().all()) for t in done.values()):
            raise Diverged(f"client {self._key[1]}: the parameters ({purpose}) are not finite; lower lr")
        if only is None:
            return done
        return {name: done[name] if only(name) or name in net.free else start[name] for name in done}

    def descend(
        self,
        start: Params,
        direction: Callable[..., Params],
        *,
        batches: int = 1,
        epochs: int | None = None,
        lr: float | None = None,
        momentum: float | None = None,
        weight_decay: float | None = None,
        purpose: str = "train",
    ) -> Params:
        """Return `start` after steps w - lr * `direction`(w, batch, ...), for methods whose step is no gradient.

        `direction` gets the parameters and the next `batches` batches (x, y), and returns what is subtracted, by name;
        it takes its gradients with `grad`, in training mode. Momentum and weight decay, the protocol's unless given,
        work on it as on a gradient. The last batches are left out where they are too few for a step; who has too few
        for any step goes through its samples more often. Running statistics are those of the last gradient. The loss in
        the record is the mean of all those at which a gradient was taken, if the purpose is to train. Raises `Diverged`
        when the parameters are not finite.
        """
        rate = self.lr if lr is None else lr
        epochs = self._spec.local_epochs if epochs is None else epochs
        size = self._spec.batch_size
        momentum = self._spec.momentum if momentum is None else momentum
        decay = self._spec.weight_decay if weight_decay is None else weight_decay
        least = math.ceil(batches / math.ceil(self._used(size) / size))
        orders = self._orders(max(epochs, least) if epochs else 0, None, purpose)
        now = start
        speed: Params = {}
        self._descending = purpose
        for indices in zip(*[iter(orders)] * batches, strict=False):
            drawn = [(self._bench.batch(self._x, index), self.y[index]) for index in indices]
            change = direction(now, *drawn)
            if decay:
                change = {name: by.add(now[name], alpha=decay) for name, by in change.items()}
            if momentum:
                change = {name: speed[name].mul(momentum).add(by) if speed else by for name, by in change.items()}
                speed = change
            buffers = {name: self._bench.slots[name].clone() for name in self._bench.buffers if name in now}
            now = now | buffers | {name: now[name].sub(by, alpha=rate) for name, by in change.items()}
            self.counts.steps += 1
        self._descending = None
        if not all(bool(t.isfinite().all()) for t in now.values()):
            raise Diverged(f"client {self._key[1]}: the parameters ({purpose}) are not finite; lower lr")
        return now

    def batches(self, *, batch_size: int | None = None, purpose: str = "read") -> Iterator[Batch]:
        """Yield the training data once, in batches (x, y) of the protocol's size and order unless given."""
        for index in self._orders(1, batch_size, purpose):
            yield self._bench.batch(self._x, index), self.y[index]

    def trainable(self, model: Params) -> Params:
        """Return `model` without the network's buffers, of which there are no gradients, in the network's order."""
        own = (name for name in self._bench.slots if name in model and name not in self._bench.buffers)
        return {name: model[name] for name in own}

    def grad(
        self,
        at: Params,
        x: Tensor,
        y: Tensor,
        loss: Loss = cross_entropy,
        *,
        only: Callable[[str], bool] | None = None,
        exact: bool = False,
    ) -> Params:
        """Return the gradient of the mean `loss` of one batch at parameters `at`, in evaluation mode.

        Within `descend`, in training mode. `only` selects the parameters. With `exact` nothing is computed in bf16.
        """
        net = self._bench.load(at).train(self._descending is not None)
        named = {name: p for name, p in net.named_parameters() if only is None or only(name)}
        for name, p in net.named_parameters():
            p.requires_grad_(name in named)
        with self._counted(net), contextlib.nullcontext() if exact else self._bench.forward():
            value = loss(net, x.clone(), y).mean()  # a first layer may work in place, and the batch may come again
        grads = torch.autograd.grad(value, list(named.values()), allow_unused=True, materialize_grads=True)
        if self._descending == "train":
            self.counts.loss_sum += float(value.detach()) * len(y)
            self.counts.samples += len(y)
        return dict(zip(named, grads, strict=True))

    def features(self, model: Params) -> Tensor:
        """Return the features [n, d] of all training samples, in their stored order, in evaluation mode."""
        return self._features(self._bench.load(model).eval())

    def prototypes(self, model: Params) -> Tensor:
        """Return the mean feature of each class's training samples [classes, d]; zeros for absent classes.

        In evaluation mode.
        """
        features = self.features(model)
        sums = features.new_zeros(self.classes, features.shape[1]).index_add_(0, self.y, features)
        return sums / self.class_counts.clamp(min=1)[:, None]

    @property
    def class_counts(self) -> Tensor:
        """How many training samples there are of each class [classes]."""
        return self.y.bincount(minlength=self.classes)

    def loss(self, model: Params) -> float:
        """Return the mean cross-entropy of the training samples under `model`, in evaluation mode."""
        net = self._bench.load(model).eval()
        total = 0.0
        with self._counted(net), torch.no_grad(), self._bench.forward():
            for part in chunks(self.n):
                total += float(cross_entropy(net, self._bench.batch(self._x, part), self.y[part]).sum())
        return total / self.n

    def parts(self, share: float, *, purpose: str, every_round: bool = True) -> tuple["Local", "Local"]:
        """Return the toolboxes of a random `share` of the samples (rounded up), and of the others.

        They are drawn anew in every round, or once for all; for each `purpose` apart. What they do counts here, too.
        """
        key = self._key if every_round else self._key[1:]
        order = torch.from_numpy(rng(self._spec.seed_of("order"), "parts", purpose, *key).permutation(self.n))
        cut = math.ceil(share * self.n)
        return self._part(order[:cut].sort().values), self._part(order[cut:].sort().values)

    def random(self, purpose: str) -> np.random.RandomState:
        """Return a generator of this round and client, for what a method draws itself: the same for each `purpose`."""
        return rng(self._spec.seed_of("order"), "random", purpose, *self._key)

    def _part(self, index: Tensor) -> "Local":
        part = copy.copy(self)
        part._x, part.y, part.n = self._x[index], self.y[index], len(index)
        return part

    @contextlib.contextmanager
    def _counted(self, net: Net) -> Iterator[None]:
        """Count what passes through the body of `net`, with whichever parameters and however often.

        What passes with gradients passes backward, too.
        """

        def count(_body: nn.Module, _inputs: object, features: Tensor) -> None:
            self.counts.forward += len(features)
            self.counts.backward += len(features) if torch.is_grad_enabled() else 0

        hook = net.body.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()

    def _features(self, net: Net) -> Tensor:
        with self._counted(net), torch.no_grad(), self._bench.forward():
            found = torch.cat([net.body(self._bench.batch(self._x, part)) for part in chunks(self.n)])
        return found.to(self._bench.dtype)

    def _orders(self, epochs: int, batch_size: int | None, purpose: str) -> Iterator[Tensor]:
        """Yield the sample numbers of each batch of `epochs` epochs."""
        size = batch_size or self._spec.batch_size
        generator = rng(self._spec.seed_of("order"), "batches", purpose, self._calls[purpose], *self._key)
        self._calls[purpose] += 1
        for _ in range(epochs):
            order = torch.from_numpy(generator.permutation(self.n)) if self._spec.shuffle else torch.arange(self.n)
            yield from torch.split(order[: self._used(size)], size)

    def _used(self, size: int) -> int:
        """Return how many samples an epoch in batches of `size` uses."""
        return self.n // size * size if self._spec.drop_last and self.n >= size else self.n


def _in_head(name: str) -> bool:
    return name.startswith("head.")


def chunks(n: int) -> Iterator[slice]:
    """Yield slices that cover n samples, for forward passes that need no gradient."""
    return (slice(i, i + _CHUNK) for i in range(0, n, _CHUNK))
