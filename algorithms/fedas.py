"""FedAS: align the received body with the client's own features; weight the average by Fisher information.

Paper: Yang, Huang, Ye, "FedAS: Bridging Inconsistency in Personalized Federated Learning", CVPR 2024, pp. 11986-11995.
Parameter alignment: p_c is the mean feature of the client's samples of class c under its own previous model; the
received body phi descends the sum over the classes c in a batch of MSE(phi(x_c), p_c). Then body and own head train
together. Client synchronisation: the server's body is sum_k F_k phi_k / sum_j F_j over the round's uploads, where F_k
is the trace of client k's Fisher information after its training.
Personal: the head; a client also keeps the body it trained, for the prototypes and for its evaluation.
Evaluated: the client's own model after its last training; before its first participation, the initial one.
Deviations: the weight is the trace of the empirical Fisher information as the authors' code computes it: the sum over
batches of the squared norm of the gradient of the batch's mean loss, which grows with the client's samples. Aligned is
a copy of the received body; the authors' code trains the server's own, so that a client starts from what the clients
before it aligned: `alignment=in-place` does the same (the aligned body is then sent back, and counted).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from pflbench.core.algorithm import Message, Params, State, merge
from pflbench.core.client import Local
from pflbench.core.models import Net
from pflbench.core.registry import register
from pflbench.errors import Diverged
from pflbench.settings import setting

from .fedper import FedPer


@register("fedas")
class FedAS(FedPer):
    """FedPer with parameter alignment on the client and client synchronisation on the server."""

    @dataclass(frozen=True)
    class Hyper:
        alignment: str = setting("own-copy", "what is aligned", choices=("own-copy", "in-place", "off"))
        weighting: str = setting("fisher", "weights of the average", choices=("fisher", "samples"))
        align_lr: float = setting(0.01, "learning rate of the alignment", gt=0)
        align_epochs: int = setting(1, "epochs of the alignment", ge=1)
        align_batch_size: int = setting(16, "samples in a batch of the alignment", ge=1)

    @property
    def sequential(self) -> bool:  # type: ignore[override]
        return bool(self.h.alignment == "in-place")

    def init_client(self, model: Params) -> State:
        return {"model": model}

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        start = merge(state["model"], down["model"])
        if self.h.alignment != "off":
            start = local.sgd(
                start, epochs=self.h.align_epochs, lr=self.h.align_lr, momentum=0.0, weight_decay=0.0,
                batch_size=self.h.align_batch_size, only=self.is_shared, loss=pull(local.prototypes(state["model"])),
                purpose="align",
            )  # fmt: skip
        model = local.sgd(start)
        weight = fisher_trace(local, model) if self.h.weighting == "fisher" else local.n
        parts = {"model": self.shared(model)}
        if self.sequential:
            parts["aligned"] = self.shared(start)
        return Message(parts, weight), {"model": model}

    def relay(self, server: State, up: Message) -> State:
        return {"model": up["aligned"]}

    def aggregate(self, server: State, ups: Sequence[Message]) -> State:
        traces = [up.weight for up in ups]
        if not (isfinite(sum(traces)) and sum(traces) > 0):
            raise Diverged(f"the Fisher traces of the uploads, {traces}, have no positive finite sum; lower lr")
        return super().aggregate(server, ups)


def pull(targets: Tensor) -> Callable[[Net, Tensor, Tensor], Tensor]:
    """Return the alignment loss: summed over the classes of a batch, the MSE of features to the class's prototype."""

    def loss(net: Net, x: Tensor, y: Tensor) -> Tensor:
        distance: Tensor = (net.body(x) - targets[y]).square().mean(1)
        counts = y.bincount()[y].to(distance.dtype)
        return distance * (len(y) / counts)  # the mean over the batch is then the sum of the classes' means

    return loss


def fisher_trace(local: Local, model: Params) -> float:
    """Return the trace of the empirical Fisher information of `model`, over batches of the training data."""
    trace = torch.zeros((), dtype=torch.float64)
    for x, y in local.batches(purpose="fisher"):
        for g in local.grad(model, x, y).values():
            trace += torch.dot(g.flatten(), g.flatten())
    return float(trace)
