"""FedALA: a client starts from an element-wise mixture, which it learns, of the received model and its own.

Paper: Zhang et al., "FedALA: Adaptive Local Aggregation for Personalized Federated Learning", AAAI 2023,
https://arxiv.org/abs/2212.01197; Algorithm 1, whose lines 6 to 16 are the local aggregation: the last layers become
own + (received - own) * W, the others are the received ones. W, ones at first, is trained by SGD on a random share of
the samples and clipped to [0, 1]: until it converges the first time, for one epoch from then on.
Personal: W, and the client's model after training, which is also uploaded.
Evaluated: the client's own model after its last training; before its first participation, the initial one.
Deviations: W has converged, as in the authors' code, when the last ten losses have a standard deviation below 0.1; ours
are over the share, theirs of a last batch, and we stop at 100 epochs. Their code mixes for those that do not take part,
too, and tests mixtures. As there, a received model that is the client's own is not mixed.
"""

from dataclasses import dataclass

import torch

from pflbench.core.algorithm import Message, Params, State
from pflbench.core.client import Batch, Local
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedavg import FedAvg


@register("fedala")
class FedALA(FedAvg):
    """FedAvg with adaptive local aggregation."""

    @dataclass(frozen=True)
    class Hyper:
        eta: float = setting(1.0, "learning rate of the weights", gt=0)
        share: float = setting(0.8, "share of the samples on which the weights are trained", gt=0, le=1)
        layers: int = setting(1, "how many of the last layers are mixed", ge=1)

    def init_client(self, model: Params) -> State:
        return {"model": model, "weights": {}}

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        start, weights = self.mix(local, down["model"], state["model"], state["weights"])
        model = local.sgd(start)
        return Message({"model": model}, weight=local.n), {"model": model, "weights": weights}

    def mix(self, local: Local, received: Params, own: Params, weights: Params) -> tuple[Params, Params]:
        """Return the mixture and its weights, trained further; `weights` is empty the first time."""
        if all(torch.equal(t, own[name]) for name, t in received.items()):
            return received, weights
        of = {name: name.rpartition(".")[0] for name in local.trainable(received)}  # the layer of each parameter
        last = list(dict.fromkeys(of.values()))[-self.h.layers :]
        gap = {name: received[name] - own[name] for name in of if of[name] in last}
        some, _ = local.parts(self.h.share, purpose="weights")

        def mixed(w: Params) -> Params:
            return received | {name: own[name] + by * w[name] for name, by in gap.items()}

        def direction(w: Params, batch: Batch) -> Params:
            grad = some.grad(mixed(w), *batch, only=gap.__contains__)
            return {name: t - (t - self.h.eta * grad[name] * gap[name]).clamp(0, 1) for name, t in w.items()}

        w, losses = weights or {name: torch.ones_like(t) for name, t in gap.items()}, list[float]()
        for _ in range(1 if weights else 100):
            w = some.descend(w, direction, epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, purpose="weights")
            losses += [] if weights else [some.loss(mixed(w))]
            if len(losses) > 10 and torch.tensor(losses[-10:]).std(correction=0) < 0.1:
                break
        return mixed(w), w
