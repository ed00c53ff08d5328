"""Where the time of a round of W goes, how close it comes to the processor's peak, and what is left idle."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import workload
from torch.utils.flop_counter import FlopCounterMode

from pflbench.core import models
from pflbench.core.training import Optimiser
from pflbench.engine import work
from pflbench.store.folder import Writer

HERE = Path(__file__).parent
WORKERS = 2


def peaks():
    """The GFLOP/s of matrix products and of convolutions, by as many processes at once as there are workers."""
    command = [sys.executable, str(HERE / "peak.py")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(WORKERS)]
    found = [[float(v) for v in p.communicate()[0].split()] for p in processes]
    return [sum(values) for values in zip(*found, strict=True)]


def flops(net, batch):
    """Floating-point operations for each sample: of a training step with `batch` samples, and of a test."""
    x, y = torch.randn(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.int64)
    with FlopCounterMode(display=False) as training:
        torch.nn.functional.cross_entropy(net(x), y).backward()
    with FlopCounterMode(display=False) as testing:
        net(x)
    return training.get_total_flops() / batch, testing.get_total_flops() / batch


@pytest.fixture
def clocks(monkeypatch, tmp_path):
    """Time forward, backward and optimiser in the workers; return a function that sums up what they noted."""
    spent = {"forward": 0.0, "backward": 0.0, "optimiser": 0.0, "states": 0.0}

    def timed(part, function):
        def wrapper(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - began

        return wrapper

    def noted(function):
        def wrapper(self, job):
            spent.update(dict.fromkeys(spent, 0.0))
            result = function(self, job)
            step = job.round if isinstance(job, work.Evaluate) else job.round - 1
            line = json.dumps({"round": step, "all": result.seconds, **spent})
            with (tmp_path / f"{os.getpid()}.jsonl").open("a") as file:
                file.write(line + "\n")
            return result

        return wrapper

    monkeypatch.setattr(models.Net, "forward", timed("forward", models.Net.forward))
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", timed("forward", torch.nn.functional.cross_entropy))
    monkeypatch.setattr(torch.autograd, "grad", timed("backward", torch.autograd.grad))
    monkeypatch.setattr(Optimiser, "step", timed("optimiser", Optimiser.step))
    monkeypatch.setattr(work, "save_state", timed("states", work.save_state))
    monkeypatch.setattr(work.Work, "__call__", noted(work.Work.__call__))

    def total(steps):
        """The seconds of all workers in `steps`: training of a round, and evaluation of the one before."""
        lines = [json.loads(line) for path in tmp_path.glob("*.jsonl") for line in path.read_text().splitlines()]
        lines = [line for line in lines if line["round"] in steps]
        return {part: sum(line[part] for line in lines) for part in ("all", *spent)}

    return total


def test_where_the_time_goes(federation, rounds, benchmark, clocks, say, request):
    """The loop's own cost is all but forward, backward and optimiser: batches, copies, pipes, averages, waiting."""
    benchmark.group = "profile"
    before = peaks()
    with rounds(federation, algo="fedavg") as run:
        run.step()
        pairs = request.config.getoption("--pairs")
        benchmark.pedantic(run.step, rounds=pairs)
    spent = clocks(range(1, 1 + pairs))  # in the step that evaluates round 1, round 2 is trained
    seconds = sum(benchmark.stats.stats.data)
    useful = {part: spent[part] / (WORKERS * seconds) for part in ("forward", "backward", "optimiser")}
    own = 1 - sum(useful.values())
    training, testing = flops(models.build_model("cnn", (3, 32, 32), workload.CLASSES), 10)
    n = [sum(len(getattr(c, part)) for c in federation.clients) for part in ("train", "test")]
    achieved = pairs * (n[0] * training + n[1] * testing) / seconds / 1e9
    gemm, conv = (max(pair) for pair in zip(before, peaks(), strict=True))
    shares = ", ".join(f"{part} {share:.1%}" for part, share in useful.items())
    say(f"of the time of {WORKERS} workers: {shares}, all else {own:.1%}")
    say(
        f"{achieved:.0f} GFLOP/s: {achieved / gemm:.0%} of the peak of matrix products ({gemm:.0f}), "
        f"{achieved / conv:.0%} of that of convolutions ({conv:.0f})"
    )
    benchmark.extra_info.update(useful, own=own, gflops=achieved, gemm=gemm, conv=conv)


def test_what_checkpoints_cost(federation, rounds, benchmark, clocks, say, request, monkeypatch, tmp_path):
    """FedAS with a checkpoint every round; every client's whole model is its state, and all take part."""
    benchmark.group = "checkpoints"
    written = []

    def timed(function):
        def wrapper(*args):
            began = time.perf_counter()
            function(*args)
            written.append(time.perf_counter() - began)

        return wrapper

    for name in ("add_round", "add_evaluation", "checkpoint"):
        monkeypatch.setattr(Writer, name, timed(getattr(Writer, name)))
    with rounds(federation, algo="fedas", out=tmp_path / "runs") as run:
        run.step()
        written.clear()
        pairs = request.config.getoption("--pairs")
        benchmark.pedantic(run.step, rounds=pairs)
    seconds = sum(benchmark.stats.stats.data)
    share = (sum(written) + clocks(range(1, 1 + pairs))["states"] / WORKERS) / seconds
    say(f"checkpoints: {share:.1%} of a round of FedAS")
    benchmark.extra_info.update(share=share)


@pytest.mark.parametrize("algo", ["fedavg", "fedas"])
def test_utilisation_with_two_unequal_clients_a_round(algo, images, rounds, benchmark, say):
    """FedAS's published setting: 2 of 20 take part. What one of them leaves idle, the other work of the round fills."""
    benchmark.group = "2 of 20 clients a round"
    with rounds(workload.federation(images), algo=algo, join_ratio=0.1) as run:
        run.step()
        benchmark.pedantic(run.step, rounds=12)
        rows = run.rows[1:]
    both = [*rows, *run.evaluations]  # of the same steps
    busy = sum(row["busy_seconds"] for row in both) / sum(WORKERS * row["seconds"] for row in both)
    sizes = [sorted(len(run._federation.clients[c].train) for c in row["participants"]) for row in rows]
    bound = sum(sum(pair) for pair in sizes) / sum(2 * max(pair) for pair in sizes)
    say(f"{algo}: {busy:.0%} of {WORKERS} workers' time is work; training alone could fill {bound:.0%}")
    benchmark.extra_info.update(busy=busy, training_alone=bound)
