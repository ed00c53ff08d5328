"""FedBABU: train and average the body alone; the head stays as it was initialised, until the evaluation fine-tunes it.

Paper: Oh, Kim, Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR 2022,
https://arxiv.org/abs/2106.06042; Algorithm 1: body update (the head's learning rate is 0) and body aggregation; then
personalisation by fine-tuning, for 5 epochs in the paper's tables.
Family: personal part of the network.
Personal: nothing between rounds; the head is never sent, because it is the same for all clients and never changes.
Sent: the body.
Evaluated: the averaged body and the initial head, after `ft_epochs` epochs of the protocol's SGD on the client's
training data, at the round's learning rate.
Reported: the deployed model.
Deviations: `ft_part` is by default the whole network, as in the authors' evaluation code (a notebook), which tunes body
and head at one learning rate; the paper's abstract speaks of the head (`ft_part=head`). The average is weighted by
samples; the authors' code takes the plain mean, and its clients have equal numbers of samples.
"""

from pflbench.core import Client, Message, Params, State, body, head, register, setting

from .fedavg_ft import FedAvgFT
from .fedper import FedPer


@register("fedbabu")
class FedBABU(FedPer, FedAvgFT):
    """FedPer whose head is not trained, with fine-tuning before evaluation."""

    ft_epochs: int = setting(5, "epochs of fine-tuning before each evaluation", ge=0)
    ft_part: str = setting("full", "what is fine-tuned", choices=("full", "head", "body"))

    def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
        model = {**received["model"], **state["model"]}
        model = client.sgd(model, trainable=self.shared(model))
        return Message({"model": self.shared(model)}, weight=client.n), state

    def tuned(self, model: Params) -> Params:
        return {"full": model, "head": head(model), "body": body(model)}[self.ft_part]
