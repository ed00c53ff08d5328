"""MOON: a contrastive loss pulls a client's features to the global model's and away from its own previous model's.

Paper: Li, He, Song, "Model-Contrastive Federated Learning", CVPR 2021, https://arxiv.org/abs/2103.16257; Algorithm 1:
the client minimises cross-entropy + mu l_con, l_con = -log(e^{s_glob} / (e^{s_glob} + e^{s_prev})), where s is the
cosine of its features with those under the received model and under its previous local model, divided by tau.
Personal: nothing that is evaluated; a client keeps its previous local model.
Evaluated: the global model.
Deviations: the paper's networks have a projection head before the classifier, and compare its outputs. Ours have none,
so that all methods train the same network: the outputs of the body are compared. Before its first participation a
client's previous model is the initial one; in the authors' code it is another random one. mu and tau are the defaults
of the authors' code; the paper tunes mu.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pflbench.core.algorithm import Message, Params, State
from pflbench.core.client import Local
from pflbench.core.models import Net
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedavg import FedAvg


@register("moon")
class Moon(FedAvg):
    """FedAvg with a model-contrastive loss."""

    @dataclass(frozen=True)
    class Hyper:
        mu: float = setting(1.0, "weight of the contrastive loss", ge=0)
        temperature: float = setting(0.5, "temperature tau of the contrastive loss", gt=0)

    def init_client(self, model: Params) -> State:
        return {"previous": model}

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        def loss(net: Net, x: Tensor, y: Tensor, z_glob: Tensor, z_prev: Tensor) -> Tensor:
            z = net.body(x)
            gap = F.cosine_similarity(z, z_prev) - F.cosine_similarity(z, z_glob)
            contrastive = F.softplus(gap / self.h.temperature)
            return F.cross_entropy(net.head(z), y, reduction="none") + float(self.h.mu) * contrastive

        beside = [local.features(model) for model in (down["model"], state["previous"])]
        model = local.sgd(down["model"], loss=loss, beside=beside)
        return Message({"model": model}, weight=local.n), {"previous": model}
