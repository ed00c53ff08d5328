"""FedRep: train the head on the received body, then the body under that head.

Paper: Collins et al., "Exploiting Shared Representations for Personalized Federated Learning", ICML 2021,
https://arxiv.org/abs/2102.07078; Algorithm 1: `head_epochs` of updates of h_i with the representation phi fixed, then
the update of phi with h_i fixed; the server takes the plain mean of the phi_i, with equal weights.
Family: personal part of the network.
Personal: the head.
Sent: the body.
Evaluated: the averaged body with the client's personal head.
Reported: the deployed model.
Deviations: none. The body trains for the protocol's local epochs; the paper's experiments use 10 for the head.
"""

from dataclasses import replace

from pflbench.core import Client, Message, State, register, setting

from .fedper import FedPer


@register("fedrep")
class FedRep(FedPer):
    """FedPer with head and body trained in turn."""

    head_epochs: int = setting(10, "epochs of the head, before the body's", ge=0)

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        model = {**received["model"], **state["model"]}
        first = replace(client.protocol, epochs=self.head_epochs)
        model = client.sgd(model, config=first, trainable=self.personal(model), stream="head")
        model = client.sgd(model, trainable=self.shared(model))
        return Message({"model": self.shared(model)}), {"model": self.personal(model)}
