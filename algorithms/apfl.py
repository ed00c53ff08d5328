"""APFL: train a global model and, on every client, a personal model; the client uses a mixture of the two.

Paper: Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020, https://arxiv.org/abs/2003.13461;
Algorithm 1, Local Descent APFL: with one batch, w_i steps along the gradient of f_i(w_i), and v_i along the gradient
with respect to v_i of f_i(alpha v_i + (1 - alpha) w_i); the server takes the plain mean of the w_i. Equation (10) is
the step of alpha along its own gradient, <v_i - w_i, grad f_i at the mixture>, if `adaptive`.
Family: personal model beside the global one.
Personal: v_i and alpha.
Sent: the global model.
Evaluated: the mixture of the client's v_i with the received global model. The global model, too.
Reported: the mixture; the authors' code evaluates it before the averaging, so neither the deployed model nor the own
one.
Deviations: the authors' code evaluates the mixture with the client's w_i from before the averaging; ours takes the
received model. Their code computes v's gradient after w's step; ours computes both gradients at the same point. alpha
is 0.5 and fixed by default, as in their code. If adaptive, alpha takes one step a round, before the training, on a
separate batch, and is clipped to [0, 1]; once a round and the clipping come from their code. Their step
mixes outputs, not parameters, adds 0.02 alpha to the slope, and multiplies it by alpha^2 + (1 - alpha)^2; ours does
none of these, as in the paper. The training loss in the record is the sum of both losses.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from pflbench.core import Batch, Client, Message, Net, Params, Setup, State, register, setting

from .fedavg import FedAvg


@register("apfl")
class APFL(FedAvg):
    """FedAvg, with a mixture of the global and a personal model on every client."""

    alpha: float = setting(0.5, "share of the personal model in the mixture; if adaptive, at first", ge=0, le=1)
    adaptive: bool = setting(False, "learn alpha on each client")

    def init_client(self, setup: Setup) -> State:
        return {"model": setup.model, "alpha": self.alpha}

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        w, v, alpha = received["model"], state["model"], state["alpha"]
        if self.adaptive:
            grad = client.grad(mix(v, client.setup.trainable(w), alpha), next(client.batches(stream="alpha")))
            slope = torch.stack([((v[name] - w[name]) * g).sum() for name, g in grad.items()]).sum()
            alpha = float((slope.new_tensor(alpha) - client.protocol.lr * slope).clamp(0, 1))
        personal = client.setup.trainable(v)
        # The running statistics of the mixture, whose forward passes update them.
        statistics = {name: t.clone() for name, t in v.items() if name not in personal}

        def loss(net: Net, batch: Batch) -> Tensor:
            fixed = {name: p.detach() for name, p in net.named_parameters()}
            mixture = mix({**net.extra, **statistics}, fixed, alpha)
            of_w = F.cross_entropy(net(batch.x.clone()), batch.y, reduction="none")  # a first layer may work in place
            of_v = F.cross_entropy(functional_call(net, mixture, (batch.x,)), batch.y, reduction="none")
            return (of_w + of_v).mean()

        w, personal = client.sgd(w, extra=personal, loss=loss)
        return Message({"model": w}), {"model": {**personal, **statistics}, "alpha": alpha}

    def personalise(self, client: Client, received: Message, state: State) -> State:
        return {"model": mix(state["model"], client.setup.trainable(received["model"]), state["alpha"])}


def mix(v: Params, w: Params, alpha: float) -> Params:
    """Return alpha v + (1 - alpha) w. `w` has no buffers: the buffers of `v` are those of the mixture."""
    return {**v, **{name: torch.lerp(t, v[name], alpha) for name, t in w.items()}}
