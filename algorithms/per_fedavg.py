"""Per-FedAvg: learn an initial model that every client adapts to its data with one gradient step.

Paper: Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic
Meta-Learning Approach", NeurIPS 2020, https://arxiv.org/abs/2002.07948; Algorithm 1 (Per-FedAvg), which descends the
mean of F_i(w) = f_i(w - alpha grad f_i(w)). Its gradient has the product of a Hessian with a vector: `exact` computes
it by double backward; the paper's approximation `hf` takes the difference of two gradients, `fo` leaves the Hessian
out. The batches of a step are independent; the server takes the plain mean. beta is the protocol's learning rate.
Family: fine-tuning and meta-learning.
Personal: nothing between rounds.
Sent: the model.
Evaluated: the received model after one step alpha grad f_i, over all of the client's training data (with drop_last,
without the last incomplete batch), in evaluation mode. The received model itself is the global model.
Reported: the deployed model.
Deviations: steps are counted in epochs: a batch serves one of the two (fo) or three (hf, exact) gradients of one step.
On a network of ReLUs the difference of gradients crosses kinks: at the default delta it missed the exact product by a
median of 76 % over 12 draws. hf is the default nevertheless, because the paper's experiments use it; exact follows the
equation. Neither hf nor exact uses bf16, which would lose the difference. alpha and delta have the values of public
re-implementations.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pflbench.core import Batch, Client, Message, Net, Params, State, average, cross_entropy, register, setting

from .fedavg import FedAvg


@register("per-fedavg")
class PerFedAvg(FedAvg):
    """Federated averaging of models that descend the loss after adaptation."""

    variant: str = setting(
        "hf", "hf: Hessian-free; fo: first-order; exact: with the Hessian", choices=("hf", "fo", "exact")
    )
    alpha: float = setting(0.01, "learning rate of the adaptation", ge=0)
    delta: float = setting(0.001, "hf: step of the difference of gradients, in both directions", gt=0)

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        def direction(w: Params, first: Batch, second: Batch, *third: Batch) -> Params:
            adapted = move(w, client.grad(w, first, train_mode=True), -self.alpha)
            meta = client.grad(adapted, second, train_mode=True)
            if not third:
                return meta
            product = self.exact_product if self.variant == "exact" else self.difference
            return move(meta, product(client, w, meta, third[0]), -self.alpha)

        model = client.descend(received["model"], direction, batches=2 if self.variant == "fo" else 3)
        return Message({"model": model}), state

    def difference(self, client: Client, w: Params, vector: Params, batch: Batch) -> Params:
        """Return the Hessian of the loss at `w` times `vector`, from two gradients along it."""
        ahead, behind = (
            client.grad(move(w, vector, by), batch, train_mode=True, exact=True) for by in (self.delta, -self.delta)
        )
        return {name: (ahead[name] - behind[name]) / (2 * self.delta) for name in vector}

    def exact_product(self, client: Client, w: Params, vector: Params, batch: Batch) -> Params:
        """Return the Hessian of the loss at `w` times `vector`: the gradient of the slope along `vector`."""

        def slope(net: Net, batch: Batch) -> Tensor:
            named = dict(net.named_parameters())
            grads = torch.autograd.grad(
                cross_entropy(net, batch),
                list(named.values()),
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            return torch.stack([(g * vector[name]).sum() for name, g in zip(named, grads, strict=True)]).sum()

        # With another stream, the loss of this batch is not part of the training loss.
        return client.grad(w, replace(batch, stream="hessian"), loss=slope, train_mode=True, exact=True)

    def personalise(self, client: Client, received: Message, state: State) -> State:
        batches = list(client.batches(stream="adapt"))
        grads = (client.grad(received["model"], batch) for batch in batches)
        mean = average(grads, [len(batch) for batch in batches])
        return {"model": move(received["model"], mean, -self.alpha)}


def move(at: Params, along: Params, by: float) -> Params:
    """Return `at` + `by` * `along`; parameters that are not in `along` do not change."""
    return {**at, **{name: at[name].add(t, alpha=by) for name, t in along.items()}}
