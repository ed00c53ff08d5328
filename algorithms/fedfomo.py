"""FedFomo: every client mixes its model with those of other clients that do better on its validation samples.

Paper: Zhang et al., "Personalized Federated Learning with First Order Model Optimization", ICLR 2021,
https://arxiv.org/abs/2012.08565, and the authors' code, https://github.com/NVlabs/FedFomo. Of client i, theta is the
model before its last training, and theta_n are the clients' last models, client i's included. With the weights
w_n = (L(theta) - L(theta_n)) / ||theta_n - theta||, and w*_n = max(w_n, 0) / sum_m max(w_m, 0), training starts from
theta + sum_n w*_n (theta_n - theta). Row i of the affinity matrix P grows by w_n; the server sends client i the models
that have the highest affinity; each of them is, with probability epsilon, a random one instead.
Family: mixture of models.
Personal: the whole model; the server keeps the last upload of every client.
Sent: up: the model and its affinities; down: up to `models` - 1 models of other clients.
Evaluated: the client's personal model after its last training; before its first participation, the initial model.
Reported: the deployed model, which is also the client's own model.
Deviations: L is the loss on a fixed share of the training samples. As in the authors' code, the client trains only on
the other samples, so on fewer than with other methods. In its first round, a client trains without mixing. P grows by
w_n; the authors' code divides w_n by |sum_m w_m| first. Our norm is Euclidean; theirs is L1 by default. In their code,
the server offers only the models of the last round's clients, and also averages of them.
"""

from collections.abc import Sequence
from math import inf

from pflbench.core import Algorithm, Client, Message, Round, Setup, State, Upload, average, distance, register, setting


@register("fedfomo")
class FedFomo(Algorithm):
    """First-order model optimisation."""

    models: int = setting(5, "models that a client weighs, its personal model included", ge=1)
    epsilon: float = setting(0.3, "probability that a random model is sent", ge=0, le=1)
    epsilon_decay: float = setting(0.05, "what epsilon loses with every round", ge=0)
    validation: float = setting(0.2, "share of the training samples that weigh models", gt=0, le=0.9)

    def init_server(self, setup: Setup) -> State:
        return {"models": {}, "affinity": {}}

    def init_client(self, setup: Setup) -> State:
        return {"start": setup.model, "model": setup.model, "affinity": {}}

    def broadcast(self, round: Round, server: State, client: int) -> Message:
        models, row = server["models"], server["affinity"].get(client, {})
        epsilon = self.epsilon - self.epsilon_decay * (round.number - 1)
        left = {other: row.get(other, 0.0) for other in models if other != client and client in models}
        chosen: list[int] = []
        for coin, pick in round.rng("models", client).rand(self.models - 1, 2)[: len(left)].tolist():
            pool = [other for other in left if coin < epsilon or left[other] == max(left.values())]
            chosen.append(pool[int(pick * len(pool))])
            del left[chosen[-1]]
        return Message({"models": {other: models[other] for other in chosen}})

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        validation, training = client.part(self.validation, stream="validation", every_round=False)
        models, start, row = {client.id: state["model"], **received["models"]}, state["start"], state["affinity"]
        loss, origin = validation.loss(start), client.setup.trainable(start)
        gaps = {n: distance(client.setup.trainable(m), origin) or inf for n, m in models.items()}
        gains = {n: (loss - validation.loss(m)) / gaps[n] for n, m in models.items()}
        if max(gains.values()) > 0:
            start = average(models.values(), [max(gain, 0.0) for gain in gains.values()])
        model = (training if training.n else client).sgd(start)  # a client with one sample uses it for both
        row = {**row, **{n: gains[n] + row.get(n, 0.0) for n in received["models"]}}
        return Message({"model": model, "affinity": row}), {"start": start, "model": model, "affinity": row}

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        return {
            "models": {**server["models"], **{upload.client: upload["model"] for upload in uploads}},
            "affinity": {**server["affinity"], **{upload.client: upload["affinity"] for upload in uploads}},
        }

    def serve(self, round: Round, server: State, client: int) -> Message:
        return Message({})
