"""FedAS: align the received body with the client's features; weight the average by Fisher information.

Paper: Yang, Huang, Ye, "FedAS: Bridging Inconsistency in Personalized Federated Learning", CVPR 2024, pp. 11986-11995.
Parameter alignment: p_c is the mean feature of the client's samples of class c under its previous model; the received
body phi descends the sum over the classes c in a batch of MSE(phi(x_c), p_c). Then body and personal head train
together. Client synchronisation: the server's body is sum_k F_k phi_k / sum_j F_j over the round's uploads, where F_k
is the trace of client k's Fisher information after its training.
Family: personal part of the network.
Personal: the head; a client also keeps the body it trained, for the prototypes and for its evaluation.
Sent: the body; the trace is the upload's weight.
Evaluated: the client's personal model after its last training; before its first participation, the initial model.
Reported: the deployed model, which is also the client's own model.
Deviations: the weight is the trace of the empirical Fisher information as the authors' code computes it: the sum over
batches of the squared norm of the gradient of the batch's mean loss, which grows with the client's samples. We align a
copy of the received body. The authors' code aligns the server's model in place, so each client starts from the body
that earlier clients have already aligned: `alignment=in-place` does the same (the aligned body is then sent back, and
counted). Prototypes use all samples, as in the paper; the authors' loader drops the last incomplete batch. Buffers of
BatchNorm are averaged here; the authors' code neither sends nor averages them.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from pflbench.core import (
    Batch, Client, Cohort, Diverged, Loss, Message, Net, Params, Round, Setup, State, Upload, need_features,
    numbers, prototypes, register, setting,
)  # fmt: skip

from .fedper import FedPer


@register("fedas")
class FedAS(FedPer):
    """FedPer with parameter alignment on the client and client synchronisation on the server."""

    alignment: str = setting("own-copy", "what is aligned", choices=("own-copy", "in-place", "off"))
    weighting: str = setting("fisher", "weights of the average", choices=("fisher", "samples"))
    align_lr: float = setting(0.01, "learning rate of the alignment", gt=0)
    align_epochs: int = setting(1, "epochs of the alignment", ge=1)
    align_batch_size: int = setting(16, "samples in a batch of the alignment", ge=1)

    def check(self, setup: Setup) -> None:
        if self.alignment != "off":
            need_features(self, setup)

    def init_client(self, setup: Setup) -> State:
        return {"model": setup.model}

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        start = {**state["model"], **received["model"]}
        if self.alignment != "off":
            config = replace(
                client.protocol, epochs=self.align_epochs, lr=self.align_lr, batch_size=self.align_batch_size,
                momentum=0.0, weight_decay=0.0,
            )  # fmt: skip
            loss = to_prototypes(prototypes(client, state["model"]))
            start = client.sgd(start, loss=loss, trainable=received["model"], config=config, stream="align")
        model = client.sgd(start)
        weight = fisher_trace(client, model) if self.weighting == "fisher" else client.n
        aligned = {"aligned": self.shared(start)} if self.alignment == "in-place" else {}
        return Message({"model": self.shared(model), **aligned}, weight), {"model": model}

    def play(self, round: Round, server: State, cohort: Cohort) -> State:
        if self.alignment != "in-place":
            return super().play(round, server, cohort)
        uploads: list[Upload] = []
        for client in round.cohort:
            uploads += cohort.update(server, [client])
            server = {"model": uploads[-1]["aligned"]}
        return self.aggregate(round, server, uploads)

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        traces = [upload.weight for upload in uploads]
        if not (isfinite(sum(traces)) and sum(traces) > 0):
            raise Diverged(f"the Fisher traces of the uploads, {traces}, have no positive finite sum; lower lr")
        return super().aggregate(round, server, uploads)


def to_prototypes(means: Tensor) -> Loss:
    """Return the alignment loss: the MSE between features and `means`, summed over the classes in a batch."""

    def loss(net: Net, batch: Batch) -> Tensor:
        distance = (net.body(batch.x) - means[batch.y]).square().mean(1)
        counts = (batch.y[:, None] == batch.y).sum(1).to(distance.dtype)  # of the sample's class
        # A class's mean counts once: sum_c 1/n_c sum_i d_i, written as a mean over the batch to keep the bits of 0.1.
        value: Tensor = (distance * (len(batch) / counts)).mean()
        return value

    return loss


def fisher_trace(client: Client, model: Params) -> float:
    """Return the trace of the empirical Fisher information of `model`, over batches of the training data."""
    batches = client.batches(stream="fisher")
    squares = [torch.dot(g.flatten(), g.flatten()) for batch in batches for g in client.grad(model, batch).values()]
    return float(sum(numbers(squares)))
