"""What the benchmarks share. None of it runs with the tests: `pytest tests/perf -o python_files='bench_*.py'` does."""

import json
import platform
import queue
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import workload

import pflbench

HERE = Path(__file__).parent
WORKERS = 2


def pytest_addoption(parser):
    parser.addoption("--scale", type=float, default=0.1, help="how much of W is computed: 1 is all of it")
    parser.addoption("--pairs", type=int, default=3, help="how often the plain loop and pflbench take turns")
    parser.addoption("--update-ratios", action="store_true", help="replace the numbers in ratios.json")


class Rounds(pflbench.Observer):
    """A run of pflbench that waits after each round until the next is wanted.

    `rows` are the lines of its rounds, `evaluations` those of its evaluations.
    """

    def __init__(self, federation, out=None, **settings):
        defaults = {"local_epochs": 1, "batch_size": 10, "join_ratio": 1.0, "rounds": 1000}
        self._spec = pflbench.RunSpec(clients=len(federation.clients), **{**defaults, **settings})
        self._federation = federation
        self._out = out
        self._go, self._done = queue.Queue(), queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.rows = []
        self.evaluations = []

    def round(self, row):
        """Note a round, and wait until the next is wanted."""
        self.rows.append(row)
        self._done.put(None)
        if self._go.get():
            raise KeyboardInterrupt

    def evaluation(self, row):
        """Note an evaluation."""
        self.evaluations.append(row)

    def _run(self):
        try:
            self._go.get()
            record = pflbench.run(self._spec, self._federation, workers=WORKERS, out=self._out, observers=[self])
            self._done.put(RuntimeError(f"the run has ended: {record.status} {record.reason}"))
        except KeyboardInterrupt:
            pass
        except BaseException as error:
            self._done.put(error)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._go.put("stop")
        self._thread.join()

    def step(self):
        """Compute until the next round's line is there: one round's training beside one round's evaluation."""
        self._go.put(None)
        error = self._done.get()
        if error is not None:
            raise error


class Plain:
    """The plain loop, in a process of its own."""

    def __init__(self, images):
        command = [sys.executable, str(HERE / "plain.py"), str(images)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.round()

    def round(self):
        """Return the seconds of a round."""
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def close(self):
        self._process.stdin.close()
        self._process.wait()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Leave torch its threads, unlike in the tests: they are part of what is timed."""


@pytest.fixture(scope="session")
def images(request):
    return int(workload.FULL * request.config.getoption("--scale"))


@pytest.fixture(scope="session")
def federation(images):
    return workload.federation(images)


@pytest.fixture(scope="session")
def plain(images):
    loop = Plain(images)
    yield loop
    loop.close()


@pytest.fixture
def rounds():
    return Rounds


@pytest.fixture
def against_plain(benchmark, plain, slower, request):
    """Time `target` in turn with the plain loop's round; return how many times as fast it is, the median of pairs.

    What seems slower than it was is measured again with as many pairs, and judged by all of them.
    """

    def measure(target):
        pairs = request.config.getoption("--pairs")
        theirs, ours = [], []

        def timed():
            began = time.perf_counter()
            target()
            ours.append(time.perf_counter() - began)

        def ratios():
            return sorted(a / b for a, b in zip(theirs, ours, strict=True))

        benchmark.pedantic(timed, setup=lambda: theirs.append(plain.round()), rounds=pairs)
        if slower(statistics.median(ratios())):
            for _ in range(pairs):
                theirs.append(plain.round())
                timed()
        found = {"plain_seconds": statistics.median(theirs), "seconds": statistics.median(ours), "ratios": ratios()}
        found |= {"ratio": statistics.median(ratios()), "scale": request.config.getoption("--scale")}
        found["slower"] = slower(found["ratio"])  # no later run is measured by one that is
        benchmark.extra_info.update(found)
        return found

    return measure


@pytest.fixture
def slower(request):
    """Return a function that says of a ratio what it is too far below: the committed one, or this machine's last."""
    path = HERE / "ratios.json"
    committed = json.loads(path.read_text())
    name, scale = request.node.name, request.config.getoption("--scale")
    key = f"{name} at {scale:g} of W"  # a round of less work has other shares

    def check(ratio):
        if request.config.getoption("--update-ratios"):
            committed["ratios"][key] = round(ratio, 2)
            path.write_text(json.dumps(committed, indent=2) + "\n")
            return ""
        wanted = {"committed": committed["ratios"].get(key), "last run's": last(request.config, name)}
        least = 1 - committed["tolerance"]
        below = [f"the {who} was {r:.2f}" for who, r in wanted.items() if r is not None and ratio < least * r]
        if not below:
            return ""
        tolerated = f"tolerance {committed['tolerance']:.0%}"
        return f"{name} got slower: {ratio:.2f} times as fast as the plain loop; {', '.join(below)} ({tolerated})"

    return check


@pytest.fixture
def say(capsys):
    """Print past pytest's capture."""

    def line(text):
        with capsys.disabled():
            print(f"\n  {text}", end="")

    return line


def last(config, name):
    """Return the ratio of benchmark `name` in the newest saved run of this machine, at the same scale, or None."""
    for _, data in reversed(list(config._benchmarksession.storage.load())):
        if data["machine_info"]["node"] != platform.node():
            continue
        for found in data["benchmarks"]:
            info = found["extra_info"]
            same = found["name"] == name and info.get("scale") == config.getoption("--scale")
            if same and not info.get("slower"):
                return info["ratio"]
    return None
