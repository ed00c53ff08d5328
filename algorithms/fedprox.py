"""FedProx: FedAvg with a proximal term that keeps the clients near the global model.

Paper: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, https://arxiv.org/abs/1812.06127;
Algorithm 2: client k minimises h_k(w; w^t) = F_k(w) + mu / 2 ||w - w^t||^2, inexactly.
Family: one global model.
Personal: nothing.
Sent: the model.
Evaluated: the global model.
Reported: the deployed model.
Deviations: the inexact minimiser is the protocol's local epochs, the same for all clients; there are no stragglers.
Clients are sampled uniformly and weighted by their samples, as in the paper's experiments (Section 5.1); Algorithm 2
samples them in proportion and takes the plain mean. The paper tunes mu for each data set, from 0.001 to 1; our default
is the value of the authors' scripts for synthetic data.
"""

from pflbench.core import Client, Message, State, proximal, register, setting

from .fedavg import FedAvg


@register("fedprox")
class FedProx(FedAvg):
    """FedAvg with a proximal term."""

    mu: float = setting(1.0, "weight of the proximal term", ge=0)

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        model = client.sgd(received["model"], transform=proximal(received["model"], self.mu))
        return Message({"model": model}, weight=client.n), state
