"""pFedMe: descend the Moreau envelope of the local loss; its proximal point is the client's own model.

Paper: T. Dinh, Tran, Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020,
https://arxiv.org/abs/2006.08848; Algorithm 1: on each batch, K gradient steps towards the minimum over theta of
h_i = f_i(theta) + lambda/2 |theta - w|^2, equation (7), then w_i steps along lambda (w_i - theta), line 8; the server
takes (1 - beta) w + beta times the plain mean of the w_i.
Personal: theta, the client's own model.
Evaluated: theta after the last batch; before its first participation, the initial model. The global model, too.
Deviations: in the paper all clients train in every round, and some of them upload; here those that take part train, and
all of them upload. theta goes on from one batch's to the next, and begins a round at the received model, as in the
authors' code, whose lambda, K, beta and rate of theta are the defaults; its decay of theta (0.001) is left out, and the
protocol's momentum and weight decay work on w alone. Steps are counted in epochs, there R = 20 batches. beta does not
apply to running statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pflbench.core.algorithm import Message, Params, State, merge
from pflbench.core.client import Batch, Local
from pflbench.core.params import average
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedavg import FedAvg


@register("pfedme")
class PFedMe(FedAvg):
    """Federated averaging of models that descend Moreau envelopes."""

    @dataclass(frozen=True)
    class Hyper:
        lam: float = setting(15.0, "lambda: how strongly theta is tied to w", gt=0)
        inner_steps: int = setting(5, "K: gradient steps of theta on each batch", ge=1)
        inner_lr: float = setting(0.09, "learning rate of theta", gt=0)
        beta: float = setting(1.0, "step of the server from its model towards the mean of the uploads", gt=0)

    def init_client(self, model: Params) -> State:
        return {"model": model}

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        theta: Params = {}

        def direction(w: Params, batch: Batch) -> Params:
            for _ in range(self.h.inner_steps):
                at = merge(w, theta)
                for name, grad in local.grad(at, *batch).items():
                    theta[name] = at[name] - self.h.inner_lr * (grad + self.h.lam * (at[name] - w[name]))
            return {name: self.h.lam * (w[name] - t) for name, t in theta.items()}

        w = local.descend(down["model"], direction)
        model = local.trainable(w)
        statistics = {name: t for name, t in w.items() if name not in model}
        return Message({"model": model, "statistics": statistics}), {"model": merge(w, theta)}

    def aggregate(self, server: State, ups: Sequence[Message]) -> State:
        model, statistics = (average((up[part] for up in ups), [1] * len(ups)) for part in ("model", "statistics"))
        return {
            "model": {name: torch.lerp(server["model"][name], t, self.h.beta) for name, t in model.items()} | statistics
        }
