"""Runs of a sweep that are computed on another machine: what is sent, and what is kept at home. Without a cluster."""

import dataclasses
import errno
import io
import os
import pickle
import subprocess
import tarfile
import tempfile

import pytest

import pflbench
from pflbench import RunError, RunSpec, UsageError
from pflbench.datasets import load
from pflbench.engine.executors.node import code, packed
from pflbench.store import partial
from pflbench.sweep import away
from pflbench.sweep.away import Away, pack, unpack


@pytest.fixture
def run(tree):
    spec = RunSpec(
        algo="local", dataset=f"folder:{tree}", model="mlp", clients=3, join_ratio=1.0, local_epochs=1, rounds=2,
        min_samples=2, alpha=1.0,
    )  # fmt: skip
    return pflbench.prepare(spec, data_dir=tree.parent / "data")


@pytest.fixture
def made(run, tmp_path):
    """The folder of the run's record."""
    return pflbench.run_experiment(run, store=pflbench.Folder(tmp_path / "made")).path


def test_a_folder_of_which_a_part_is_unpacked_is_not_there(made, run, tmp_path):
    data = pack(made)
    target = partial.own(tmp_path, run.id)
    with pytest.raises(tarfile.ReadError):
        unpack(data[: len(data) // 2], target)
    assert list(tmp_path.iterdir()) == [made.parent]
    unpack(data, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in made.iterdir())


@pytest.fixture
def remote():
    pytest.importorskip("ray")
    from pflbench.sweep import remote

    return remote


def unfinished(made, folder, number):
    """Write a partial folder with a checkpoint of round `number`."""
    unpack(pack(made), folder)
    (folder / "run.json").unlink()
    path = next((folder / "checkpoint").glob("*.json"))
    path.rename(path.with_name(f"{number:06}.json"))
    return folder


def test_a_full_disk_at_home_keeps_the_folder_before(remote, made, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    unfinished(made, out / f"{run.id}.partial", 1)
    hold = remote.Hold(out, run, anew=False)

    def full(self, folder, **_):
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "run.json").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    data = pack(made)
    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    for keep in (hold.replace, hold.publish):
        with pytest.raises(RunError, match=r"cannot write .*No space left on device"):
            keep(data)
    hold.close()
    assert [path.name for path in out.iterdir() if path.name != ".locks"] == [f"{run.id}.partial"]
    assert [path.name for path in (out / f"{run.id}.partial" / "checkpoint").glob("*.json")] == ["000001.json"]


def test_a_run_whose_data_cannot_be_read_fails_alone(remote, run, tmp_path, monkeypatch):
    def damaged(*_):
        raise UsageError("data_dir: the images are damaged")

    monkeypatch.setattr(remote, "load_dataset", damaged)
    place = remote.Cluster(tmp_path, pflbench.Execution("ray"))
    handle = place.start(run)
    assert place.wait([handle], None) == [handle]
    assert place.message(handle) == ("failed", ("data_dir: the images are damaged", None))
    place.__exit__()
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture
def messages(tmp_path, monkeypatch):
    """Compute a run away, and return its messages."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()

    def compute(run):
        data = packed(load(run.spec.dataset, run.data_dir), pickle.Pickler)
        there = Away(packed(run, pickle.Pickler), data, code(run.algorithm), "cpu", None, 60.0)
        there.identity()
        found = [there.next()]
        while found[-1][0] in ("round", "evaluation", "folder", "record"):
            found.append(there.next())
        return found

    return compute


def test_a_run_that_is_computed_away_sends_its_record_and_leaves_no_folder(messages, run, made, tmp_path):
    found = messages(run)
    assert [kind for kind, _ in found] == ["round", "evaluation", "round", "evaluation", "record", "done"]
    assert sorted(name for name in _names(found[-2][1])) == sorted(_names(pack(made)))
    assert list((tmp_path / "scratch").iterdir()) == []


def _names(data):
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getnames()


def test_what_a_killed_worker_left_on_its_machine_is_deleted_by_the_next_one(messages, run, tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    here = partial.own(tmp_path / "scratch", "pflbench")
    left = here.with_name(here.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    living = here.with_name(here.name.replace(f"-{os.getpid()}-", "-1-"))
    for folder in (left, living):
        (folder / "runs").mkdir(parents=True)
    messages(run)
    assert list((tmp_path / "scratch").iterdir()) == [living]


def test_an_impossible_partition_fails_its_run_alone(messages, run):
    run = pflbench.prepare(dataclasses.replace(run.spec, min_samples=10**6), data_dir=run.data_dir)
    ((kind, (reason, trace)),) = messages(run)
    assert (kind, trace) == ("failed", None)
    with pytest.raises(UsageError) as error:
        pflbench.load_federation(run.spec, run.data_dir)
    assert reason == str(error.value)


def test_a_folder_that_cannot_be_sent_fails_the_run_and_the_sweep_does_not_wait_for_it(messages, run, monkeypatch):
    def broken(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(away, "pack", broken)
    kind, (reason, trace) = messages(run)[-1]
    assert (kind, reason) == ("failed", "OSError: [Errno 5] Input/output error")
    assert "in broken" in trace
