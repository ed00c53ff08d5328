"""Ditto: train a global model and, on every client, a personal model that a proximal term ties to the global one.

Paper: Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
https://arxiv.org/abs/2012.04221; Algorithm 1 with FedAvg as the solver of the global problem: the personal model v_k
descends F_k(v) + lambda/2 |v - w^t|^2, where w^t is the global model as it was received.
Family: personal model beside the global one.
Personal: a second model, v_k, trained on the client alone.
Sent: the global model.
Evaluated: the client's v_k; before its first participation, the initial model. The global model, too.
Reported: the deployed model, which is also the client's own model.
Deviations: v_k trains for the protocol's local epochs, like w, but on other batches; in the authors' code both use the
same batches. Clients are sampled uniformly and weighted by their samples; the authors' example samples them in
proportion and takes the plain mean. lambda comes from that example; the paper chooses it for each client by validation.
"""

from pflbench.core import Client, Message, Setup, State, proximal, register, setting

from .fedavg import FedAvg


@register("ditto")
class Ditto(FedAvg):
    """FedAvg, with a personal model on every client."""

    lam: float = setting(1.0, "lambda: how strongly the personal model is tied to the global one", ge=0)

    def init_client(self, setup: Setup) -> State:
        return {"model": setup.model}

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        upload = Message({"model": client.sgd(received["model"])}, weight=client.n)
        pull = proximal(received["model"], self.lam)
        return upload, {"model": client.sgd(state["model"], transform=pull, stream="personal")}
