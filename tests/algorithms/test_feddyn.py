import oracle
import pytest
import torch
import toy
from facts import Facts

from pflbench import Upload
from pflbench.core import registry

FACTS = Facts()


def zeros():
    return {k: torch.zeros_like(t) for k, t in toy.initial().items()}


def feddyn(chosen, alpha, sizes=(7, 4), **sgd):
    """The server's model and h and the clients' gradients after each round of two epochs."""
    server, h, gradients = toy.initial(), zeros(), [zeros() for _ in sizes]
    for r, taking_part in enumerate(chosen):
        models = []
        for i in taking_part:
            x, y, _, _ = oracle.arrays(sizes)[i]

            def risk(q, b, x=x, y=y, g=gradients[i], server=server):
                linear = sum((g[k] * q[k]).sum() for k in q)
                return oracle.nll(q, x[b], y[b]) - linear + alpha / 2 * sum(((q[k] - server[k]) ** 2).sum() for k in q)

            model = oracle.descend(server, oracle.batches(len(y), 3) * 2, risk, lr=0.1 * 0.5**r, **sgd)
            gradients[i] = {k: gradients[i][k] - alpha * (model[k] - server[k]) for k in model}
            models.append(model)
        h = {k: h[k] - alpha / len(sizes) * sum(m[k] - server[k] for m in models) for k in h}
        server = {k: sum(m[k] for m in models) / len(models) - h[k] / alpha for k in h}
        yield server, h, list(gradients)


@pytest.mark.parametrize("sgd", [{}, {"momentum": 0.5, "weight_decay": 0.02}], ids=["plain", "full"])
def test_two_rounds_are_algorithm_1_with_sgd_on_the_regularised_risk(turns, sgd):
    settings, chosen = turns
    record = toy.run("feddyn", {"alpha": 0.3}, **settings, lr_decay=0.5, **sgd)
    rounds = list(feddyn(chosen, 0.3, **sgd))
    server, h, gradients = rounds[-1]
    oracle.close(record.server["model"], server)
    oracle.close(record.server["h"], h)
    for i in range(2):
        oracle.close(record.client_states[i]["gradient"], gradients[i])
    toy.check_tested(record, [[model, model] for model, _, _ in rounds])
    assert all(row["global_accuracy"] == row["accuracy"] for row in record.evaluations)


def test_h_is_divided_by_all_clients_and_the_mean_is_over_those_that_took_part():
    sizes = (7, 4, 5)
    settings = {"join_ratio": 0.67, "rounds": 3, "lr_decay": 0.5}
    record = toy.run("feddyn", {"alpha": 0.3}, federation=toy.federation(sizes), **settings)
    chosen = [row["participants"] for row in record.rounds]
    assert [len(c) for c in chosen] == [2, 2, 2]
    assert len(set(map(tuple, chosen))) > 1
    *_, (server, h, gradients) = feddyn(chosen, 0.3, sizes)
    oracle.close(record.server["model"], server)
    oracle.close(record.server["h"], h)
    for i in range(3):
        oracle.close(record.client_states[i]["gradient"], gradients[i])


def test_fewer_uploads_than_planned_are_averaged_over_those_that_came():
    method = registry.algorithm("feddyn")(alpha=0.3)
    first = toy.round(clients=5)
    server = method.init_server(first.setup)
    uploads = []
    for i in range(2):
        client = toy.client(*oracle.arrays()[i][:2], id=i, clients=5)
        received = method.broadcast(first, server, i)
        message, _ = method.local_update(client, received, method.init_client(first.setup))
        uploads.append(Upload(message.content, message.weight, client=i))
    new = method.aggregate(first, server, uploads[1:])
    came = uploads[1]["model"]
    oracle.close(new["h"], {k: -0.3 / 5 * (t - toy.initial()[k]) for k, t in came.items()})
    oracle.close(new["model"], {k: t + (t - toy.initial()[k]) / 5 for k, t in came.items()})
    assert oracle.same(server["model"], toy.initial())


def test_h_is_the_mean_of_all_clients_gradients(turns):
    record = toy.run("feddyn", **turns[0], rounds=3, shuffle=True)
    oracle.close(record.server["h"], oracle.mean([record.client_states[i]["gradient"] for i in range(2)], [1, 1]))
    assert any(t.abs().max() > 1e-5 for t in record.server["h"].values())


def test_with_a_vanishing_alpha_the_first_round_is_twice_the_mean_step_of_fedavgs_clients():
    record = toy.run("feddyn", {"alpha": 1e-11}, rounds=1)
    uploads = [oracle.train(toy.initial(), x, y, 2, lr=0.1) for x, y, _, _ in oracle.arrays()]
    mean = oracle.mean(uploads, [1, 1])  # equal weights, though the clients have 7 and 4 samples
    oracle.close(record.server["model"], {k: 2 * t - toy.initial()[k] for k, t in mean.items()})


def test_after_enough_local_steps_the_kept_gradient_is_the_losss_at_the_clients_model():
    """Algorithm 1's update of the gradient is the first-order condition of the risk that the client has minimised."""
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("feddyn")(alpha=0.5)
    state = {"gradient": {k: 0.1 * t for k, t in toy.initial().items()}}
    client = toy.client(x, y, batch_size=7, local_epochs=1500, lr=0.5)
    first = toy.round()
    message, new = method.local_update(client, method.broadcast(first, method.init_server(first.setup), 0), state)
    oracle.close(
        new["gradient"], oracle.gradient(lambda q: oracle.nll(q, x, y), message["model"], oracle.BODY + oracle.HEAD)
    )


def test_clients_that_drift_apart_come_near_a_stationary_point_of_the_mean_loss_and_those_of_fedavg_do_not():
    settings = {
        "federation": toy.federation((6, 6)), "batch_size": 6, "local_epochs": 5, "lr": 0.5, "weight_decay": 0.1,
        "rounds": 60, "eval_every": 60,
    }  # fmt: skip

    def slope(algo, hyper):
        p = toy.run(algo, hyper, **settings).server["model"]
        g = [
            oracle.gradient(lambda q, x=x, y=y: oracle.nll(q, x, y), p, tuple(p))
            for x, y, _, _ in oracle.arrays((6, 6))
        ]
        return max(float(((g[0][k] + g[1][k]) / 2 + 0.1 * p[k]).abs().max()) for k in p)

    fedavg = slope("fedavg", {})
    assert fedavg > 0.02
    assert slope("feddyn", {"alpha": 0.3}) < 0.01 * fedavg


def test_gradients_stay_with_their_clients_in_worker_processes():
    settings = {"rounds": 3, "shuffle": True}
    a, b = toy.run("feddyn", **settings), toy.run("feddyn", executor="processes", workers=2, **settings)
    for i in range(2):
        assert oracle.same(a.client_states[i]["gradient"], b.client_states[i]["gradient"])
    assert not oracle.same(a.client_states[0]["gradient"], a.client_states[1]["gradient"])


def test_buffers_of_batch_norm_are_averaged_and_neither_regularised_nor_corrected():
    net = toy.batch_norm()
    names = ["body.1.running_mean", "body.1.running_var"]
    method = registry.algorithm("feddyn")()
    first = toy.round(network=net)
    server, state = method.init_server(first.setup), method.init_client(first.setup)
    uploads, states = [], []
    for i, (x, y, _, _) in enumerate(oracle.arrays((8, 4))):
        client = toy.client(x, y, net=net, id=i, batch_size=4)
        message, own = method.local_update(client, method.broadcast(first, server, i), state)
        uploads.append(Upload(message.content, message.weight, client=i))
        states.append(own)
    new = method.aggregate(first, server, uploads)
    assert new["model"].keys() == server["model"].keys()
    assert new["h"].keys() == server["h"].keys()
    for name in names:
        torch.testing.assert_close(new["model"][name], (uploads[0]["model"][name] + uploads[1]["model"][name]) / 2)
        assert not torch.equal(new["model"][name], server["model"][name])
        assert not new["h"][name].any()
        assert all(not s["gradient"][name].any() for s in states)
    record = toy.run("feddyn", net=net, federation=toy.federation((8, 4)), batch_size=4, rounds=3)
    assert record.status == "finished"
    assert (record.server["model"]["body.1.running_var"] > 0).all()


@pytest.mark.parametrize("hyper", [{"alpha": 0.1}])
def test_every_hyperparameter_changes_the_result(hyper):
    a, b = toy.run("feddyn", hyper), toy.run("feddyn")
    assert not oracle.same(a.server["model"], b.server["model"])


def test_alpha_is_that_of_the_authors_example_unless_told():
    assert registry.algorithm("feddyn")().alpha == 0.01
