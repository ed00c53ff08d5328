"""FedAMP: clients with similar models attend to each other, through a cloud model for each client.

Paper: Huang et al., "Personalized Cross-Silo Federated Learning on Non-IID Data", AAAI 2021,
https://arxiv.org/abs/2007.03797; Algorithm 1 with A(t) = 1 - exp(-t / sigma). The cloud model of client i is
u_i = (1 - sum_j xi_ij) w_i + sum_j xi_ij w_j over the others j, with xi_ij = alpha_k A'(||w_i - w_j||^2); the client's
model becomes argmin_w F_i(w) + lambda / (2 alpha_k) ||w - u_i||^2.
Personal: the whole model; the server keeps the last one of every client.
Evaluated: the client's own model after its last training; before its first participation, the initial one.
Deviations: the argmin is approximated by the protocol's SGD, which starts at u_i. In the paper all clients take part;
here the server uses the last model of who does not, and nobody attends to a client that has not taken part yet. The
default of sigma is ours: the largest attention, alpha_k / sigma, is then 0.01. A step's pull is at most the whole way
to u_i: as alpha_k falls, lambda / alpha_k grows beyond what SGD can follow. Distances count running statistics, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import torch

from pflbench.core.algorithm import Algorithm, Message, Params, State
from pflbench.core.client import Local, proximal
from pflbench.core.params import average, distance
from pflbench.core.registry import register
from pflbench.errors import UsageError
from pflbench.settings import setting


@register("fedamp")
class FedAMP(Algorithm):
    """Federated attentive message passing."""

    tested_alone = True

    @dataclass(frozen=True)
    class Hyper:
        lam: float = setting(1.0, "weight of the pull to the cloud model, lambda", ge=0)
        alpha: float = setting(1e4, "first step size alpha_k; keep it below sigma / clients", gt=0)
        alpha_decay: float = setting(0.1, "factor of alpha_k after every `decay_every` rounds", gt=0, le=1)
        decay_every: int = setting(30, "rounds with the same alpha_k", ge=1)
        sigma: float = setting(1e6, "scale of squared distances in the attention", gt=0)

    def init_server(self, model: Params) -> State:
        return {"initial": model, "rounds": {"done": torch.zeros((), dtype=torch.float64)}}

    def init_client(self, model: Params) -> State:
        return {"model": model}

    def broadcast(self, server: State, client: int) -> Message:
        me, done = f"model {client}", int(server["rounds"]["done"])
        alpha = self.h.alpha * self.h.alpha_decay ** (done // self.h.decay_every)
        own = server.get(me, server["initial"])
        others = [model for part, model in server.items() if part.startswith("model ") and part != me]
        attention = [alpha / self.h.sigma * exp(-(distance(own, w) ** 2) / self.h.sigma) for w in others]
        if sum(attention) > 1:
            found = f"the attention of client {client} to {len(others)} others sums to {sum(attention):.3g}, above 1"
            raise UsageError(f"fedamp: {found}; lower alpha ({self.h.alpha:g}) or raise sigma ({self.h.sigma:g})")
        cloud = average([own, *others], [1 - sum(attention), *attention])
        return Message({"model": cloud, "step": {"alpha": torch.tensor(alpha, dtype=torch.float64)}})

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        pull = min(self.h.lam / float(down["step"]["alpha"]), 1 / local.lr)
        model = local.sgd(down["model"], correct=proximal(down["model"], pull))
        return Message({"model": model}), {"model": model}

    def aggregate(self, server: State, ups: Sequence[Message]) -> State:
        last = {f"{part} {up.sender}": up[part] for up in ups for part in up.tensors}
        return server | last | {"rounds": {"done": server["rounds"]["done"] + 1}}

    def personalised(self, local: Local, down: Message, state: State) -> Params:
        return state["model"]

    def global_model(self, down: Message) -> None:
        return None
