"""FedProto: send the mean feature of each class, and pull the features of all clients towards the mean over clients.

Paper: Tan et al., "FedProto: Federated Prototype Learning across Heterogeneous Clients", AAAI 2022,
https://arxiv.org/abs/2105.00243; section Problem Setting: prototypes, and inference by the nearest one; Methodology:
their aggregation, equation (6), and the local loss, cross-entropy plus lambda times the distance to the global
prototypes.
Personal: the whole model. Sent are prototypes and their counts alone; zeros for classes that a client does not have.
Evaluated: the client's body with argmin_j |f(x) - C_j| over the client's classes, C_j the global prototypes: a linear
head, 2 f(x) C_j - |C_j|^2, whose cross-entropy is `test_loss`, huge for other classes; without any C_j, its own head.
Deviations: the distance is the mean square over features of a sample to its class's prototype, as in the authors' code,
where lambda is 1 (0.1 in its command for CIFAR-10); the paper takes class means. Weights are counts alone; the paper
also divides by the number of clients, which would shrink prototypes; the authors' code takes the plain mean, of
prototypes gathered while the weights move, ours after training. What nobody uploads in a round stays as it was; in the
paper all clients take part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pflbench.core.algorithm import Message, Params, State
from pflbench.core.client import Local
from pflbench.core.models import Net
from pflbench.core.params import linear_head
from pflbench.core.registry import register
from pflbench.errors import UsageError
from pflbench.settings import setting

from .local import Local as Alone


@register("fedproto")
class FedProto(Alone):
    """Local training that is pulled towards common prototypes."""

    @dataclass(frozen=True)
    class Hyper:
        lam: float = setting(1.0, "lambda, the weight of the distance to the prototypes", ge=0)

    def init_server(self, model: Params) -> State:
        if not linear_head(model) or "head.bias" not in model:
            raise UsageError("fedproto: the network's head must be one nn.Linear with a bias, which prototypes replace")
        return {"prototypes": {"mean": 0 * model["head.weight"], "count": 0 * model["head.bias"]}}

    def broadcast(self, server: State, client: int) -> Message:
        return Message(server)

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        mean, known = down["prototypes"]["mean"], down["prototypes"]["count"] > 0

        def loss(net: Net, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            features = net.body(x)
            distance: torch.Tensor = (features - mean[y]).square().mean(1) * known[y] * self.h.lam
            return torch.nn.functional.cross_entropy(net.head(features), y, reduction="none") + distance

        model = local.sgd(state["model"], loss=loss)
        own = {"mean": local.prototypes(model), "count": local.class_counts.to(mean.dtype)}
        return Message({"prototypes": own}), {"model": model}

    def aggregate(self, server: State, ups: Sequence[Message]) -> State:
        before = server["prototypes"]
        mean, count = before["mean"].double(), 0 * before["count"].double()
        for up in (up["prototypes"] for up in ups):  # a running mean: a class without uploads keeps its own
            count = count + up["count"]
            mean = mean + (up["mean"] - mean) * (up["count"] / count.clamp(min=1))[:, None]
        count = torch.where(count > 0, count, before["count"])
        return {"prototypes": {"mean": mean.to(before["mean"].dtype), "count": count.to(before["count"].dtype)}}

    def personalised(self, local: Local, down: Message, state: State) -> Params:
        mean, possible = down["prototypes"]["mean"], (down["prototypes"]["count"] > 0) & (local.class_counts > 0)
        if not possible.any():
            return state["model"]
        bias = torch.where(possible, -mean.square().sum(1), -1e9)  # -1e9 is below any other
        return state["model"] | {"head.weight": 2 * mean, "head.bias": bias}
