"""FedProx: FedAvg whose clients are held near the global model by a proximal term.

Paper: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, https://arxiv.org/abs/1812.06127;
Algorithm 2: client k minimises h_k(w; w^t) = F_k(w) + mu / 2 ||w - w^t||^2, inexactly.
Personal: nothing.
Evaluated: the global model.
Deviations: the inexact minimiser is the protocol's local epochs, the same for all clients; there are no stragglers.
Clients are sampled uniformly and weigh their samples, as in the paper's experiments (Section 5.1); Algorithm 2 samples
them in proportion and takes the plain mean. The paper tunes mu for each data set, from 0.001 to 1; ours is what the
authors' scripts use on their synthetic data.
"""

from dataclasses import dataclass

from pflbench.core.algorithm import Message, State
from pflbench.core.client import Local, proximal
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedavg import FedAvg


@register("fedprox")
class FedProx(FedAvg):
    """FedAvg with a proximal term."""

    @dataclass(frozen=True)
    class Hyper:
        mu: float = setting(1.0, "weight of the proximal term", ge=0)

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        model = local.sgd(down["model"], correct=proximal(down["model"], self.h.mu))
        return Message({"model": model}, weight=local.n), state
