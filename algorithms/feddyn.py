"""FedDyn: a regulariser that changes with the rounds makes the clients' optima agree with the global one.

Paper: Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021, https://arxiv.org/abs/2111.04263;
Algorithm 1: client k minimises L_k(w) - <g_k, w> + alpha / 2 ||w - w^{t-1}||^2; g_k <- g_k - alpha (w_k - w^{t-1}), its
estimate of its gradient at w_k; the server, of m clients in all, h <- h - alpha / m sum_k (w_k - w^{t-1}) over those
that took part, and w^t = mean_k w_k - h / alpha, with equal weights.
Family: one global model.
Personal: the client's g_k.
Sent: the model.
Evaluated: the server's w^t. The authors' code also evaluates means of the clients' models.
Reported: the deployed model.
Deviations: the protocol's local epochs approximate the minimiser, as in the authors' code; their code divides alpha by
the client's relative number of samples, Algorithm 1 does not. alpha comes from their example. Buffers are averaged.
"""

from collections.abc import Sequence

from pflbench.core import (
    Client, Message, Params, Round, Setup, State, Upload, mean, proximal, register, setting, zeros_like,
)  # fmt: skip

from .fedavg import FedAvg


@register("feddyn")
class FedDyn(FedAvg):
    """FedAvg with dynamic regularisation."""

    alpha: float = setting(0.01, "weight of the regulariser", gt=0)

    def init_server(self, setup: Setup) -> State:
        return {"model": setup.model, "h": zeros_like(setup.model)}

    def init_client(self, setup: Setup) -> State:
        return {"gradient": zeros_like(setup.model)}

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        start, g = received["model"], state["gradient"]
        pull = proximal(start, self.alpha)

        def regularised(grads: Params, now: Params) -> Params:
            return pull({name: grad - g[name] for name, grad in grads.items()}, now)

        model = client.sgd(start, transform=regularised)
        trained = client.setup.trainable(model)
        new = {name: g[name] - self.alpha * (t - start[name]) for name, t in trained.items()}
        return Message({"model": model}), {"gradient": {**g, **new}}

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        share, w = len(uploads) / round.setup.clients, mean(uploads, "model")
        trained = round.setup.trainable(w)
        h = {n: server["h"][n] - self.alpha * share * (t - server["model"][n]) for n, t in trained.items()}
        return {"model": {**w, **{n: t - h[n] / self.alpha for n, t in trained.items()}}, "h": {**server["h"], **h}}
