"""FedAMP: clients with similar models attend to each other, through a cloud model for each client.

Paper: Huang et al., "Personalized Cross-Silo Federated Learning on Non-IID Data", AAAI 2021,
https://arxiv.org/abs/2007.03797; Algorithm 1 with A(t) = 1 - exp(-t / sigma). The cloud model of client i is
u_i = (1 - sum_j xi_ij) w_i + sum_j xi_ij w_j over the others j, with xi_ij = alpha_k A'(||w_i - w_j||^2); the client's
model becomes argmin_w F_i(w) + lambda / (2 alpha_k) ||w - u_i||^2.
Family: mixture of models.
Personal: the whole model; the server keeps the last upload of every client.
Sent: up: the model; down: the client's cloud model and its step size.
Evaluated: the client's personal model after its last training; before its first participation, the initial model.
Reported: the deployed model, which is also the client's own model.
Deviations: the argmin is approximated by the protocol's SGD, which starts at u_i. In the paper all clients take part.
With partial participation the server uses each absent client's last upload; clients that never participated receive no
attention. The default of sigma is ours: it makes the largest attention, alpha_k / sigma, 0.01. The pull of a step goes
at most to u_i: as alpha_k falls, lambda / alpha_k becomes too large for SGD. Distances include running statistics. A
federation of more than 1 + sigma / alpha_k clients is refused: attentions could sum to more than 1.
"""

from collections.abc import Sequence
from math import exp

from pflbench.core import (
    Algorithm, Client, Message, Round, Setup, State, Upload, UsageError, average, distance, proximal, register,
    setting,
)  # fmt: skip


@register("fedamp")
class FedAMP(Algorithm):
    """Federated attentive message passing."""

    lam: float = setting(1.0, "weight of the pull to the cloud model, lambda", ge=0)
    alpha: float = setting(1e4, "first step size alpha_k; keep it below sigma / clients", gt=0)
    alpha_decay: float = setting(0.1, "factor of alpha_k after every `decay_every` rounds", gt=0, le=1)
    decay_every: int = setting(30, "rounds with the same alpha_k", ge=1)
    sigma: float = setting(1e6, "scale of squared distances in the attention", gt=0)

    def check(self, setup: Setup) -> None:
        most = self.alpha / self.sigma * (setup.clients - 1)
        if most > 1 + 1e-9:  # 1 itself is allowed, however it is rounded
            raise UsageError(
                f"fedamp: the attention of a client to {setup.clients - 1} others can sum to {most:.3g}, above 1; "
                f"lower alpha ({self.alpha:g}) or raise sigma ({self.sigma:g})"
            )

    def init_server(self, setup: Setup) -> State:
        return {"models": {}}

    def init_client(self, setup: Setup) -> State:
        return {"model": setup.model}

    def broadcast(self, round: Round, server: State, client: int) -> Message:
        alpha = self.alpha * self.alpha_decay ** ((round.number - 1) // self.decay_every)
        w_i = server["models"].get(client, round.setup.model)
        others = [model for other, model in server["models"].items() if other != client]
        attention = [alpha / self.sigma * exp(-(distance(w_i, w_j) ** 2) / self.sigma) for w_j in others]
        cloud = average([w_i, *others], [1 - sum(attention), *attention])
        return Message({"model": cloud, "alpha": alpha})

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        pull = min(self.lam / received["alpha"], 1 / client.protocol.lr)
        model = client.sgd(received["model"], transform=proximal(received["model"], pull))
        return Message({"model": model}), {"model": model}

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        return {"models": {**server["models"], **{upload.client: upload["model"] for upload in uploads}}}

    def serve(self, round: Round, server: State, client: int) -> Message:
        return Message({})
