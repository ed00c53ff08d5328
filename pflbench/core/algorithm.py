"""What a method is: pure functions over server state, client state and the messages between them.

An instance holds its hyperparameters and nothing else. Inputs are values: no function changes what it is given.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pflbench import settings
from pflbench.core import params
from pflbench.core.params import Params, State, merge

if TYPE_CHECKING:
    from pflbench.core.client import Local

__all__ = ["Algorithm", "Message", "Params", "State", "merge"]


@dataclasses.dataclass(frozen=True)
class Message:
    """What crosses the network: parameters by part and name, and the sender's weight in the aggregation.

    `sender` is the client's number in uploads as the server gets them, written there by the harness.
    """

    tensors: Mapping[str, Params]
    weight: float = 1.0
    sender: int | None = None

    def __getitem__(self, part: str) -> Params:
        return self.tensors[part]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors: the communication cost. The weight, one number, is not counted."""
        return params.nbytes(self.tensors.values())


class Algorithm:
    """Base of all methods.

    The server has one model, less what is personal; a client keeps what is personal. A method overrides what its paper
    changes. Docstrings of methods have the lines `Paper:`, `Personal:`, `Evaluated:` and, where there are any,
    `Deviations:`; `pflbench describe` shows them.
    """

    name: ClassVar[str]  # set by `register`

    @dataclasses.dataclass(frozen=True)
    class Hyper:
        """Hyperparameters: fields made by `pflbench.settings.setting`."""

    sequential: bool = False
    """True when the clients of a round depend on each other: they are then computed one by one, and `relay` is called
    after each."""
    tested_alone: bool = False
    """True when the evaluated model comes from the client's state alone: for a test it is sent an empty message."""

    def __init__(self, **hyperparameters: Any) -> None:
        self.h: Any = settings.build(type(self).Hyper, hyperparameters, f"hyperparameter of {self.name}")

    def is_personal(self, name: str) -> bool:  # noqa: ARG002
        """Return whether the parameter (or buffer) `name` never leaves its client."""
        return False

    def is_shared(self, name: str) -> bool:
        """Return the opposite of `is_personal`."""
        return not self.is_personal(name)

    def personal(self, model: Params) -> Params:
        """Return the parameters of `model` that are personal: those of which `is_personal` is true.

        Overridden where the name alone does not tell.
        """
        return {name: t for name, t in model.items() if self.is_personal(name)}

    def shared(self, model: Params) -> Params:
        """Return the parameters of `model` that are shared: all that are not in `personal(model)`."""
        own = self.personal(model)
        return {name: t for name, t in model.items() if name not in own}

    def init_server(self, model: Params) -> State:
        """Return the server's first state, from the initial `model`."""
        return {"model": self.shared(model)}

    def init_client(self, model: Params) -> State:
        """Return a client's first state, from the initial `model`, which is the same for all clients."""
        return {"model": self.personal(model)}

    def broadcast(self, server: State, client: int) -> Message:  # noqa: ARG002
        """Return what the server sends to `client`."""
        return Message({"model": server["model"]})

    def local_update(self, local: "Local", down: Message, state: State) -> tuple[Message, State]:
        """Train on the client; return its upload and its new state."""
        raise NotImplementedError

    def aggregate(self, server: State, ups: Sequence[Message]) -> State:
        """Return the new server state from a round's uploads, which come in the order of client numbers."""
        raise NotImplementedError

    def relay(self, server: State, up: Message) -> State:
        """Return the server state for the next client of the same round (only where `sequential` is true)."""
        raise NotImplementedError

    def personalised(self, local: "Local", down: Message, state: State) -> Params:  # noqa: ARG002
        """Return exactly the model that is evaluated for this client.

        By default, the received model, with the parameters that the client keeps as its "model", some or all, in place.
        """
        return merge(down["model"], state.get("model", {}))

    def global_model(self, down: Message) -> Params | None:
        """Return the model that the server could hand to anybody, or None where there is none.

        What lacks some of the model's parameters, because they are personal, is not evaluated as a global model.
        """
        return down["model"]
