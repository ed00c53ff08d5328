import oracle
import pytest
import torch
import toy
from facts import BODY, HEAD, Facts

from pflbench import Message, Upload
from pflbench.core import registry

FACTS = Facts(bytes={"": (2 * (BODY + HEAD), 2 * (BODY + HEAD))})


def zeros():
    return {k: torch.zeros_like(t) for k, t in toy.initial().items()}


def train(x, own, c, samples, labels, batches, *, lr, **sgd):
    """The paper's local steps and control variate: y_i, and c_i+ by option II."""

    def drifting(q, b):  # whose gradient is g_i - c_i + c
        return oracle.nll(q, samples[b], labels[b]) + sum(((c[k] - own[k]) * q[k]).sum() for k in q)

    y = oracle.descend(x, batches, drifting, lr=lr, **sgd)
    return y, {k: own[k] - c[k] + (x[k] - y[k]) / (len(batches) * lr) for k in x}


def scaffold(chosen, global_lr, sizes=(7, 4), **sgd):
    """The server's x and c and the clients' c_i after each round of two epochs."""
    x, c, own = toy.initial(), zeros(), [zeros() for _ in sizes]
    for r, taking_part in enumerate(chosen):
        moves, changes = [], []
        for i in taking_part:
            samples, labels, _, _ = oracle.arrays(sizes)[i]
            batches = oracle.batches(len(labels), 3) * 2
            y, new = train(x, own[i], c, samples, labels, batches, lr=0.1 * 0.5**r, **sgd)
            moves.append({k: y[k] - x[k] for k in x})
            changes.append({k: new[k] - own[i][k] for k in x})
            own[i] = new
        x = {k: x[k] + global_lr * sum(m[k] for m in moves) / len(moves) for k in x}
        c = {k: c[k] + len(moves) / len(sizes) * (sum(m[k] for m in changes) / len(moves)) for k in x}
        yield x, c, list(own)


@pytest.mark.parametrize("global_lr", [1.0, 1.5])
@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.5, "weight_decay": 0.02}], ids=["plain", "full"])
def test_two_rounds_are_algorithm_1_with_option_ii(turns, global_lr, sgd):
    settings, chosen = turns
    record = toy.run("scaffold", {"global_lr": global_lr}, **settings, lr_decay=0.5, **sgd)
    rounds = list(scaffold(chosen, global_lr, **sgd))
    x, c, own = rounds[-1]
    oracle.close(record.server["model"], x)
    oracle.close(record.server["control"], c)
    for i in range(2):
        oracle.close(record.client_states[i]["control"], own[i])
    toy.check_tested(record, [[x, x] for x, _, _ in rounds])
    assert all(row["global_accuracy"] == row["accuracy"] for row in record.evaluations)


def test_c_is_divided_by_all_clients_and_x_by_those_that_took_part():
    sizes = (7, 4, 5)
    settings = {"join_ratio": 0.67, "rounds": 3, "lr_decay": 0.5}
    record = toy.run("scaffold", federation=toy.federation(sizes), **settings)
    chosen = [row["participants"] for row in record.rounds]
    assert [len(c) for c in chosen] == [2, 2, 2]
    assert len(set(map(tuple, chosen))) > 1
    *_, (x, c, own) = scaffold(chosen, 1.0, sizes)
    oracle.close(record.server["model"], x)
    oracle.close(record.server["control"], c)
    for i in range(3):
        oracle.close(record.client_states[i]["control"], own[i])


def test_fewer_uploads_than_planned_are_averaged_over_those_that_came():
    method = registry.algorithm("scaffold")()
    first = toy.round(clients=5)
    server = method.init_server(first.setup)
    uploads = []
    for i in range(2):
        client = toy.client(*oracle.arrays()[i][:2], id=i, clients=5)
        received = method.broadcast(first, server, i)
        message, _ = method.local_update(client, received, method.init_client(first.setup))
        uploads.append(Upload(message.content, message.weight, client=i))
    new = method.aggregate(first, server, uploads[1:])
    oracle.close(new["model"], uploads[1]["model"])
    oracle.close(new["control"], {k: t / 5 for k, t in uploads[1]["control"].items()})
    assert oracle.same(server["model"], toy.initial())


def test_the_message_down_has_the_model_and_the_servers_control_variate():
    method = registry.algorithm("scaffold")()
    server = {"model": toy.initial(), "control": {k: t + 1 for k, t in toy.initial().items()}}
    received = method.broadcast(toy.round(), server, 0)
    assert oracle.same(received["model"], server["model"])
    assert oracle.same(received["control"], server["control"])
    assert oracle.same(method.personalise(None, received, {"control": zeros()})["model"], server["model"])


def test_the_first_round_is_fedavg_with_equal_weights():
    record = toy.run("scaffold", rounds=1, **toy.FULL)
    uploads = [
        oracle.train(toy.initial(), x, y, 2, lr=0.1, momentum=0.5, weight_decay=0.02) for x, y, _, _ in oracle.arrays()
    ]  # fmt: skip
    oracle.close(record.server["model"], oracle.mean(uploads, [1, 1]))
    same_size = {"federation": toy.federation((6, 6)), "rounds": 1, "shuffle": True}
    oracle.close(toy.run("scaffold", **same_size).server["model"], toy.run("fedavg", **same_size).server["model"])


def test_one_client_is_fedavg():
    settings = {"federation": toy.federation((7,)), "rounds": 4, "shuffle": True}
    oracle.close(toy.run("scaffold", **settings).server["model"], toy.run("fedavg", **settings).server["model"])


def test_a_first_control_variate_is_the_mean_gradient_of_the_steps_each_of_one_batch():
    record = toy.run("scaffold", rounds=1)
    for i, (x, y, _, _) in enumerate(oracle.arrays()):
        p, gradients = toy.initial(), []
        for batch in oracle.batches(len(y), 3) * 2:
            gradients.append(oracle.gradient(lambda q, b=batch, x=x, y=y: oracle.nll(q, x[b], y[b]), p, tuple(p)))
            p = {k: p[k] - 0.1 * gradients[-1][k] for k in p}
        oracle.close(record.client_states[i]["control"], oracle.mean(gradients, [1.0] * len(gradients)))
        assert any(t.abs().max() > 0.01 for t in record.client_states[i]["control"].values())


@pytest.mark.parametrize(
    ("n", "drop_last", "epoch"),
    [
        (7, False, [[0, 1, 2], [3, 4, 5], [6]]),
        (7, True, [[0, 1, 2], [3, 4, 5]]),
        (6, True, [[0, 1, 2], [3, 4, 5]]),
        (4, True, [[0, 1, 2]]),
        (2, True, [[0, 1]]),  # the only batch is not dropped
        (1, False, [[0]]),
    ],
)
def test_k_is_how_many_steps_the_client_takes(n, drop_last, epoch):
    samples, labels, _, _ = oracle.arrays((n,))[0]
    x = toy.initial()
    c, own = {k: 0.1 * t for k, t in x.items()}, {k: t - 0.3 for k, t in x.items()}
    client = toy.client(samples, labels, drop_last=drop_last)
    message, state = registry.algorithm("scaffold")().local_update(
        client, Message({"model": x, "control": c}), {"control": own}
    )
    assert client.counts.steps == client.protocol.steps(n) == 2 * len(epoch)
    y, new = train(x, own, c, samples, labels, epoch * 2, lr=0.1)
    oracle.close(message["model"], y)
    oracle.close(state["control"], new)
    oracle.close(message["control"], {k: new[k] - own[k] for k in x})


def test_the_servers_control_variate_is_the_mean_of_all_clients(turns):
    record = toy.run("scaffold", **turns[0], rounds=3, shuffle=True)
    oracle.close(record.server["control"], oracle.mean([record.client_states[i]["control"] for i in range(2)], [1, 1]))


def test_clients_that_drift_apart_come_near_a_stationary_point_of_the_mean_loss_and_those_of_fedavg_do_not():
    settings = {
        "federation": toy.federation((6, 6)), "batch_size": 6, "local_epochs": 5, "lr": 0.5, "weight_decay": 0.1,
        "rounds": 60, "eval_every": 60,
    }  # fmt: skip

    def slope(algo):
        p = toy.run(algo, **settings).server["model"]
        g = [
            oracle.gradient(lambda q, x=x, y=y: oracle.nll(q, x, y), p, tuple(p))
            for x, y, _, _ in oracle.arrays((6, 6))
        ]
        return max(float(((g[0][k] + g[1][k]) / 2 + 0.1 * p[k]).abs().max()) for k in p)

    fedavg = slope("fedavg")
    assert fedavg > 0.02
    assert slope("scaffold") < 0.01 * fedavg


def test_control_variates_stay_with_their_clients_in_worker_processes():
    settings = {"rounds": 3, "shuffle": True}
    a, b = toy.run("scaffold", **settings), toy.run("scaffold", executor="processes", workers=2, **settings)
    for i in range(2):
        assert oracle.same(a.client_states[i]["control"], b.client_states[i]["control"])
    assert not oracle.same(a.client_states[0]["control"], a.client_states[1]["control"])


def test_buffers_of_batch_norm_are_averaged_and_have_no_control_variates():
    net = toy.batch_norm()
    names = ["body.1.running_mean", "body.1.running_var"]
    method = registry.algorithm("scaffold")(global_lr=3.0)
    first = toy.round(network=net)
    server, state = method.init_server(first.setup), method.init_client(first.setup)
    uploads, states = [], []
    for i, (x, y, _, _) in enumerate(oracle.arrays((8, 4))):
        client = toy.client(x, y, net=net, id=i, batch_size=4)
        message, new = method.local_update(client, method.broadcast(first, server, i), state)
        uploads.append(Upload(message.content, message.weight, client=i))
        states.append(new)
    new = method.aggregate(first, server, uploads)
    for name in names:
        torch.testing.assert_close(new["model"][name], (uploads[0]["model"][name] + uploads[1]["model"][name]) / 2)
        assert not torch.equal(new["model"][name], server["model"][name])
        assert all(not s["control"][name].any() for s in [new, *states])
    record = toy.run("scaffold", net=net, federation=toy.federation((8, 4)), batch_size=4, rounds=3)
    assert record.status == "finished"
    assert all(not record.server["control"][name].any() for name in names)


@pytest.mark.parametrize("hyper", [{"global_lr": 0.5}])
def test_every_hyperparameter_changes_the_result(hyper):
    a, b = toy.run("scaffold", hyper), toy.run("scaffold")
    assert not oracle.same(a.server["model"], b.server["model"])
