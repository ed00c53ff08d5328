"""Sweeps: the meaning of a suite, and that each of its runs is computed exactly once, also after errors."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from PIL import Image
from refusals import refusal

from pflbench import RunSpec, UsageError, datasets, register
from pflbench.sweep import runner
from pflbench.sweep.places import Here
from pflbench.sweep.runner import plan
from pflbench.sweep.suite import Suite, labels

PFLBENCH = Path(sysconfig.get_path("scripts")) / "pflbench"


def made(**tables):
    return [(s.algo, s.alpha, s.seed) for s in Suite.from_toml(tables, Path("suite.toml")).specs()]


def test_the_grid_is_every_combination_and_includes_and_excludes_are_applied():
    found = made(
        base={"alpha": 0.5, "clients": 30},
        grid={"algo": ["fedavg", "fedper"], "seed": [0, 1]},
        include=[{"algo": "fedas", "alpha": 5.0}, {"algo": "fedavg", "seed": 0}],
        exclude=[{"algo": "fedper", "seed": 1}],
    )
    assert found == [("fedavg", 0.5, 0), ("fedavg", 0.5, 1), ("fedper", 0.5, 0), ("fedas", 5.0, 0)]


def test_a_methods_settings_override_the_base_and_its_set_is_of_hyperparameters():
    specs = Suite.from_toml(
        {
            "base": {"local-epochs": 3},
            "grid": {"algo": ["fedavg", "fedas"]},
            "algorithm": {"fedas": {"local-epochs": 1, "set": {"align-lr": 0.5}}},
            "include": [{"algo": "fedas", "set": {"alignment": "off"}}],
        },
        Path("suite.toml"),
    ).specs()
    assert [s.local_epochs for s in specs] == [3, 1, 3]
    assert [dict(s.hyperparameters) for s in specs] == [{}, {"align_lr": 0.5}, {"alignment": "off"}]


@pytest.mark.parametrize(
    ("tables", "value", "remedy"),
    [
        ({"gird": {}}, "'gird'", "did you mean 'grid'?"),
        ({"grid": []}, "grid", "a table, [grid]"),
        ({"include": {}}, "include", "tables, [[include]]"),
        ({"include": [3]}, "3", "not a table"),
        ({"grid": {"algo": "fedavg"}}, "algo", "a list of values"),
        ({"grid": {"algo": []}}, "algo", "a list of values"),
        ({"grid": {"alhpa": [1.0]}}, "'alhpa'", "did you mean 'alpha'?"),
        ({"grid": {"alpha": [0]}}, "alpha: 0", "must be > 0"),
        ({"grid": {"alpha": [1.0]}, "exclude": [{"aplha": 1.0}]}, "'aplha'", "did you mean 'alpha'?"),
        ({"grid": {"seed": [1]}, "base": {"ronds": 3}}, "'ronds'", "did you mean 'rounds'?"),
        ({"algorithm": {"per_fedavg": {"lr": 1.0}}}, "algorithm 'per_fedavg'", "did you mean 'per-fedavg'?"),
        ({"base": {"local-epochs": 1, "local_epochs": 2}}, "suite.toml: 'local_epochs'", "leave one out"),
        ({"grid": {"local_epochs": [1], "local-epochs": [2]}}, "suite.toml: 'local-epochs'", "leave one out"),
        ({"algorithm": {"fedas": {"batch-size": 1, "batch_size": 2}}}, "'batch_size'", "leave one out"),
        ({"base": {"set": {"align-lr": 1.0, "align_lr": 2.0}}}, "'align_lr'", "leave one out"),
        ({"grid": {"set": [{"align-lr": 1.0, "align_lr": 2.0}]}}, "'align_lr'", "leave one out"),
        ({"include": [{"min-samples": 2, "min_samples": 3}]}, "'min_samples'", "leave one out"),
        ({"exclude": [{"min-samples": 2, "min_samples": 3}]}, "'min_samples'", "leave one out"),
    ],
)
def test_what_a_suite_cannot_mean_is_one_clear_line(tables, value, remedy):
    with pytest.raises(UsageError) as caught:
        Suite.from_toml(tables, Path("suite.toml")).specs()
    message = str(caught.value)
    assert value in message
    assert remedy in message
    assert "\n" not in message


NARROW = {
    "base": {"alpha": 0.5, "clients": 30, "eval-every": 2},
    "grid": {"algo": ["fedavg", "fedper", "fedas"], "join-ratio": [0.2, 1], "alpha": [0.1, 0.5]},
    "algorithm": {"fedas": {"lr": 0.1, "set": {"align-lr": 0.1}}},
    "include": [{"algo": "fedas", "alpha": 0.1, "set": {"alignment": "off"}}, {"algo": "local"}],
    "exclude": [{"algo": "fedper", "alpha": 0.5}],
}


def narrowed(options, tables=NARROW):
    """The runs of a suite that remain with these options, as texts of a command line."""
    suite = Suite.from_toml(tables, Path("suite.toml"))
    return suite.narrowed({name: values.split() for name, values in options.items()})


def test_without_options_a_suite_is_whole():
    assert narrowed({}) == Suite.from_toml(NARROW, Path("suite.toml")).specs()
    assert len(narrowed({})) == 12


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        ({"algo": "fedper"}, [("fedper", 0.2, 0.1), ("fedper", 1.0, 0.1)]),
        ({"algo": "fedavg fedper", "join_ratio": "0.20"},
         [("fedavg", 0.2, 0.1), ("fedavg", 0.2, 0.5), ("fedper", 0.2, 0.1)]),
        ({"alpha": "0.10", "algo": "fedas local"}, [("fedas", 0.2, 0.1), ("fedas", 1.0, 0.1), ("fedas", 0.1, 0.1)]),
        ({"join_ratio": "0.1"}, [("fedas", 0.1, 0.1), ("local", 0.1, 0.5)]),  # the default, of the included runs
        ({"lr": "0.1", "alpha": "0.5"}, [("fedas", 0.2, 0.5), ("fedas", 1.0, 0.5)]),  # not in the grid, but differs
    ],
)  # fmt: skip
def test_an_option_selects_the_runs_whose_setting_differs(options, runs):
    found = narrowed(options)
    assert [(s.algo, s.join_ratio, s.alpha) for s in found] == runs
    assert set(map(repr, found)) <= set(map(repr, narrowed({})))


def test_an_option_replaces_a_setting_that_all_runs_share():
    found = narrowed({"algo": "fedas", "alpha": "0.1", "join_ratio": "1 0.1", "clients": "20", "dataset": "folder:x"})
    assert {(s.clients, s.dataset, s.eval_every) for s in found} == {(20, "folder:x", 2)}
    assert [s.hyperparameters for s in found] == [{"align_lr": 0.1}, {"alignment": "off"}]


def test_several_values_of_a_shared_setting_repeat_all_runs():
    found = narrowed({"seed": "0 1", "rounds": "3"})
    assert len(found) == len(set(map(repr, found))) == 24
    assert [s.seed for s in found] == [0, 1] * 12
    assert {s.rounds for s in found} == {3}


def test_a_suite_of_included_runs_alone_gets_no_grid_from_options():
    tables = {"include": [{"algo": "fedas"}, {"algo": "fedper"}]}
    assert [(s.algo, s.seed) for s in narrowed({"seed": "4 5"}, tables)] == [
        ("fedas", 4), ("fedas", 5), ("fedper", 4), ("fedper", 5),
    ]  # fmt: skip


def test_without_a_grid_the_options_make_it():
    assert [(s.algo, s.lr) for s in narrowed({"algo": "fedas local"}, {"base": {"lr": 1.0}})] == [
        ("fedas", 1.0), ("local", 1.0),
    ]  # fmt: skip
    assert [s.algo for s in narrowed({"algo": "fedas local"}, {})] == ["fedas", "local"]


def test_a_method_that_replaces_the_suites_method_gets_its_own_settings():
    tables = {"base": {"algo": "fedavg"}, "grid": {"alpha": [0.1, 1.0]}, "algorithm": {"fedas": {"lr": 0.5}}}
    assert [(s.algo, s.lr) for s in narrowed({"algo": "fedas"}, tables)] == [("fedas", 0.5)] * 2


def test_a_value_that_follows_from_another_setting_is_found():
    tables = {"grid": {"partition": ["dirichlet", "iid"], "partition-seed": [0, 1]}, "include": [{"alpha": 0.3}]}
    assert [(s.alpha, s.partition_seed) for s in narrowed({"alpha": "0.1", "partition_seed": "0"}, tables)] == [
        (None, 0)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": "0.2"}, "alpha: no run of the suite has 0.2; its grid is: algo fedavg, fedper, fedas, local; "
                           "join_ratio 0.2, 1.0, 0.1; alpha 0.1, 0.5"),
        ({"alpha": "0.1 0.2"}, "alpha: no run of the suite has 0.2; its grid"),
        ({"algo": "fedper", "alpha": "0.5"}, "no run of the suite has algo fedper and alpha 0.5; its grid is: "),
        ({"join_ratio": "half"}, "join_ratio: 'half' is not a number"),
        ({"clients": "0"}, "clients: 0 is out of bounds"),
    ],
)  # fmt: skip
def test_options_that_leave_no_run_are_one_clear_line(options, message):
    assert message in refusal(narrowed, options)


def test_labels_name_what_differs():
    specs = [
        RunSpec(algo="fedavg", seed=0),
        RunSpec(algo="fedas", seed=1, hyperparameters={"alignment": "off", "align_lr": 0.1}),
        RunSpec(algo="fedas", seed=1, hyperparameters={"alignment": "own-copy", "align_lr": 0.1}),
    ]
    assert labels(specs) == ["fedavg seed 0", "fedas seed 1 alignment off", "fedas seed 1 alignment own-copy"]


def test_a_plan_looks_at_each_dataset_once_under_the_name_it_was_given(monkeypatch, tmp_path):
    seen = []

    def resolve(name, *_, **__):
        seen.append(name)
        return f"{name}@1234" if "@" not in name else name

    monkeypatch.setattr(datasets, "resolve", resolve)
    specs = [RunSpec(dataset=name, seed=seed) for name in ("folder:a", "folder:b") for seed in range(3)]
    assert [run.spec.dataset for run in plan(specs, tmp_path, print)] == ["folder:a@1234"] * 3 + ["folder:b@1234"] * 3
    assert [name for name in seen if "@" not in name] == ["folder:a", "folder:b"]


@pytest.fixture
def call(tmp_path):
    """`pflbench sweep` over a small folder of images; returns the started process."""
    draw = np.random.RandomState(0)
    for part, n in (("train", 30), ("test", 10)):
        for name, low in (("dark", 0), ("light", 100)):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(draw.randint(low, low + 156, (8, 8, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    base = f"dataset = 'folder:{tmp_path}/images'\nmodel = 'mlp'\nclients = 3\nmin-samples = 4\njoin-ratio = 1.0"
    suite = tmp_path / "suite.toml"
    suite.write_text(f"[base]\n{base}\nlocal-epochs = 1\nrounds = 6\nalpha = 5.0\n")

    def start(*args, executable=PFLBENCH):
        command = [str(executable), "sweep", str(suite), "--out", "runs", "--data-dir", str(tmp_path / "data"), *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, stdin=subprocess.DEVNULL, text=True)

    return start


def end(process, seconds=120):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


GRID = ["--algo", "fedavg", "--algo", "local", "--seed", "0", "--seed", "1"]


def records(folder):
    return {p.parent.name: p.stat().st_mtime_ns for p in Path(folder).glob("*/run.json") if "." not in p.parent.name}


def test_a_plan_is_shown_a_failing_run_stops_no_other_and_what_is_done_is_not_done_again(call, tmp_path):
    code, out, _ = end(call(*GRID, "--lr", "0.01", "--lr", "1e30", "--dry-run"))
    assert code == 0
    assert "8 runs: 0 recorded, 8 to do" in out
    assert not (tmp_path / "runs").exists()
    code, out, err = end(call(*GRID, "--lr", "0.01", "--lr", "1e30"))
    assert code == 1
    assert out == ""
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 4
    assert all("lr 1e+30" in line and "diverged: round 1: client" in line for line in failed)
    assert err.splitlines()[-1] == "Error: 4 of 8 runs failed"
    before = records(tmp_path / "runs")
    assert len(before) == 8
    code, out, err = end(call(*GRID, "--lr", "0.01", "--lr", "1e30", "--json"))
    found = json.loads(out)
    assert (code, found["runs"], found["computed"], len(found["failed"])) == (1, 8, 0, 4)
    assert records(tmp_path / "runs") == before
    code, out, err = end(call(*GRID, "--lr", "0.01"))
    assert (code, err.splitlines()) == (0, ["4 runs: 4 recorded, 0 to do"])
    made = next(path for path in (tmp_path / "runs").glob("*/run.json") if '"finished"' in path.read_text())
    text = made.read_text()
    made.write_text(text.replace('"numpy": "', '"numpy": "0.'))
    code, out, err = end(call(*GRID, "--lr", "0.01"))
    (note,) = [line for line in err.splitlines() if line.startswith("Note:")]
    assert (
        f"other code made 1 of the recorded runs (for example {made.parent.name}: numpy 0.{np.__version__} and not"
        in note
    )
    made.write_text(text)
    os.utime(made, ns=(before[made.parent.name],) * 2)
    code, out, err = end(call(*GRID, "--lr", "0.01", "--lr", "1e30", "--retry"))
    assert (code, err.splitlines()[0]) == (1, "8 runs: 4 recorded, 4 to do")
    after = records(tmp_path / "runs")
    again = {run for run in after if after[run] != before[run]}
    assert again == {line.split()[1] for line in err.splitlines() if line.startswith("failed: ")}
    assert len(again) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="kills")
def test_an_interrupted_run_that_cannot_go_on_fails_until_the_sweep_is_told_to_retry(call, tmp_path):
    sweep = call("--algo", "local", "--rounds", "40")
    while not list((tmp_path / "runs").glob("*.partial/checkpoint/0*.json")):
        time.sleep(0.01)
        assert sweep.poll() is None
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.communicate(timeout=20)  # until the run, which has the same standard error, has ended, too
    (partial,) = (tmp_path / "runs").glob("*.partial")
    for path in (partial / "checkpoint").glob("*.json"):
        path.write_text("{}")
    code, _, err = end(call("--algo", "local", "--rounds", "40"))
    assert code == 1
    assert "has no checkpoint that can be used; sweep --retry starts from round 1" in err
    assert end(call("--algo", "local", "--rounds", "40", "--retry"))[0] == 0
    assert list(records(tmp_path / "runs")) == [partial.name.partition(".")[0]]


@pytest.mark.skipif(sys.platform != "linux", reason="kills")
def test_a_killed_sweep_goes_on_with_what_is_left_and_ends_with_the_same_numbers(call, tmp_path):
    assert end(call(*GRID, "--out", "whole"))[0] == 0
    sweep = call(*GRID, "--jobs", "1")
    while len(records(tmp_path / "runs")) < 2:
        time.sleep(0.01)
        assert sweep.poll() is None
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.communicate()
    before = records(tmp_path / "runs")
    code, _, _ = end(call(*GRID))
    assert code == 0
    after = records(tmp_path / "runs")
    assert len(after) == 4
    assert {run: after[run] for run in before} == before
    for run in after:
        one, other = (json.loads((tmp_path / f / run / "run.json").read_text()) for f in ("whole", "runs"))
        assert one["fingerprints"] == other["fingerprints"]


def test_two_sweeps_at_once_share_the_work_and_do_no_run_twice(call, tmp_path):
    seeds = [part for seed in range(2, 6) for part in ("--seed", str(seed))]
    sweeps = [call(*GRID, *seeds, "--jobs", "1") for _ in range(2)]
    ended = [end(s) for s in sweeps]
    assert [code for code, _, _ in ended] == [0, 0], ended
    runs = records(tmp_path / "runs")
    assert len(runs) == 12
    done = [line.split()[1] for _, _, err in ended for line in err.splitlines()[1:]]
    assert sorted(done) == sorted(runs)


SETTINGS = {
    "algo": "fedavg", "model": "mlp", "clients": 3, "join_ratio": 1.0, "local_epochs": 1, "min_samples": 2, "alpha": 1,
}  # fmt: skip


@pytest.fixture
def planned(tree, tmp_path):
    """Resolve a run over the small folder of images."""

    def make(**more):
        spec = RunSpec(**{**SETTINGS, "dataset": f"folder:{tree}", "rounds": 1, **more})
        return plan([spec], tmp_path / "data", pytest.fail)

    return make


def computed(runs, out, **kw):
    """Return the failed runs of a sweep that computes one run at a time."""
    with Here(out, jobs=1) as place:
        return runner.compute(runs, out, place, **kw)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_failed_run_leaves_its_traceback_in_a_log_that_its_reason_names(planned, methods, tmp_path):
    from pflbench.algorithms.fedavg import FedAvg

    @register("broken")
    class Broken(FedAvg):
        def local_update(self, *args):
            raise ZeroDivisionError("nothing to\n divide by")

    runs = planned(algo="broken")
    out = tmp_path / "runs"
    failed = computed(runs, out)
    log = out / ".logs" / f"{runs[0].id}.log"
    assert failed == {runs[0].id: f"ZeroDivisionError: nothing to divide by; {log} has the traceback"}
    text = log.read_text()
    assert 'raise ZeroDivisionError("nothing to\\n divide by")' in text
    assert "In a worker, round 1, client" in text

    register("broken")(type("Mended", (FedAvg,), {}))
    assert computed(planned(algo="broken"), out) == {}
    assert not log.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_sweep_takes_no_lock_of_a_run_itself(planned, tmp_path, monkeypatch):
    """If the sweep tried the lock, a run that starts in that moment could not get it."""
    acquire, here, events = filelock.BaseFileLock.acquire, os.getpid(), []

    def acquired(self, *args, **kw):
        assert os.getpid() != here
        return acquire(self, *args, **kw)

    monkeypatch.setattr(filelock.BaseFileLock, "acquire", acquired)
    assert computed(planned(), tmp_path, on_event=events.append) == {}
    assert [event.kind for event in events] == ["started", "round", "evaluation", "done"]


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process")
@pytest.mark.parametrize(("number", "last"), [(signal.SIGCONT, "there"), (signal.SIGKILL, "done")])
def test_a_sweep_waits_for_a_run_of_another_process(
    planned, tree, tmp_path, monkeypatch, eventually, environment, number, last
):
    monkeypatch.setattr(runner, "_LOOK", 0.05)
    monkeypatch.setattr(runner, "_PAUSES", (0.1, 0.2))
    runs, out, events = planned(rounds=20), tmp_path / "runs", []
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    other = subprocess.Popen(
        [PFLBENCH, "run", *options, f"--dataset=folder:{tree}", "--rounds=20", "--executor=serial", "--quiet",
         f"--out={out}", f"--data-dir={tmp_path / 'data'}"],
        env=environment(), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert eventually(lambda: list(out.glob("*.partial/checkpoint/0*.json")), 60)
        other.send_signal(signal.SIGSTOP)

        def on_event(event):
            events.append(event.kind)
            if events == ["started"] * 3:  # it was busy twice
                other.send_signal(number)

        assert computed(runs, out, on_event=on_event) == {}
    finally:
        other.kill()
        other.wait()
    assert events[-1] == last
    assert list(records(out)) == [runs[0].id]
    if number == signal.SIGCONT:
        assert "round" not in events
