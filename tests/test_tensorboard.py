"""`--log tensorboard`, read back by TensorBoard itself."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pflbench.store.record import Record

PFLBENCH = Path(sysconfig.get_path("scripts")) / "pflbench"
RUN = [
    PFLBENCH, "run", "--algo", "fedavg", "--dataset", "synthetic10", "--model", "mlp", "--local-epochs", "1", "--quiet",
    "--clients", "20", "--batch-size", "200",
]  # fmt: skip


def test_the_curves_are_those_of_the_record(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for rounds in ("2", "2"):  # the second run replaces the first
        command = [*RUN, "--log", "tensorboard", "--rounds", rounds, "--eval-every", "2", "--force"]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    (folder,) = (tmp_path / "runs" / "tensorboard").iterdir()
    record = Record.load(tmp_path / "runs" / folder.name)
    found = events.EventAccumulator(str(folder))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("accuracy")] == [
        (2, pytest.approx(record.evaluations[0]["accuracy"]))
    ]
    assert [e.value for e in found.Scalars("train_loss")] == pytest.approx([r["train_loss"] for r in record.rounds])


def test_without_tensorboard_the_remedy_is_named_before_anything_is_written(tmp_path):
    code = (
        "import sys; sys.modules['tensorboard'] = None; from pflbench.cli import main; sys.argv = sys.argv[1:]; main()"
    )
    command = [sys.executable, "-c", code, *map(str, RUN), "--log", "tensorboard"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install 'pflbench[tensorboard]'" in done.stderr
    assert list(tmp_path.iterdir()) == []
