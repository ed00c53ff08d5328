"""FedTrim: FedAvg whose server leaves out the extremes, so that a few broken clients cannot pull the average.

Paper: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
https://arxiv.org/abs/1803.01498; Definition 2, the coordinate-wise trimmed mean.
Personal: nothing.
Evaluated: the global model.
Deviations: the paper trims gradients, this trims the models after local training.
"""

from collections.abc import Sequence

import torch

from pflbench.algorithms.fedavg import FedAvg
from pflbench.core import Round, State, Upload, register, setting


@register("fedtrim")
class FedTrim(FedAvg):
    """FedAvg with a trimmed mean."""

    trim: float = setting(0.1, "share of the uploads to leave out at either end", ge=0, le=0.49)

    def aggregate(self, round: Round, server: State, uploads: Sequence[Upload]) -> State:
        cut = int(self.trim * len(uploads))

        def trimmed(name: str) -> torch.Tensor:
            ordered = torch.stack([upload["model"][name] for upload in uploads]).sort(dim=0).values
            return ordered[cut : len(uploads) - cut].mean(dim=0)

        return {"model": {name: trimmed(name) for name in server["model"]}}
