"""From the command to the first training step, with the data in the cache."""

import statistics
import subprocess
import sys
import time

import pytest

CODE = """
import os, sys, time
import click
from pflbench.cli import main

def stop(self, grads, parameters):
    with open(os.environ["FIRST_STEP"], "w") as file:
        file.write(repr(time.time()))
    os._exit(1)

class Late:  # torch must not be imported any earlier than the command does
    def find_spec(self, name, path, target=None):
        if name == "pflbench.engine.runner":
            sys.meta_path.remove(self)
            from pflbench.core.training import Optimiser
            Optimiser.step = stop

sys.meta_path.insert(0, Late())
main()
"""


@pytest.mark.parametrize("dataset", ["synthetic10"])
def test_start(dataset, benchmark, tmp_path, say, monkeypatch):
    benchmark.group = "from the command to the first step"
    monkeypatch.setenv("FIRST_STEP", str(tmp_path / "first"))
    command = ["run", "--dataset", dataset, "--workers", "2", "--out", str(tmp_path / "runs"), "--quiet"]
    taken = []

    def start():
        (tmp_path / "first").unlink(missing_ok=True)
        began = time.time()
        # -P: what is installed is timed, and not the checkout, in which the folders are not in their places.
        done = subprocess.run(
            [sys.executable, "-P", "-c", CODE, *command], stderr=subprocess.PIPE, text=True, check=False
        )
        assert (tmp_path / "first").exists(), done.stderr
        taken.append(float((tmp_path / "first").read_text()) - began)

    benchmark.pedantic(start, rounds=5, warmup_rounds=1)
    taken = taken[1:]
    benchmark.extra_info.update(to_first_step=taken)
    say(f"{dataset}: {statistics.median(taken):.2f} s to the first step (of {min(taken):.2f}-{max(taken):.2f})")
