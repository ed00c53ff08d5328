"""What holds for every executor: the bits of `serial`, retries, errors, and runs that are interrupted."""

import errno
import signal
import sys
import threading

import pytest
import tcp
import toy
from faults import Faulty, once

import pflbench
from pflbench import MethodError, RunError
from pflbench.engine import executors

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and starts a Ray cluster of several nodes here")
SIZES = (30, 4, 11, 7)


class Way:
    """An executor, as arguments of `pflbench.run`."""

    def __init__(self, name, monkeypatch, request):
        self.name = name
        self.notes = []
        self.kw = {"executor": name, "workers": None if name == "serial" else 2, "notice": self.notes.append}
        if name == "ray":
            pytest.importorskip("ray")
            self.kw["ray_address"] = request.getfixturevalue("cluster").address
        if name == "tcp":
            self.kw["executor"] = "processes"
            monkeypatch.setattr(executors, "make", tcp.Tcp)

    def run(self, algo, hyper=None, *, observers=(), resume=False, out=None, **settings):
        spec = toy.spec(algo, hyper, **{"clients": len(SIZES), **settings})
        return pflbench.run(
            spec, toy.federation(SIZES), toy.net_for(algo) if algo != "faulty" else toy.net(), out=out, resume=resume,
            observers=observers, **self.kw,
        )  # fmt: skip


@pytest.fixture(params=["serial", "processes", "tcp", "ray"])
def way(request, monkeypatch):
    return Way(request.param, monkeypatch, request)


@pytest.fixture(params=["processes", "tcp", "ray"])
def workers(request, monkeypatch):
    """An executor with workers."""
    return Way(request.param, monkeypatch, request)


@pytest.fixture(autouse=True)
def faulty(methods):
    methods["faulty"] = Faulty


def prints(record):
    return record.fingerprints["metrics"], record.fingerprints["states"]


def expected(algo, **settings):
    kw = {"federation": toy.federation(SIZES), **settings}
    return prints(toy.run(algo, net=toy.net() if algo == "faulty" else None, **kw))


@pytest.mark.parametrize("algo", ["fedas", "fedavg", "fedala", "scaffold", "fedproto"])
def test_the_bits_are_those_of_serial(way, tmp_path, algo):
    assert prints(way.run(algo, out=None if algo == "fedavg" else tmp_path)) == expected(algo)
    assert way.notes == []


def test_own_models_and_partial_participation_have_the_bits_of_serial(way, tmp_path):
    settings = {"tested": "both", "join_ratio": 0.5, "rounds": 4, "shuffle": True}
    assert prints(way.run("fedas", out=tmp_path, **settings)) == expected("fedas", **settings)


def test_a_worker_that_is_killed_once_is_replaced(workers, tmp_path):
    fault = once(tmp_path / "was", "import os; os.kill(os.getpid(), 9)")
    record = workers.run("faulty", {"fault": fault}, out=tmp_path / "runs")
    assert prints(record) == expected("faulty")
    (note,) = workers.notes
    assert note.endswith(" in round 2, client 1; another worker computes this again")


def test_a_job_that_kills_three_workers_is_an_error_that_names_round_and_client(workers):
    with pytest.raises(RunError, match=r"in round 2, client 1; 3 workers died of this job") as error:
        workers.run("faulty", {"fault": "import os; os._exit(3)"})
    assert "\n" not in str(error.value)
    assert len(workers.notes) == 2


def test_an_error_in_a_method_is_raised_with_its_traceback(way):
    with pytest.raises(ZeroDivisionError) as error:
        way.run("faulty", {"fault": "1 / 0"})
    if way.name != "serial":
        (note,) = error.value.__notes__
        assert "round 2, client 1" in note
        assert "local_update" in note


def test_what_is_no_state_is_one_line(way):
    fault = "import pflbench\nout = pflbench.Message({'model': {}}), {'model': {}, 'extra': len}"
    with pytest.raises(MethodError) as error:
        way.run("faulty", {"fault": fault})
    assert str(error.value).startswith("the state of client 1 has a builtin_function_or_method at 'extra'")


def test_divergence_ends_the_run_as_diverged(way, tmp_path):
    fault = "import pflbench\nraise pflbench.Diverged('client 1: it is too much')"
    record = way.run("faulty", {"fault": fault}, out=tmp_path)
    assert (record.status, record.reason) == ("diverged", "round 2: client 1: it is too much")


def test_an_interrupted_run_is_resumed_by_any_executor(way, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        way.run("fedas", out=tmp_path, rounds=5, observers=[toy.Stop(2)])
    assert prints(way.run("fedas", out=tmp_path, rounds=5, resume=True)) == expected("fedas", rounds=5)


def test_a_run_that_another_executor_began_is_resumed(way, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pflbench.run(
            toy.spec("fedas", clients=len(SIZES), rounds=5), toy.federation(SIZES), toy.net_for("fedas"),
            executor="serial", out=tmp_path, observers=[toy.Stop(3)],
        )  # fmt: skip
    assert prints(way.run("fedas", out=tmp_path, rounds=5, resume=True)) == expected("fedas", rounds=5)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(way, tmp_path, monkeypatch):
    full = tmp_path / "full"
    write = pflbench.files.write

    def limited(path, data):
        if full.exists() and "000003" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    full.touch()
    monkeypatch.setattr("pflbench.files.write", limited)
    with pytest.raises(RunError, match=r"cannot write .* \(No space left on device\); .* use --resume") as error:
        way.run("fedas", out=tmp_path / "runs", rounds=5)
    assert "\n" not in str(error.value)
    full.unlink()
    record = way.run("fedas", out=tmp_path / "runs", rounds=5, resume=True)
    assert prints(record) == expected("fedas", rounds=5)


def test_the_handler_of_sigterm_and_the_number_of_threads_stay_as_they_were(way):
    before, running = signal.getsignal(signal.SIGTERM), set(threading.enumerate())
    way.run("fedavg", rounds=1)
    assert signal.getsignal(signal.SIGTERM) is before
    assert {thread for thread in set(threading.enumerate()) - running if not thread.daemon} == set()


def test_no_more_workers_are_used_than_there_are_clients(workers):
    if workers.name == "tcp":
        pytest.skip("the tests' own executor")
    workers.kw["workers"] = 9
    record = pflbench.run(toy.spec("fedavg"), toy.federation((7,)), toy.net(), **workers.kw)
    assert record.machine["workers"] == 1
