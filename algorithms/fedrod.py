"""Fed-RoD: a generic head, trained as if classes were balanced, and a personalised head on top of it.

Paper: Chen, Chao, "On Bridging Generic and Personalized Federated Learning for Image Classification", ICLR 2022,
https://arxiv.org/abs/2107.00778; Fed-RoD with a linear personalised head and the balanced softmax: of client m, with
N_c samples of class c, the generic logits g(z) minimise -log(N_y^gamma exp g_y / sum_c N_c^gamma exp g_c), and the
personalised head h_m minimises the cross-entropy of g(z) + h_m(z), with g and z held fixed.
Personal: the personalised head.
Evaluated: the received generic model and the client's own head. Both heads are linear, so the sum of their logits is
one linear head with the sum of their weights. The received model alone is the global model.
Deviations: the personalised head starts at zero, so that an untrained client has the generic model; other suites start
it as a copy of the initial head. A class that the client lacks has weight 0 in the sum above, which is log 0 nowhere.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pflbench.core.algorithm import Message, Params, State, merge
from pflbench.core.client import Local
from pflbench.core.models import Net
from pflbench.core.params import linear_head
from pflbench.core.registry import register
from pflbench.errors import UsageError
from pflbench.settings import setting

from .fedavg import FedAvg


@register("fedrod")
class FedRoD(FedAvg):
    """FedAvg with a balanced loss, and a personalised head that has no influence on it."""

    @dataclass(frozen=True)
    class Hyper:
        gamma: float = setting(1.0, "exponent of the class counts in the balanced softmax; 0: cross-entropy", ge=0)

    def is_personal(self, name: str) -> bool:
        return name.startswith("personal.")

    def init_client(self, model: Params) -> State:
        if not linear_head(model):
            raise UsageError("fedrod: the network's head must be one nn.Linear, so that two heads sum to one")
        head = {name: t for name, t in model.items() if name.startswith("head.")}
        return {"model": {name.replace("head.", "personal."): torch.zeros_like(t) for name, t in head.items()}}

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        counts = local.y.bincount(minlength=local.classes).to(down["model"]["head.weight"].dtype)
        prior = counts.pow(self.h.gamma).log()

        def loss(net: Net, x: Tensor, y: Tensor) -> Tensor:
            z = net.body(x)
            generic = net.head(z)
            own = F.linear(z.detach(), net.free["personal.weight"], net.free.get("personal.bias"))
            balanced = F.cross_entropy(generic + prior, y, reduction="none")
            return balanced + F.cross_entropy(generic.detach() + own, y, reduction="none")

        model = local.sgd(merge(down["model"], state["model"]), loss=loss)
        return Message({"model": self.shared(model)}, weight=local.n), {"model": self.personal(model)}

    def personalised(self, local: Local, down: Message, state: State) -> Params:
        own = {name.replace("personal.", "head."): t for name, t in state["model"].items()}
        return merge(down["model"], {name: down["model"][name] + t for name, t in own.items()})
