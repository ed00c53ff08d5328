"""APFL: train the global model, and on every client an own one for use in a mixture with the global one.

Paper: Deng, Kamani, Mahdavi, "Adaptive Personalized Federated Learning", 2020, https://arxiv.org/abs/2003.13461;
Algorithm 1, Local Descent APFL: with one batch, w_i steps along the gradient of f_i(w_i), and v_i along the gradient
with respect to v_i of f_i(alpha v_i + (1 - alpha) w_i); the server takes the plain mean of the w_i. Equation (10) is
the step of alpha along its own gradient, <v_i - w_i, grad f_i at the mixture>, if `adaptive`.
Personal: v_i and alpha.
Evaluated: the mixture of the client's v_i with the received global model. The global model, too.
Deviations: the authors' code tests the mixture with the client's own w_i as it was before the averaging; ours takes the
received model. alpha is 0.5 and fixed by default, as there. If adaptive, it makes one step a round, before the
training, on a batch of its own, and is clipped to [0, 1]; once a round and clipped are the authors' code's. That mixes
outputs, not parameters, and adds 0.02 alpha to the slope; this does neither, as in the paper. The training loss in the
record is the sum of both losses.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from pflbench.core.algorithm import Message, Params, State
from pflbench.core.client import Local, cross_entropy
from pflbench.core.models import Net
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedavg import FedAvg

OWN = "own."  # before the names of v_i, where it is trained together with w_i


@register("apfl")
class APFL(FedAvg):
    """FedAvg, with a mixture of the global and an own model on every client."""

    @dataclass(frozen=True)
    class Hyper:
        alpha: float = setting(0.5, "share of the own model in the mixture; if adaptive, at first", ge=0, le=1)
        adaptive: bool = setting(False, "learn alpha on each client")

    def init_client(self, model: Params) -> State:
        return {"model": model, "mixture": {"alpha": next(iter(model.values())).new_tensor(self.h.alpha)}}

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        own, alpha = state["model"], state["mixture"]["alpha"]
        if self.h.adaptive:
            grad = local.grad(self.personalised(local, down, state), *next(local.batches(purpose="alpha")))
            slope = torch.stack([((own[name] - down["model"][name]) * g).sum() for name, g in grad.items()]).sum()
            alpha = (alpha - local.lr * slope).clamp(0, 1)

        def loss(net: Net, x: Tensor, y: Tensor) -> Tensor:
            fixed = {name: p.detach() for name, p in net.named_parameters()}
            mixed = mix({name: net.free[OWN + name] for name in own}, fixed, float(alpha))
            of_w = cross_entropy(net, x.clone(), y)  # a first layer may work in place
            return of_w + F.cross_entropy(functional_call(net, mixed, (x,)), y, reduction="none")

        start = down["model"] | {OWN + name: t for name, t in own.items()}
        changing = {*down["model"], *(OWN + name for name in local.trainable(own))}
        done = local.sgd(start, loss=loss, only=changing.__contains__)
        new = {"model": {name: done[OWN + name] for name in own}, "mixture": {"alpha": alpha}}
        return Message({"model": {name: done[name] for name in down["model"]}}), new

    def personalised(self, local: Local, down: Message, state: State) -> Params:
        return mix(state["model"], local.trainable(down["model"]), float(state["mixture"]["alpha"]))


def mix(own: Params, other: Params, alpha: float) -> Params:
    """Return alpha own + (1 - alpha) other. Buffers, which `other` has not, are `own`'s: the mixture's statistics."""
    return own | {name: torch.lerp(t, own[name], alpha) for name, t in other.items()}
