"""What the commands print, write and return."""

import csv
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pflbench import settings
from pflbench.cli import main
from pflbench.core import registry
from pflbench.spec import MODELS, PARTITION_SETTINGS, RunSpec

PFLBENCH = Path(sysconfig.get_path("scripts")) / "pflbench"
COMMANDS = ("run", "list", "describe", "partition", "sweep", "runs", "report", "compare", "export")


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["pflbench", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def spawn(environment: Callable[..., dict[str, str]]) -> Callable[..., Done]:
    """Run a command in a process."""

    def run(*args: str, cwd: Path) -> Done:
        done = subprocess.run(
            [PFLBENCH, *args], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file's time and bytes."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


# Help, lists, descriptions


def test_version_and_help(call: Callable[..., Done]) -> None:
    assert re.fullmatch(r"pflbench \d+\.\d+\.\d+\S*\n", call("--version").out)
    for args in (["--help"], ["-h"]):
        done = call(*args)
        assert (done.code, done.err) == (0, "")
        assert all(re.search(rf"^  {command} ", done.out, re.MULTILINE) for command in COMMANDS)


def test_no_command_is_a_question_for_help(call: Callable[..., Done]) -> None:
    done = call()
    assert (done.code, done.out) == (2, "")
    assert "Usage: pflbench" in done.err
    assert "partition" in done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(call: Callable[..., Done], command: str) -> None:
    done = call(command, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"Usage: pflbench {command} ")
    assert call(command, "-h") == done


def test_help_of_run_has_every_setting(call: Callable[..., Done]) -> None:
    text = " ".join(call("run", "--help").out.split())
    for name, field in settings.fields(RunSpec).items():
        flag = "--" + name.replace("_", "-")
        assert f"{flag} " in text or f"{flag} / --no-{flag[2:]} " in text
        shown = str(field.default).lower() if isinstance(field.default, bool) else field.default
        assert field.default is None or f"[default: {shown}]" in text
        assert " ".join(field.metadata["doc"].split()[:6]) in text
    for flag in ("--set", "--config", "--executor", "--workers", "--out", "--data-dir", "--force", "--dry-run"):
        assert f"{flag} " in text


@pytest.mark.parametrize(
    "line",
    [
        *("--help", "--version", "run --help", "partition --help", "run --lr fast"),
        *("list partitions", "list algorithms", "list datasets", "list models --json"),
        *("describe fedas", "describe fedbabu", "describe fedsa", "sweep --help", "sweep quik", "report --help"),
        *("runs", "runs --json"),
    ],
)
def test_light_commands_import_nothing_heavy(tmp_path: Path, line: str) -> None:
    code = (
        "import sys\nfrom pflbench.cli import main\n"
        "try:\n    main()\n"
        "finally:\n    print('\\n' + ' '.join({name.split('.')[0] for name in sys.modules}))"
    )
    (tmp_path / "runs" / "0123456789ab.partial").mkdir(parents=True)
    done = subprocess.run([sys.executable, "-c", code, *line.split()], cwd=tmp_path, capture_output=True, text=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "click" in loaded
    assert not loaded & {"torch", "torchvision", "matplotlib", "pyarrow", "pandas", "PIL", "scipy"}


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("algorithms", sorted(registry.algorithms())),
        ("datasets", ["auto", "cifar10", "cifar100", "fashion-mnist", "folder:PATH", "synthetic10", "synthetic100"]),
        ("models", sorted(MODELS)),
        ("partitions", sorted(PARTITION_SETTINGS)),
    ],
)
def test_lists(call: Callable[..., Done], what: str, names: list[str]) -> None:
    done = call("list", what)
    assert (done.code, done.err) == (0, "")
    found = json.loads(call("list", what, "--json").out)
    lines = done.out.splitlines()
    if what == "algorithms":  # by family
        families = [line.removesuffix(":") for line in lines if not line.startswith("  ")]
        assert sorted(families) == sorted({facts["family"] for facts in found.values()})
        assert found["fedas"] == {
            "line": registry.algorithms()["fedas"], "title": "FedAS", "venue": "CVPR", "year": 2024,
            "family": "personal part of the network",
            "personal": "the head; a client also keeps the body it trained, for the prototypes and for its evaluation",
            "sent": "the body; the trace is the upload's weight",
        }  # fmt: skip
        lines = [line for line in lines if line.startswith("  ")]
        found = {name: facts["line"] for name, facts in found.items()}
    assert set(names) <= set(found)
    assert dict(line.split(maxsplit=1) for line in lines) == found


@pytest.mark.parametrize("name", list(registry.algorithms()))
def test_describe(call: Callable[..., Done], name: str) -> None:
    done = call("describe", name)
    assert (done.code, done.err) == (0, "")
    text = done.out.splitlines()
    assert text[0] == registry.algorithms()[name]
    for word in ("Paper: ", "Family: ", "Personal: ", "Sent: ", "Evaluated: ", "Reported: "):
        assert sum(line.startswith(word) for line in text) == 1
    known = registry.describe(name).hyperparameters
    last = text[text.index("Hyperparameters (--set name=value):" if known else "Hyperparameters: none.") + 1 :]
    assert len(last) == len(known)
    for line, (key, field) in zip(last, known.items(), strict=True):
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        assert line.startswith(f"  {key} = {default}  {field.metadata['doc']}")
        assert settings.bounds(field) in line


# A run


@pytest.fixture(scope="module")
def finished(
    spawn: Callable[..., Done], quick: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Done, Path]:
    """Run the default method and executor as a process; return its output and its folder."""
    cwd = tmp_path_factory.mktemp("finished")
    return spawn("run", *quick, "--set", "align-lr=0.02", cwd=cwd), cwd


@pytest.fixture
def record(finished: tuple[Done, Path]) -> Path:
    (path,) = (p for p in (finished[1] / "runs").iterdir() if not p.name.startswith("."))
    return path


def test_a_run_prints_progress_to_stderr_and_a_table_to_stdout(finished: tuple[Done, Path], record: Path) -> None:
    done, _ = finished
    assert done.code == 0, done.err
    first, *rounds = done.err.splitlines()
    assert re.fullmatch(r"FedAS on folder:tree@[0-9a-f]{12}: 3 clients, dirichlet 1, 3 a round", first)
    assert len(rounds) == 2
    for number, line in enumerate(rounds, 1):
        assert re.fullmatch(rf"round {number}/2  accuracy \d+\.\d\d %  \d+\.\d s", line)
    last = json.loads((record / "run.json").read_text())["summary"]["last"]
    row = next(line for line in done.out.splitlines() if "weighted by samples" in line)
    assert row.split()[-4:-2] == [f"{100 * last['accuracy']:.2f}", "%"]
    assert f"round 2/2  accuracy {100 * last['accuracy']:.2f} %" in rounds[-1]
    assert done.out.rstrip().endswith(f"record: runs/{record.name}")
    assert "\x1b" not in done.out + done.err


def test_the_record_says_everything(record: Path) -> None:
    run = json.loads((record / "run.json").read_text())
    assert run.keys() == {
        "schema", "id", "status", "reason", "summary", "spec", "fingerprints", "versions", "machine"
    }  # fmt: skip
    assert (run["schema"], run["id"], run["status"], run["reason"]) == (2, record.name, "finished", None)
    assert re.fullmatch("[0-9a-f]{12}", record.name)
    spec = run["spec"]
    assert spec.keys() == {"hyperparameters", *settings.fields(RunSpec)}
    assert spec["algo"] == "fedas"
    assert spec["hyperparameters"] == {
        "alignment": "own-copy", "weighting": "fisher", "align_lr": 0.02, "align_epochs": 1, "align_batch_size": 16
    }  # fmt: skip
    assert (spec["alpha"], spec["balanced"], spec["rounds"], spec["lr"]) == (1.0, False, 2, 0.005)
    assert re.fullmatch("folder:tree@[0-9a-f]{12}", spec["dataset"])
    assert run["fingerprints"].keys() == {"data", "partition", "initial", "algorithm", "metrics", "states"}
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in run["fingerprints"].values())
    assert {"python", "pflbench", "torch", "torchvision", "numpy", "pyarrow", "safetensors"} <= run["versions"].keys()
    assert run["machine"].keys() >= {"system", "processor", "cores", "executor", "workers", "git_commit"}
    assert run["machine"]["executor"] == "processes"
    assert run["summary"].keys() == {
        "last",
        "last5",
        "best_on_test",
        "rounds",
        "bytes_up",
        "bytes_down",
        "seconds",
        "busy_seconds",
        "evaluation",
    }


def test_the_record_has_every_round_and_every_client(record: Path) -> None:
    run = json.loads((record / "run.json").read_text())
    rounds, evaluations = (
        [json.loads(line) for line in (record / f"{name}.jsonl").read_text().splitlines()]
        for name in ("rounds", "evaluations")
    )
    assert [row["round"] for row in rounds] == [row["round"] for row in evaluations] == [1, 2]
    for row in evaluations:
        assert row.keys() == {
            "round", "accuracy", "accuracy_mean", "accuracy_std", "accuracy_worst10", "global_accuracy", "test_loss",
            "steps", "forward", "backward", "seconds", "busy_seconds",
        }  # fmt: skip
        assert (row["steps"], row["forward"], row["backward"]) == (0, 0, 0)
    for row in rounds:
        assert row.keys() == {
            "round", "participants", "train_loss", "bytes_up", "bytes_down", "steps", "forward", "backward", "seconds",
            "busy_seconds",
        }  # fmt: skip
        assert row["participants"] == [0, 1, 2]
        assert row["forward"] > row["backward"] > 0  # prototypes need no gradient
        # The body's 512 x 768 weights and 512 biases, as float32, for three clients either way.
        assert row["bytes_up"] == row["bytes_down"] == 3 * 4 * (512 * 768 + 512)
    clients = pq.read_table(record / "clients.parquet")
    assert clients.column_names == ["round", "client", "n", "accuracy", "global_accuracy"]
    rows = clients.to_pylist()
    assert [(row["round"], row["client"]) for row in rows] == [(r, c) for r in (1, 2) for c in range(3)]
    last = rows[3:]
    samples = sum(row["n"] for row in last)
    assert run["summary"]["last"]["accuracy"] == pytest.approx(sum(r["n"] * r["accuracy"] for r in last) / samples)
    assert run["summary"]["last"]["accuracy_mean"] == pytest.approx(np.mean([r["accuracy"] for r in last]))
    assert run["summary"]["last5"]["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in evaluations]))
    assert run["summary"]["bytes_up"] == sum(row["bytes_up"] for row in rounds)
    assert {str(p.relative_to(record)) for p in record.rglob("*") if p.is_file()} == {
        "run.json", "rounds.jsonl", "evaluations.jsonl", "clients.parquet", "samples.parquet", "checkpoint/000002.json",
        "checkpoint/initial.safetensors",
        "checkpoint/server-000002.safetensors", *(f"checkpoint/00000{c}-000002.safetensors" for c in range(3)),
    }  # fmt: skip


def test_a_second_time_shows_the_record(
    spawn: Callable[..., Done], finished: tuple[Done, Path], quick: list[str], record: Path
) -> None:
    first, cwd = finished
    before = contents(cwd)
    done = spawn("run", *quick, "--set", "align_lr=0.02", "--executor", "serial", cwd=cwd)
    assert (done.code, done.out) == (0, first.out)
    (line,) = done.err.splitlines()
    assert f"{record.name} already exists" in line
    assert "--force" in line
    assert contents(cwd) == before


@pytest.mark.parametrize("changed", ["source", "torch"])
def test_a_record_of_other_code_is_shown_as_such(
    call: Callable[..., Done], quick: list[str], monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    settings = [*quick, "--executor", "serial", "--rounds", "1", "--algo", "fedavg"]
    made = json.loads(call("run", *settings, "--json").out)
    if changed == "source":
        monkeypatch.setattr("pflbench.store.provenance.source_fingerprint", lambda _: "0" * 64)
        what = "another source of fedavg or of pflbench"
    else:
        now = made["versions"]["torch"]
        monkeypatch.setattr("pflbench.store.provenance.versions", lambda: {**made["versions"], "torch": "9.0"})
        what = f"torch {now} and not 9.0"
    note = f"Note: run {made['id']} was made with {what}; --force runs it again"
    assert note in call("run", *settings).err.splitlines()
    assert note not in call("run", *settings, "--force").err.splitlines()


def test_force_runs_anew(call: Callable[..., Done], quick: list[str], tmp_path: Path) -> None:
    settings = [*quick, "--algo", "fedrep", "--set", "head_epochs=1", "--executor", "serial", "--json"]
    runs, written = [], []
    for more in ([], [], ["--force"]):
        runs.append(json.loads(call("run", *settings, *more).out))
        written.append(Path(runs[-1]["path"], "run.json").stat().st_mtime_ns)
    assert written[0] == written[1] < written[2]
    first, again, forced = runs
    assert [run.pop("existed") for run in (first, again, forced)] == [False, True, False]
    assert again == first
    assert forced["fingerprints"] == first["fingerprints"]
    for run in (first, forced):
        del run["summary"]["seconds"], run["summary"]["busy_seconds"], run["summary"]["evaluation"]
    assert forced["summary"] == first["summary"]
    assert json.loads(Path(forced["path"], "run.json").read_text())["fingerprints"] == first["fingerprints"]
    assert [p.name for p in (tmp_path / "runs").glob("[!.]*")] == [first["id"]]


def test_quiet_and_json(call: Callable[..., Done], quick: list[str]) -> None:
    settings = [*quick, "--algo", "fedper", "--executor", "serial"]
    for _ in range(2):
        assert call("run", *settings, "--quiet") == (0, "", "")
    done = call("run", *settings, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n") == 1
    found = json.loads(done.out)
    assert found["spec"]["algo"] == "fedper"
    path = Path(found.pop("path"))
    assert found.pop("existed")
    assert found == json.loads((path / "run.json").read_text())


def test_results_do_not_depend_on_executor_and_folder(
    call: Callable[..., Done], finished: tuple[Done, Path], quick: list[str], record: Path
) -> None:
    line = [*quick, "--set", "align_lr=0.02", "--executor", "serial", "--out", "else/where", "--json"]
    found = json.loads(call("run", *line).out)
    run = json.loads((record / "run.json").read_text())
    assert found["id"] == record.name
    assert found["fingerprints"] == run["fingerprints"]
    assert (Path("else/where") / record.name / "run.json").exists()


def test_a_run_that_diverges_is_recorded_and_fails(call: Callable[..., Done], quick: list[str]) -> None:
    for _ in range(2):
        done = call("run", *quick, "--algo", "fedavg", "--lr", "1e30", "--executor", "serial")
        assert done.code == 1
        assert re.fullmatch(
            r"Error: run [0-9a-f]{12} diverged: round \d.* client \d.*; lower lr", done.err.split("\n")[-2]
        )
        (path,) = Path("runs").glob("[!.]*")
        run = json.loads((path / "run.json").read_text())
        assert run["status"] == "diverged"
        assert "lower lr" in run["reason"]


# Settings


def dry(call: Callable[..., Done], *args: str) -> dict[str, Any]:
    done = call("run", *args, "--dry-run", "--json")
    assert (done.code, done.err) == (0, "")
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_dry_run_resolves_and_writes_nothing(
    call: Callable[..., Done], quick: list[str], record: Path, tmp_path: Path
) -> None:
    done = call("run", *quick, "--set", "align_lr=0.02", "--dry-run")
    assert (done.code, done.err) == (0, "")
    run = json.loads((record / "run.json").read_text())
    assert json.loads(done.out) == {"id": run["id"], "spec": run["spec"]}
    assert not list(tmp_path.iterdir())


def test_config_file_and_command_line(call: Callable[..., Done], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'algo = "fedas"\ndataset = "synthetic10"\nlocal-epochs = 7\nbatch_size = 8\nlr = 1\nshuffle = false\n'
        "momentum = 0.5\n[set]\nalign-lr = 0.5\nalign_epochs = 3\n"
    )
    line = "--config run.toml --lr 0.25 --set align_epochs=4 --momentum 0 --drop-last --alpha 0.3"
    found = dry(call, *line.split())
    spec = found["spec"]
    assert (spec["local_epochs"], spec["batch_size"], spec["lr"], spec["alpha"]) == (7, 8, 0.25, 0.3)
    assert (spec["shuffle"], spec["drop_last"], spec["momentum"]) == (False, True, 0.0)
    assert (spec["hyperparameters"]["align_lr"], spec["hyperparameters"]["align_epochs"]) == (0.5, 4)
    assert spec["hyperparameters"]["alignment"] == "own-copy"
    assert spec["rounds"] == RunSpec().rounds
    line = (
        "--algo fedas --dataset synthetic10 --local-epochs 7 --batch-size 8 --lr 0.25 --no-shuffle --drop-last "
        "--alpha 0.3 --set align-lr=0.5 --set align_epochs=9 --set align_epochs=4"
    )
    assert dry(call, *line.split()) == found


def test_a_method_in_the_config_can_be_replaced_with_its_hyperparameters(
    call: Callable[..., Done], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text('dataset = "synthetic10"\nset = {head_epochs = 2}\nalgo = "fedrep"\n')
    assert dry(call, "--config", "run.toml")["spec"]["hyperparameters"] == {"head_epochs": 2}
    done = call("run", "--config", "run.toml", "--algo", "fedas", "--dry-run")
    assert done.code == 2
    assert "hyperparameter of fedas 'head_epochs'" in done.err


def test_config_may_say_where_and_how(call: Callable[..., Done], quick: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('algo = "local"\nexecutor = "serial"\nout = "mine"\nworkers = 1\nrounds = 9\n')
    done = call("run", *quick, "--config", "run.toml")
    assert done.code == 0
    (path,) = (tmp_path / "mine").glob("[!.]*")
    run = json.loads((path / "run.json").read_text())
    assert (run["machine"]["executor"], run["spec"]["rounds"]) == ("serial", 2)


@pytest.mark.parametrize(
    ("more", "name", "value"),
    [
        ("", "shuffle", True),
        ("--no-shuffle", "shuffle", False),
        ("--no-shuffle --shuffle", "shuffle", True),
        ("--drop-last", "drop_last", True),
        ("--no-drop-last", "drop_last", False),
        ("", "balanced", False),
        ("--balanced", "balanced", True),
        ("--partition iid", "balanced", True),
        ("--partition iid --no-balanced", "balanced", False),
        ("--partition pathological", "classes_per_client", 2),
        ("--alpha none", "alpha", 0.1),
        ("--alpha 1", "alpha", 1.0),
        ("--init-seed 3", "init_seed", 3),
        ("--init-seed 0", "init_seed", None),
        ("--model resnet18", "norm", "batch"),
        ("--model resnet18 --norm group", "norm", "group"),
    ],
)
def test_resolved(call: Callable[..., Done], more: str, name: str, value: object) -> None:
    assert dry(call, "--dataset", "synthetic10", *more.split())["spec"][name] == value


def test_auto_without_a_network_is_synthetic_and_says_so(
    call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def offline(*args: object, **kw: object) -> None:
        raise URLError("the network is unplugged")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    monkeypatch.setenv("PFLBENCH_DATA", str(tmp_path / "data"))
    done = call("run", "--dry-run")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["spec"]["dataset"] == "synthetic10"
    (line,) = done.err.splitlines()
    assert line.startswith("Note: CIFAR-10 is not in ")
    assert "the network is unplugged" in line
    assert "using synthetic10 instead" in line
    assert dry(call, "--dataset", "synthetic10") == found
    assert not list(tmp_path.iterdir())


def test_auto_with_a_network_is_cifar10(
    call: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kw: nullcontext())
    monkeypatch.setenv("PFLBENCH_DATA", str(tmp_path / "data"))
    assert dry(call)["spec"]["dataset"] == "cifar10"
    assert not list(tmp_path.iterdir())


# Processes


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_bar_on_a_terminal(environment: Callable[..., dict[str, str]], quick: list[str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [PFLBENCH, "run", *quick, "--algo", "fedavg"],
        cwd=tmp_path, env=environment(COLUMNS="100"), stdout=subprocess.PIPE, stderr=theirs, text=True,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # Linux's way to say that the terminal has no more writers
            pass
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0
    screen = shown.decode()
    assert "━" in screen
    assert "2/2" in screen
    assert "\x1b[" in screen
    assert "round 1/2" not in screen  # the plain lines
    assert "weighted by samples" in out
    assert "\x1b" not in out


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes of POSIX")
@pytest.mark.parametrize("command", ["--help", "list algorithms", "list algorithms --json", "run", "partition --json"])
def test_a_reader_that_goes_away(
    environment: Callable[..., dict[str, str]], command: str, finished: tuple[Done, Path], quick: list[str], tree: Path
) -> None:
    name, *more = command.split()
    if name == "run":
        more = [*quick, "--set", "align_lr=0.02"]  # shows the record
    elif name == "partition":
        more = ["--dataset", f"folder:{tree}", "--clients", "3", "--min-samples", "2", "--json"]
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [PFLBENCH, name, *more], cwd=finished[1], stdout=theirs, stderr=subprocess.PIPE, text=True,
        env=environment(PFLBENCH_DATA=str(tree.parent / "data")),
    )  # fmt: skip
    os.close(theirs)
    assert done.returncode in (0, 1)
    assert all(word not in done.stderr for word in ("Traceback", "Exception", "Broken"))


# The partition command


def test_partition_shows_draws_and_writes_once(call: Callable[..., Done], quick: list[str], record: Path) -> None:
    settings = [*quick[:4], "--clients", "3", "--min-samples", "2", "--alpha", "1"]
    done = call("partition", *settings)
    assert (done.code, done.err) == (0, "")
    (path,) = Path("partitions").iterdir()
    assert {p.name for p in path.iterdir()} == {"partition.png", "partition.svg", "counts.csv", "indices.npz"}
    with Image.open(path / "partition.png") as image:
        assert image.format == "PNG"
    assert "<svg" in (path / "partition.svg").read_text()
    with (path / "counts.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["client", "cat", "dog", "owl"]
    counts = np.array(rows, dtype=int)[:, 1:]
    assert counts.sum(0).tolist() == [12, 12, 12]
    with np.load(path / "indices.npz") as indices:
        assert sorted(indices) == [f"{part}_{i}" for part in ("test", "train") for i in range(3)]
        assert sorted(np.concatenate(list(indices.values()))) == list(range(36))
        assert [len(indices[f"train_{i}"]) + len(indices[f"test_{i}"]) for i in range(3)] == counts.sum(1).tolist()
    for client, row in enumerate(counts):
        shown = [str(n) if n else "." for n in row]
        assert [str(client), str(row.sum()), str((row > 0).sum()), *shown] in [x.split() for x in done.out.splitlines()]
    assert f"partition {path.name[:12]}: {path}" in done.out
    # It is the partition of the run with the same settings.
    assert json.loads((record / "run.json").read_text())["fingerprints"]["partition"].startswith(path.name[:12])

    before = contents(Path("partitions"))
    assert call("partition", *settings) == done
    as_json = call("partition", *settings, "--json")
    assert (as_json.code, as_json.err) == (0, "")
    found = json.loads(as_json.out)
    assert found.keys() == {"dataset", "classes", "fingerprint", "path", "moved", "counts"}
    assert found["counts"] == counts.tolist()
    assert found["fingerprint"][:12] == path.name[:12]
    assert contents(Path("partitions")) == before

    assert call("partition", *settings, "--partition-seed", "1", "--out", "partitions").code == 0
    assert len(list(Path("partitions").iterdir())) == 2
    shutil.copytree(quick[1].removeprefix("folder:"), "others")
    Image.new("RGB", (16, 16)).save("others/train/cat/0.png")  # other data, the same labels
    others = json.loads(call("partition", "--dataset", "folder:others", *settings[2:], "--json").out)
    assert others["fingerprint"] == found["fingerprint"]
    assert others["path"] != found["path"]
    assert before.items() <= contents(Path("partitions")).items()


def test_partition_from_a_config_for_run(call: Callable[..., Done], quick: list[str], tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text(
        'rounds = 3\npartition = "pathological"\nclasses-per-client = 1\nmin-samples = 2\n'
    )
    done = call("partition", *quick[:4], "--config", "p.toml", "--clients", "3", "--json")
    assert done.code == 0
    counts = np.array(json.loads(done.out)["counts"])
    assert sorted(counts.tolist()) == [[0, 0, 12], [0, 12, 0], [12, 0, 0]]
