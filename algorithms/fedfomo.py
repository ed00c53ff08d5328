"""FedFomo: every client mixes its model with those of others that do better on its own validation samples.

Paper: Zhang et al., "Personalized Federated Learning with First Order Model Optimization", ICLR 2021,
https://arxiv.org/abs/2012.08565, and the authors' code, https://github.com/NVlabs/FedFomo. Of client i, theta is the
model before its last training, and theta_n are the clients' last models, its own among them. With the weights
w_n = (L(theta) - L(theta_n)) / ||theta_n - theta||, and w*_n = max(w_n, 0) / sum_m max(w_m, 0), training goes on from
theta + sum_n w*_n (theta_n - theta). Row i of the affinity matrix P grows by w_n; the server sends client i the models
that have the highest affinity, or, each with probability epsilon, a random one.
Personal: the whole model; the server keeps the last one of every client.
Evaluated: the client's own model after its last training; before its first participation, the initial one.
Deviations: L is the loss on a fixed share of the training samples. As in the authors' code, the client trains on the
rest only, on fewer samples than with other methods. A client's first round is training alone. P grows by w_n, which the
authors' code divides by |sum_m w_m| first; the norm is Euclidean, which in their code is L1 by default. There, the
server offers the models of the last round's clients alone, and their averages as well.
"""

from dataclasses import dataclass
from math import inf

import torch

from pflbench.core.algorithm import Message, Params, State
from pflbench.core.client import Local
from pflbench.core.params import average, distance
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedamp import FedAMP


@register("fedfomo")
class FedFomo(FedAMP):
    """First-order model optimisation; its server keeps the clients' last uploads, as FedAMP's."""

    @dataclass(frozen=True)
    class Hyper:
        models: int = setting(5, "models that a client weighs, its own among them", ge=1)
        epsilon: float = setting(0.3, "probability that a random model is sent", ge=0, le=1)
        epsilon_decay: float = setting(0.05, "what epsilon loses with every round", ge=0)
        validation: float = setting(0.2, "share of the training samples that weigh models", gt=0, le=0.9)

    def init_client(self, model: Params) -> State:
        return {"start": model, "model": model, "affinity": {}}

    def broadcast(self, server: State, client: int) -> Message:
        epsilon = self.h.epsilon - self.h.epsilon_decay * float(server["rounds"]["done"])
        me, row = f"model {client}", server.get(f"affinity {client}", {})
        left = {part: float(row.get(part, 0)) for part in server if part.startswith("model ") and part != me}
        chosen: list[str] = []
        for coin, pick in server[f"draws {client}"]["draws"][: len(left)].tolist() if me in server else ():
            pool = [part for part in left if coin < epsilon or left[part] == max(left.values())]
            chosen.append(pool[int(pick * len(pool))])
            del left[chosen[-1]]
        return Message({part: server[part] for part in chosen})

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        validation, rest = local.parts(self.h.validation, purpose="validation", every_round=False)
        models, start, row = {"own": state["model"], **down.tensors}, state["start"], state["affinity"]
        loss, origin = validation.loss(start), local.trainable(start)
        gaps = {n: distance(local.trainable(m), origin) or inf for n, m in models.items()}
        gains = {n: (loss - validation.loss(m)) / gaps[n] for n, m in models.items()}
        if max(gains.values()) > 0:
            start = average(models.values(), [max(gain, 0.0) for gain in gains.values()])
        model = (rest if rest.n else local).sgd(start)  # a client with one sample trains on it, too
        row = row | {n: torch.tensor(gains[n], dtype=torch.float64) + row.get(n, 0) for n in down.tensors}
        draws = {"draws": torch.from_numpy(local.random("choice").rand(self.h.models - 1, 2))}
        up = Message({"model": model, "affinity": row, "draws": draws})
        return up, {"start": start, "model": model, "affinity": row}
