"""FedBN: FedAvg whose clients keep their BatchNorm layers, because their features are distributed differently.

Paper: Li, Jiang, Zhang, Kamp, Dou, "FedBN: Federated Learning on Non-IID Features via Local Batch Normalization", ICLR
2021, https://arxiv.org/abs/2102.07623; the algorithm FedBN: local training of the whole network, then the plain mean
over clients, with equal weights, of every layer that is not BatchNorm.
Family: personal part of the network.
Personal: the parameters and the running statistics of BatchNorm layers, which are the layers with a `running_mean`.
Sent: the model without BatchNorm.
Evaluated: the averaged layers with the client's personal BatchNorm.
Reported: the deployed model.
Deviations: in the paper all clients take part. Here an absent client combines its last BatchNorm with newer shared
layers; before its first participation, its BatchNorm is the initial one.
"""

from collections.abc import Sequence

from pflbench.core import Params, Round, Setup, State, Upload, UsageError, mean, register

from .fedavg import FedAvg


@register("fedbn")
class FedBN(FedAvg):
    """FedAvg over all layers but BatchNorm."""

    def check(self, setup: Setup) -> None:
        if not self.personal(setup.model):
            raise UsageError("fedbn: the model has no BatchNorm; use --model resnet18, or --model cnn --norm batch")

    def personal(self, model: Params) -> Params:
        layers = {layer for layer, _, name in (key.rpartition(".") for key in model) if name == "running_mean"}
        return {name: t for name, t in model.items() if name.rpartition(".")[0] in layers}

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        return {"model": mean(uploads, "model", equal=True)}
