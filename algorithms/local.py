"""Local: every client trains alone; nothing is sent.

Paper: none; the lower bound that federated learning has to beat, "Local" in the tables of PFL papers.
Family: no federation.
Personal: the whole model.
Sent: nothing.
Evaluated: the client's personal model; before its first participation, the initial model.
Reported: the deployed model, which is also the client's own model.
"""

from collections.abc import Sequence

from pflbench.core import Algorithm, Client, Message, Params, Round, State, Upload, register


@register("local")
class LocalOnly(Algorithm):
    """Training without federation."""

    def personal(self, model: Params) -> Params:
        return model

    def broadcast(self, round: Round, server: State, client: int) -> Message:
        return Message({})

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        return Message({}), {"model": client.sgd(state["model"])}

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        return server
