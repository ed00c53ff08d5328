"""LG-FedAvg: keep the body on the client, average the head.

Paper: Liang et al., "Think Locally, Act Globally: Federated Learning with Local and Global Representations", 2020,
https://arxiv.org/abs/2001.01523; Algorithm 1 with a supervised local model: the client's steps on the local and the
global parameters together, along the gradient of the loss of their composition; the server's average of the global
parameters, weighted by samples, N_m / N.
Family: personal part of the network.
Personal: the body.
Sent: the head.
Evaluated: the client's personal body with the averaged head, the paper's local test.
Reported: the deployed model.
Deviations: our global model is the head alone; the paper chooses for each experiment how many layers it has. All
clients start with the same body; the authors' code starts with a model that FedAvg has trained and takes the plain
mean. Contrary to the paper, its command for CIFAR-10 shares the convolutions and makes the linear layers personal.
"""

from pflbench.core import Params, body, register

from .fedavg import FedAvg


@register("lg-fedavg")
class LGFedAvg(FedAvg):
    """FedAvg over the head alone."""

    def personal(self, model: Params) -> Params:
        return body(model)
