"""FedPer: keep the head on the client, average the body.

Paper: Arivazhagan et al., "Federated Learning with Personalization Layers", 2019, https://arxiv.org/abs/1912.00818;
Algorithm 1 (client: SGD on base and personalisation layers together) and Algorithm 2 (server: the base layers' average,
weighted by samples).
Family: personal part of the network.
Personal: the head.
Sent: the body.
Evaluated: the averaged body with the client's personal head.
Reported: the deployed model.
"""

from pflbench.core import Params, head, register

from .fedavg import FedAvg


@register("fedper")
class FedPer(FedAvg):
    """FedAvg over the body alone."""

    def personal(self, model: Params) -> Params:
        return head(model)
