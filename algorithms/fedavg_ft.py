"""FedAvg-FT: FedAvg, whose global model every client fine-tunes on its own data before it is evaluated.

Paper: McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629, with the fine-tuning of Wang et al., "Federated
Evaluation of On-device Personalization", 2019, https://arxiv.org/abs/1910.10252, section 2: the personalised model is
the global one after training on the client; it is not sent back.
Personal: nothing between rounds.
Evaluated: the global model after `ft_epochs` epochs of the protocol's SGD on the client's training data.
Deviations: the paper tunes the fine-tuning per task and gives no default; ours is one epoch at the protocol's rate.
"""

from dataclasses import dataclass

from pflbench.core.algorithm import Message, Params, State
from pflbench.core.client import Local
from pflbench.core.registry import register
from pflbench.settings import setting

from .fedavg import FedAvg


@register("fedavg-ft")
class FedAvgFT(FedAvg):
    """FedAvg with fine-tuning before evaluation."""

    @dataclass(frozen=True)
    class Hyper:
        ft_epochs: int = setting(1, "epochs of fine-tuning before each evaluation", ge=0)

    def is_tuned(self, name: str) -> bool:
        """Return whether fine-tuning changes the parameter (or buffer) `name`."""
        return True

    def personalised(self, local: Local, down: Message, state: State) -> Params:
        received = super().personalised(local, down, state)
        return local.sgd(received, epochs=self.h.ft_epochs, only=self.is_tuned, purpose="fine-tune")
