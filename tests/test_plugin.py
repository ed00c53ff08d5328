"""A method in another package: tests/plugin_example, which docs/adding-an-algorithm.md describes."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from PIL import Image

import pflbench
from pflbench.core import registry
from pflbench.store import states

EXAMPLE = Path(__file__).parent / "plugin_example"
PFLBENCH = Path(sysconfig.get_path("scripts")) / "pflbench"


def install(pip_install: Callable[..., None], source: Path, target: Path) -> Path:
    """Install the package in `source`, of which a copy is built: building writes into the source."""
    copy = target.with_name(target.name + "-source")
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip_install(copy, target)
    return target


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, pip_install: Callable[..., None]) -> Path:
    return install(pip_install, EXAMPLE, tmp_path_factory.mktemp("plugin") / "site")


@pytest.fixture
def call(tmp_path: Path, installed: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command where the package, and what else is on `path`, is installed."""

    def run(*args: str, path: tuple[Path, ...] = (), command: tuple[object, ...] = (PFLBENCH,)) -> Any:
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [installed, *path]))}
        return subprocess.run([*map(str, command), *args], cwd=tmp_path, env=env, capture_output=True, text=True)

    return run


def test_it_is_the_documented_one() -> None:
    text = (EXAMPLE.parents[1] / "docs" / "adding-an-algorithm.md").read_text(encoding="utf-8")
    assert (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8") in text
    assert "`tests/plugin_example` is this very package" in text


def test_it_is_listed_without_being_imported(call: Callable[..., Any]) -> None:
    code = (
        "import sys\nfrom pflbench.cli import main\ntry:\n    main()\n"
        "finally:\n    assert not {'torch', 'pflbench_fedtrim'} & set(sys.modules)"
    )
    done = call("list", "algorithms", command=(sys.executable, "-c", code))
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith("  "))
    assert lines["fedtrim"] == "from pflbench-fedtrim"
    assert "fedavg" in lines


def test_it_is_described_and_suggested(call: Callable[..., Any]) -> None:
    done = call("describe", "fedtrim")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("FedTrim: FedAvg whose server leaves out the extremes")
    assert "\nEvaluated: the global model.\n" in done.stdout
    assert done.stdout.endswith("  trim = 0.1  share of the uploads to leave out at either end (>= 0, <= 0.49)\n")
    done = call("describe", "fedtrm")
    assert (done.returncode, done.stderr) == (2, "Error: unknown algorithm 'fedtrm'; did you mean 'fedtrim'?\n")


def test_it_runs_in_worker_processes(call: Callable[..., Any], tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    for part, n in (("train", 9), ("test", 3)):
        for kind in ("cat", "dog"):
            (tmp_path / "tree" / part / kind).mkdir(parents=True)
            for i in range(n):
                pixels = random.randint(0, 256, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "tree" / part / kind / f"{i}.png")
    line = (
        "run --algo fedtrim --dataset folder:tree --data-dir data --model mlp --clients 3 --join-ratio 1 --rounds 1 "
        "--local-epochs 1 --min-samples 2 --partition iid"
    )
    done = call(*line.split(), "--set", "trim=0.34", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["machine"]["executor"] == "processes"
    assert found["spec"]["hyperparameters"] == {"trim": 0.34}
    assert found["status"] == "finished"


@pytest.fixture
def method(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[pflbench.Algorithm]]:
    """Register the example in this process, and remove it after the test."""
    monkeypatch.syspath_prepend(installed)
    yield registry.algorithm("fedtrim")
    del registry._registered["fedtrim"], sys.modules["pflbench_fedtrim"]


def test_it_does_what_it_says(method: type[pflbench.Algorithm]) -> None:
    sent = [([1.0, 9.0], 5.0), ([2.0, 100.0], 1.0), ([6.0, 8.0], 1.0), ([-50.0, 1.0], 1.0)]
    uploads = [
        pflbench.Upload({"model": {"w": torch.tensor(values)}}, weight, client=i)
        for i, (values, weight) in enumerate(sent)
    ]
    model = {"w": torch.zeros(2)}
    round_ = pflbench.Round(1, (0, 1, 2, 3), pflbench.Setup(clients=4, classes=2, features=0, model=model))

    def trimmed(uploads: list[pflbench.Upload], **hyper: float) -> list[float]:
        found: list[float] = method(**hyper).aggregate(round_, {"model": model}, uploads)["model"]["w"].tolist()
        return found

    assert trimmed(uploads, trim=0.25) == [1.5, 8.5]
    assert trimmed(uploads, trim=0.24) == [-10.25, 29.5]
    assert trimmed(uploads[:1]) == [1.0, 9.0]
    with pytest.raises(pflbench.UsageError, match=re.escape("trim: 0.5 is out of bounds; it must be >= 0, <= 0.49")):
        method(trim=0.5)


@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_its_server_reads_every_tensor_of_every_upload_once(
    method: type[pflbench.Algorithm], executor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop over names and uploads needs no more than that, though uploads lie in files."""
    read: list[tuple[str, str]] = []

    class Counted:
        def __init__(self, path: Path, framework: str) -> None:
            self.file, self.path = safe_open(path, framework), path

        def __enter__(self) -> "Counted":
            self.file = self.file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self.file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            if self.path.name.startswith("upload-"):
                read.append((self.path.name, name))
            tensor: torch.Tensor = self.file.get_tensor(name)
            return tensor

    safe_open = states.safe_open
    monkeypatch.setattr(states, "safe_open", Counted)
    clients = 3
    spec = toy.spec("fedtrim", {"trim": 0.34}, clients=clients, rounds=1)
    record = pflbench.run(spec, toy.federation((7, 4, 5)), toy.net(), executor=executor, workers=2, out=tmp_path)
    names = [f"model/{name}" for name in toy.initial()]
    assert sorted(read) == sorted((f"upload-{i:06}-0.safetensors", name) for i in range(clients) for name in names)
    assert (
        record.fingerprints["states"]
        == pflbench.run(spec, toy.federation((7, 4, 5)), toy.net(), executor="serial").fingerprints["states"]
    )


def declare(folder: Path, package: str, entry: str) -> Path:
    """The metadata of an installed package: its name and an entry point."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[pflbench.algorithms]\n{entry}\n")
    return folder


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("fedavg = their_fedavg", "entry point 'their_fedavg' reuses the method name 'fedavg'; rename it"),
        ("fedtrim = zz_trim", "'pflbench_fedtrim' and 'zz_trim' share the method name 'fedtrim'; rename one"),
    ],
)
def test_a_name_that_is_taken(call: Callable[..., Any], tmp_path: Path, entry: str, message: str) -> None:
    other = declare(tmp_path / "other", "other", entry)
    for args in (["list", "algorithms"], ["describe", "fedavg"]):
        done = call(*args, path=(other,))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("Error: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr


def test_a_module_that_registers_another_name(call: Callable[..., Any], tmp_path: Path) -> None:
    other = declare(tmp_path / "other", "other", "fedother = wrong_name")
    (other / "wrong_name.py").write_text(
        "from pflbench.core import Algorithm, register\n\n\n@register('fedoter')\nclass Other(Algorithm):\n    pass\n"
    )
    done = call("describe", "fedother", path=(other,))
    assert (done.returncode, done.stdout) == (2, "")
    assert "method 'fedother' registers no class of that name; see @register" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_package_twice_on_the_path_is_no_clash(call: Callable[..., Any], installed: Path) -> None:
    done = call("list", "algorithms", path=(installed,))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("fedtrim ") == 1
