"""A tiny federation and network to run methods on: clients of unequal size, and a float64 network of 24 parameters.

`oracle` has the same network and its training in plain torch.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import facts
import oracle
import pytest
import torch
from oracle import Params
from torch import Tensor, nn

import pflbench
from pflbench.core import Client, Replica, Round, Setup
from pflbench.core.training import SGD
from pflbench.federation import Split

SETTINGS = {
    "batch_size": 3, "lr": 0.1, "local_epochs": 2, "rounds": 2, "join_ratio": 1.0, "shuffle": False,
}  # fmt: skip
FULL = {"momentum": 0.5, "weight_decay": 0.02, "lr_decay": 0.5}

# Settings of participation, and the cohort of each of two rounds (the fixture `turns` checks them):
# both clients; each once; the same one twice, the other never.
TURNS = [
    ({"join_ratio": 1.0}, [[0, 1], [0, 1]]),
    ({"join_ratio": 0.5, "sampling_seed": 4}, [[0], [1]]),
    ({"join_ratio": 0.5, "sampling_seed": 3}, [[1], [1]]),
]


def federation(sizes: Iterable[int] = (7, 4), **kw: Any) -> pflbench.Federation:
    """Return the federation of `oracle.arrays`."""
    return pflbench.Federation.from_arrays(oracle.arrays(sizes, **kw), classes=3)


# Networks.


def net(*, seed: int = 0, act: type[nn.Module] = nn.Tanh, features: int = 3, norm: bool = False) -> pflbench.Net:
    """Return the network. With `norm`, all features are one channel of a BatchNorm: it can train on one sample."""
    layers = [nn.Unflatten(1, (1, features)), nn.BatchNorm1d(1), nn.Flatten()] if norm else []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(3, features), *layers, act())
        return pflbench.Net(body, nn.Linear(features, 3)).double()


def dropping(**kw: Any) -> pflbench.Net:
    """Return the network with dropout at the end of its body: it draws random numbers while it trains."""
    plain = net(**kw)
    return pflbench.Net(nn.Sequential(*plain.body, nn.Dropout(0.5)), plain.head)


class _Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


def halving() -> pflbench.Net:
    """Return the network behind a layer that works in place: it changes a batch that is not copied."""
    plain = net()
    return pflbench.Net(nn.Sequential(_Halved(), *plain.body), plain.head)


def batch_norm() -> pflbench.Net:
    """Return the network with BatchNorm as `body.1`."""
    plain = net()
    return pflbench.Net(nn.Sequential(plain.body[0], nn.BatchNorm1d(3), plain.body[1]), plain.head).double()


def net_for(algo: str, **kw: Any) -> pflbench.Net:
    """Return the network that method `algo` needs."""
    return net(norm=facts.of(algo).norm, **kw)


def initial(network: pflbench.Net | None = None) -> Params:
    """Return the parameters and buffers of a network; without one, of the toy's."""
    return {name: t.clone() for name, t in (network or net()).state_dict().items() if t.is_floating_point()}


# Runs.


def spec(algo: str, hyper: dict[str, Any] | None = None, **settings: Any) -> pflbench.RunSpec:
    """Return the specification of a run with the toy's settings, or with others."""
    return pflbench.RunSpec(algo=algo, hyperparameters=hyper or {}, **{"clients": 2, **SETTINGS, **settings})


def run(
    algo: str,
    hyper: dict[str, Any] | None = None,
    *,
    federation: pflbench.Federation | None = None,
    net: pflbench.Net | None = None,
    executor: str = "serial",
    workers: int | None = None,
    device: str = "cpu",
    ray_address: str | None = None,
    notice: Callable[[str], None] = lambda _: None,
    out: Path | None = None,
    **settings: Any,
) -> pflbench.Record:
    """Return the record of a run."""
    federation = federation or pflbench.Federation.from_arrays(oracle.arrays(), classes=3)
    wanted = spec(algo, hyper, **{"clients": len(federation.clients), **settings})
    return pflbench.run(
        wanted, federation, net or net_for(algo), executor=executor, workers=workers, device=device,
        ray_address=ray_address, notice=notice, out=out,
    )  # fmt: skip


WAYS = ["serial", "processes", "disk"]
ways = pytest.mark.parametrize("way", WAYS)


def run_in(way: str, algo: str, tmp_path: Path, sizes: Iterable[int] = (7, 4), **settings: Any) -> pflbench.Record:
    """Return the record of a run in this process, in worker processes, or in worker processes with files."""
    sizes = tuple(sizes)
    wanted = spec(algo, clients=len(sizes), **settings)
    executor = "serial" if way == "serial" else "processes"
    out = tmp_path / "runs" if way == "disk" else None
    return pflbench.run(wanted, federation(sizes), net(), executor=executor, workers=2, out=out)


class Stop(pflbench.Observer):
    """Interrupts a run after the training of a round."""

    def __init__(self, number: int) -> None:
        self.number = number

    def round(self, row: dict[str, Any]) -> None:
        """Interrupt the run if this is the round."""
        if row["round"] == self.number:
            raise KeyboardInterrupt


def interrupted(
    spec: pflbench.RunSpec, federation: pflbench.Federation, out: Path
) -> tuple[pflbench.Record, pflbench.Record]:
    """Return the records of an uninterrupted run, and of one that stops after round 3 and resumes."""
    with pytest.raises(KeyboardInterrupt):
        pflbench.run(spec, federation, net(), executor="serial", out=out, observers=[Stop(3)])
    resumed = pflbench.run(spec, federation, net(), executor="serial", out=out, resume=True)
    return pflbench.run(spec, federation, net(), executor="serial"), resumed


# The arguments of a method.


def setup(network: pflbench.Net | None = None, *, clients: int = 2, order_seed: int = 0) -> Setup:
    """Return what server and clients know before the first round."""
    network = network or net()
    model = initial(network)
    buffers = frozenset(name for name, _ in network.named_buffers() if name in model)
    features = model["head.weight"].shape[-1] if "head.weight" in model else 0
    return Setup(clients=clients, classes=3, features=features, model=model, buffers=buffers, seed=order_seed)


def round(number: int = 1, cohort: Iterable[int] = (0, 1), **kw: Any) -> Round:  # noqa: A001
    """Return a round of the toy's federation."""
    return Round(number, tuple(cohort), setup(**kw))


def client(
    x: Tensor,
    y: Tensor,
    *,
    net: pflbench.Net | None = None,
    replica: Replica | None = None,
    round: int = 1,
    id: int = 0,
    **settings: Any,
) -> Client:
    """Return a client with these samples. `settings` are a run's."""
    wanted = spec("fedavg", **settings)
    protocol = SGD(
        epochs=wanted.local_epochs, batch_size=wanted.batch_size, lr=wanted.lr * wanted.lr_decay ** (round - 1),
        momentum=wanted.momentum, weight_decay=wanted.weight_decay, shuffle=wanted.shuffle,
        drop_last=wanted.drop_last,
    )  # fmt: skip
    network = net or net_for("fedavg")
    known = setup(network, clients=wanted.clients, order_seed=wanted.seed_of("order"))
    replica = replica or Replica(network, wanted.precision)
    return Client(replica, Split(x, y), known, protocol, seed=known.seed, key=(round, id))


def check_tested(record: pflbench.Record, models: list[list[Params]]) -> None:
    """Assert by loss and accuracy that `models[r][i]` is the model of client i in the evaluation of round r + 1."""
    data = oracle.arrays()
    for number, (row, own) in enumerate(zip(record.evaluations, models, strict=True), 1):
        tests = [(p, x, y) for p, (_, _, x, y) in zip(own, data, strict=True)]
        right = [int((oracle.logits(p, x).argmax(1) == y).sum()) for p, x, y in tests]
        n = [len(y) for _, _, y in tests]
        loss = sum(float(oracle.nll(p, x, y)) * len(y) for p, x, y in tests) / sum(n)
        assert row["test_loss"] == pytest.approx(loss, rel=1e-13, abs=1e-9)
        assert row["accuracy"] == sum(right) / sum(n)
        rows = [c for c in record.clients if c["round"] == number]
        assert [c["accuracy"] for c in rows] == [k / m for k, m in zip(right, n, strict=True)]
