"""Killed runs, and their continuation."""

import ctypes
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy

import pflbench
import pflbench.engine.evaluation
from pflbench import RunError
from pflbench.core import registry
from pflbench.store.checkpoint import Checkpoint, checkpoints

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")
METHODS = [*sorted(registry.algorithms()), "fedas in-place"]
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def start(tmp_path):
    """Run a method on a toy federation, into a folder by name."""

    def run(algo, out, rounds=8, eval_every=2, **settings):
        algo, _, alignment = algo.partition(" ")
        federation = toy.federation((9, 4, 7, 6, 5))
        hyper = {"alignment": alignment} if alignment else {}
        spec = toy.spec(algo, hyper, clients=5, join_ratio=0.4, rounds=rounds, shuffle=True, eval_every=eval_every)
        settings = {"executor": "serial", **settings}
        return pflbench.run(spec, federation, toy.net_for(algo), out=tmp_path / out, **settings)

    run.out = tmp_path
    return run


def result(record):
    """All bytes that must not depend on interruptions."""
    names = sorted(str(p.relative_to(record.path)) for p in record.path.rglob("*"))
    logs = [
        [json.loads(line) for line in (record.path / name).read_text().splitlines()]
        for name in ("rounds.jsonl", "evaluations.jsonl")
    ]
    timeless = [[{**row, "seconds": None, "busy_seconds": None} for row in rows] for rows in logs]
    states = {p.name: p.read_bytes() for p in (record.path / "checkpoint").glob("*.safetensors")}
    clients = (record.path / "clients.parquet").read_bytes()
    return names, timeless, states, clients, record.fingerprints


class Seen(pflbench.Observer):
    """Records the numbers of the trained rounds and of the evaluated rounds."""

    def __init__(self):
        self.rounds = []
        self.evaluations = []

    def round(self, row):
        self.rounds.append(row["round"])

    def evaluation(self, row):
        self.evaluations.append(row["round"])


def interrupt(start, out, **settings):
    """Make an interrupted run with checkpoints of rounds 4 and 5."""
    with pytest.raises(KeyboardInterrupt):
        start("fedas", out, observers=[toy.Stop(5)], **settings)


def forked(start, algo, out, **settings):
    """Run in a forked child, which has no threads of torch's pool."""
    torch.set_num_threads(1)
    start(algo, out, **settings)


@pytest.mark.parametrize("algo", METHODS)
def test_a_run_killed_at_random_moments_ends_with_the_bytes_of_one_that_never_was(start, tmp_path, algo):
    whole = result(start(algo, "whole"))
    began = time.monotonic()
    timed = FORK.Process(target=forked, args=(start, algo, "timed"))
    timed.start()
    timed.join(60)
    assert timed.exitcode == 0
    seconds = time.monotonic() - began
    draw = random.Random(algo)
    kills = attempts = 0
    while attempts < 12 or (kills < 3 and attempts < 60):  # the machine's speed may change meanwhile
        attempts += 1
        settings = {"resume": True, "checkpoint_every": draw.choice([1, 1, 2, 3])}
        child = FORK.Process(target=forked, args=(start, algo, "killed"), kwargs=settings)
        child.start()
        child.join(draw.uniform(0.0, 1.0) * seconds)
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        if child.exitcode == 0:  # it was done: restart
            shutil.rmtree(tmp_path / "killed")
    assert kills >= 3
    assert result(start(algo, "killed", resume=True)) == whole


def test_a_run_killed_while_workers_compute_continues_with_other_workers(start):
    whole = result(start("fedas", "whole"))
    interrupt(start, "killed", executor="processes", workers=2)
    assert result(start("fedas", "killed", resume=True, executor="processes", workers=3)) == whole


def test_what_was_done_is_not_done_again(start):
    interrupt(start, "out")
    seen = Seen()
    start("fedas", "out", resume=True, observers=[seen])
    assert seen.rounds == [6, 7, 8]
    assert seen.evaluations == [6, 8]


def test_without_resume_an_interrupted_run_restarts_from_round_1(start):
    interrupt(start, "out")
    seen = Seen()
    start("fedas", "out", observers=[seen])
    assert seen.rounds == list(range(1, 9))
    assert seen.evaluations == [2, 4, 6, 8]


def test_resume_of_nothing_starts_and_of_a_finished_run_shows_it(start):
    first = start("fedper", "out", resume=True)
    assert len(first.rounds) == 8
    seen = Seen()
    assert start("fedper", "out", resume=True, observers=[seen]).rounds == first.rounds
    assert seen.rounds == seen.evaluations == []


@pytest.mark.parametrize(("number", "every", "evaluated"), [(4, 1, [4, 6, 8]), (5, 1, [6, 8]), (5, 4, [4, 6, 8])])
def test_the_evaluation_that_is_pending_follows_from_the_rounds_and_evaluations_that_are_kept(
    start, number, every, evaluated
):
    """The evaluation of round 4 runs in parallel with the training of round 5."""
    whole = result(start("fedas", "whole"))
    with pytest.raises(KeyboardInterrupt):
        start("fedas", "out", observers=[toy.Stop(number)], checkpoint_every=every)
    seen = Seen()
    assert result(start("fedas", "out", resume=True, observers=[seen])) == whole
    assert seen.evaluations == evaluated
    assert seen.rounds == list(range(number // every * every + 1, 9))


def test_a_run_whose_last_evaluation_is_missing_trains_no_round_again(start):
    whole = result(start("fedas", "whole"))
    with pytest.raises(KeyboardInterrupt):
        start("fedas", "out", observers=[toy.Stop(8)])
    seen = Seen()
    assert result(start("fedas", "out", resume=True, observers=[seen])) == whole
    assert (seen.rounds, seen.evaluations) == ([], [8])


def test_uploads_lie_in_files_by_client_and_exchange_until_the_next_checkpoint(start, tmp_path):
    names = []

    class Look(pflbench.Observer):
        def round(self, row):
            (folder,) = tmp_path.glob("out/*.partial/checkpoint")
            names.append(sorted(p.name for p in folder.glob("upload-*")))
            participants.append(row["participants"])

    participants = []
    start("fedas in-place", "out", observers=[Look()], checkpoint_every=8)
    seen = set()
    for found, cohort in zip(names[:-1], participants, strict=False):
        seen |= {f"upload-{client:06}-0.safetensors" for client in cohort}
        assert found == sorted(seen)
    assert names[-1] == []


def test_two_checkpoints_are_kept_and_no_file_that_neither_names(start, tmp_path):
    interrupt(start, "out")
    (folder,) = tmp_path.glob("out/*.partial/checkpoint")
    found = checkpoints(folder)
    assert {p.name for p in folder.parent.iterdir() if p.is_file()} == {
        "rounds.jsonl", "evaluations.jsonl", "clients.jsonl",
    }  # fmt: skip
    assert [p.name for p in found] == ["000005.json", "000004.json"]
    named = {saved.file for path in found for saved in Checkpoint.read(path).files()}
    assert {p.name for p in folder.glob("*.safetensors")} == named


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, lambda path: path.unlink()], ids=["truncated", "flipped", "gone"])
@pytest.mark.parametrize("victim", ["000005.json", "server-000005.safetensors", "client"])
def test_a_damaged_checkpoint_is_found_out_and_the_one_before_is_used(start, tmp_path, damage, victim):
    whole = result(start("fedas", "whole"))
    interrupt(start, "out")
    (folder,) = tmp_path.glob("out/*.partial/checkpoint")
    if victim == "client":
        (victim,) = sorted(p.name for p in folder.glob("0*-000005.safetensors"))[:1]
    damage(folder / victim)
    notices = []
    assert result(start("fedas", "out", resume=True, notice=notices.append)) == whole
    if (victim, damage.__name__) != ("000005.json", "<lambda>"):  # a missing newest checkpoint cannot be detected
        assert any("round 5 cannot be used" in text and victim in text for text in notices)
    assert any("after round 4" in text for text in notices)


def test_with_no_good_checkpoint_there_is_a_clear_error_and_no_silent_restart(start, tmp_path):
    interrupt(start, "out")
    (folder,) = tmp_path.glob("out/*.partial/checkpoint")
    truncate(folder / "initial.safetensors")
    with pytest.raises(RunError, match="no checkpoint that can be used; --force starts from round 1"):
        start("fedas", "out", resume=True)
    assert len(start("fedas", "out", force=True).rounds) == 8


LOGS = pytest.mark.parametrize("name", ["rounds.jsonl", "evaluations.jsonl", "clients.jsonl"])


@LOGS
def test_a_log_that_was_changed_is_found_out(start, tmp_path, name):
    interrupt(start, "out")
    (log,) = tmp_path.glob(f"out/*.partial/{name}")
    assert '"round": 2' in log.read_text()
    log.write_text(log.read_text().replace('"round": 2', '"round": 3'))
    with pytest.raises(RunError, match="no checkpoint that can be used"):
        start("fedas", "out", resume=True)


@LOGS
def test_a_torn_last_line_is_cut_off(start, tmp_path, name):
    whole = result(start("fedas", "whole"))
    interrupt(start, "out")
    (log,) = tmp_path.glob(f"out/*.partial/{name}")
    with log.open("a") as file:
        file.write('{"round": 6, "partici')
    assert result(start("fedas", "out", resume=True)) == whole


def test_other_versions_are_refused_by_name(start, monkeypatch):
    interrupt(start, "out")
    monkeypatch.setattr("pflbench.engine.runner.versions", lambda: {"torch": "0.0"})
    with pytest.raises(RunError, match="torch changed since it was written; --force starts from round 1"):
        start("fedas", "out", resume=True)


def failure(work):
    """Call `work`, which tells how it failed, in a child; return the message, one line that names the remedy."""
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=work, args=(theirs,))
    child.start()
    child.join(60)
    assert ours.poll(), "the child sent no error"
    kind, message = ours.recv()
    if kind == "skip":
        pytest.skip(message)
    assert kind == "RunError"
    assert "\n" not in message
    assert "--resume" in message
    return message


def test_a_state_that_cannot_be_written_is_one_clear_line_and_what_was_written_is_good(start, tmp_path):
    """RLIMIT_FSIZE simulates a full disk: the system refuses to write more."""
    whole = result(start("fedas", "whole"))

    def limited(pipe):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        try:
            forked(start, "fedas", "out")
        except BaseException as error:
            pipe.send((type(error).__name__, str(error)))

    assert "File too large" in failure(limited)
    notices = []
    assert result(start("fedas", "out", resume=True, notice=notices.append)) == whole
    assert any("resuming run" in text for text in notices)


def test_a_full_disk_is_one_clear_line_and_what_was_written_is_good(start, tmp_path):
    whole = result(start("fedas", "whole"))
    out, kept = tmp_path / "out", tmp_path / "kept"
    out.mkdir()

    def filled(pipe):
        if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS: private mounts, which end with this process
            pipe.send(("skip", "mounts need privileges here"))
            return
        for command in ("mount --make-rprivate /", f"mount -t tmpfs -o size=44k none {out}"):
            if subprocess.run(command.split(), capture_output=True, check=False).returncode:
                pipe.send(("skip", f"{command} fails here"))
                return
        try:
            forked(start, "fedas", "out")
        except BaseException as error:
            pipe.send((type(error).__name__, str(error)))
        shutil.copytree(out, kept)

    assert "No space left on device" in failure(filled)
    notices = []
    assert result(start("fedas", "kept", resume=True, notice=notices.append)) == whole
    assert any("resuming run" in text for text in notices)


def kill_at(number, folder):
    """Kill this process by SIGKILL just before its `number`th change below `folder`."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if not writes and event not in (
            "os.rename",
            "os.remove",
            "os.truncate",
            "os.mkdir",
            "os.rmdir",
            "shutil.rmtree",
        ):
            return
        if os.fsdecode(args[0]).startswith(str(folder)):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize(
    ("every", "eval_every", "poisoned"), [(1, 1, False), (2, 2, False), (1, 1, True), (2, 1, True)]
)
def test_a_run_killed_before_any_of_its_writes_ends_with_the_bytes_of_one_that_never_was(
    start, tmp_path, monkeypatch, every, eval_every, poisoned
):
    """For each file that is opened, renamed or removed: kill a process just before, then resume the run."""
    settings = {"rounds": 3, "eval_every": eval_every, "checkpoint_every": every}
    if poisoned:  # the evaluation of the second round diverges
        update = registry.algorithm("fedas").personalise

        def personalise(self, client, received, state):
            own = update(self, client, received, state)["model"]
            return {"model": {n: p * torch.nan for n, p in own.items()} if client._key[0] == 2 else own}

        monkeypatch.setattr(registry.algorithm("fedas"), "personalise", personalise)
    killed_at_every_write(start, tmp_path, "fedas", diverges=poisoned, **settings)


def test_a_run_with_several_exchanges_a_round_survives_a_kill_before_any_of_its_writes(start, tmp_path, twice):
    killed_at_every_write(start, tmp_path, twice, rounds=3, eval_every=1)


def killed_at_every_write(start, tmp_path, algo, *, diverges=False, **settings):
    record = start(algo, "whole", **settings)
    assert record.status == ("diverged" if diverges else "finished")
    whole = result(record)

    def killed(number):
        kill_at(number, tmp_path / "out")
        forked(start, algo, "out", **settings)

    number = 0
    while True:
        number += 1
        child = FORK.Process(target=killed, args=(number,))
        child.start()
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        assert result(start(algo, "out", resume=True, **settings)) == whole, f"killed at change {number}"
        shutil.rmtree(tmp_path / "out")
        if child.exitcode == 0:
            break
    assert number > 25


@pytest.mark.parametrize("where", ["server", "initial", "clients", "logs", "link", "folder"])
def test_a_checkpoint_that_leads_elsewhere_is_refused_and_nothing_there_is_touched(start, tmp_path, where):
    """Its hashes are correct: the author of the file could compute them."""
    interrupt(start, "out")
    (partial,) = tmp_path.glob("out/*.partial")
    folder = partial / "checkpoint"
    newest = checkpoints(folder)[0]
    victim = tmp_path / "out" / "victim"
    for old in checkpoints(folder)[1:]:
        old.unlink()
    outer = json.loads(newest.read_text())
    content = json.loads(outer["content"])
    if where in ("server", "initial", "clients"):
        saved = content["clients"]["1"] if where == "clients" else content[where]
        victim.write_bytes((folder / saved["file"]).read_bytes())  # even a good state
        saved["file"] = "../../victim"
    else:
        victim.write_text("something of value\n")
    if where == "logs":
        content["logs"]["../victim"] = (9, hashlib.sha256(victim.read_bytes()[:9]).hexdigest())
    if where == "link":
        content["logs"]["rounds.jsonl"] = (0, hashlib.sha256(b"").hexdigest())
        (partial / "rounds.jsonl").unlink()
        (partial / "rounds.jsonl").symlink_to(victim)
    if where == "folder":
        folder.rename(tmp_path / "out" / "elsewhere")
        folder.symlink_to(tmp_path / "out" / "elsewhere")
    before = victim.read_bytes()
    text = json.dumps(content)
    newest.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}))
    with pytest.raises(RunError, match=r"no checkpoint that can be used|is a symbolic link"):
        start("fedas", "out", resume=True)
    assert victim.read_bytes() == before


@LOGS
def test_a_log_that_is_shorter_than_the_checkpoint_says_and_a_renamed_checkpoint_are_found_out(start, tmp_path, name):
    interrupt(start, "out")
    (folder,) = tmp_path.glob("out/*.partial/checkpoint")
    newest, older = checkpoints(folder)
    older.rename(folder / "000009.json")
    outer = json.loads(newest.read_text())
    content = json.loads(outer["content"])
    content["logs"][name][0] += 1
    text = json.dumps(content)
    newest.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}))
    with pytest.raises(RunError, match="no checkpoint that can be used"):
        start("fedas", "out", resume=True)


def test_nothing_in_a_run_folder_is_unpickled(start, tmp_path):
    interrupt(start, "out")
    (folder,) = tmp_path.glob("out/*.partial/checkpoint")
    poison = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    for path in folder.iterdir():
        path.write_bytes(poison)
    with pytest.raises(RunError, match="no checkpoint that can be used"):
        start("fedas", "out", resume=True)
    assert not (tmp_path / "owned").exists()


def test_a_forced_run_that_was_interrupted_is_resumed_and_force_always_restarts(start):
    whole = result(start("fedas", "out"))
    seen = Seen()
    interrupt(start, "out", force=True)
    start("fedas", "out", observers=[seen])
    assert seen.rounds == []  # the old record still stands
    assert result(start("fedas", "out", resume=True, observers=[seen])) == whole
    assert seen.rounds == [6, 7, 8]
    interrupt(start, "out", force=True)
    seen.rounds.clear()
    assert result(start("fedas", "out", force=True, resume=True, observers=[seen])) == whole
    assert seen.rounds == list(range(1, 9))


def test_states_are_checked_when_a_record_is_read(start):
    record = start("fedas", "out")
    flip(record.path / "checkpoint" / "server-000008.safetensors")
    with pytest.raises(RunError, match=r"server-000008.safetensors is missing or damaged"):
        pflbench.Record.load(record.path).load_states()


def test_divergence_in_an_evaluation_leaves_the_states_that_were_evaluated(start, monkeypatch):
    test = pflbench.engine.evaluation.test
    seen = Seen()
    poison = (0, float("nan"))

    def poisoned(*args):
        return poison if seen.rounds == [1, 2, 3, 4] else test(*args)

    monkeypatch.setattr("pflbench.engine.evaluation.test", poisoned)
    record = start("fedavg-ft", "bad", observers=[seen])
    assert record.status == "diverged"
    assert record.reason == "round 4: client 0: the loss on the test data is nan; lower lr"
    assert [row["round"] for row in record.rounds] == [1, 2, 3, 4]
    assert [row["round"] for row in record.evaluations] == seen.evaluations == [2]
    assert {row["round"] for row in record.clients} == {2}
    saved = Checkpoint.read(checkpoints(record.path / "checkpoint")[0])
    assert saved.round == 4
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        start("fedavg-ft", "short", observers=[toy.Stop(4)])
    (folder,) = start.out.glob("short/*.partial/checkpoint")
    short = Checkpoint.read(folder / "000004.json")
    assert (short.server, short.clients) == (saved.server, saved.clients)


def test_an_evaluation_that_was_cut_short_is_done_again_and_its_round_is_not(start, tmp_path, monkeypatch):
    whole = result(start("fedavg-ft", "whole"))
    # Round 2's five clients with two models each, and one of round 4's.
    test, left = pflbench.engine.evaluation.test, 12

    def stop(*args):
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return test(*args)

    monkeypatch.setattr("pflbench.engine.evaluation.test", stop)
    with pytest.raises(KeyboardInterrupt):
        start("fedavg-ft", "out")
    monkeypatch.undo()
    (folder,) = tmp_path.glob("out/*.partial/checkpoint")
    assert Checkpoint.read(checkpoints(folder)[0]).round == 4
    assert len((folder.parent / "rounds.jsonl").read_text().splitlines()) == 4
    assert len((folder.parent / "evaluations.jsonl").read_text().splitlines()) == 1
    trained = []
    update = registry.algorithm("fedavg-ft").local_update
    monkeypatch.setattr(
        registry.algorithm("fedavg-ft"), "local_update", lambda *args: trained.append(1) or update(*args)
    )
    seen = Seen()
    assert result(start("fedavg-ft", "out", resume=True, observers=[seen])) == whole
    assert len(trained) == 4 * 2  # rounds 5 to 8
    assert seen.evaluations == [4, 6, 8]


def test_a_forced_run_that_is_killed_while_it_deletes_a_complete_folder_leaves_no_complete_folder(
    tmp_path, monkeypatch
):
    spec = toy.spec("fedavg")
    record = pflbench.run(spec, toy.federation(), toy.net(), executor="serial", out=tmp_path)
    partial = tmp_path / f"{record.id}.partial"
    record.path.rename(partial)

    def killed(path):
        (Path(path) / "clients.parquet").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("pflbench.store.folder.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        pflbench.run(spec, toy.federation(), toy.net(), executor="serial", out=tmp_path, force=True)
    assert not list(tmp_path.glob("*/run.json"))
