"""The interface of methods: pure functions of server state, client state and the messages between them.

An instance holds its hyperparameters and nothing else. Inputs are values: no function changes its inputs.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, where

from pflbench import settings
from pflbench.core import params
from pflbench.core.params import Params, State, average
from pflbench.errors import MethodError, UsageError
from pflbench.rng import rng

if TYPE_CHECKING:
    from pflbench.core.client import Client
    from pflbench.core.device import Replica


class Parts(dict[str, Any]):
    """A state or a message by part. A missing part raises an error that names the existing parts."""

    def __init__(self, parts: Mapping[str, Any], owner: str) -> None:
        super().__init__(parts)
        self._owner = owner

    def __missing__(self, part: str) -> Any:
        raise missing(part, self, self._owner)


def missing(part: str, parts: Iterable[str | int], owner: str) -> MethodError:
    """Return the error for a part that `owner`, such as "the message", does not have."""
    return MethodError(f"{owner} has no part {part!r}; its parts are: {', '.join(map(str, parts)) or 'none'}")


@dataclasses.dataclass(frozen=True)
class Message:
    """What server and clients send each other: a state, and in an upload the client's weight in the aggregation.

    `message["model"]` is a part of the content. Raises `MethodError` for a missing part.
    """

    content: State
    weight: float = 1.0

    def __getitem__(self, part: str) -> Any:
        try:
            return self.content[part]
        except KeyError:
            raise missing(part, self.content, "the message") from None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors and numbers: the communication cost. The weight, one number, is not counted."""
        return params.nbytes(self.content)


@dataclasses.dataclass(frozen=True)
class Upload(Message):
    """A message to the server, and the client that sent it."""

    client: int = -1


@dataclasses.dataclass(frozen=True)
class Setup:
    """What server and clients know before the first round.

    `clients` and `classes` are numbers, `features` is the length of a feature vector (0 if features are not vectors).
    `model` has the common initial parameters and buffers, in the network's order; `buffers` has the names of the
    buffers, which have no gradient.
    """

    clients: int
    classes: int
    features: int
    model: Params = dataclasses.field(repr=False)
    buffers: frozenset[str] = frozenset()
    seed: int = 0
    draw: Callable[[int], Params] | None = dataclasses.field(default=None, repr=False, compare=False)

    def fresh(self, *key: str | int) -> Params:
        """Return other initial parameters, the same for the same `key`. Raises `MethodError` if none can be drawn."""
        if self.draw is None:
            raise MethodError("this network's initial parameters are given; no others can be drawn")
        return self.draw(int(self.rng("fresh", *key).randint(2**31)))

    def rng(self, *key: str | int) -> np.random.RandomState:
        """Return a generator for draws that a method makes once for all rounds: the same for the same `key`."""
        return rng(self.seed, "setup", *key)

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros in the network's number format."""
        return next(iter(self.model.values())).new_zeros(shape)

    def trainable(self, model: Params) -> Params:
        """Return the parameters of `model` that have gradients, in the network's order: all but its buffers."""
        return {name: model[name] for name in self.model if name in model and name not in self.buffers}


@dataclasses.dataclass(frozen=True)
class Round:
    """What the server knows in a round: its number (1, 2, ...), its cohort (the clients that train), and the setup."""

    number: int
    cohort: tuple[int, ...]
    setup: Setup

    def rng(self, *key: str | int) -> np.random.RandomState:
        """Return a generator for the server's draws in this round: the same for the same `key`."""
        return rng(self.setup.seed, "server", self.number, *key)


class Cohort(Protocol):
    """The clients of a round. The engine runs them in parallel, counts bytes, and stores their states."""

    def update(self, server: State, clients: Sequence[int] | None = None) -> list[Upload]:
        """Return the uploads of `clients`, by default of all clients of the cohort, in the order of their numbers.

        Each client receives `Algorithm.broadcast` of the `server` state and computes `Algorithm.local_update`.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """Base of all methods. A method is a frozen dataclass: its fields, made by `setting`, are its hyperparameters.

    By default, the server has the shared parameters of one model, and each client keeps its personal parameters. A
    method overrides what its paper changes. The docstring of a method has the lines `Paper:`, `Personal:`,
    `Evaluated:` and, if it deviates from the paper, `Deviations:`; `pflbench describe` shows them.
    """

    name: ClassVar[str]  # set by `register`

    def __post_init__(self) -> None:
        settings.normalise(self)

    def check(self, setup: Setup) -> None:
        """Raise `UsageError` when the method cannot run in this federation, before anything is computed or written."""

    def personal(self, model: Params) -> Params:
        """Return the parameters of `model` that never leave their client. By default there are none."""
        return {}

    def shared(self, model: Params) -> Params:
        """Return the parameters of `model` that are not personal."""
        personal = self.personal(model)
        return {name: t for name, t in model.items() if name not in personal}

    def init_server(self, setup: Setup) -> State:
        """Return the server's first state."""
        return {"model": self.shared(setup.model)}

    def init_client(self, setup: Setup) -> State:
        """Return a client's first state, which is the same for all clients."""
        return {"model": self.personal(setup.model)}

    def broadcast(self, round: Round, server: State, client: int) -> Message:
        """Return what the server sends to `client` in a round."""
        return Message({"model": server["model"]})

    def local_update(self, client: "Client", received: Message, state: State) -> tuple[Message, State]:
        """Train on the client; return its upload and its new state."""
        raise MethodError(f"{self.name} does not define local_update, which trains on the client")

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        """Return the new server state from a round's uploads, which come in the order of client numbers."""
        raise MethodError(f"{self.name} does not define aggregate, which returns the server's new state")

    def play(self, round: Round, server: State, cohort: Cohort) -> State:
        """Return the server state after a round.

        Override this when the clients do not all train once and together. Uploads are only valid until this returns.
        """
        return self.aggregate(round, server, cohort.update(server))

    def serve(self, round: Round, server: State, client: int) -> Message:
        """Return what the server sends to `client` for its evaluation: by default, the same as for training."""
        return self.broadcast(round, server, client)

    def personalise(self, client: "Client", received: Message, state: State) -> State:
        """Return exactly what is deployed on this client and evaluated.

        By default, "model" is the received model, completed by the personal parameters in the client's state.
        """
        return {"model": {**received.content.get("model", {}), **state.get("model", {})}}

    def predict(self, net: "Replica", deployed: State, x: Tensor) -> Tensor:
        """Return the logits [n, classes] of `x` that the client computes with what is `deployed`.

        `net(params, x)` gives the network's logits, `net.features(params, x)` its features, in evaluation mode. A class
        that the client rules out has the logit -inf.
        """
        return net(deployed["model"], x)

    def global_model(self, server: State) -> Params | None:
        """Return the global model, or None if there is none.

        If it lacks parameters because they are personal, it is not evaluated.
        """
        return server.get("model")


def need_features(method: Algorithm, setup: Setup) -> None:
    """Raise `UsageError` unless the network's body gives a vector of features for each sample."""
    if not setup.features:
        raise UsageError(f"{method.name}: the network's body must give a vector of features for each sample")


def mean(uploads: Sequence[Upload], part: str, *, equal: bool = False) -> Params:
    """Return the mean of a part of the uploads, weighted by their weights, or with `equal` weights."""
    return average((upload[part] for upload in uploads), [1.0 if equal else upload.weight for upload in uploads])


def merged_prototypes(server: State, uploads: Sequence[Upload]) -> State:
    """Return the server's prototypes after a round: "mean" [classes, d] and "count" [classes], the samples behind it.

    A class's mean feature is the mean of the uploads' "mean", weighted by their "count". A class that no upload has
    stays as it is in `server`.
    """
    mean, count = server["mean"].double(), 0 * server["count"].double()
    for upload in uploads:  # a running mean: a class without uploads keeps its mean
        count = count + upload["count"]
        mean = mean + (upload["mean"] - mean) * (upload["count"] / count.clamp(min=1))[:, None]
    count = where(count > 0, count, server["count"])
    return {"mean": mean.to(server["mean"].dtype), "count": count.to(server["count"].dtype)}
