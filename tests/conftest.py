"""Fixtures of several test modules. `toy` and `oracle` are for tests of methods: import them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pflbench
from pflbench.core import registry

pytest.register_assert_rewrite("oracle", "toy")
os.environ["RAY_AUTH_MODE"] = "disabled"  # else Ray writes a token to the home folder; it must be set before the import
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


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


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch use one thread: threads that wait for each other slow the toy's small tensors on a busy machine."""
    if "torch" not in sys.modules:
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=range(3), ids=["both", "each-once", "one-twice"])
def turns(request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[list[int]]]:
    """Settings of participation, and the cohort of each of two rounds."""
    import toy

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


@pytest.fixture
def twice(methods: dict[str, Any]) -> str:
    """A method that asks its cohort twice in a round: with all clients, two rounds of FedAvg in one.

    A client's state has how often it was asked, and the order of its samples in each exchange.
    """
    import torch

    from pflbench.algorithms.fedavg import FedAvg
    from pflbench.core import Client, Cohort, Message, Round, Setup, State

    @pflbench.register("twice")
    class Twice(FedAvg):
        def init_client(self, setup: Setup) -> State:
            return {"asked": 0, "orders": {}}

        def local_update(self, client: Client, received: Message, state: State) -> tuple[Message, State]:
            order = torch.cat([batch.index for batch in client.batches(stream="order")])
            model = client.sgd(received["model"])
            orders = {**state["orders"], state["asked"]: order}
            return Message({"model": model}, weight=client.n), {"asked": state["asked"] + 1, "orders": orders}

        def play(self, round: Round, server: State, cohort: Cohort) -> State:
            for _ in range(2):
                server = self.aggregate(round, server, cohort.update(server))
            return server

    return Twice.name


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A Ray cluster of two nodes of one core each."""
    from clusters import Cluster

    found = Cluster()
    yield found
    found.close()
