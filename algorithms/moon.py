"""MOON: a contrastive loss pulls a client's features to the global model's and away from its previous model's.

Paper: Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021, https://arxiv.org/abs/2103.16257; Algorithm 1:
the client minimises cross-entropy + mu l_con, l_con = -log(e^{s_glob} / (e^{s_glob} + e^{s_prev})), where s is the
cosine of its features with those under the received model and under its previous local model, divided by tau.
Family: one global model.
Personal: nothing that is evaluated; a client keeps its previous local model.
Sent: the model.
Evaluated: the global model.
Reported: the deployed model.
Deviations: the paper's networks have a projection head before the classifier, and the paper compares its outputs. Our
networks have none, so that all methods train the same network: we compare the outputs of the body. Before its first
participation a client's previous model is the initial model; in the authors' code it is another random model. mu and
tau are the defaults of the authors' code; the paper tunes mu.
"""

import torch.nn.functional as F
from torch import Tensor

from pflbench.core import Batch, Client, Message, Net, Setup, State, need_features, register, setting

from .fedavg import FedAvg


@register("moon")
class Moon(FedAvg):
    """FedAvg with a model-contrastive loss."""

    mu: float = setting(1.0, "weight of the contrastive loss", ge=0)
    temperature: float = setting(0.5, "temperature tau of the contrastive loss", gt=0)

    def check(self, setup: Setup) -> None:
        need_features(self, setup)

    def init_client(self, setup: Setup) -> State:
        return {"previous": setup.model}

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        z_glob, z_prev = (client.features(model) for model in (received["model"], state["previous"]))

        def loss(net: Net, batch: Batch) -> Tensor:
            z = net.body(batch.x)
            gap = F.cosine_similarity(z, z_prev[batch.index]) - F.cosine_similarity(z, z_glob[batch.index])
            contrastive = F.softplus(gap / self.temperature)
            return (F.cross_entropy(net.head(z), batch.y, reduction="none") + self.mu * contrastive).mean()

        model = client.sgd(received["model"], loss=loss)
        return Message({"model": model}, weight=client.n), {"previous": model}
