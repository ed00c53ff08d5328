"""FedBN: FedAvg whose clients keep their BatchNorm layers, because their features are distributed differently.

Paper: Li, Jiang, Zhang, Kamp, Dou, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR
2021, https://arxiv.org/abs/2102.07623; the algorithm FedBN: local training of the whole network, then the plain mean
over clients, with equal weights, of every layer that is not BatchNorm.
Personal: the parameters and the running statistics of BatchNorm layers; those are the layers with a `running_mean`.
Evaluated: the averaged layers with the client's own BatchNorm.
Deviations: in the paper all clients take part. Here the BatchNorm of who does not stays as it was under newer layers,
and is the initial one until its client first takes part.
"""

from pflbench.core.algorithm import Message, Params, State
from pflbench.core.client import Local
from pflbench.core.registry import register
from pflbench.errors import UsageError

from .fedavg import FedAvg


@register("fedbn")
class FedBN(FedAvg):
    """FedAvg but for BatchNorm layers."""

    def personal(self, model: Params) -> Params:
        layers = {layer for layer, _, name in (key.rpartition(".") for key in model) if name == "running_mean"}
        if not layers:
            raise UsageError("fedbn: the model has no BatchNorm; use --model resnet18, or --model cnn --norm batch")
        return {name: t for name, t in model.items() if name.rpartition(".")[0] in layers}

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        up, new = super().local_update(local, down, state)
        return Message(up.tensors), new
