"""Fed-RoD: a generic head, trained as if classes were balanced, and a personalised head on top of it.

Paper: Chen, Chao, "On Bridging Generic and Personalized Federated Learning for Image Classification", ICLR 2022,
https://arxiv.org/abs/2107.00778; Fed-RoD with a linear personalised head and the balanced softmax: of client m, with
N_c samples of class c, the generic logits g(z) minimise -log(N_y^gamma exp g_y / sum_c N_c^gamma exp g_c), and the
personalised head h_m minimises the cross-entropy of g(z) + h_m(z), with g and z held fixed.
Family: personal part of the network.
Personal: the personalised head.
Sent: the generic model.
Evaluated: the received generic model and the client's personalised head. Both heads are linear, so the sum of their
logits is one linear head with the sum of their weights. The received model alone is the global model.
Reported: the deployed model.
Deviations: the personalised head starts at zero, so that an untrained client has the generic model; other suites start
it as a copy of the initial head. A class without samples on the client has weight 0 in the sum above; it is never a
label, so log 0 does not occur.
"""

import torch.nn.functional as F
from torch import Tensor

from pflbench.core import (
    Batch, Client, Message, Net, Setup, State, UsageError, class_counts, head, linear_head, register, setting,
    zeros_like,
)  # fmt: skip

from .fedavg import FedAvg


@register("fedrod")
class FedRoD(FedAvg):
    """FedAvg with a balanced loss, and a personalised head that has no influence on it."""

    gamma: float = setting(1.0, "exponent of the class counts in the balanced softmax; 0: cross-entropy", ge=0)

    def check(self, setup: Setup) -> None:
        if not linear_head(setup.model):
            raise UsageError("fedrod: the network's head must be one nn.Linear, so that two heads sum to one")

    def init_client(self, setup: Setup) -> State:
        return {"head": zeros_like(head(setup.model))}

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        counts = class_counts(client).to(received["model"]["head.weight"].dtype)
        prior = counts.pow(self.gamma).log()

        def loss(net: Net, batch: Batch) -> Tensor:
            z = net.body(batch.x)
            generic = net.head(z)
            personal = F.linear(z.detach(), net.extra["head.weight"], net.extra.get("head.bias"))
            balanced = F.cross_entropy(generic + prior, batch.y, reduction="none")
            return (balanced + F.cross_entropy(generic.detach() + personal, batch.y, reduction="none")).mean()

        model, personal = client.sgd(received["model"], extra=state["head"], loss=loss)
        return Message({"model": model}, weight=client.n), {"head": personal}

    def personalise(self, client: Client, received: Message, state: State) -> State:
        model = received["model"]
        return {"model": {**model, **{name: model[name] + t for name, t in state["head"].items()}}}
