"""FedBABU: train and average the body alone; the head stays as it was initialised, until the evaluation fine-tunes it.

Paper: Oh, Kim, Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR 2022,
https://arxiv.org/abs/2106.06042; Algorithm 1: body update (the head's learning rate is 0) and body aggregation; then
personalisation by fine-tuning, for 5 epochs in the paper's tables.
Personal: nothing between rounds; the head is never sent, for it is the same for all and never changes.
Evaluated: the averaged body and the initial head, after `ft_epochs` epochs of the protocol's SGD on the client's
training data, at the round's rate.
Deviations: `ft_part` is the whole network, as in the authors' evaluation code (a notebook), which tunes body and head
at one rate; the paper's abstract speaks of the head (`ft_part=head`). The average is weighted by samples; the authors'
code, whose clients have equally many, takes the plain mean.
"""

from dataclasses import dataclass

from pflbench.core.algorithm import Message, State, merge
from pflbench.core.client import Local
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedavg_ft import FedAvgFT
from .fedper import FedPer


@register("fedbabu")
class FedBABU(FedPer, FedAvgFT):
    """FedPer whose head is not trained, with fine-tuning before evaluation."""

    @dataclass(frozen=True)
    class Hyper:
        ft_epochs: int = setting(5, "epochs of fine-tuning before each evaluation", ge=0)
        ft_part: str = setting("full", "what is fine-tuned", choices=("full", "head", "body"))

    def local_update(self, local: Local, down: Message, state: State) -> tuple[Message, State]:
        model = local.sgd(merge(down["model"], state["model"]), only=self.is_shared)
        return Message({"model": self.shared(model)}, weight=local.n), state

    def is_tuned(self, name: str) -> bool:
        return bool(self.h.ft_part == "full" or (self.h.ft_part == "head") == self.is_personal(name))
