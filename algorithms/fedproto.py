"""FedProto: send the mean feature of each class, and pull the features of all clients towards the mean over clients.

Paper: Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022,
https://arxiv.org/abs/2105.00243; section Problem Setting: prototypes, and inference by the nearest one; Methodology:
their aggregation, equation (6), and the local loss, cross-entropy plus lambda times the distance to the global
prototypes.
Family: prototypes.
Personal: the whole model. Clients upload only prototypes and counts, with zeros for classes without samples.
Sent: prototypes and their counts.
Evaluated: the client's body f with argmin_j |f(x) - C_j| over the client's classes, where C_j are the global
prototypes. Its logits are -|f(x) - C_j|^2, and -inf for other classes. Without any C_j, the personal head predicts.
Reported: the deployed model.
Deviations: the distance in the loss is the mean square over features of a sample to its class's prototype, as in the
authors' code, where lambda is 1 (0.1 in its command for CIFAR-10); the paper takes class means. Weights are counts
alone; the paper also divides by the number of clients, which would shrink prototypes; the authors' code takes the plain
mean. Their code collects prototypes during training, ours computes them after it. A class that no client uploads in a
round keeps its prototype; in the paper all clients take part.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, inf

from pflbench.core import (
    Algorithm, Batch, Client, Message, Net, Params, Replica, Round, Setup, State, Upload, class_counts,
    merged_prototypes, need_features, prototypes, register, setting,
)  # fmt: skip


@register("fedproto")
class FedProto(Algorithm):
    """Local training that is pulled towards common prototypes."""

    lam: float = setting(1.0, "lambda, the weight of the distance to the prototypes", ge=0)

    def check(self, setup: Setup) -> None:
        need_features(self, setup)

    def personal(self, model: Params) -> Params:
        return model

    def init_server(self, setup: Setup) -> State:
        return {"mean": setup.zeros(setup.classes, setup.features), "count": setup.zeros(setup.classes)}

    def broadcast(self, round: Round, server: State, client: int) -> Message:
        return Message(server)

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        mean, known = received["mean"], received["count"] > 0

        def loss(net: Net, batch: Batch) -> Tensor:
            features = net.body(batch.x)
            distance: Tensor = (features - mean[batch.y]).square().mean(1) * known[batch.y] * self.lam
            return (F.cross_entropy(net.head(features), batch.y, reduction="none") + distance).mean()

        model = client.sgd(state["model"], loss=loss)
        count = class_counts(client).to(mean.dtype)
        return Message({"mean": prototypes(client, model), "count": count}), {"model": model}

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        return merged_prototypes(server, uploads)

    def personalise(self, client: Client, received: Message, state: State) -> State:
        known = (received["count"] > 0) & (class_counts(client) > 0)
        return {"model": state["model"], "mean": received["mean"], "known": known}

    def predict(self, net: Replica, deployed: State, x: Tensor) -> Tensor:
        if not deployed["known"].any():
            return net(deployed["model"], x)
        features = net.features(deployed["model"], x)
        distance: Tensor = (features[:, None] - deployed["mean"]).square().sum(2)
        return -distance.masked_fill(~deployed["known"], inf)
