"""Local: every client trains alone; nothing is sent.

Paper: none; the lower bound that federated learning has to beat, "Local" in the tables of PFL papers.
Personal: the whole model.
Evaluated: the client's own model; before its first participation, the initial one.
"""

from collections.abc import Sequence

from pflbench.core.algorithm import Algorithm, Message, Params, State
from pflbench.core.client import Local as Toolbox
from pflbench.core.registry import register


@register("local")
class Local(Algorithm):
    """Training without federation."""

    def is_personal(self, name: str) -> bool:
        return True

    def local_update(self, local: Toolbox, down: Message, state: State) -> tuple[Message, State]:
        return Message({}), {"model": local.sgd(state["model"])}

    def aggregate(self, server: State, ups: Sequence[Message]) -> State:
        return server

    def broadcast(self, server: State, client: int) -> Message:
        return Message({})

    def personalised(self, local: Toolbox, down: Message, state: State) -> Params:
        return state["model"]

    def global_model(self, down: Message) -> None:
        return None
