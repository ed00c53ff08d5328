"""Records that cc204e1 wrote: they are found, read and compared. tests/reports and tests/store have more."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
import toy
from safetensors.torch import save_file

import pflbench
from pflbench.store.record import Record
from pflbench.store.states import load_state

OLD = Path(__file__).parent / "data" / "schema1"
SETTINGS = {
    "dataset": "synthetic10", "model": "mlp", "clients": 3, "join_ratio": 1.0, "rounds": 2, "local_epochs": 1,
    "alpha": 0.5, "min_samples": 2, "batch_size": 64,
}  # fmt: skip


@pytest.mark.parametrize("algo", ["fedavg", "fedas"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_was_recorded_is_not_computed_again(tmp_path, algo, seed):
    out = tmp_path / "runs"
    shutil.copytree(OLD, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    notes = []
    spec = pflbench.RunSpec(algo=algo, seed=seed, **SETTINGS)
    record = pflbench.run(spec, out=out, notice=notes.append)
    assert record.path == out / record.id
    assert [row["round"] for row in record.evaluations] == [1, 2]
    recorded = json.loads((OLD / record.id / "run.json").read_text())["summary"]
    assert {name: record.summary[name] for name in ("last", "last5", "best_on_test")} == {
        name: recorded[name] for name in ("last", "last5", "best_on_test")
    }
    assert notes == [f"run {record.id} was made with another source of {algo} or of pflbench; --force runs it again"]
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_was_computed_is_computed_again_with_the_same_numbers(tmp_path):
    """On another processor, the last digits may differ."""
    spec = pflbench.RunSpec(algo="fedas", seed=0, **SETTINGS)
    new = pflbench.run(spec, out=tmp_path)
    old = Record.load(OLD / new.id)
    for a, b in zip(new.evaluations, old.evaluations, strict=True):
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=0.01)
        assert a["test_loss"] == pytest.approx(b["test_loss"], rel=1e-3)
    assert {n: new.fingerprints[n] for n in ("data", "partition")} == {
        n: old.fingerprints[n] for n in ("data", "partition")
    }


def test_the_command_line_compares_an_old_record_with_a_new_one(tmp_path):
    spec = pflbench.RunSpec(algo="fedavg", seed=0, **SETTINGS)
    new = pflbench.run(spec, out=tmp_path)
    command = [sys.executable, "-m", "pflbench", "compare", str(OLD / new.id), str(new.path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "accuracy" in done.stdout


def test_the_states_of_an_old_record_that_kept_them_are_read(tmp_path):
    """cc204e1's states have parts of tensors, and their names in the file's metadata."""
    tensors = {"model/body.0.weight": torch.ones(2, 2), "mixture/alpha": torch.tensor(0.5)}
    save_file(tensors, tmp_path / "old.safetensors", metadata={"parts": json.dumps(["model", "mixture", "empty"])})
    found = load_state(tmp_path / "old.safetensors")
    assert list(found) == ["model", "mixture", "empty"]
    assert torch.equal(found["model"]["body.0.weight"], torch.ones(2, 2))
    assert found["empty"] == {}


def test_the_seconds_of_evaluations_of_an_old_record_are_unknown_and_not_0():
    (folder, *_) = sorted((Path(__file__).parent / "data" / "schema1").iterdir())
    assert Record.load(folder).summary["evaluation"] == {"seconds": None, "busy_seconds": None}


def test_the_states_of_a_record_whose_checkpoint_has_two_logs_are_read(tmp_path):
    """So has a record of schema 1."""
    record = pflbench.run(toy.spec("fedavg"), toy.federation(), toy.net(), executor="serial", out=tmp_path)
    (path,) = (record.path / "checkpoint").glob("*.json")
    content = json.loads(json.loads(path.read_text())["content"])
    del content["logs"]["evaluations.jsonl"]
    text = json.dumps(content)
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}))
    loaded = Record.load(record.path)
    loaded.load_states()
    assert oracle.same(loaded.server["model"], record.server["model"])
