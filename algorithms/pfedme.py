"""pFedMe: descend the Moreau envelope of the local loss; its proximal point is the client's personal model.

Paper: T. Dinh, Tran, Nguyen, "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020,
https://arxiv.org/abs/2006.08848; Algorithm 1: on each batch, K gradient steps towards the minimum over theta of
h_i = f_i(theta) + lambda/2 |theta - w|^2, equation (7), then w_i steps along lambda (w_i - theta), line 8; the server
takes (1 - beta) w + beta times the plain mean of the w_i.
Family: personal model beside the global one.
Personal: theta, the client's personal model.
Sent: the global model.
Evaluated: theta after the last batch; before its first participation, the initial model. The global model, too.
Reported: the deployed model.
Deviations: in the paper all clients train in every round, and some of them upload; here only the participants train,
and all of them upload. As in the authors' code, theta starts a round at the received model, and each batch continues
from theta of the previous batch. lambda, K, beta and the learning rate of theta are the defaults of their code; we omit
its decay of theta (0.001), and the protocol's momentum and weight decay apply to w alone. Steps are counted in epochs;
the paper has R = 20 batches. beta does not apply to running statistics.
"""

from collections.abc import Sequence

import torch

from pflbench.core import Batch, Client, Message, Params, Round, Setup, State, Upload, mean, register, setting

from .fedavg import FedAvg


@register("pfedme")
class PFedMe(FedAvg):
    """Federated averaging of models that descend Moreau envelopes."""

    lam: float = setting(15.0, "lambda: how strongly theta is tied to w", gt=0)
    inner_steps: int = setting(5, "K: gradient steps of theta on each batch", ge=1)
    inner_lr: float = setting(0.09, "learning rate of theta", gt=0)
    beta: float = setting(1.0, "step of the server from its model towards the mean of the uploads", gt=0)

    def init_client(self, setup: Setup) -> State:
        return {"model": setup.model}

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        theta: Params = {}

        def direction(w: Params, batch: Batch) -> Params:
            for _ in range(self.inner_steps):
                at = {**w, **theta}
                for name, grad in client.grad(at, batch, train_mode=True).items():
                    theta[name] = at[name] - self.inner_lr * (grad + self.lam * (at[name] - w[name]))
            return {name: self.lam * (w[name] - t) for name, t in theta.items()}

        w = client.descend(received["model"], direction)
        return Message({"model": w}), {"model": {**w, **theta}}

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        w, old = mean(uploads, "model"), server["model"]
        mixed = {name: torch.lerp(old[name], t, self.beta) for name, t in round.setup.trainable(w).items()}
        return {"model": {**w, **mixed}}
