"""Shards of a sweep, and its runs as commands."""

import json
import shlex
import subprocess
import sys

import pytest

from pflbench import RunSpec, UsageError, prepare
from pflbench.sweep import spread
from pflbench.sweep.runner import plan

SPECS = [
    RunSpec(algo=algo, dataset="synthetic10", join_ratio=ratio, rounds=rounds)
    for algo in ("fedavg", "fedas", "ditto")
    for ratio in (0.1, 0.5, 1.0)
    for rounds in (5, 40)
]


@pytest.fixture(scope="module")
def runs():
    return plan(SPECS, None, print)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 18, 30])
def test_every_run_is_in_one_shard(runs, parts):
    shards = [spread.shard(runs, f"{i}/{parts}") for i in range(1, parts + 1)]
    ids = [run.id for part in shards for run in part]
    assert sorted(ids) == sorted(run.id for run in runs)
    assert len(set(ids)) == len(ids)


def test_shards_have_about_equal_costs_whatever_the_order_of_the_runs(runs):
    costs = [sum(spread.cost(run.spec) for run in spread.shard(runs, f"{i}/3")) for i in (1, 2, 3)]
    assert max(costs) < 1.1 * min(costs)
    for i in (1, 2, 3):
        backwards = spread.shard(list(reversed(runs)), f"{i}/3")
        assert {run.id for run in backwards} == {run.id for run in spread.shard(runs, f"{i}/3")}


@pytest.mark.parametrize("text", ["0/4", "5/4", "a/b", "1", "1/0", "-1/4", "1/4/2", ""])
def test_another_shard_is_refused(runs, text):
    with pytest.raises(UsageError, match="is not I/N"):
        spread.shard(runs, text)


def parsed(line):
    """The id that the command line finds for a command."""
    words = shlex.split(line)
    assert words[:2] == ["pflbench", "run"]
    words = [word for word in words[2:] if word != "--resume"]
    done = subprocess.run(
        [sys.executable, "-m", "pflbench", "run", *words, "--dry-run"], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)["id"]


def test_a_command_is_the_same_run():
    spec = RunSpec(
        algo="fedas", hyperparameters={"align_lr": 0.25, "alignment": "off"}, dataset="synthetic10", shuffle=False,
        drop_last=True, alpha=0.5, tested="both", sampling_seed=3,
    )  # fmt: skip
    run = prepare(spec)
    assert parsed(spread.command(run.spec)) == run.id


def test_the_command_line_lists_the_missing_runs_of_a_shard(tmp_path, tree, quick):
    sweep = [sys.executable, "-m", "pflbench", "sweep", "--algo", "fedavg", "--algo", "local", *quick, "--out", "a b"]
    run = {"capture_output": True, "text": True, "cwd": tmp_path}
    listed = subprocess.run([*sweep, "--list"], **run, check=True).stdout.splitlines()
    assert len(listed) == 2
    assert all(f"--dataset folder:{tree}" in line and line.endswith(f"--data-dir {quick[3]}") for line in listed)
    assert "--resume --out 'a b'" in listed[0]
    on_gpus = subprocess.run([*sweep, "--list", "--device", "cuda"], **run, check=True).stdout.splitlines()
    assert on_gpus == [f"{line} --device cuda" for line in listed]
    halves = [subprocess.run([*sweep, "--list", "--shard", f"{i}/2"], **run, check=True).stdout for i in (1, 2)]
    assert sorted("".join(halves).splitlines()) == sorted(listed)
    words = [sys.executable, "-m", *shlex.split(listed[0])]
    subprocess.run(words, **run, check=True)
    assert subprocess.run([*sweep, "--list"], **run, check=True).stdout.splitlines() == listed[1:]
    done = subprocess.run([*sweep, "--shard", "3/2"], **run)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
