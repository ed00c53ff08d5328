"""FedPAC: align the clients' features to common prototypes; combine the heads of clients with similar statistics.

Paper: Xu, Tong, Huang, "Personalized Federated Learning with Feature Alignment and Classifier Collaboration", ICLR
2023, https://arxiv.org/abs/2306.11867, and the authors' code, https://github.com/JianXu95/FedPAC. Under the received
model, client i has the statistics H_i[c] = p_ic m_ic, for the share p_ic and the mean feature m_ic of class c, and
V_i = (mean |z|^2 - sum_c p_ic^2 |m_ic|^2) / n_i. It trains the head for an epoch; then the body, with the head fixed,
on cross-entropy plus lambda times the mean square between the features and C_y, the clients' mean feature of class y,
weighted by samples. The server averages the bodies by samples. Client i's head becomes sum_j a_j h_j, where a
minimises sum_j a_j^2 V_j + sum_jk a_j a_k <H_i - H_j, H_i - H_k> over the simplex.
Family: personal part of the network.
Personal: the head, which the server combines for each client.
Sent: up: the model, prototypes, counts, and statistics of the features; down: the body, the client's combined head, and
prototypes.
Evaluated: the averaged body with the client's combined head; before its first participation, the initial head.
Reported: the authors' code prints both, the deployed model and the client's own model.
Deviations: a client gets its combined head when it takes part again; the authors' code sends it at once, with the same
bytes. C_y of a class that no client uploads stays as it was; before there is one, it is the client's mean feature from
before its training, and without any C, lambda is 0, as in the authors' code. There, the momentum is 0.5 and the weight
decay 0.0005; ours are the protocol's. Weights up to 0.001 are dropped, unless all are, as in their code, which solves
the same quadratic program with another solver after clipping small eigenvalues.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pflbench.core import (
    Algorithm, Batch, Client, Message, Net, Round, Setup, State, Upload, average, body, class_counts, class_means, head,
    merged_prototypes, need_features, register, setting,
)  # fmt: skip


@register("fedpac")
class FedPAC(Algorithm):
    """Feature alignment and classifier collaboration."""

    lam: float = setting(1.0, "lambda, the weight of the distance to the prototypes", ge=0)
    head_epochs: int = setting(1, "epochs of the head, before the body's", ge=0)
    head_lr: float = setting(0.1, "learning rate of the head", gt=0)

    def check(self, setup: Setup) -> None:
        need_features(self, setup)

    def init_server(self, setup: Setup) -> State:
        prototypes = {"mean": setup.zeros(setup.classes, setup.features), "count": setup.zeros(setup.classes)}
        return {"model": body(setup.model), **prototypes, "heads": {}}

    def init_client(self, setup: Setup) -> State:
        return {}

    def broadcast(self, round: Round, server: State, client: int) -> Message:
        own = server["heads"].get(client) or head(round.setup.model)
        return Message({"model": {**server["model"], **own}, "mean": server["mean"], "count": server["count"]})

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        model, mean, known = received["model"], received["mean"], received["count"] > 0
        features, count = client.features(model), class_counts(client)
        own = class_means(client, features)
        statistics = own * count[:, None] / client.n
        variance = ((features.square().sum() / client.n - statistics.square().sum()) / client.n).clamp(min=0)
        target, lam = torch.where(known[:, None], mean, own), self.lam if known.any() else 0.0

        def aligned(net: Net, batch: Batch) -> Tensor:
            z = net.body(batch.x)
            return F.cross_entropy(net.head(z), batch.y) + lam * F.mse_loss(z, target[batch.y])

        first = replace(client.protocol, epochs=self.head_epochs, lr=self.head_lr)
        model = client.sgd(model, config=first, trainable=head(model), stream="head")
        model = client.sgd(model, loss=aligned, trainable=body(model))
        after = {"mean": class_means(client, client.features(model)), "count": count.to(mean.dtype)}
        upload = {"model": model, **after, "statistics": statistics, "variance": float(variance)}
        return Message(upload, weight=client.n), state

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        bodies = average((body(upload["model"]) for upload in uploads), [upload.weight for upload in uploads])
        heads = [head(upload["model"]) for upload in uploads]
        weights = head_weights([u["variance"] for u in uploads], [u["statistics"] for u in uploads])
        new = {
            u.client: average(heads, [a if a > min(1e-3, max(row) / 2) else 0.0 for a in row])
            for u, row in zip(uploads, weights, strict=True)
        }
        return {"model": bodies, **merged_prototypes(server, uploads), "heads": {**server["heads"], **new}}


def head_weights(variances: Sequence[float], statistics: Sequence[Tensor]) -> list[list[float]]:
    """Return for each client the weights of all heads, which minimise the quadratic form over the simplex."""
    from scipy.optimize import nnls

    all_h = torch.stack([h.double().flatten() for h in statistics]).numpy()
    found = []
    for h in all_h:
        p = np.diag(variances) + (all_h - h) @ (all_h - h).T
        values, vectors = np.linalg.eigh(p / max(np.diag(p).mean(), np.finfo(float).tiny))
        root = np.sqrt(values.clip(min=0))[:, None] * vectors.T
        # With x = t a, the minimum of |root x|^2 + (sum x - 1)^2 over t grows with a' P a: nnls finds a multiple of a.
        x, _ = nnls(np.vstack([root, np.ones(len(p))]), np.append(np.zeros(len(p)), 1.0))
        found.append((x / x.sum()).tolist())
    return found
