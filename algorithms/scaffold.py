"""SCAFFOLD: control variates correct the drift of the clients' steps.

Paper: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020,
https://arxiv.org/abs/1910.06378; Algorithm 1 with option II: K steps y_i <- y_i - eta_l (g_i(y_i) - c_i + c), then
c_i+ = c_i - c + (x - y_i) / (K eta_l); the server x <- x + eta_g mean(y_i - x), c <- c + |S| / N mean(c_i+ - c_i) over
the |S| of N clients that took part, with equal weights.
Family: one global model.
Personal: the client's control variate.
Sent: the model, and a control variate of its size.
Evaluated: the global model.
Reported: the deployed model.
Deviations: K is the number of steps in the protocol's local epochs, so it depends on the client's samples; the paper
has one K for all. The paper's steps have no momentum; with momentum, (x - y_i) / (K eta_l) is not the mean gradient.
Buffers have no gradients: they are averaged, and their control variates are zeros.
"""

from collections.abc import Sequence

from pflbench.core import Client, Message, Params, Round, Setup, State, Upload, mean, register, setting, zeros_like

from .fedavg import FedAvg


@register("scaffold")
class Scaffold(FedAvg):
    """FedAvg with control variates."""

    global_lr: float = setting(1.0, "global step size eta_g", gt=0)

    def init_server(self, setup: Setup) -> State:
        return {"model": setup.model, "control": zeros_like(setup.model)}

    def init_client(self, setup: Setup) -> State:
        return {"control": zeros_like(setup.model)}

    def broadcast(self, round: Round, server: State, client: int) -> Message:
        return Message(server)

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        x, c, c_i = received["model"], received["control"], state["control"]

        def corrected(grads: Params, _: Params) -> Params:
            return {name: grad - c_i[name] + c[name] for name, grad in grads.items()}

        y = client.sgd(x, transform=corrected)
        path = client.protocol.steps(client.n) * client.protocol.lr
        new = {name: c_i[name] - c[name] + (t - y[name]) / path for name, t in client.setup.trainable(x).items()}
        change = {name: t - c_i[name] for name, t in new.items()}
        return Message({"model": y, "control": change}), {"control": {**c_i, **new}}

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        share = len(uploads) / round.setup.clients
        y, change = mean(uploads, "model"), mean(uploads, "control")
        model = {name: server["model"][name].lerp(y[name], self.global_lr) for name in change}
        control = {name: server["control"][name] + share * t for name, t in change.items()}
        return {"model": {**y, **model}, "control": {**server["control"], **control}}
