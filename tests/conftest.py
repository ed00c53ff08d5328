"""What several tests need.

Above all a toy for those of methods: a tiny federation and network, and the same network written out in plain tensors.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import pflbench
from pflbench.core import registry
from pflbench.core.client import Bench, Local
from pflbench.federation import Split

Params = dict[str, Tensor]
BODY = ("body.0.weight", "body.0.bias")
HEAD = ("head.weight", "head.bias")


class _Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


class Toy:
    """Clients of unequal size, a float64 network of 24 parameters, and its equations."""

    BODY = BODY
    HEAD = HEAD
    SETTINGS = {
        "batch_size": 3, "lr": 0.1, "local_epochs": 2, "rounds": 2, "join_ratio": 1.0, "shuffle": False,
    }  # fmt: skip
    FULL = {"momentum": 0.5, "weight_decay": 0.02, "lr_decay": 0.5}

    # Both clients; each once; the same one twice, the other never.
    TURNS = [
        ({"join_ratio": 1.0}, [[0, 1], [0, 1]]),
        ({"join_ratio": 0.5, "sampling_seed": 4}, [[0], [1]]),
        ({"join_ratio": 0.5, "sampling_seed": 3}, [[1], [1]]),
    ]

    def arrays(self, sizes: Iterable[int] = (7, 4), *, seed: int = 0, tests: int = 60) -> list[tuple[Tensor, ...]]:
        """Client 1, 3, ... have no samples of class 2."""
        random = np.random.RandomState(seed)
        clients = []
        for i, n in enumerate(sizes):
            y = np.arange(n + tests) % (3 if i % 2 == 0 else 2)
            x = random.randn(n + tests, 3) + 0.8 * y[:, None] * np.array([1.0, -1.0, 0.5]) * (1 if i % 2 else -1)
            x, y = torch.from_numpy(x), torch.from_numpy(y)
            clients.append((x[:n], y[:n], x[n:], y[n:]))
        return clients

    def federation(self, sizes: Iterable[int] = (7, 4), **kw: Any) -> pflbench.Federation:
        return pflbench.Federation.from_arrays(self.arrays(sizes, **kw), classes=3)

    def net(
        self, *, seed: int = 0, act: type[nn.Module] = nn.Tanh, features: int = 3, norm: bool = False
    ) -> pflbench.Net:
        """With `norm`, the features together are one channel of a BatchNorm, which can then train on one sample."""
        layers = [nn.Unflatten(1, (1, features)), nn.BatchNorm1d(1), nn.Flatten()] if norm else []
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            body = nn.Sequential(nn.Linear(3, features), *layers, act())
            return pflbench.Net(body, nn.Linear(features, 3)).double()

    def dropping(self, **kw: Any) -> pflbench.Net:
        """The network with dropout at the end of its body: it draws random numbers while it trains."""
        net = self.net(**kw)
        return pflbench.Net(nn.Sequential(*net.body, nn.Dropout(0.5)), net.head)

    def halving(self) -> pflbench.Net:
        """The network behind a layer that works in place: one that is given the same batch twice sees another."""
        net = self.net()
        return pflbench.Net(nn.Sequential(_Halved(), *net.body), net.head)

    def batch_norm(self) -> pflbench.Net:
        """The network with BatchNorm as `body.1`."""
        net = self.net()
        return pflbench.Net(nn.Sequential(net.body[0], nn.BatchNorm1d(3), net.body[1]), net.head).double()

    def net_for(self, algo: str, **kw: Any) -> pflbench.Net:
        """The network, as `algo` needs it."""
        return self.net(norm=algo == "fedbn", **kw)

    def initial(self, net: pflbench.Net | None = None) -> Params:
        return {name: t.clone() for name, t in (net or self.net()).state_dict().items() if t.is_floating_point()}

    def spec(self, algo: str, hyper: dict[str, Any] | None = None, **settings: Any) -> pflbench.RunSpec:
        return pflbench.RunSpec(algo=algo, hyperparameters=hyper or {}, **{"clients": 2, **self.SETTINGS, **settings})

    def run(
        self,
        algo: str,
        hyper: dict[str, Any] | None = None,
        *,
        federation: pflbench.Federation | None = None,
        net: pflbench.Net | None = None,
        executor: str = "serial",
        workers: int | None = None,
        **settings: Any,
    ) -> pflbench.Record:
        federation = federation or self.federation()
        spec = self.spec(algo, hyper, **{"clients": len(federation.clients), **settings})
        return pflbench.run(spec, federation, net or self.net_for(algo), executor=executor, workers=workers)

    def interrupted(
        self, spec: pflbench.RunSpec, federation: pflbench.Federation, out: Path
    ) -> tuple[pflbench.Record, pflbench.Record]:
        """The run as a whole, and stopped after round 3 and resumed."""

        def stop(row: dict[str, Any]) -> None:
            if row["round"] == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pflbench.run(spec, federation, self.net(), executor="serial", out=out, on_round=stop)
        resumed = pflbench.run(spec, federation, self.net(), executor="serial", out=out, resume=True)
        return pflbench.run(spec, federation, self.net(), executor="serial"), resumed

    def local(
        self,
        x: Tensor,
        y: Tensor,
        *,
        net: pflbench.Net | None = None,
        round: int = 1,  # noqa: A002
        client: int = 0,
        **settings: Any,
    ) -> Local:
        """The toolbox of a client with these samples."""
        spec = self.spec("fedavg", **settings)
        return Local(Bench(net or self.net()), Split(x, y), 3, spec, round=round, client=client)

    # The oracle: nothing below calls pflbench.

    def features(self, p: Params, x: Tensor) -> Tensor:
        return torch.tanh(x @ p["body.0.weight"].T + p["body.0.bias"])

    def logits(self, p: Params, x: Tensor) -> Tensor:
        return self.features(p, x) @ p["head.weight"].T + p["head.bias"]

    def nll(self, p: Params, x: Tensor, y: Tensor) -> Tensor:
        """The mean negative log-likelihood."""
        z = self.logits(p, x)
        return (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean()

    def batches(self, n: int, size: int) -> list[list[int]]:
        """One epoch in stored order; the last batch may be incomplete."""
        return [list(range(i, min(i + size, n))) for i in range(0, n, size)]

    def gradient(self, loss: Callable[[Params], Tensor], p: Params, names: Iterable[str]) -> Params:
        q = {name: t.clone().requires_grad_(name in names) for name, t in p.items()}
        chosen = [name for name in q if name in names]
        return dict(zip(chosen, torch.autograd.grad(loss(q), [q[n] for n in chosen]), strict=True))

    def descend(
        self,
        p: Params,
        batches: Iterable[list[int]],
        loss: Callable[[Params, list[int]], Tensor],
        *,
        lr: float,
        names: Iterable[str] = BODY + HEAD,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> Params:
        """SGD: v <- momentum v + (g + weight_decay w), w <- w - lr v, from v = 0."""
        v: dict[str, Any] = dict.fromkeys(names, 0.0)
        for batch in batches:
            g = self.gradient(lambda q, b=batch: loss(q, b), p, names)
            v = {k: momentum * v[k] + g[k] + weight_decay * p[k] for k in names}
            p = {k: p[k] - lr * v[k] if k in names else p[k] for k in p}
        return p

    def train(self, p: Params, x: Tensor, y: Tensor, epochs: int, size: int = 3, **kw: Any) -> Params:
        """`epochs` of SGD on the negative log-likelihood in stored order."""
        batches = self.batches(len(y), size) * epochs
        return self.descend(p, batches, lambda q, b: self.nll(q, x[b], y[b]), **kw)

    def mean(self, parts: list[Params], weights: list[float]) -> Params:
        total = sum(weights)
        return {k: sum(w / total * p[k] for p, w in zip(parts, weights, strict=True)) for k in parts[0]}

    def check_tested(self, record: pflbench.Record, models: list[list[Params]]) -> None:
        """`models[r][i]` is what client i was tested with in round r + 1: the loss tells, beyond the accuracy."""
        data = self.arrays()
        for number, (row, own) in enumerate(zip(record.rounds, models, strict=True), 1):
            tests = [(p, x, y) for p, (_, _, x, y) in zip(own, data, strict=True)]
            right = [int((self.logits(p, x).argmax(1) == y).sum()) for p, x, y in tests]
            n = [len(y) for _, _, y in tests]
            loss = sum(float(self.nll(p, x, y)) * len(y) for p, x, y in tests) / sum(n)
            assert row["test_loss"] == pytest.approx(loss, rel=1e-13, abs=1e-9)
            assert row["accuracy"] == sum(right) / sum(n)
            rows = [c for c in record.clients if c["round"] == number]
            assert [c["accuracy"] for c in rows] == [k / m for k, m in zip(right, n, strict=True)]

    def close(self, actual: Params, expected: Params) -> None:
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-9)

    def same(self, a: Params, b: Params) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    def body(self, p: Params) -> Params:
        return {k: t for k, t in p.items() if k in BODY}

    def head(self, p: Params) -> Params:
        return {k: t for k, t in p.items() if k in HEAD}


@pytest.fixture(scope="session")
def pip_install() -> Callable[[Path, Path], None]:
    """Install a wheel or a source folder into a folder, without the network."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--root-user-action=ignore",
    ]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]

    def install(source: Path, target: Path) -> None:
        subprocess.run([*pip, *offline, "--target", target, source], check=True, capture_output=True, text=True)

    return install


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 noisy images of 3 classes that can be told apart."""
    root = tmp_path_factory.mktemp("images") / "tree"
    random = np.random.RandomState(0)
    for part, n in (("train", 9), ("test", 3)):
        for number, kind in enumerate(("cat", "dog", "owl")):
            (root / part / kind).mkdir(parents=True)
            for i in range(n):
                pixels = random.randint(0, 128, (16, 16, 3)) + 64 * number
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / kind / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def quick(tree: Path) -> list[str]:
    """The settings of a run of a second."""
    return [
        *("--dataset", f"folder:{tree}", "--data-dir", str(tree.parent / "data"), "--model", "mlp", "--clients", "3"),
        *("--join-ratio", "1", "--rounds", "2", "--local-epochs", "1", "--min-samples", "2", "--alpha", "1"),
    ]


@pytest.fixture(scope="session")
def environment() -> Callable[..., dict[str, str]]:
    """The variables of a plain terminal, without a network."""
    settings = ("PYTHONUNBUFFERED", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
    kept = {name: value for name, value in os.environ.items() if name not in settings}
    nowhere = "http://127.0.0.1:9"
    return lambda **more: kept | {"TERM": "xterm", "http_proxy": nowhere, "https_proxy": nowhere, "no_proxy": ""} | more


@pytest.fixture(scope="session")
def children() -> Callable[[int], set[int]]:
    """The processes that a process has started and not yet waited for (Linux)."""

    def read(pid: int) -> set[int]:
        return {int(n) for path in Path(f"/proc/{pid}/task").glob("*/children") for n in path.read_text().split()}

    return read


@pytest.fixture(scope="session")
def alive() -> Callable[[Iterable[int]], set[int]]:
    """Which of some processes have not ended (Linux)."""

    def running(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
        except OSError:
            return False

    return lambda pids: {pid for pid in pids if running(pid)}


@pytest.fixture(scope="session")
def eventually() -> Callable[..., bool]:
    """Wait until a condition holds; False when it does not within `seconds`."""

    def wait(condition: Callable[[], object], seconds: float = 20.0) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.02)
        return False

    return wait


@pytest.fixture(scope="session")
def toy() -> Iterator[Toy]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other make tensors this small slow on a busy machine
    yield Toy()
    torch.set_num_threads(threads)


@pytest.fixture(params=range(3), ids=["both", "each-once", "one-twice"])
def turns(request: pytest.FixtureRequest, toy: Toy) -> tuple[dict[str, Any], list[list[int]]]:
    """Settings of participation, and who then takes part in each of two rounds."""
    settings, chosen = toy.TURNS[request.param]
    spec = toy.spec("local", **settings)
    assert [pflbench.participants(spec, r) for r in (1, 2)] == chosen
    return settings, chosen


@pytest.fixture
def methods() -> Iterator[dict[str, Any]]:
    """The registered methods; what a test registers is forgotten after it."""
    for name in registry.algorithms():  # else one that is first imported in the test would be forgotten with it
        registry.algorithm(name)
    before = dict(registry._registered)
    yield registry._registered
    registry._registered.clear()
    registry._registered.update(before)
