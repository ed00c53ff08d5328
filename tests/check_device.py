"""What is proven on a pretend device. `test_device.py` runs this file in processes of their own."""

import os

import pretend
import pytest
import torch
import toy

import pflbench
from pflbench import Message, RunError, register
from pflbench.algorithms.fedavg import FedAvg
from pflbench.core import params, registry
from pflbench.core.device import Device, Replica

METHODS = sorted(registry.algorithms())
pytestmark = pytest.mark.usefixtures("pretending")


@pytest.fixture
def pretending():
    with pretend.devices(2):
        yield


def on_device(algo, **kw):
    return toy.run(algo, device="pretend", **kw)


def flat(*states):
    return [leaf for state in states for leaf in params.leaves(state)]


@pytest.mark.parametrize("algo", METHODS)
def test_a_method_computes_the_same_on_a_device_and_mixes_no_devices(algo):
    kw = {"federation": toy.federation((12, 6, 9)), "tested": "both", "join_ratio": 0.67, "rounds": 3}
    there, here = on_device(algo, **kw), toy.run(algo, **kw)
    rows = zip((*there.evaluations, *there.rounds), (*here.evaluations, *here.rounds), strict=True)
    for a, b in rows:
        numbers = {name: value for name, value in a.items() if isinstance(value, int | float) and "seconds" not in name}
        assert numbers == pytest.approx({name: b[name] for name in numbers}, rel=1e-10)
    states = [flat(record.server, *record.client_states.values()) for record in (there, here)]
    for (path, a), (other, b) in zip(*states, strict=True):
        assert path == other
        if isinstance(a, torch.Tensor):
            assert (a.device.type, a.dtype, a.is_contiguous()) == ("cpu", b.dtype, True)
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        else:
            assert a == pytest.approx(b, rel=1e-10)


def syncs(algo, times):
    """Return how often a round of clients with 12 and 8 samples, or `times` as many, waits for the device."""
    federation = toy.federation((12 * times, 8 * times))
    pretend.reset()
    on_device(algo, federation=federation, rounds=1, batch_size=4)
    return sum(pretend.syncs.values())


# They stop when a loss no longer falls, so they need the loss of every epoch.
SEARCHING = {"fedala"}


@pytest.mark.parametrize("algo", [algo for algo in METHODS if algo not in SEARCHING])
def test_a_method_waits_for_its_device_a_number_of_times_that_is_independent_of_its_steps(algo):
    once, counted = syncs(algo, 1), dict(pretend.syncs)
    assert syncs(algo, 4) == once > 0, (counted, dict(pretend.syncs))


def cnn_client(n, **settings):
    net = pflbench.build_model("cnn", (3, 32, 32), 10, seed=0)
    there = Device("pretend")
    x = torch.arange(n * 3 * 32 * 32).remainder(255).to(torch.uint8).reshape(n, 3, 32, 32)
    samples = there.to(pflbench.Split(x, torch.arange(n) % 10))
    return toy.client(samples.x, samples.y, net=net, replica=Replica(net, device=there), batch_size=10, **settings)


def test_a_step_of_sgd_has_at_most_45_operations_and_no_synchronisation():
    counts = {}
    for steps in (2, 3):
        client = cnn_client(10 * steps, local_epochs=1)
        start = client._replica.device.to(params.read(client._replica.net))
        pretend.reset()
        client.sgd(start)
        counts[steps] = sum(pretend.computed.values()), sum(pretend.syncs.values())
    operations = counts[3][0] - counts[2][0]
    assert operations <= 45  # as many as in September 2026; each is a kernel on a GPU
    assert counts[3][1] == counts[2][1] <= 3


def test_a_method_that_makes_a_tensor_at_home_fails_with_its_line(methods):
    @register("homely")
    class Homely(FedAvg):
        def local_update(self, client, received, state):
            model = {name: t + torch.zeros(t.shape) for name, t in received["model"].items()}  # the faulty line
            return Message({"model": model}, client.n), state

    with pytest.raises(RuntimeError, match="tensors on two devices") as error:
        on_device("homely")
    assert "the faulty line" in str(error.traceback[-2].statement) or any(
        "the faulty line" in str(entry.statement) for entry in error.traceback
    )
    assert toy.run("homely").status == "finished"


def test_a_method_that_waits_in_every_step_is_counted(methods):
    @register("waiting")
    class Waiting(FedAvg):
        def local_update(self, client, received, state):
            model = client.sgd(
                received["model"], transform=lambda g, w: {k: t * float(t.norm() > 0) for k, t in g.items()}
            )
            return Message({"model": model}, client.n), state

    assert syncs("waiting", 4) > 1.5 * syncs("waiting", 1)


def test_worker_processes_use_the_devices_in_turn_and_their_number_does_not_change_bits(tmp_path, methods):
    @register("placed")
    class Placed(FedAvg):
        def local_update(self, client, received, state):
            (tmp_path / f"{os.getpid()} {client._replica.device.torch}").touch()
            return super().local_update(client, received, state)

    federation = toy.federation((12, 6, 9, 8, 7, 11))
    records = [
        on_device("placed", federation=federation, executor="processes", workers=workers, rounds=5)
        for workers in (1, 2, 4, None)
    ]
    assert [record.machine["workers"] for record in records] == [1, 2, 4, 6]  # 8 for two devices, but 6 clients
    assert len({record.metrics_fingerprint() for record in records}) == 1
    assert len({record.states_fingerprint() for record in records}) == 1
    found = {tuple(path.name.split()) for path in tmp_path.iterdir()}
    assert {name for _, name in found} == {"pretend:0", "pretend:1"}
    assert len(found) == len({pid for pid, _ in found})  # a worker stays on one device
    assert str(os.getpid()) not in {pid for pid, _ in found}


def test_the_record_says_what_computed_it_and_the_id_does_not_depend_on_it():
    record = on_device("fedavg")
    described = {"type": "pretend", "name": "Pretend 3000", "capability": "1.0", "count": 2}
    assert record.machine["device"] == described
    here = toy.run("fedavg")
    assert here.machine["device"] == {"type": "cpu"}
    assert here.id == record.id


def test_a_run_is_not_resumed_on_another_kind_of_device(tmp_path):
    spec, federation = toy.spec("fedavg", rounds=4), toy.federation((7, 4))

    def run(**kw):
        return pflbench.run(spec, federation, toy.net(), executor="serial", out=tmp_path, **kw)

    def interrupted(**kw):
        with pytest.raises(KeyboardInterrupt):
            run(observers=[toy.Stop(2)], **kw)

    interrupted(device="pretend")
    with pytest.raises(RunError, match="device changed since it was written; --force starts"):
        run(resume=True)
    assert run(resume=True, device="pretend").status == "finished"
    interrupted(force=True)
    with pytest.raises(RunError, match="device changed since it was written; --force starts"):
        run(resume=True, device="pretend")
    assert run(resume=True).status == "finished"


def test_a_full_memory_of_the_device_is_one_line(methods):
    @register("greedy")
    class Greedy(FedAvg):
        def local_update(self, client, received, state):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    with pytest.raises(RunError, match=r"round 1, client 0: the memory of pretend:0 is full; use fewer --workers"):
        on_device("greedy")
