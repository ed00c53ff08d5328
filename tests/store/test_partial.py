"""Partial folders: who computes in them, how they are taken over, and that two owners damage nothing."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import filelock
import pytest
import torch
import toy
from click.testing import CliRunner

import pflbench
from pflbench.core import registry
from pflbench.errors import RunBusy
from pflbench.store import listing, locks, partial

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
FORK = multiprocessing.get_context("fork")
REMOTE = "node7-17-ab12"


@pytest.fixture(autouse=True)
def unlocked(monkeypatch):
    """Make locks hold nothing, as on a network file system without a lock service, also in forked processes."""
    monkeypatch.setattr(filelock.BaseFileLock, "acquire", lambda *_args, **_options: None)


@pytest.fixture
def start(tmp_path):
    """Run FedAS on a toy federation, into the folder `runs` or another."""

    def run(out="runs", *, rounds=5, **settings):
        spec = toy.spec("fedas", clients=5, join_ratio=0.4, rounds=rounds, shuffle=True, eval_every=2)
        federation = toy.federation((9, 4, 7, 6, 5))
        settings = {"executor": "serial", "resume": True, **settings}
        return pflbench.run(spec, federation, toy.net(), out=tmp_path / out, **settings)

    return run


@pytest.fixture
def whole(start):
    """What an undisturbed run has on disk, except times."""
    return content(start("whole").path)


def content(record):
    """All files of a record, without times."""
    found = {str(p.relative_to(record)): p.read_bytes() for p in record.rglob("*") if p.is_file()}
    for name in ("rounds.jsonl", "evaluations.jsonl"):
        rows = [json.loads(line) for line in found[name].splitlines()]
        found[name] = [{**row, "seconds": None, "busy_seconds": None} for row in rows]
    (checkpoint,) = [name for name in found if name.startswith("checkpoint/0") and name.endswith(".json")]
    del found[checkpoint]  # it has the hashes of the logs
    found["run.json"] = json.loads(found["run.json"])["fingerprints"]
    return found


class Child:
    """A run in a forked process, which sends how it ended: "done", or the error's type and message."""

    def __init__(self, work):
        def run(pipe):
            torch.set_num_threads(1)
            try:
                work()
            except BaseException as error:
                pipe.send((type(error).__name__, str(error)))
            else:
                pipe.send("done")

        self._pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=run, args=(theirs,))
        self.process.start()
        theirs.close()

    def wait_for_stop(self):
        """Wait until the process stops itself; return False if it ends instead."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        while (state := stat.read_text().rpartition(")")[2].split()[0]) not in "TZ":
            time.sleep(0.005)
        return state == "T"

    def end(self):
        """Continue the process, and return how it ended."""
        os.kill(self.process.pid, signal.SIGCONT)
        assert self._pipe.poll(60)
        found = self._pipe.recv()
        self.process.join()
        return found


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


class At(pflbench.Observer):
    """Does something after a round."""

    def __init__(self, number, action):
        self._number, self._action = number, action

    def round(self, row):
        if row["round"] == self._number:
            self._action()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def assert_taken_over(end, run):
    kind, message = end
    assert kind == "RunBusy"
    assert message.startswith(f"run {run} was taken over by another process (")
    assert "nothing was damaged" in message
    assert "\n" not in message


def remote(start, tmp_path):
    """Make the folder of a run whose owner is on another machine; return the run's id and the folder."""
    with pytest.raises(KeyboardInterrupt):
        start(observers=[toy.Stop(3)])
    (folder,) = (tmp_path / "runs").glob("*.partial")
    run = folder.name.partition(".")[0]
    return run, folder.rename(folder.with_name(f"{run}.{REMOTE}.partial"))


def test_an_orderly_end_leaves_a_folder_without_an_owner(start, tmp_path, monkeypatch):
    run, folder = remote(start, tmp_path)
    folder.rename(tmp_path / "runs" / f"{run}.partial")  # of an earlier version of pflbench, too

    def fail(*_args):
        (mine,) = (tmp_path / "runs").glob("*.partial")
        assert partial._OWNED.fullmatch(mine.name)["pid"] == str(os.getpid())
        assert (mine / "alive").exists()
        raise ZeroDivisionError

    monkeypatch.setattr(registry.algorithm("fedas"), "local_update", fail)
    with pytest.raises(ZeroDivisionError):
        start()
    assert names(tmp_path / "runs") == [f"{run}.partial"]
    assert not (tmp_path / "runs" / f"{run}.partial" / "alive").exists()


def test_a_killed_run_is_resumed_at_once_on_its_machine_even_before_its_parent_waits_for_it(start, tmp_path, whole):
    child = Child(lambda: start(observers=[At(3, kill)]))
    assert not child.wait_for_stop()  # it was killed
    (name,) = names(tmp_path / "runs")
    assert f"-{child.process.pid}-" in name
    notices = []
    record = start(notice=notices.append)
    child.process.join()
    assert notices == [f"resuming run {record.id} after round 3"]
    assert content(record.path) == whole
    assert names(tmp_path / "runs") == [record.id]


def test_a_fresh_sign_of_life_is_respected_and_an_old_one_is_not(start, tmp_path, whole, monkeypatch):
    run, folder = remote(start, tmp_path)
    before = names(folder)
    os.utime(folder / "rounds.jsonl", (0, 0))
    for settings in ({}, {"resume": False}, {"force": True}):
        with pytest.raises(RunBusy, match=rf"run {run} is computed by node7-17, last sign of life \d+ s ago; wait"):
            start(**settings)
        assert names(tmp_path / "runs") == [folder.name]
        assert names(folder) == before
    monkeypatch.setattr(partial, "_STALE", 0.5)
    (folder / "alive").touch()
    time.sleep(0.6)  # it is the file system's clock that counts, and nobody can set the time of a rename
    assert content(start().path) == whole
    assert names(tmp_path / "runs") == [run]


@pytest.mark.parametrize("settings", [{"resume": False}, {"force": True}])
def test_a_restart_deletes_abandoned_folders_alone(start, tmp_path, whole, monkeypatch, settings):
    run, folder = remote(start, tmp_path)
    monkeypatch.setattr(partial, "_STALE", 0.0)
    delete = shutil.rmtree

    def out_of_the_owners_reach(path, *args, **options):
        assert not folder.exists()
        delete(path, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", out_of_the_owners_reach)
    (tmp_path / "runs" / f"{run}0.partial").mkdir()
    rounds = []
    record = start(**settings, observers=[At(1, lambda: rounds.append(names(tmp_path / "runs")))])
    assert content(record.path) == whole
    ((mine, other),) = rounds
    assert (mine.split("-")[-2], other) == (str(os.getpid()), f"{run}0.partial")
    assert names(tmp_path / "runs") == [run, f"{run}0.partial"]


def test_of_several_abandoned_folders_the_one_that_got_furthest_is_resumed_and_the_others_go(
    start, tmp_path, whole, monkeypatch
):
    run, folder = remote(start, tmp_path)
    monkeypatch.setattr(partial, "_STALE", 0.0)
    for number, name in ((1, "aaaa-1-0000"), (2, "zzzz-1-0000")):
        with pytest.raises(KeyboardInterrupt):
            start("other", observers=[toy.Stop(number)], resume=False)
        (tmp_path / "other" / f"{run}.partial").rename(tmp_path / "runs" / f"{run}.{name}.partial")
    notices = []
    assert content(start(notice=notices.append).path) == whole
    assert notices == [f"resuming run {run} after round 3"]
    assert names(tmp_path / "runs") == [run]
    assert not folder.exists()


@pytest.mark.parametrize("executor", ["serial", "processes"])
@pytest.mark.parametrize("settings", [{}, {"resume": False}], ids=["resume", "restart"])
def test_an_owner_that_was_stopped_for_long_ends_with_one_line_and_damages_nothing(
    start, tmp_path, whole, monkeypatch, settings, executor
):
    child = Child(lambda: start(observers=[At(2, stop)], executor=executor, workers=2))
    assert child.wait_for_stop()
    assert list(tmp_path.glob("runs/*.partial/alive"))
    with pytest.raises(RunBusy, match="last sign of life"):
        start(**settings)
    monkeypatch.setattr(partial, "_STALE", 0.0)
    ends = []  # the stopped owner goes on while the new one computes
    record = start(**settings, observers=[At(4, lambda: ends.append(child.end()))])
    assert_taken_over(*ends, record.id)
    assert content(record.path) == whole
    assert names(tmp_path / "runs") == [record.id]


def stop_at(number, folder):
    """Stop this process just before its `number`th change below `folder`."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            seen += os.fsdecode(args[0]).startswith(str(folder))
            if seen == number:
                seen += 1
                stop()

    sys.addaudithook(hook)


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_an_owner_that_is_stopped_before_any_of_its_writes_damages_nothing(start, tmp_path, monkeypatch, first):
    whole = content(start("whole", rounds=2).path)
    for number in range(first, 99, 4):
        monkeypatch.setattr(partial, "_STALE", 60.0)
        out = f"runs{number}"

        def work(number=number, out=out):
            stop_at(number, tmp_path / out)
            start(out, rounds=2)

        child = Child(work)
        if not child.wait_for_stop():
            assert child.end() == "done"
            break
        monkeypatch.setattr(partial, "_STALE", 0.0)
        record = start(out, rounds=2)
        end = child.end()
        assert end == "done" or end[0] == "RunBusy", end
        if end != "done":
            assert_taken_over(end, record.id)
        assert content(record.path) == whole, f"stopped at change {number}"
        assert names(tmp_path / out) == [record.id]
    assert number > 20


@pytest.mark.parametrize(("name", "number"), [("rounds.jsonl", 3), ("writing-run.json", 0)])
def test_what_a_stopped_owner_has_begun_to_write_does_not_reach_the_new_owners_files(
    start, whole, monkeypatch, name, number
):
    opened = Path.open
    times = iter(range(9))

    def work():
        def stopping(path, *args, **options):
            file = opened(path, *args, **options)
            if path.name == name and next(times) == number:
                stop()
            return file

        Path.open = stopping
        start()

    child = Child(work)
    assert child.wait_for_stop()
    monkeypatch.setattr(partial, "_STALE", 0.0)
    record = start(executor="processes", workers=2)  # so that run.json differs from the other's
    before = (record.path / "run.json").read_bytes()
    assert_taken_over(child.end(), record.id)
    assert content(record.path) == whole
    assert (record.path / "run.json").read_bytes() == before


def test_processes_that_take_a_run_from_each_other_end_with_one_whole_record(start, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(partial, "_STALE", 0.0)

    def work():
        for _ in range(200):
            try:
                start()
            except RunBusy:
                time.sleep(0.01 * (os.getpid() % 7))
            else:
                return

    children = [Child(work) for _ in range(3)]
    assert [child.end() for child in children] == ["done"] * 3
    (run,) = names(tmp_path / "runs")
    assert content(tmp_path / "runs" / run) == whole


@pytest.mark.parametrize("force", [False, True], ids=["new", "forced"])
def test_of_two_processes_that_both_finish_a_run_one_publishes_it(start, tmp_path, whole, monkeypatch, force):
    if force:
        start()
    monkeypatch.setattr(partial, "abandoned", lambda *_: [])  # they do not see each other
    meet = FORK.Barrier(2)
    children = [Child(lambda: start(force=force, observers=[At(5, meet.wait)])) for _ in range(2)]
    assert [child.end() for child in children] == ["done"] * 2
    (run,) = names(tmp_path / "runs")
    assert content(tmp_path / "runs" / run) == whole


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_process_that_is_stopped_when_it_publishes_leaves_the_record_of_the_other(
    start, tmp_path, whole, monkeypatch, moment
):
    record = start()
    monkeypatch.setattr(partial, "abandoned", lambda *_: [])
    stops = []

    def work():
        def hook(event, args):  # the old record is aside then
            if event == "os.rename" and Path(args[1]) == record.path and not stops:
                stops.append(1)
                stop()

        if moment == "within":
            sys.addaudithook(hook)
        start(force=True, observers=[At(5, stop)] if moment == "before" else [])

    child = Child(work)
    assert child.wait_for_stop()
    assert record.path.exists() == (moment == "before")
    start(force=True)
    theirs = (record.path / "run.json").stat()
    assert child.end() == "done"
    assert (record.path / "run.json").stat() == theirs
    assert content(record.path) == whole
    assert names(tmp_path / "runs") == [record.id]


def test_signs_of_life_end_with_the_folder_and_never_make_one(tmp_path, monkeypatch, eventually):
    monkeypatch.setattr(partial, "_BEAT", 0.01)
    folder, taken = tmp_path / "mine", tmp_path / "theirs"
    folder.mkdir()
    life = partial.Life()
    life.begin(folder)
    first = (folder / "alive").stat().st_mtime_ns
    assert eventually(lambda: (folder / "alive").stat().st_mtime_ns > first, 5)
    folder.rename(taken)
    time.sleep(0.05)
    last = (taken / "alive").stat().st_mtime_ns
    time.sleep(0.05)
    assert (taken / "alive").stat().st_mtime_ns == last
    life.end()
    assert names(tmp_path) == ["theirs"]


def test_a_sweep_that_is_terminated_leaves_folders_without_owners(quick, tmp_path, environment, eventually):
    sweep = subprocess.Popen(
        [Path(sysconfig.get_path("scripts")) / "pflbench", "sweep", *quick, "--rounds=100000", "--jobs=2", "--seed=0",
         "--seed=1"],
        cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    runs = tmp_path / "runs"
    try:
        assert eventually(lambda: len({p.parts[-3] for p in runs.glob("*.partial/checkpoint/0*.json")}) == 2, 60)
        sweep.terminate()
        _, err = sweep.communicate(timeout=30)
    finally:
        sweep.kill()
    assert err.splitlines()[-1].startswith("Error: terminated")
    assert [name.split(".")[1:] for name in names(runs)] == [["partial"]] * 2


UNLOCKED = """
import fcntl, os, sys
from pflbench.cli import main
from pflbench.store import partial
from pflbench.sweep import runner

fcntl.flock = lambda *_: None
partial._host = lambda: os.environ["NODE"]
runner._LOOK, runner._PAUSES = 0.1, (0.1, 0.2)
main()
"""


def test_two_sweeps_of_two_machines_without_locks_share_the_work(quick, tmp_path, environment):
    options = [*quick, "--jobs=1", *(f"--seed={seed}" for seed in range(4))]
    sweeps = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", UNLOCKED, "sweep", *options], cwd=tmp_path, env=environment(NODE=node),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for node in ("node1", "node2")
    ]  # fmt: skip
    ended = [(sweep.communicate(timeout=120)[1], sweep.returncode) for sweep in sweeps]
    assert [code for _, code in ended] == [0, 0], ended
    entries = listing.entries([tmp_path / "runs"])
    assert [entry.status for entry in entries] == ["finished"] * 4
    for entry in entries:
        pflbench.Record.load(entry.path).load_states()


def test_an_owned_folder_is_listed_and_found_by_its_run(tmp_path):
    folder = tmp_path / f"0123456789ab.{REMOTE}.partial"
    folder.mkdir()
    (tmp_path / f"0123456789ab.{REMOTE}.old").mkdir()
    (entry,) = listing.entries([tmp_path])
    assert (entry.id, entry.status, entry.path) == ("0123456789ab", "unfinished", folder)
    assert listing.find("0123", tmp_path) == folder


def test_a_machine_without_a_lock_service_computes_all_the_same(start, whole, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.BaseFileLock, "acquire", refuse)
    assert content(start().path) == whole


MOUNTS = """\
22 1 259:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:26 / /home rw shared:2 - nfs4 server:/home rw,local_lock=none
31 30 0:27 / /home/scratch rw - tmpfs none rw
32 22 0:28 / /mnt/my\\040disk rw master:1 propagate_from:2 - fuse.sshfs host: rw
33 22 0:29 / /twice rw - lustre server:/x rw
34 33 0:30 / /twice rw - xfs /dev/b rw
35 22 0:31 / /ceph rw - ceph mon:/ rw
"""


@pytest.mark.parametrize(
    ("path", "system"),
    [("/tmp/runs", None), ("/home/me/runs", "nfs4"), ("/home", "nfs4"), ("/homes/me", None), ("/home/scratch/a", None),
     ("/mnt/my disk/runs", "fuse.sshfs"), ("/twice/runs", None), ("/ceph/runs", "ceph")],
)  # fmt: skip
def test_network_file_systems_are_known(tmp_path, monkeypatch, path, system):
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(locks, "_MOUNTS", mounts)
    assert locks.network(Path(path)) == system


def test_a_sweep_on_a_network_file_system_says_so_once_unless_it_has_a_shard(quick, tmp_path, monkeypatch):
    from pflbench.cli import cli
    from pflbench.sweep import runner

    monkeypatch.setattr(locks, "_MOUNTS", tmp_path / "mountinfo")
    locks._MOUNTS.write_text("22 1 0:26 / / rw - nfs4 server:/ rw\n")
    monkeypatch.setattr(runner, "compute", lambda *_args, **_options: {})
    line = [*quick, "--algo=fedavg", "--algo=local", f"--out={tmp_path / 'runs'}"]
    said = CliRunner().invoke(cli, ["sweep", *line], catch_exceptions=False).stderr
    assert said.count("is on a network file system (nfs4), where locks may not hold;") == 1
    assert "--shard" in said
    assert "network" not in CliRunner().invoke(cli, ["sweep", *line, "--shard=1/2"], catch_exceptions=False).stderr
