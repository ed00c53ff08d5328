"""SCAFFOLD: control variates correct the drift of the clients' steps.

Paper: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
https://arxiv.org/abs/1910.06378; Algorithm 1 with option II: K steps y_i <- y_i - eta_l (g_i(y_i) - c_i + c), then
c_i+ = c_i - c + (x - y_i) / (K eta_l); the server x <- x + eta_g mean(y_i - x), c <- c + |S| / N mean(c_i+ - c_i) over
the |S| of N clients that took part, with equal weights.
Personal: the client's control variate.
Evaluated: the global model.
Deviations: K is the steps of the protocol's local epochs, so it differs with the clients' sizes; the paper has one K.
Its steps have no momentum; with one, (x - y_i) / (K eta_l) is not the mean gradient. Buffers have no gradients: they
are averaged, and their control variates are zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pflbench.core.algorithm import Message, Params, State
from pflbench.core.client import Local
from pflbench.core.params import average, zeros_like
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedavg import FedAvg


@register("scaffold")
class Scaffold(FedAvg):
    """FedAvg with control variates."""

    @dataclass(frozen=True)
    class Hyper:
        global_lr: float = setting(1.0, "global step size eta_g", gt=0)

    def init_server(self, model: Params) -> State:
        return {"model": model, "control": zeros_like(model)}

    def init_client(self, model: Params) -> State:
        return {"control": zeros_like(model)}

    def broadcast(self, server: State, client: int) -> Message:
        return Message(server)

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        x, c, own = down["model"], down["control"], state["control"]
        y = local.sgd(x, correct=lambda name, grad, _: grad - own[name] + c[name])
        path = local.counts.steps * local.lr
        new = {name: own[name] - c[name] + (t - y[name]) / path for name, t in local.trainable(x).items()}
        change = {name: t - own[name] for name, t in new.items()}
        # The weights of those that took part sum to |S| / N.
        return Message({"model": y, "control": change}, weight=1 / local.clients), {"control": own | new}

    def aggregate(self, server: State, ups: Sequence[Message]) -> State:
        weights = [up.weight for up in ups]
        mean = average((up["model"] for up in ups), weights)
        change = average((up["control"] for up in ups), weights)
        model = {name: server["model"][name].lerp(mean[name], self.h.global_lr) for name in change}
        control = {name: server["control"][name] + sum(weights) * t for name, t in change.items()}
        return {"model": mean | model, "control": server["control"] | control}
