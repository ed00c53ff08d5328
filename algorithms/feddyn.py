"""FedDyn: a regulariser that changes with the rounds makes the clients' optima agree with the global one.

Paper: Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, https://arxiv.org/abs/2111.04263;
Algorithm 1: client k minimises L_k(w) - <g_k, w> + alpha / 2 ||w - w^{t-1}||^2; g_k <- g_k - alpha (w_k - w^{t-1}), its
estimate of its gradient at w_k; the server, of m clients in all, h <- h - alpha / m sum_k (w_k - w^{t-1}) over those
that took part, and w^t = mean_k w_k - h / alpha, with equal weights.
Personal: the client's g_k.
Evaluated: the server's w^t. The authors' code tests means of the clients' models as well.
Deviations: the minimiser is found by the protocol's local epochs, as in the authors' code; that divides alpha by the
client's relative number of samples, Algorithm 1 does not. alpha is that of the authors' example. Buffers are averaged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pflbench.core.algorithm import Message, Params, State
from pflbench.core.client import Local, proximal
from pflbench.core.params import average, zeros_like
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedavg import FedAvg


@register("feddyn")
class FedDyn(FedAvg):
    """FedAvg with dynamic regularisation."""

    @dataclass(frozen=True)
    class Hyper:
        alpha: float = setting(0.01, "weight of the regulariser", gt=0)

    def init_server(self, model: Params) -> State:
        return {"model": model, "h": zeros_like(model)}

    def init_client(self, model: Params) -> State:
        return {"gradient": zeros_like(model)}

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        sent, g, alpha = down["model"], state["gradient"], self.h.alpha
        near = proximal(sent, alpha)
        model = local.sgd(sent, correct=lambda name, grad, param: near(name, grad - g[name], param))
        own = local.trainable(model)
        new = g | {name: g[name] - alpha * (t - sent[name]) for name, t in own.items()}
        buffers = {name: t for name, t in model.items() if name not in own}
        # The weights of those that took part sum to their share of all clients.
        return Message({"model": own, "buffers": buffers}, weight=1 / local.clients), {"gradient": new}

    def aggregate(self, server: State, ups: Sequence[Message]) -> State:
        weights, alpha = [up.weight for up in ups], self.h.alpha
        mean = average((up["model"] for up in ups), weights)
        share = sum(weights)
        h = {name: server["h"][name] - alpha * share * (t - server["model"][name]) for name, t in mean.items()}
        model = {name: t - h[name] / alpha for name, t in mean.items()}
        return {"model": model | average((up["buffers"] for up in ups), weights), "h": server["h"] | h}
