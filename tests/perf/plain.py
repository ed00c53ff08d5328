"""The yardstick: W as somebody who knows PyTorch writes it by hand.

Images in memory as normalised floats, batches by index, default threads, FedAvg.

As a script: does a round for each line on standard input, and prints its seconds.
"""

import copy
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn
from workload import CLASSES, federation


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1600, 512), nn.ReLU(inplace=True), nn.Linear(512, CLASSES),
    )  # fmt: skip


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.005)
    for batch in torch.randperm(len(y)).split(10):
        optimiser.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimiser.step()


@torch.no_grad()
def test(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    model.eval()
    return sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(256), y.split(256), strict=True))


def round(model: nn.Module, clients: list) -> float:  # noqa: A001
    """Train a copy of `model` on each client, average them into `model`, and return its accuracy over all clients."""
    total = sum(len(y) for (_, y), _ in clients)
    average = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for (x, y), _ in clients:
        local = copy.deepcopy(model)
        train(local, x, y)
        for name, value in local.state_dict().items():
            average[name] += value * (len(y) / total)
    model.load_state_dict(average)
    return sum(test(model, x, y) for _, (x, y) in clients) / sum(len(y) for _, (_, y) in clients)


if __name__ == "__main__":

    def floats(split):
        return split.x.contiguous().float() / 127.5 - 1, split.y

    clients = [(floats(c.train), floats(c.test)) for c in federation(int(sys.argv[1])).clients]
    model = build()
    train(model, *clients[0][0])  # warm
    for _ in sys.stdin:
        began = time.perf_counter()
        round(model, clients)
        print(time.perf_counter() - began, flush=True)
