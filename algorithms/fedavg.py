"""FedAvg: train on the clients, average on the server, weighted by the number of samples.

Paper: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
https://arxiv.org/abs/1602.05629; Algorithm 1: ClientUpdate, and the server's w_{t+1} = sum_k (n_k / m_t) w^k_{t+1}.
Family: one global model.
Personal: nothing.
Sent: the model.
Evaluated: the global model.
Reported: the deployed model.
"""

from collections.abc import Sequence

from pflbench.core import Algorithm, Client, Message, Round, State, Upload, mean, register


@register("fedavg")
class FedAvg(Algorithm):
    """Federated averaging, and the base of all methods that average the shared parameters."""

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        model = client.sgd({**received["model"], **state["model"]})
        return Message({"model": self.shared(model)}, weight=client.n), {"model": self.personal(model)}

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        return {"model": mean(uploads, "model")}
