"""Ray, on a cluster of two nodes of one core each. All of it runs on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
import toy

import pflbench
from pflbench import RunError, UsageError, register
from pflbench.algorithms.fedavg import FedAvg

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a cluster of several nodes on one machine needs Linux")
SIZES = (30, 4, 11, 7)


@pytest.fixture
def notes():
    return []


@pytest.fixture
def run(cluster, notes):
    def run(algo, **kw):
        kw.setdefault("federation", toy.federation(SIZES))
        return toy.run(algo, executor="ray", ray_address=cluster.address, notice=notes.append, **kw)

    return run


def prints(record):
    return record.fingerprints["metrics"], record.fingerprints["states"]


def serial(algo, **kw):
    return toy.run(algo, federation=toy.federation(SIZES), **kw)


def test_the_record_says_how_many_nodes_computed(run):
    machine = run("fedavg").machine
    assert machine["executor"] == "ray"
    assert (machine["workers"], machine["nodes"], sum(machine["processors"].values())) == (2, 2, 2)


def test_a_large_federation_and_a_network_of_a_script_travel(run):
    """The images are in the memory that all workers of a node share; the network's class is the test's own."""
    from torch import nn

    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    plain = toy.net()
    net = pflbench.Net(nn.Sequential(Doubled(), *plain.body), plain.head)
    images = torch.randint(0, 255, (60, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    federation = pflbench.Federation.from_arrays([(images[i:], labels[i:], images, labels) for i in (0, 20, 40)])
    assert prints(run("fedavg", net=net)) == prints(serial("fedavg", net=net))
    mlp = pflbench.build_model("mlp", (3, 8, 8), 3, seed=0)
    kw = {"federation": federation, "net": mlp}
    assert prints(run("fedas", **kw)) == prints(toy.run("fedas", **kw))


def test_workers_that_end_while_they_are_idle_died_of_no_job(cluster, notes, monkeypatch):
    """Both workers end between two rounds, and the next round has one job, whose second death would be an error."""
    from pflbench.engine.executors.ray import Ray

    pools = []
    monkeypatch.setattr(Ray, "tries", 2)
    monkeypatch.setattr(Ray, "describe", lambda self: pools.append(self) or {"workers": 2, "device": {"type": "cpu"}})

    class Killing(pflbench.Observer):
        def round(self, row):
            if row["round"] == 1:
                for link in pools[0]._links:
                    ray.kill(link.actor)
                time.sleep(1)

    kw = {"rounds": 3, "join_ratio": 0.25, "eval_every": 3}
    record = pflbench.run(
        toy.spec("fedavg", clients=len(SIZES), **kw), toy.federation(SIZES), toy.net(), executor="ray",
        ray_address=cluster.address, notice=notes.append, observers=[Killing()],
    )  # fmt: skip
    assert prints(record) == prints(serial("fedavg", **kw))
    assert len(notes) == 1


def test_a_node_that_is_removed_in_a_round_and_one_that_comes_between_rounds(
    cluster, run, notes, methods, tmp_path, eventually
):
    places = tmp_path / "places"
    places.mkdir()
    removed = tmp_path / "removed"

    @register("waiting")
    class Waiting(FedAvg):
        def local_update(self, client, received, state):
            import time

            from ray import get_runtime_context, is_initialized

            number = client._key[0]
            if is_initialized():
                (places / f"{number}-{get_runtime_context().get_node_id()}").touch()
            while number == 2 and is_initialized() and not removed.exists():
                time.sleep(0.05)
            return super().local_update(client, received, state)

    def nodes(number):
        return {path.name.partition("-")[2] for path in places.glob(f"{number}-*")}

    def remove():
        if eventually(lambda: len(nodes(2)) == 2, 120):
            cluster.remove()
            removed.touch()

    remover = threading.Thread(target=remove)
    remover.start()

    class Adding(pflbench.Observer):
        def round(self, row):
            if row["round"] == 4:
                cluster.add()
            elif row["round"] > 4 and len(nodes(row["round"])) < 2:
                time.sleep(0.5)

    rounds = 60
    record = pflbench.run(
        toy.spec("waiting", rounds=rounds, clients=len(SIZES)), toy.federation(SIZES), toy.net(), executor="ray",
        ray_address=cluster.address, notice=notes.append, out=tmp_path / "runs", observers=[Adding()],
    )  # fmt: skip
    remover.join()
    assert any("in round 2, client" in note and "another worker computes this again" in note for note in notes)
    assert [len(nodes(2)), len(nodes(4)), len(nodes(rounds))] == [2, 1, 2]
    assert not nodes(2) >= nodes(rounds)
    assert prints(record) == prints(serial("waiting", rounds=rounds))


DRIVER = """
import sys
sys.path[:0] = {path!r}
import toy, pflbench

class Slow(pflbench.Observer):
    def round(self, row):
        print(row["round"], flush=True)

pflbench.run(toy.spec("fedas", rounds=60, clients={clients}), toy.federation({sizes}), toy.net(), executor="ray",
             ray_address={address!r}, out={out!r}, observers=[Slow()])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_killed_resumes_with_the_same_bits(cluster, tmp_path, number):
    code = DRIVER.format(
        path=sys.path, sizes=SIZES, clients=len(SIZES), address=cluster.address, out=str(tmp_path / "runs")
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in driver.stdout:
        if line.strip() == "3":  # Ray may write lines, too
            break
    driver.send_signal(number)
    driver.stdout.close()
    driver.wait()
    spec = toy.spec("fedas", rounds=60, clients=len(SIZES))
    record = pflbench.run(
        spec, toy.federation(SIZES), toy.net(), executor="ray", ray_address=cluster.address, out=tmp_path / "runs",
        resume=True,
    )  # fmt: skip
    assert prints(record) == prints(serial("fedas", rounds=60))


def test_a_plugin_that_a_node_lacks_is_named_before_anything_is_written(run, tmp_path, monkeypatch, methods):
    (tmp_path / "pflbench_absent.py").write_text(
        "from pflbench import register\nfrom pflbench.algorithms.fedavg import FedAvg\n\n\n"
        "@register('absent')\nclass Absent(FedAvg):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    __import__("pflbench_absent")
    out = tmp_path / "runs"
    with pytest.raises(
        UsageError, match=r"node \S+ has no module 'pflbench_absent'; install the same packages"
    ) as error:
        run("absent", out=out)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_an_actor_with_other_bits_is_named_and_not_used(run, notes, monkeypatch):
    """The second actor that is ready says another probe."""
    from pflbench.engine.executors.ray import Ray

    joined, seen = Ray._joined, []

    def other(self, ref):
        link = joined(self, ref)
        seen.append(link)
        if len(seen) == 2:
            link.identity["probe"] = "other"
        return link

    monkeypatch.setattr(Ray, "_joined", other)
    record = run("fedavg")
    assert prints(record) == prints(serial("fedavg"))
    (note,) = notes
    assert note.endswith("computes other bits than the others; it is not used")


def test_a_worker_that_is_not_used_is_not_asked_for_again(monkeypatch):
    from pflbench.engine.executors import ray as module

    experiment = pflbench.prepare(toy.spec("fedavg", clients=20), toy.federation([4] * 20), toy.net())
    asked = []
    monkeypatch.setattr(module, "actor", lambda _: asked.append(1) or MagicMock())
    monkeypatch.setattr(module, "room", lambda _: 8)
    for workers, count in ((None, 5), (4, 4), (7, 5)):
        asked.clear()
        pool = module.Ray(experiment, pflbench.Execution("ray", workers=workers), print)
        pool._packed = pool._code = None
        pool._unfit = 3
        pool._grow()
        assert len(asked) == count


def test_a_run_without_workers_ends_if_none_could_be_started():
    from pflbench.engine.executors.ray import Ray

    pool = Ray(pflbench.prepare(toy.spec("fedavg"), toy.federation(), toy.net()), pflbench.Execution("ray"), print)
    with pytest.raises(RunError, match="none could be started in their place; use --resume later"):
        pool._ready([])


def test_a_run_that_diverges_at_once_has_the_record_of_serial(run, notes):
    """The workers' first two steps diverge, too."""
    kw = {"federation": toy.federation(SIZES), "net": toy.net(act=torch.nn.Identity).float(), "lr": 1e30}
    here, there = toy.run("fedavg", **kw), run("fedavg", **kw)
    assert here.status == "diverged"
    assert (there.status, there.reason) == (here.status, here.reason)
    assert notes == []


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_an_address_where_nobody_answers_is_one_line_and_nothing_is_written(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UsageError, match=f"ray_address: nobody answers at {address}") as error:
        toy.run("fedavg", executor="ray", ray_address=address, out=tmp_path / "runs")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_an_address_that_is_no_host_name_is_one_line():
    with pytest.raises(UsageError, match=r"ray_address: nobody answers at \.\.:6379"):
        toy.run("fedavg", executor="ray", ray_address="..:6379")


@pytest.mark.parametrize(("says", "message"), [(b"HTTP/1.1 400 Bad Request", "is not Ray"), (b"", "nobody answers")])
def test_an_address_where_something_else_answers_is_one_line(tmp_path, monkeypatch, says, message):
    from pflbench.engine import cluster

    monkeypatch.setattr(cluster, "_ANSWER", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            connection.sendall(says)
            time.sleep(0.0 if says else 1.0)
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UsageError, match=message) as error:
            toy.run("fedavg", executor="ray", ray_address=f"127.0.0.1:{server.getsockname()[1]}", out=tmp_path / "runs")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_ray_that_this_process_uses_already_is_left_alone(cluster):
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        with pytest.raises(UsageError, match="this process uses Ray already"):
            toy.run("fedavg", executor="ray", ray_address=cluster.address)
        assert ray.is_initialized()
    finally:
        ray.shutdown()


# Without a cluster, Ray runs on this machine while the run lasts. And sweeps.


def start(cwd, *words):
    """Start pflbench in a session of its own, in which all processes of its own Ray are."""
    return subprocess.Popen(
        [sys.executable, "-m", "pflbench", *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def call(cwd, *words):
    process = start(cwd, *words)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err, process.pid


QUICK = ["--dataset", "synthetic10", "--model", "mlp", "--clients", "4", "--join-ratio", "1", "--local-epochs", "1"]


def rays(session):
    """Return the processes of Ray in a session, except its agents: Ray leaves them behind after SIGKILL."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            ours = os.getsid(int(path.parent.name)) == session
            if ours and any(name in path.read_bytes() for name in (b"raylet/raylet", b"gcs/gcs_server", b"ray::Actor")):
                found.add(path.parent.name)
        except OSError:
            continue
    return found


def test_a_private_ray_starts_and_ends_with_the_run_and_gives_the_bits_of_serial(tmp_path, eventually):
    run = ["run", "--algo", "fedavg", *QUICK, "--rounds", "2", "--json"]
    code, out, err, session = call(tmp_path, *run, "--executor", "ray", "--workers", "2", "--out", "a")
    assert (code, err) == (0, "")
    there = json.loads(out)
    here = json.loads(call(tmp_path, *run, "--executor", "serial", "--out", "b")[1])
    assert there["fingerprints"] == here["fingerprints"]
    assert eventually(lambda: not rays(session))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_private_ray_ends_with_a_run_that_is_killed(tmp_path, eventually, number):
    run = start(tmp_path, "run", "--algo", "fedavg", *QUICK, "--rounds", "5000", "--executor", "ray", "--workers", "1")
    for line in run.stderr:
        if line.startswith("round 2/"):
            break
    assert rays(run.pid)
    run.send_signal(number)
    run.wait()
    assert run.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert eventually(lambda: not rays(run.pid), 60)
    rest = run.stderr.read()
    assert "Traceback" not in rest


def records(out):
    found = {}
    for path in sorted(out.glob("*/run.json")):
        run = json.loads(path.read_text())
        found[run["id"]] = run["fingerprints"]
    return found


SWEEP = ["sweep", "--algo", "fedavg", "--algo", "fedas", "--seed", "0", "--seed", "1", *QUICK, "--rounds", "3"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The fingerprints of the sweep's records, from processes."""
    folder = tmp_path_factory.mktemp("here")
    assert call(folder, *SWEEP, "--quiet")[0] == 0
    return records(folder / "runs")


def test_a_sweep_on_a_cluster_has_the_records_of_a_sweep_here(cluster, tmp_path, expected):
    code, _, err, _ = call(tmp_path, *SWEEP, "--executor", "ray", "--ray-address", cluster.address)
    assert code == 0, err
    assert records(tmp_path / "runs") == expected
    assert len(expected) == 4
    assert "4/4" in err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if "." in path.name) == [".locks"]
    again = call(tmp_path, *SWEEP, "--executor", "ray", "--ray-address", cluster.address)
    assert "4 runs: 4 recorded, 0 to do" in again[2]


def test_a_sweep_whose_driver_is_killed_goes_on(cluster, tmp_path, expected):
    line = [*SWEEP[:-1], "3", "--executor", "ray", "--ray-address", cluster.address]
    sweep = start(tmp_path, *line)
    for text in sweep.stderr:
        if text.startswith("1/4"):
            break
    sweep.kill()
    sweep.wait()
    code, _, err, _ = call(tmp_path, *line)
    assert code == 0, err
    assert records(tmp_path / "runs") == expected
