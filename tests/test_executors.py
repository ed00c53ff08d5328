import io
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import oracle
import pytest
import torch
import toy
from torch import nn

import pflbench
from pflbench import Diverged, Federation, Message, MethodError, RunError, register
from pflbench.algorithms.fedavg import FedAvg
from pflbench.core import params, registry
from pflbench.core.device import Devices
from pflbench.engine import evaluation
from pflbench.engine.executors import Processes, Serial
from pflbench.engine.executors.wire import Unpickler, common, dumps
from pflbench.engine.work import Evaluate, Train, Work

METHODS = sorted(registry.algorithms())
SIZES = (30, 4, 11, 7)
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _prints(record):
    return record.fingerprints["metrics"], record.fingerprints["states"]


@pytest.mark.parametrize("algo", [*METHODS, "fedas in-place"])
def test_serial_and_one_two_and_three_processes_end_with_the_same_bits(algo):
    algo, _, alignment = algo.partition(" ")
    hyper = {"alignment": alignment} if alignment else {}

    def run(executor, workers=None):
        settings = {"join_ratio": 0.5, "shuffle": True, "rounds": 3, "batch_size": 4}
        return _prints(
            toy.run(algo, hyper, federation=toy.federation(SIZES), executor=executor, workers=workers, **settings)
        )

    expected = run("serial")
    assert run("serial") == expected
    assert [run("processes", workers) for workers in (1, 2, 3, 3)] == [expected] * 4


def test_a_network_that_draws_random_numbers_draws_the_same_everywhere():
    net = toy.dropping()
    kw = {"federation": toy.federation(SIZES), "net": net, "shuffle": True}
    serial = toy.run("fedavg", **kw)
    torch.rand(7)
    assert _prints(toy.run("fedavg", **kw)) == _prints(serial)
    assert _prints(toy.run("fedavg", executor="processes", workers=3, **kw)) == _prints(serial)
    assert not oracle.same(toy.run("fedavg", **{**kw, "seed": 1}).server["model"], serial.server["model"])


def test_a_network_draws_other_numbers_for_each_seed_round_and_client():
    net = toy.dropping()
    x, y, _, _ = oracle.arrays()[0]
    turns = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]
    with torch.random.fork_rng(devices=[]):
        made = [
            toy.client(x, y, net=net, seed=s, round=r, id=c).sgd(toy.initial()) for s, r, c in turns
        ]  # in stored order: only what the network draws differs
        again = toy.client(x, y, net=net).sgd(toy.initial())
    assert len({params.fingerprint(p) for p in made}) == len(turns)
    assert oracle.same(again, made[0])


def test_a_networks_integer_buffers_do_not_carry_over_from_client_to_client():
    # With momentum=None, BatchNorm's running mean depends on an integer: how many batches it has seen.
    net = toy.net()
    net = pflbench.Net(nn.Sequential(net.body[0], nn.BatchNorm1d(3, momentum=None), nn.Tanh()), net.head).double()
    kw = {"federation": toy.federation((12, 6, 9)), "net": net, "batch_size": 3}
    serial = toy.run("fedavg", **kw)
    assert _prints(toy.run("fedavg", executor="processes", workers=3, **kw)) == _prints(serial)


def test_the_random_state_and_the_threads_of_the_caller_stay_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    threads = torch.get_num_threads()
    for executor in ("serial", "processes"):
        toy.run("fedavg", executor=executor, workers=2, shuffle=True)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


class Late(Work):
    """Takes a random time for each job, so that they end in any order."""

    def __call__(self, job):
        time.sleep(random.random() * 0.05)
        return super().__call__(job)

    def on(self, device):
        return Late(self.experiment, self.states, device)


def _jobs(work, kind=Train, *, clients=range(4)):
    algorithm, setup = work.experiment.algorithm, work.experiment.setup
    server, state = algorithm.init_server(setup), algorithm.init_client(setup)
    round = pflbench.Round(1, tuple(clients), setup)  # noqa: A001
    return [kind(1, c, algorithm.broadcast(round, server, c), state) for c in clients]


def _work(kind=Work, algo="fedas", sizes=SIZES):
    spec = toy.spec(algo, clients=len(sizes), shuffle=True)
    return kind(pflbench.prepare(spec, toy.federation(sizes), toy.net()), None)


def _flat(results):
    return [
        (r.upload.client, r.upload.weight, params.fingerprint(r.upload.content), params.fingerprint(r.state), r.counts)
        for r in results
    ]


def test_results_come_in_the_order_of_the_jobs_whoever_is_ready_first():
    work = _work(Late)
    clients = [2, 0, 3, 1, 0, 2, 1, 3]
    with Serial(Devices()) as one, Processes(3, Devices(), print) as many:
        one.start(_work())
        many.start(work)
        expected = one.map(_jobs(work, clients=clients))
        assert [r.upload.client for r in expected] == clients
        for _ in range(3):
            assert _flat(many.map(_jobs(work, clients=clients))) == _flat(expected)
        results = many.map(_jobs(work, Evaluate, clients=clients))
        assert [r.score.client for r in results] == clients
        assert [r.score for r in results] == [r.score for r in one.map(_jobs(work, Evaluate, clients=clients))]


def test_more_workers_than_jobs_and_no_jobs_are_fine():
    work = _work()
    with Processes(3, Devices(), print) as pool:
        pool.start(work)
        assert pool.map([]) == []
        assert len(pool.map(_jobs(work, clients=[1]))) == 1


def test_messages_larger_than_a_pipes_buffer_pass_both_ways():
    wide = pflbench.Net(nn.Sequential(nn.Linear(3, 50_000), nn.Tanh()), nn.Linear(50_000, 3))
    kw = {"net": wide, "rounds": 1, "local_epochs": 1, "batch_size": 50, "lr": 1e-4}
    serial = toy.run("fedavg", **kw)
    assert _prints(toy.run("fedavg", executor="processes", workers=2, **kw)) == _prints(serial)


# Errors and dead workers.


@pytest.fixture
def faulty(methods):
    """A method whose client 1 does in round 2 what `Faulty.fault` says."""

    @registry.register("faulty")
    class Faulty(FedAvg):
        fault = staticmethod(lambda: None)

        def local_update(self, client, received, state):
            if client._key == (2, 1):
                out = type(self).fault()
                if out is not None:
                    return out
            return super().local_update(client, received, state)

    return methods["faulty"]


@pytest.fixture
def notes():
    return []


def _kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


def _exit():
    os._exit(7)


@linux
@pytest.mark.parametrize(("fault", "how"), [(_kill_self, "signal 9"), (_exit, "exit code 7")])
def test_a_job_that_kills_three_workers_ends_the_run_with_an_error_that_says_how(faulty, children, fault, how, notes):
    faulty.fault = fault
    before = children(os.getpid())
    with pytest.raises(RunError, match=rf"died \({how}\) in round 2, client 1; 3 workers died of this") as error:
        toy.run("faulty", federation=toy.federation(SIZES), executor="processes", workers=3, notice=notes.append)
    assert "\n" not in str(error.value)
    assert len(notes) == 2
    assert multiprocessing.active_children() == []
    assert children(os.getpid()) <= before


@linux
@pytest.mark.parametrize("way", ["memory", "disk"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_worker_killed_from_outside_is_replaced_and_the_bits_are_those_of_serial(
    faulty, tmp_path, eventually, notes, workers, way
):
    victim = tmp_path / "pid"

    def work():
        if not victim.exists():
            victim.write_text(str(os.getpid()))
            time.sleep(60)

    def kill():
        if eventually(lambda: victim.exists() and victim.read_text()):
            os.kill(int(victim.read_text()), signal.SIGKILL)

    federation = toy.federation(SIZES)
    expected = _prints(toy.run("faulty", federation=federation))
    faulty.fault = work
    killer = threading.Thread(target=kill)
    killer.start()
    began = time.monotonic()
    out = tmp_path / "runs" if way == "disk" else None
    record = toy.run(
        "faulty", federation=federation, executor="processes", workers=workers, notice=notes.append, out=out
    )
    assert time.monotonic() - began < 30
    assert _prints(record) == expected
    (note,) = notes
    assert note.endswith("died (signal 9) in round 2, client 1; another worker computes this again")
    killer.join()
    assert multiprocessing.active_children() == []


def test_workers_are_gone_after_a_run_that_ended_well():
    toy.run("fedavg", executor="processes", workers=2)
    assert multiprocessing.active_children() == []


def _raise_key_error():
    raise KeyError("no such prototype")


def test_an_error_in_a_methods_code_arrives_with_the_workers_traceback(faulty):
    faulty.fault = _raise_key_error
    with pytest.raises(KeyError, match="no such prototype") as error:
        toy.run("faulty", executor="processes", workers=2)
    (note,) = error.value.__notes__
    assert "round 2, client 1" in note
    assert "_raise_key_error" in note
    assert multiprocessing.active_children() == []


class _OddError(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


def _raise_odd():
    raise _OddError("cannot", "travel")


def test_an_error_that_cannot_be_sent_arrives_as_its_text(faulty):
    # This error can be pickled but not unpickled: its constructor takes two arguments.
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(_OddError("cannot", "travel")))
    faulty.fault = _raise_odd
    with pytest.raises(Exception, match="cannot travel") as error:
        toy.run("faulty", executor="processes", workers=2)
    assert any("_raise_odd" in note for note in error.value.__notes__)


@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_a_result_that_cannot_be_sent_is_an_error_that_says_so(faulty, executor):
    faulty.fault = lambda: (pflbench.Message({"model": toy.initial()}), {"model": {}, "extra": lambda: None})
    with pytest.raises(MethodError) as error:
        toy.run("faulty", executor=executor, workers=2)
    message = "the state of client 1 has a function at 'extra'; leaves are tensors, integers and floats"
    assert str(error.value) == message
    assert multiprocessing.active_children() == []


def test_a_result_with_a_gradient_attached_is_the_same_in_serial_and_in_processes(faulty):
    def attached():
        model = {k: t.clone().requires_grad_(True) for k, t in toy.initial().items()}
        return pflbench.Message({"model": model}, weight=1.0), {"model": {}}

    faulty.fault = attached
    serial = toy.run("faulty")
    assert _prints(toy.run("faulty", executor="processes", workers=2)) == _prints(serial)


def _diverge():
    raise Diverged("client 1: it is too much")


def test_divergence_in_a_worker_ends_the_run_as_diverged(faulty):
    faulty.fault = _diverge
    record = toy.run("faulty", executor="processes", workers=2)
    assert (record.status, record.reason) == ("diverged", "round 2: client 1: it is too much")
    assert len(record.rounds) == 1


def test_a_round_is_tested_even_if_the_next_one_which_trains_beside_it_diverges(methods):
    @registry.register("late-nan")
    class LateNan(registry.algorithm("fedper")):
        def local_update(self, client, received, state):
            message, new = super().local_update(client, received, state)
            if client._key[0] == 3:
                raise Diverged(f"client {client.id}: lost")
            return message, new

    for executor in ("serial", "processes"):
        record = toy.run("late-nan", executor=executor, workers=2, rounds=5)
        assert record.reason == "round 3: client 0: lost"
        assert [row["round"] for row in record.rounds] == [1, 2]
        assert [row["round"] for row in record.evaluations] == [1, 2]


def test_clients_that_are_asked_one_after_the_other_each_start_from_the_one_before(methods):
    @registry.register("cyclic")
    class Cyclic(FedAvg):
        """Each client continues from the one before; the last one's model is the server's."""

        def play(self, round, server, cohort):
            for client in round.cohort:
                (upload,) = cohort.update(server, [client])
                server = {"model": upload["model"]}
            return server

    for executor in ("serial", "processes"):
        record = toy.run("cyclic", executor=executor, rounds=2)
        model = toy.initial()
        for x, y, _, _ in oracle.arrays() * 2:
            model = oracle.train(model, x, y, 2, lr=0.1)
        oracle.close(record.server["model"], model)


def test_what_all_clients_are_sent_goes_to_a_worker_once_a_round():
    received: list[torch.Tensor] = []
    own = [{"own": torch.full((5,), float(i)), "trained": nn.Parameter(torch.full((9,), float(i)))} for i in range(4)]

    def passed(model):
        """Return the sizes and the jobs received, of a round in which all clients get `model` and other tensors."""
        jobs = [Train(1, i, pflbench.Message({"model": model, "own": own[i]}), {"model": own[i]}) for i in range(4)]
        sent: dict[int, int] = {}
        data = [dumps(job, common(jobs), sent) for job in jobs]
        return [len(d) for d in data], [Unpickler(io.BytesIO(d), received).load() for d in data]

    other = {"a": torch.arange(2000.0, 3000.0)}
    for model in ({"a": torch.arange(1000.0), "b": torch.ones(3, 4)[:, 1:]}, other):
        sizes, jobs = passed(model)
        assert sizes[0] > 4000 > 2000 > max(sizes[1:])
        for i, job in enumerate(jobs):
            assert oracle.same(job.received["model"], model)
            assert oracle.same(job.received["own"], own[i])
            assert oracle.same(job.state["model"], own[i])
        assert len(received) == len(model)  # no tensors of the previous round or of only one client


def test_when_several_clients_diverge_the_reason_is_the_first_ones_whoever_is_ready_first():
    arrays = oracle.arrays((4, 9, 30))  # the largest is computed first
    arrays = [(x * torch.nan, *rest) for x, *rest in arrays]
    federation = pflbench.Federation.from_arrays(arrays, classes=3)
    serial = toy.run("fedavg", federation=federation)
    assert "client 0" in serial.reason
    for workers in (1, 3):
        record = toy.run("fedavg", federation=federation, executor="processes", workers=workers)
        assert (record.status, record.reason) == (serial.status, serial.reason)


@linux
def test_no_worker_outlives_a_killed_parent(tmp_path, children, alive, eventually):
    script = tmp_path / "orphans.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, time
            import torch
            import pflbench
            from pflbench.algorithms.fedavg import FedAvg

            @pflbench.register("sleeper")
            class Sleeper(FedAvg):
                def local_update(self, client, received, state):
                    os.write(1, b"working\\n")
                    time.sleep(120)

            x, y = torch.randn(6, 3), torch.arange(6) % 2
            net = pflbench.Net(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
            federation = pflbench.Federation.from_arrays([(x, y, x, y)] * 3)
            pflbench.run(pflbench.RunSpec(algo="sleeper", join_ratio=1.0), federation, net, workers=3)
            """
        )
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    workers = set()
    try:
        for _ in range(3):
            assert parent.stdout.readline() == "working\n"
        workers = children(parent.pid)
        assert len(workers) == 3
        assert alive(workers) == workers
        parent.kill()
        parent.wait()
        assert eventually(lambda: not alive(workers), seconds=10)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
        for worker in alive(workers):
            os.kill(worker, signal.SIGKILL)


@linux
def test_the_data_is_shared_with_the_workers_and_not_copied():
    per_client, clients = 16_000, 3
    data = torch.arange(per_client * 4096, dtype=torch.int64).to(torch.uint8).reshape(per_client, 1, 64, 64)
    y = torch.arange(per_client) % 2
    arrays = [(data + i, y, data[:64], y[:64]) for i in range(clients)]
    federation = pflbench.Federation.from_arrays(arrays)
    megabytes = sum(c.train.x.nbytes for c in federation.clients) / 2**20
    assert megabytes > 180
    net = pflbench.Net(nn.Sequential(nn.Flatten(), nn.Linear(4096, 2)), nn.Linear(2, 2))
    used = []

    class Measure(pflbench.Observer):
        def round(self, row):
            for child in multiprocessing.active_children():
                lines = Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines()
                used.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024)

    spec = pflbench.RunSpec(algo="fedper", join_ratio=1.0, rounds=2, local_epochs=1, batch_size=500, lr=1e-4)
    pflbench.run(spec, federation, net, workers=3, observers=[Measure()])
    assert len(used) == 2 * 3
    assert max(used) < 0.5 * megabytes


@dataclass(frozen=True)
class _Case:
    executor: str
    workers: object
    message: str


@pytest.mark.parametrize(
    "case", [_Case("threads", None, "choose from"), _Case("processes", 0, ">= 1"), _Case("serial", -1, ">= 1")]
)
def test_an_unknown_executor_or_too_few_workers_are_refused(case):
    with pytest.raises(pflbench.UsageError, match=case.message):
        toy.run("fedavg", executor=case.executor, workers=case.workers)


@pytest.mark.parametrize(("algo", "tests"), [("local", 4 + 5), ("fedas", 4 + 5), ("fedper", 4 * 6), ("fedavg", 4 * 6)])
def test_a_model_that_did_not_change_is_not_tested_again_and_the_numbers_are_the_same(monkeypatch, algo, tests):
    settings = {"join_ratio": 0.25, "rounds": 6, "federation": toy.federation(SIZES)}
    tested = []
    test = evaluation.test
    monkeypatch.setattr(evaluation, "test", lambda *args: tested.append(1) or test(*args))
    record = toy.run(algo, **settings)
    assert len(tested) == tests  # of FedAS and Local: all, then one participant a round

    serial = iter(range(10**6))
    monkeypatch.setattr("pflbench.engine.work.fingerprint", lambda *_: str(next(serial)))  # nothing is ever the same
    tested.clear()
    assert _prints(toy.run(algo, **settings)) == _prints(record)
    assert len(tested) == 4 * 6 * (2 if algo == "fedavg" else 1)


def images():
    random = torch.Generator().manual_seed(0)
    clients = []
    for n in (9, 7):
        x, y = torch.randn(n + 6, 3, 16, 16, generator=random), torch.arange(n + 6) % 3
        clients.append((x[:n], y[:n], x[n:], y[n:]))
    return Federation.from_arrays(clients, classes=3)


def test_a_message_with_gradients_of_a_convolution_gives_the_same_bits_in_memory_and_on_disk(methods, tmp_path):
    @register("gradnorm")
    class GradNorm(FedAvg):
        """Sends a gradient, whose numbers lie in another order in memory than in a file."""

        def local_update(self, client, received, state):
            model = client.sgd(received["model"])
            return Message({"model": model, "g": client.grad(model, next(client.batches(stream="g")))}), state

        def aggregate(self, round, server, uploads):
            norm = sum(t.square().sum() for upload in uploads for t in upload["g"].values())
            return {**super().aggregate(round, server, uploads), "norm": norm}

    spec = pflbench.RunSpec(algo="gradnorm", clients=2, rounds=2, join_ratio=1.0, batch_size=4, local_epochs=1)
    memory, disk = (pflbench.run(spec, images(), executor="serial", out=out) for out in (None, tmp_path))
    assert torch.equal(memory.server["norm"], disk.server["norm"])
    assert memory.fingerprints == disk.fingerprints


def test_bfloat16_is_refused_with_every_executor(methods):
    @register("half")
    class Half(FedAvg):
        """Sends bfloat16."""

        def local_update(self, client, received, state):
            return Message({"model": {k: t.bfloat16() for k, t in received["model"].items()}}), state

    for executor in ("serial", "processes"):
        with pytest.raises(MethodError, match=r"the upload of client . has a bfloat16 tensor at 'model/body.0.weight'"):
            toy.run("half", executor=executor)
