"""FedAvg-FT: FedAvg; before an evaluation, every client fine-tunes the global model on its data.

Paper: McMahan et al., AISTATS 2017, https://arxiv.org/abs/1602.05629, with the fine-tuning of Wang et al., "Federated
Evaluation of On-device Personalization", 2019, https://arxiv.org/abs/1910.10252, section 2: the personalised model is
the global model after training on the client; it is not uploaded.
Family: fine-tuning and meta-learning.
Personal: nothing between rounds.
Sent: the model.
Evaluated: the global model after `ft_epochs` epochs of the protocol's SGD on the client's training data.
Reported: the deployed model.
Deviations: the paper tunes the fine-tuning per task and gives no default; ours is one epoch at the protocol's learning
rate.
"""

from dataclasses import replace

from pflbench.core import Client, Message, Params, State, register, setting

from .fedavg import FedAvg


@register("fedavg-ft")
class FedAvgFT(FedAvg):
    """FedAvg with fine-tuning before evaluation."""

    ft_epochs: int = setting(1, "epochs of fine-tuning before each evaluation", ge=0)

    def tuned(self, model: Params) -> Params:
        """Return the parameters that fine-tuning changes."""
        return model

    def personalise(self, client: Client, received: Message, state: State) -> State:
        model = super().personalise(client, received, state)["model"]
        config = replace(client.protocol, epochs=self.ft_epochs)
        return {"model": client.sgd(model, config=config, trainable=self.tuned(model), stream="fine-tune")}
