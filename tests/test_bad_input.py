"""Bad input gives one line that names the value and the remedy, exit code 2, and no files."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image

from pflbench import settings
from pflbench.cli import main
from pflbench.spec import RunSpec

RUN = (
    "run --algo fedavg --dataset folder:{tree} --data-dir {data} --model mlp --clients 3 --join-ratio 1 --rounds 1 "
    "--local-epochs 1 --min-samples 2 --executor serial --out out "
)
RAY = RUN.replace("--executor serial", "--executor ray")
DEAL = "partition --dataset folder:{tree} --data-dir {data} --clients 3 --min-samples 2 --out out "


def put(path: Path, size: int = 16) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    value = sum(path.as_posix().encode()) % 256
    Image.new("RGB", (size, size), (value, 255 - value, 99)).save(path)


def plant(root: Path, *, size: int = 16) -> Path:
    """36 images of 3 classes."""
    for part, n in (("train", 9), ("test", 3)):
        for kind in ("cat", "dog", "owl"):
            for i in range(n):
                put(root / part / kind / f"{i}.png", size)
    return root


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("places")
    return {"tree": plant(root / "tree"), "data": root / "data"}


@pytest.fixture
def bad(
    tmp_path: Path, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Return a function that checks the rules for one command line and returns the error without "Error: "."""

    def offline(*args: object, **kw: object) -> None:
        raise URLError("no network in tests")

    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(urllib.request, "urlopen", offline)

    def check(line: str, **more: Path | str) -> str:
        args = [word.format(**places, here=tmp_path, **more) for word in shlex.split(line)]
        monkeypatch.setattr(sys, "argv", ["pflbench", *args])
        before = contents(cwd)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert (ended.value.code, out) == (2, ""), err
        assert contents(cwd) == before
        return only_line(err)

    yield check
    capsys.readouterr()


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def only_line(err: str) -> str:
    lines = [line for line in err.split("\n") if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in err
    return lines[0].removeprefix("Error: ")


# id: (command line, what the message says: the value, the remedy)
LINES = {
    "command": ("rnu", "'rnu'", "did you mean 'run'?"),
    "command-far": (
        "xylophone",
        "'xylophone'",
        "choose from: compare, describe, export, list, partition, report, run, runs, sweep",
    ),
    "option": (RUN + "--ruonds 3", "--ruonds", "--rounds"),
    "option-of-partition": (DEAL + "--partitoin iid", "--partitoin", "--partition"),
    "option-without-value": (RUN + "--alpha", "--alpha", "requires an argument"),
    "argument": (RUN + "fedas", "fedas", "unexpected"),
    "list": ("list methods", "'methods'", "'algorithms', 'datasets', 'models', 'partitions'"),
    "list-nothing": ("list", "Missing argument", "partitions"),
    "describe": ("describe fedsa", "'fedsa'", "did you mean 'fedas'?"),
    "describe-nothing": ("describe", "Missing argument", "ALGORITHM"),
    "algo": (RUN + "--algo fedavgg", "algorithm 'fedavgg'", "did you mean 'fedavg'?"),
    "algo-underscore": (RUN + "--algo fedavg_ft", "'fedavg_ft'", "did you mean 'fedavg-ft'?"),
    "algo-far": (RUN + "--algo zzz", "'zzz'", "choose from: apfl, ditto, fedala,"),
    "algo-path": (RUN + "--algo ../fedavg", "'../fedavg'", "fedavg"),
    "algo-empty": (RUN + "--algo ''", "algorithm ''", "choose from"),
    "dataset": (RUN + "--dataset cifra10", "dataset 'cifra10'", "did you mean 'cifar10'?"),
    "dataset-empty": (RUN + "--dataset ''", "dataset ''", "choose from: auto, cifar10"),
    "model": (RUN + "--model resnet", "model 'resnet'", "did you mean 'resnet18'?"),
    "partition": (RUN + "--partition dirichelt", "partition 'dirichelt'", "did you mean 'dirichlet'?"),
    "partition-given": (RUN + "--partition given", "'given'", "from Python"),
    "partition-given-shown": (DEAL + "--partition given", "'given'", "choose from: dirichlet, iid, pathological"),
    "split": (RUN + "--split offical", "split 'offical'", "did you mean 'official'?"),
    "split-given": (RUN + "--split given", "'given'", "from Python"),
    "precision": (RUN + "--precision fp16", "'fp16'", "did you mean 'bf16'?"),
    "log": (RUN + "--log wandb", "unknown log 'wandb'", "tensorboard"),
    "norm": (RUN + "--model resnet18 --norm layer", "norm 'layer'", "choose from: batch, group"),
    "norm-without-layers": (RUN + "--model mlp --norm batch", "norm: the model 'mlp'", "leave it out"),
    "executor": (RUN + "--executor proceses", "'proceses'", "did you mean 'processes'?"),
    "executor-empty": (RUN + "--executor ''", "''", "choose from: processes, serial, ray"),
    "device": (RUN + "--device gpu", "unknown device 'gpu'", "did you mean 'cpu'?"),
    "device-near": (RUN + "--device CUDA", "unknown device 'CUDA'", "cuda"),
    "device-numbered": (RUN + "--device cuda:1", "not 'cuda:1'", "CUDA_VISIBLE_DEVICES"),
    "device-absent": (RUN + "--device mps", "device: mps needs a GPU of Apple", "leave --device out"),
    "device-absent-workers": (RUN + "--device mps --executor processes", "this torch", "leave --device out"),
    "ray-address-unused": (RUN + "--ray-address a:1", "only the executor ray", "--executor ray"),
    "ray-address": (RAY + "--ray-address here", "'here' is not HOST:PORT", "10.0.0.1:6379"),
    "ray-address-client": (RAY + "--ray-address ray://a:1", "'ray://a:1' is not HOST:PORT", "10.0.0.1:6379"),
    "ray-nobody": (RAY + "--ray-address 127.0.0.1:9", "nobody answers at 127.0.0.1:9", "ray status"),
    "ray-mps": (RAY + "--device mps", "not on mps", "cpu or cuda"),
    "sweep-executor": ("sweep --algo local --executor serial", "a sweep has processes and ray", "--jobs 1"),
    "sweep-device": ("sweep --algo local --device gpu", "unknown device 'gpu'", "did you mean 'cpu'?"),
    "sweep-ray-address": ("sweep --algo local --ray-address a:1", "only the executor ray", "--executor ray"),
    "workers-zero": (RUN + "--workers 0", "workers: 0", "must be >= 1"),
    "workers-negative": (RUN + "--workers -2", "workers: -2", "must be >= 1"),
    "workers-text": (RUN + "--workers all", "'all'", "not an integer"),
    "workers-fraction": (RUN + "--workers 1.5", "'1.5'", "not an integer"),
    "alpha-unused": (RUN + "--partition iid --alpha 1", "alpha: the partition 'iid'", "leave it out"),
    "alpha-tiny": (RUN + "--alpha 1e-300", "1e-300", "from 1e-06 to 1e+06"),
    "alpha-vast": (RUN + "--alpha 1e30", "1e+30", "from 1e-06 to 1e+06"),
    "classes-unused": (RUN + "--classes-per-client 2", "classes_per_client: the partition 'dirichlet'", "leave it out"),
    "classes-too-many": (RUN + "--partition pathological --classes-per-client 4", "is 4", "from 1 to 3"),
    "join-nobody": (RUN + "--clients 20 --join-ratio 0.02", "0.02 of 20 clients", "at least 0.05"),
    "join-beyond-all": (RUN + "--join-ratio 1.01", "1.01", "<= 1"),
    "clients-beyond-samples": (RUN + "--clients 19", "19 clients", "38 samples, there are 36; ask for fewer clients"),
    "clients-vast": (RUN + "--clients 1000000000000000", "1000000000000000 clients", "fewer clients"),
    "min-samples": (RUN + "--min-samples 13", "at least 13", "there are 36; ask for fewer clients or lower"),
    "min-samples-shown": (DEAL + "--min-samples 13", "at least 13", "lower the minimum"),
    "min-samples-of-classes": (
        RUN + "--partition pathological --min-samples 12 --clients 3 --classes-per-client 3 --split official",
        "12",
        "fewer clients",
    ),
    "test-set-too-small": (RUN + "--clients 12 --split official --partition iid", "12 clients", "--split pooled"),
    "set-no-equals": (RUN + "--algo fedas --set align_lr", "'align_lr'", "NAME=VALUE"),
    "set-no-name": (RUN + "--algo fedas --set =3", "'=3'", "NAME=VALUE"),
    "set-unknown": (RUN + "--algo fedas --set align_rl=1", "of fedas 'align_rl'", "did you mean 'align_lr'?"),
    "set-without-any": (RUN + "--set mu=1", "of fedavg 'mu'", "choose from: none"),
    "set-a-setting": (RUN + "--algo fedas --set lr=1", "of fedas 'lr'", "align_lr"),
    "set-zero": (RUN + "--algo fedas --set align_lr=0", "align_lr: 0.0", "must be > 0"),
    "set-negative": (RUN + "--algo fedrep --set head_epochs=-1", "head_epochs: -1", "must be >= 0"),
    "set-nan": (RUN + "--algo fedas --set align_lr=nan", "align_lr: nan", "not a number"),
    "set-vast": (RUN + "--algo fedas --set align_lr=1e300", "align_lr: 1e+300", "must be <= "),
    "set-fraction": (RUN + "--algo fedas --set align_epochs=1.5", "'1.5'", "not an integer"),
    "set-empty": (RUN + "--algo fedas --set align_lr=", "align_lr: ''", "not a number"),
    "set-choice": (RUN + "--algo fedas --set alignment=inplace", "'inplace'", "did you mean 'in-place'?"),
    "out-is-file": (RUN + "--out {tree}/train/cat/0.png", "0.png is a file", "choose another --out"),
    "out-below-file": (RUN + "--out {tree}/train/cat/0.png/a/b", "0.png is a file", "choose another --out"),
    "out-empty": (RUN + "--out ''", "out: ''", "not a folder"),
    "out-name-too-long": (RUN + f"--out {'x' * 300}", "xxx", "File name too long"),
    "out-is-file-shown": (DEAL + "--out {tree}/train/cat/0.png", "0.png is a file", "choose another --out"),
    "out-below-file-shown": (DEAL + "--out {tree}/train/cat/0.png/a", "0.png is a file", "choose another --out"),
    "data-dir-is-file": (RUN + "--data-dir {tree}/train/cat/0.png", "data_dir: ", "choose another --data-dir"),
    "data-dir-below-file": (RUN + "--data-dir {tree}/train/cat/0.png/a", "cannot write", "choose another --data-dir"),
    "folder-missing": (RUN + "--dataset folder:{here}/nowhere", "nowhere is not there", "give an image tree"),
    "folder-is-file": (RUN + "--dataset folder:{tree}/train/cat/0.png", "not a folder", "give an image tree"),
    "folder-no-train": (RUN + "--dataset folder:{tree}/train", "train has no folder train/", "train/<class>/"),
    "folder-name-too-long": (RUN + f"--dataset folder:{'x' * 300}", "xxx", "File name too long"),
    "cifar10-offline": (
        RUN + "--dataset cifar10 --data-dir {here}/empty",
        "CIFAR-10 is not in {here}/empty and cannot be downloaded (no network in tests)",
        "choose --dataset synthetic10",
    ),
    "cifar100-offline-shown": (
        DEAL + "--dataset cifar100 --data-dir {here}/empty",
        "CIFAR-100 is not in {here}/empty",
        "choose --dataset synthetic100",
    ),
    "sweep-nothing": ("sweep", "nothing to run", "give a suite"),
    "sweep-without-the-value": ("sweep quick --alpha 0.2", "alpha: no run of the suite has 0.2", "alpha 0.1, 0.5"),
    "config-missing": (RUN + "--config {here}/no.toml", "cannot read {here}/no.toml", "No such file"),
    "config-is-folder": (RUN + "--config {here}", "cannot read {here}", "Is a directory"),
    "config-is-image": (RUN + "--config {tree}/train/cat/0.png", "0.png", "not a TOML file"),
}


if not importlib.util.find_spec("ray"):  # then all of them are one line: that Ray is needed
    LINES = {name: line for name, line in LINES.items() if not line[0].startswith(RAY)}


@pytest.mark.parametrize(("line", "value", "remedy"), LINES.values(), ids=LINES)
def test_command_line(bad: Callable[..., str], tmp_path: Path, line: str, value: str, remedy: str) -> None:
    message = bad(line)
    assert value.format(here=tmp_path) in message
    assert remedy in message


# What is wrong whatever the option, and what only its own bounds forbid.
NUMBERS = [
    (name, value)
    for name in settings.fields(RunSpec)
    for kind in [settings.kind(RunSpec, name)[0]]
    if kind in (int, float)
    for value in [
        *{int: ["-1", "-9" + "9" * 400, "1" + "0" * 30, "9" * 400, "1.5", "1e3"], float: ["-0.1", "1e300", "-1e300"]}[
            kind
        ],
        *["nan", "inf", "-inf", "1e999", "", "many", "1,5", "0x10", "true"],
    ]
]
ZERO = [n for n, f in settings.fields(RunSpec).items() if f.metadata["gt"] == 0 or (f.metadata["ge"] or 0) > 0]


@pytest.mark.parametrize(("name", "value"), [*NUMBERS, *((name, "0") for name in ZERO), ("min_samples", "1")])
def test_numbers(bad: Callable[..., str], name: str, value: str) -> None:
    message = bad(f"{RUN} --{name.replace('_', '-')} '{value}'")
    assert message.startswith(f"{name}: ")
    assert "is not a" in message or "is out of bounds; it must be " in message
    said = message.removeprefix(f"{name}: ").split(" is ")[0]
    if len(value) > 40:
        assert said[:10].strip("'") == value[:10]  # cut short
        return
    try:
        assert repr(float(said)) == repr(float(value))
    except ValueError:
        assert said == repr(value)


# id: (TOML, the value, the remedy)
CONFIGS = {
    "name": ("lerning_rate = 1", "'lerning_rate'", "choose from"),
    "name-near": ("local_epoch = 1", "'local_epoch'", "did you mean 'local_epochs'?"),
    "name-of-a-flag": ("force = true", "'force'", "choose from"),
    "hyperparameters": ("hyperparameters = {{}}", "'hyperparameters'", "choose from"),
    "table": ("[settings]\nalpha = 1", "'settings'", "choose from"),
    "nested": ("[alpha]\nvalue = 1", "alpha: {{'value': 1}}", "not a number"),
    "syntax": ("rounds = = 3", "c.toml is not a TOML file", "line 1"),
    "twice": ("rounds = 1\nrounds = 2", "c.toml is not a TOML file", "overwrite"),
    "hyphen-and-underscore": ("local-epochs = 1\nlocal_epochs = 2", "'local_epochs'", "leave one out"),
    "not-text": ("\xff\xfe", "c.toml is not a TOML file", "utf-8"),
    "json": ('{{"rounds": 3}}', "c.toml is not a TOML file", "line 1"),
    "text-for-integer": ('rounds = "three"', "rounds: 'three'", "not an integer"),
    "fraction-for-integer": ("seed = 1.5", "seed: 1.5", "not an integer"),
    "bool-for-integer": ("clients = true", "clients: True", "not an integer"),
    "bool-for-number": ("lr = true", "lr: True", "not a number"),
    "integer-for-text": ("algo = 3", "algo: 3", "not text"),
    "integer-for-bool": ("shuffle = 1", "shuffle: 1", "not true or false"),
    "text-for-bool": ('drop_last = "yes"', "drop_last: 'yes'", "not true or false"),
    "list": ("alpha = [0.1, 1.0]", "alpha: [0.1, 1.0]", "not a number"),
    "date": ("lr = 2024-01-01", "2024", "not a number"),
    "nan": ("lr = nan", "lr: nan", "not a number"),
    "infinite": ("alpha = inf", "alpha: inf", "not a number"),
    "integer-beyond-floats": (f"lr = 1{'0' * 400}", "lr: 1000", "must be <= "),
    "integer-beyond-64-bits": (f"batch_size = {2**63}", "batch_size: ", f"must be <= {2**63 - 1}"),
    "negative": ("clients = -3", "clients: -3", "must be >= 1"),
    "set-not-table": ('set = "align_lr=1"', "c.toml", "[set]"),
    "set-unknown": ("[set]\nmu = 1", "of fedavg 'mu'", "choose from: none"),
    "set-of-wrong-type": ('algo = "fedas"\n[set]\nalign_lr = [1]', "align_lr: [1]", "not a number"),
    "set-twice": ("[set]\nalign-lr = 1\nalign_lr = 1", "'align_lr'", "leave one out"),
    "executor": ("executor = 2", "'2'", "choose from: processes, serial, ray"),
    "device": ('device = "gpu"', "unknown device 'gpu'", "did you mean 'cpu'?"),
    "ray-address": ('workers = 2\nray-address = "here:1"', "only the executor ray", "--executor ray"),
    "workers": ("workers = true", "True", "not an integer"),
    "out": ("out = 3", "out: 3", "not a folder"),
    "out-null": ('out = "a\\u0000b"', r"out: 'a\x00b'", "not a folder"),
    "data-dir": ("data-dir = []", "data_dir: []", "not a folder"),
}


@pytest.mark.parametrize(("text", "value", "remedy"), CONFIGS.values(), ids=CONFIGS)
def test_config(bad: Callable[..., str], tmp_path: Path, text: str, value: str, remedy: str) -> None:
    (tmp_path / "c.toml").write_bytes(text.format().encode("latin-1"))
    message = bad("run --config {here}/c.toml " + rest_of(text))
    assert value.format() in message
    assert remedy in message


def rest_of(text: str) -> str:
    """The settings of a quick run that `text` does not set: the command line would win."""
    settings = {
        "algo": "fedavg", "model": "mlp", "clients": "3", "join_ratio": "1", "rounds": "1", "min_samples": "2",
        "executor": "serial", "out": "out", "dataset": "folder:{tree}", "data-dir": "{data}",
    }  # fmt: skip
    given = {line.split("=")[0].strip() for line in text.replace("[", "").splitlines()}
    return " ".join(f"--{k.replace('_', '-')} {v}" for k, v in settings.items() if k not in given)


def broken_image(root: Path) -> None:
    (root / "train" / "dog" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nand no more")


def cut_image(root: Path) -> None:
    path = root / "test" / "owl" / "1.png"
    path.write_bytes(path.read_bytes()[:-30])


def other_size(root: Path) -> None:
    put(root / "train" / "dog" / "3.png", 17)


def class_of_test_alone(root: Path) -> None:
    put(root / "test" / "newt" / "0.png")


def no_test(root: Path) -> None:
    shutil.rmtree(root / "test")


def nothing(root: Path) -> None:
    shutil.rmtree(root)
    root.mkdir()


def empty_train(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train" / "cat").mkdir(parents=True)


def deep_colour(root: Path) -> None:
    Image.fromarray(np.full((16, 16), 40000, np.uint16)).save(root / "train" / "cat" / "0.png")


@pytest.mark.parametrize(
    ("damage", "value", "remedy"),
    [
        (broken_image, "train/dog/3.png", "repair or remove it"),
        (cut_image, "test/owl/1.png", "repair or remove it"),
        (other_size, "train/dog/3.png is 17x17", "must have one size"),
        (class_of_test_alone, "class 'newt'", "add or remove it"),
        (no_test, "has no folder test/", "test/<class>/"),
        (nothing, "has no folder train/", "train/<class>/"),
        (empty_train, "train holds no images", "train/<class>/"),
        (deep_colour, "train/cat/0.png has more than 8 bits", "convert it to 8 bits"),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_image_tree(
    bad: Callable[..., str], tmp_path: Path, damage: Callable[[Path], None], value: str, remedy: str
) -> None:
    damage(plant(tmp_path / "own"))
    for line in (RUN, DEAL):
        message = bad(line + "--dataset folder:{here}/own --data-dir {here}/own-data")
        assert value in message
        assert remedy in message


def test_images_too_small_for_the_cnn(bad: Callable[..., str], tmp_path: Path) -> None:
    plant(tmp_path / "own", size=15)
    message = bad(RUN + "--model cnn --dataset folder:{here}/own --data-dir {here}/own-data")
    assert "15x15" in message
    assert "use --model mlp" in message


def test_damaged_cifar(bad: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "d" / "cifar-10-batches-py").mkdir(parents=True)
    message = bad(RUN + "--dataset cifar10 --data-dir {here}/d")
    assert "cifar-10-batches-py is damaged" in message
    assert "delete it" in message


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
@pytest.mark.parametrize("line", [RUN, DEAL])
@pytest.mark.parametrize("out", ["/proc", "/proc/none", "/proc/none/runs"])
def test_out_that_even_root_cannot_write(bad: Callable[..., str], line: str, out: str) -> None:
    message = bad(line + f"--out {out}")
    assert "out: /proc" in message
    assert "choose another --out" in message


@pytest.mark.parametrize("line", [RUN, DEAL])
def test_read_only_out(bad: Callable[..., str], tmp_path: Path, line: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o555)
    if os.access(mine, os.W_OK):
        pytest.skip("root may write everywhere")
    message = bad(line + "--out {here}/mine/a/b")
    assert f"out: {mine} cannot be written to" in message
    assert "choose another --out" in message


@pytest.fixture(scope="module")
def finished(places: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of the quick run."""
    import pflbench

    out = tmp_path_factory.mktemp("finished")
    spec = pflbench.RunSpec(
        algo="fedavg", dataset=f"folder:{places['tree']}", model="mlp", clients=3, join_ratio=1.0, rounds=1,
        local_epochs=1, min_samples=2,
    )  # fmt: skip
    path = pflbench.run(spec, executor="serial", out=out, data_dir=places["data"]).path
    assert path is not None
    return path


DAMAGES = {
    "run-not-json": ("run.json", "{"),
    "run-not-an-object": ("run.json", "[]"),
    "run-empty": ("run.json", "{}"),
    "run-missing": ("run.json", None),
    "rounds-missing": ("rounds.jsonl", None),
    "rounds-cut": ("rounds.jsonl", '{"round": 1, "acc'),
    "clients-missing": ("clients.parquet", None),
    "clients-not-parquet": ("clients.parquet", "round,client"),
}


@pytest.mark.parametrize(("name", "text"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_record(bad: Callable[..., str], finished: Path, name: str, text: str | None) -> None:
    path = Path("out") / finished.name
    shutil.copytree(finished, path)
    if text is None:
        (path / name).unlink()
    else:
        (path / name).write_text(text)
    message = bad(RUN)
    assert f"{path}: not a readable record" in message
    assert "use --force" in message


def test_record_that_is_a_file(bad: Callable[..., str], finished: Path) -> None:
    Path("out").mkdir()
    (Path("out") / finished.name).write_text("mine")
    assert "not a readable record" in bad(RUN)


def test_record_of_another_schema(bad: Callable[..., str], finished: Path) -> None:
    path = Path("out") / finished.name
    shutil.copytree(finished, path)
    run = path / "run.json"
    run.write_text(run.read_text().replace('"schema": 2', '"schema": 99'))
    message = bad(RUN)
    assert f"{path}: record schema 99 is not 1" in message
    assert "use the pflbench that wrote it" in message


@pytest.mark.parametrize(
    "line", ["rnu", "list methods", "run --lr nan", "describe fedsa", "run --dataset folder:nowhere --min-samples 2"]
)
def test_as_a_process(places: dict[str, Path], tmp_path: Path, line: str) -> None:
    command = Path(sysconfig.get_path("scripts")) / "pflbench"
    env = {**os.environ, "PFLBENCH_DATA": str(places["data"])}
    done = subprocess.run([command, *shlex.split(line)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    only_line(done.stderr)
    assert not list(tmp_path.iterdir())
