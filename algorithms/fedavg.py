"""FedAvg: train on the clients, average on the server, weighted by the number of samples.

Paper: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
https://arxiv.org/abs/1602.05629; Algorithm 1: ClientUpdate, and the server's w_{t+1} = sum_k (n_k / m_t) w^k_{t+1}.
Personal: nothing.
Evaluated: the global model.
"""

from collections.abc import Sequence

from pflbench.core.algorithm import Algorithm, Message, State, merge
from pflbench.core.client import Local
from pflbench.core.params import average
from pflbench.core.registry import register


@register("fedavg")
class FedAvg(Algorithm):
    """Federated averaging, and the base of the methods that average what is shared."""

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        model = local.sgd(merge(down["model"], state["model"]))
        return Message({"model": self.shared(model)}, weight=local.n), {"model": self.personal(model)}

    def aggregate(self, server: State, ups: Sequence[Message]) -> State:
        return {"model": average((up["model"] for up in ups), [up.weight for up in ups])}
