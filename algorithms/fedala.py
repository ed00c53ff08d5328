"""FedALA: every client learns an element-wise mixture of the received and its personal model, and starts from it.

Paper: Zhang et al., "FedALA: Adaptive Local Aggregation for Personalized Federated Learning", AAAI 2023,
https://arxiv.org/abs/2212.01197; Algorithm 1, whose lines 6 to 16 are the local aggregation: the last layers become
personal + (received - personal) * W, the other layers are the received ones. W starts as ones. SGD trains it on a
random share of the samples and clips it to [0, 1]: until it converges the first time, and for one epoch in every later
round.
Family: mixture of models.
Personal: W, and the client's model after training, which is also uploaded.
Sent: the model.
Evaluated: the client's personal model after its last training; before its first participation, the initial model.
Reported: the deployed model, which is also the client's own model.
Deviations: W has converged, as in the authors' code, when the last ten losses have a standard deviation below 0.1; our
losses are over the share, theirs over the last batch, and we stop at 100 epochs. Their code also mixes for absent
clients, and evaluates mixtures. As in their code, a received model that equals the client's is not mixed, and the
training of W uses all batches, even if the protocol drops incomplete ones.
"""

from dataclasses import replace

import torch

from pflbench.core import Batch, Client, Message, Params, Setup, State, register, setting

from .fedavg import FedAvg


@register("fedala")
class FedALA(FedAvg):
    """FedAvg with adaptive local aggregation."""

    eta: float = setting(1.0, "learning rate of the weights", gt=0)
    share: float = setting(0.8, "share of the samples on which the weights are trained", gt=0, le=1)
    layers: int = setting(1, "how many of the last layers are mixed", ge=1)

    def init_client(self, setup: Setup) -> State:
        return {"model": setup.model, "weights": {}}

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        start, weights = self.mix(client, received["model"], state["model"], state["weights"])
        model = client.sgd(start)
        return Message({"model": model}, weight=client.n), {"model": model, "weights": weights}

    def mix(self, client: Client, received: Params, personal: Params, weights: Params) -> tuple[Params, Params]:
        """Return the mixture and its newly trained weights; `weights` is empty the first time."""
        if all(torch.equal(t, personal[name]) for name, t in received.items()):
            return received, weights
        layer = {name: name.rpartition(".")[0] for name in client.setup.trainable(received)}
        last = list(dict.fromkeys(layer.values()))[-self.layers :]
        gap = {name: received[name] - personal[name] for name in layer if layer[name] in last}
        some, _ = client.part(self.share, stream="weights")
        config = replace(client.protocol, epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, drop_last=False)

        def mixed(w: Params) -> Params:
            return {**received, **{name: personal[name] + by * w[name] for name, by in gap.items()}}

        def direction(w: Params, batch: Batch) -> Params:
            grad = some.grad(mixed(w), batch, trainable=gap, train_mode=True)
            return {name: t - (t - self.eta * grad[name] * gap[name]).clamp(0, 1) for name, t in w.items()}

        w, losses = weights or {name: torch.ones_like(t) for name, t in gap.items()}, list[float]()
        for _ in range(1 if weights else 100):
            w = some.descend(w, direction, config=config, stream="weights")
            losses += [] if weights else [some.loss(mixed(w))]
            if len(losses) > 10 and torch.tensor(losses[-10:]).std(correction=0) < 0.1:
                break
        return mixed(w), w
