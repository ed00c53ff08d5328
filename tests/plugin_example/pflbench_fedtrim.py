"""FedTrim: FedAvg whose server leaves out the extremes, so that a few broken clients cannot pull the average.

Paper: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
https://arxiv.org/abs/1803.01498; Definition 2, the coordinate-wise trimmed mean.
Personal: nothing.
Evaluated: the global model.
Deviations: the paper trims gradients, this trims the models after local training.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pflbench import Message, register, setting
from pflbench.algorithms.fedavg import FedAvg
from pflbench.core.algorithm import State


@register("fedtrim")
class FedTrim(FedAvg):
    """FedAvg with a trimmed mean."""

    @dataclass(frozen=True)
    class Hyper:
        trim: float = setting(0.1, "share of the uploads to leave out at either end", ge=0, le=0.49)

    def aggregate(self, server: State, ups: Sequence[Message]) -> State:
        cut = int(self.h.trim * len(ups))

        def trimmed(name: str) -> torch.Tensor:
            ordered = torch.stack([up["model"][name] for up in ups]).sort(dim=0).values
            return ordered[cut : len(ups) - cut].mean(dim=0)

        return {"model": {name: trimmed(name) for name in server["model"]}}
