"""APFL: train a global model and, on every client, a personal model; the client uses a mixture of the two.

Paper: Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020, https://arxiv.org/abs/2003.13461;
Algorithm 1, Local Descent APFL: with one batch, w_i steps along the gradient of f_i(w_i), and v_i along the gradient
with respect to v_i of f_i(alpha v_i + (1 - alpha) w_i); the server takes the plain mean of the w_i. Equation (10) is
the step of alpha along its own gradient, <v_i - w_i, grad f_i at the mixture>, if `adaptive`.
Personal: v_i and alpha.
Evaluated: the mixture of the client's v_i with the received global model. The global model, too.
Deviations: the authors' code tests the mixture with the client's own w_i as it was before the averaging; ours takes the
received model. There, v's gradient is taken after w's step; here, both gradients are taken at the same point. alpha is
0.5 and fixed by default, as there. If adaptive, it makes one step a round, before the training, on a batch of its own,
and is clipped to [0, 1]; once a round and clipped are the authors' code's. That mixes outputs, not parameters, adds
0.02 alpha to the slope, and multiplies it by alpha^2 + (1 - alpha)^2; this does none of it, as in the paper. The
training loss in the record is the sum of both losses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from pflbench.core import Batch, Client, Message, Net, Params, Setup, State, register, setting

from .fedavg import FedAvg


@register("apfl")
class APFL(FedAvg):
    """FedAvg, with a mixture of the global and an own model on every client."""

    alpha: float = setting(0.5, "share of the own model in the mixture; if adaptive, at first", ge=0, le=1)
    adaptive: bool = setting(False, "learn alpha on each client")

    def init_client(self, setup: Setup) -> State:
        return {"model": setup.model, "alpha": self.alpha}

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        w, v, alpha = received["model"], state["model"], state["alpha"]
        if self.adaptive:
            grad = client.grad(mix(v, client.setup.trainable(w), alpha), next(client.batches(stream="alpha")))
            slope = torch.stack([((v[name] - w[name]) * g).sum() for name, g in grad.items()]).sum()
            alpha = float((slope.new_tensor(alpha) - client.protocol.lr * slope).clamp(0, 1))
        own = client.setup.trainable(v)
        statistics = {name: t.clone() for name, t in v.items() if name not in own}  # of the mixture, which writes them

        def loss(net: Net, batch: Batch) -> Tensor:
            fixed = {name: p.detach() for name, p in net.named_parameters()}
            mixture = mix({**net.extra, **statistics}, fixed, alpha)
            of_w = F.cross_entropy(net(batch.x.clone()), batch.y, reduction="none")  # a first layer may work in place
            of_v = F.cross_entropy(functional_call(net, mixture, (batch.x,)), batch.y, reduction="none")
            return (of_w + of_v).mean()

        w, own = client.sgd(w, extra=own, loss=loss)
        return Message({"model": w}), {"model": {**own, **statistics}, "alpha": alpha}

    def personalise(self, client: Client, received: Message, state: State) -> State:
        return {"model": mix(state["model"], client.setup.trainable(received["model"]), state["alpha"])}


def mix(own: Params, other: Params, alpha: float) -> Params:
    """Return alpha own + (1 - alpha) other. Buffers, which `other` does not have, are `own`'s: the mixture's."""
    return {**own, **{name: torch.lerp(t, own[name], alpha) for name, t in other.items()}}
