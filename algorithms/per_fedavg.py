"""Per-FedAvg: learn an initial model that every client adapts to its data with one gradient step.

Paper: Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
Meta-Learning Approach", NeurIPS 2020, https://arxiv.org/abs/2002.07948; Algorithm 1 (Per-FedAvg), which descends the
mean of F_i(w) = f_i(w - alpha grad f_i(w)), in its two approximations: FO leaves out the Hessian, HF takes its product
with a vector from the difference of two gradients. The batches of a step are independent; the server takes the plain
mean. beta is the protocol's learning rate.
Personal: nothing between rounds.
Evaluated: the received model after one step alpha grad f_i, over all of the client's training data (with drop_last,
less the last incomplete batch), in evaluation mode. The received model as it is, too, as the global one.
Deviations: steps are counted in epochs: a batch serves one of the two (FO) or three (HF) gradients of one step. The
Hessian itself is not computed; HF, the nearer to it, is the default. Its difference of gradients is always taken in the
network's own precision: bf16 would round it away. alpha and delta have the values of public re-implementations.
"""

from dataclasses import dataclass

from pflbench.core.algorithm import Message, Params, State
from pflbench.core.client import Batch, Local
from pflbench.core.params import average
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedavg import FedAvg


@register("per-fedavg")
class PerFedAvg(FedAvg):
    """Federated averaging of models that descend the loss after adaptation."""

    @dataclass(frozen=True)
    class Hyper:
        variant: str = setting("hf", "hf: Hessian-free; fo: first-order", choices=("hf", "fo"))
        alpha: float = setting(0.01, "learning rate of the adaptation", ge=0)
        delta: float = setting(0.001, "hf: step of the difference of gradients, in both directions", gt=0)

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        alpha, delta = self.h.alpha, self.h.delta

        def direction(w: Params, first: Batch, second: Batch, *third: Batch) -> Params:
            adapted = move(w, local.grad(w, *first), -alpha)
            meta = local.grad(adapted, *second)
            if not third:
                return meta
            ahead, behind = (local.grad(move(w, meta, by), *third[0], exact=True) for by in (delta, -delta))
            hessian_meta = {name: (ahead[name] - behind[name]) / (2 * delta) for name in meta}
            return move(meta, hessian_meta, -alpha)

        model = local.descend(down["model"], direction, batches=2 if self.h.variant == "fo" else 3)
        return Message({"model": model}), {"model": {}}

    def personalised(self, local: Local, down: Message, state: State) -> Params:
        batches = list(local.batches(purpose="adapt"))
        grads = (local.grad(down["model"], *batch) for batch in batches)
        return move(down["model"], average(grads, [len(y) for _, y in batches]), -self.h.alpha)


def move(at: Params, along: Params, by: float) -> Params:
    """Return `at` + `by` `along`; what `along` has not stays."""
    return at | {name: at[name].add(t, alpha=by) for name, t in along.items()}
