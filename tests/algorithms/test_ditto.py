import oracle
import pytest
import torch
import toy
from facts import Facts
from torch import nn

import pflbench

FACTS = Facts()


def personal(v, w, x, y, epochs, *, lam, **sgd):
    """SGD on F(v) + lambda/2 |v - w|^2."""

    def loss(q, b):
        return oracle.nll(q, x[b], y[b]) + lam / 2 * sum(((q[k] - w[k]) ** 2).sum() for k in q)

    return oracle.descend(v, oracle.batches(len(y), 3) * epochs, loss, **sgd)


def test_two_rounds_are_fedavg_and_proximal_descent_to_the_received_model(turns):
    settings, chosen = turns
    record = toy.run("ditto", {"lam": 0.7}, **settings, **toy.FULL)

    data = oracle.arrays()
    server, own = toy.initial(), [toy.initial()] * 2
    tested, right = [], []
    for r in range(2):
        sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
        uploads = []
        for i in chosen[r]:
            x, y, _, _ = data[i]
            uploads.append(oracle.train(server, x, y, 2, **sgd))
            own[i] = personal(own[i], server, x, y, 2, lam=0.7, **sgd)
        server = oracle.mean(uploads, [len(data[i][1]) for i in chosen[r]])
        tested.append(list(own))
        right.append(sum(int((oracle.logits(server, x).argmax(1) == y).sum()) for _, _, x, y in data))

    oracle.close(record.server["model"], server)
    for i in range(2):
        oracle.close(record.client_states[i]["model"], own[i])
    toy.check_tested(record, tested)
    # The global model's accuracy stands apart from the personal ones'.
    assert [row["global_accuracy"] for row in record.evaluations] == [k / 120 for k in right]
    assert all(row["global_accuracy"] != row["accuracy"] for row in record.evaluations)


@pytest.mark.parametrize("lam", [0.0, 1.0, 5.0])
def test_the_global_model_is_fedavgs_whatever_lambda(lam):
    ditto = toy.run("ditto", {"lam": lam}, shuffle=True, **toy.FULL)
    fedavg = toy.run("fedavg", shuffle=True, **toy.FULL)
    assert oracle.same(ditto.server["model"], fedavg.server["model"])
    assert [r["global_accuracy"] for r in ditto.evaluations] == [r["accuracy"] for r in fedavg.evaluations]
    assert [r["train_loss"] for r in ditto.rounds] == [r["train_loss"] for r in fedavg.rounds]


def test_the_global_model_is_fedavgs_in_a_network_that_draws_random_numbers():
    net = toy.dropping()
    ditto, fedavg = (toy.run(name, net=net) for name in ("ditto", "fedavg"))
    assert oracle.same(ditto.server["model"], fedavg.server["model"])


def test_lambda_zero_is_local_training_but_the_default_is_not():
    local = toy.run("local", **toy.FULL)
    none, default = toy.run("ditto", {"lam": 0}, **toy.FULL), toy.run("ditto", **toy.FULL)
    for i in range(2):
        assert oracle.same(none.client_states[i]["model"], local.client_states[i]["model"])
        assert not oracle.same(default.client_states[i]["model"], local.client_states[i]["model"])
    assert [r["test_loss"] for r in none.evaluations] == [r["test_loss"] for r in local.evaluations]


def test_the_default_lambda_is_one():
    default, one = toy.run("ditto"), toy.run("ditto", {"lam": 1.0})
    assert default.fingerprints["states"] == one.fingerprints["states"]


def test_the_personal_model_converges_to_the_proximal_point_of_the_received_model():
    record = toy.run("ditto", {"lam": 2.0}, rounds=1, local_epochs=400, batch_size=7)
    w = toy.initial()
    for i, (x, y, _, _) in enumerate(oracle.arrays()):
        v = record.client_states[i]["model"]
        g = oracle.gradient(lambda q, x=x, y=y: oracle.nll(q, x, y), v, oracle.BODY + oracle.HEAD)
        for k in v:
            torch.testing.assert_close(g[k], 2.0 * (w[k] - v[k]), rtol=0, atol=1e-9)
            assert not torch.equal(v[k], w[k])


def test_the_larger_lambda_the_nearer_stays_the_personal_model_to_the_received_one():
    def distance(lam):
        record = toy.run("ditto", {"lam": lam}, rounds=1)
        w, v = toy.initial(), record.client_states[0]["model"]
        return float(sum(((v[k] - w[k]) ** 2).sum() for k in w))

    assert 0 < distance(8.0) < distance(1.0) < distance(0.0)


def test_a_client_state_holds_its_own_model_alone_and_depends_on_others_through_the_global_model_only():
    changed = oracle.arrays()
    changed[0] = (changed[0][0] * -3, *changed[0][1:])
    other = pflbench.Federation.from_arrays(changed, classes=3)
    a, b = toy.run("ditto", rounds=1), toy.run("ditto", rounds=1, federation=other)
    assert [list(s) for s in a.client_states.values()] == [["model"]] * 2
    assert oracle.same(a.client_states[1]["model"], b.client_states[1]["model"])
    assert not oracle.same(a.client_states[0]["model"], b.client_states[0]["model"])


def test_batch_norm_statistics_are_each_models_own_and_are_not_pulled():
    def net():
        plain = toy.net()
        norm = nn.BatchNorm1d(3)
        norm.num_batches_tracked = None
        return pflbench.Net(nn.Sequential(plain.body[0], norm, nn.Tanh()), plain.head).double()

    settings = {"federation": toy.federation((8, 4)), "batch_size": 4, **toy.FULL}
    none, some = (toy.run("ditto", {"lam": lam}, net=net(), **settings) for lam in (0, 1.0))
    local, fedavg = (toy.run(name, net=net(), **settings) for name in ("local", "fedavg"))
    assert oracle.same(none.client_states[0]["model"], local.client_states[0]["model"])
    assert oracle.same(some.server["model"], fedavg.server["model"])
    one = toy.run("ditto", {"lam": 1.0}, net=net(), **{**settings, "rounds": 1, "local_epochs": 1, "batch_size": 8})
    x = oracle.arrays((8, 4))[0][0]
    h = x @ toy.initial()["body.0.weight"].T + toy.initial()["body.0.bias"]
    expected = {"mean": 0.1 * h.mean(0), "var": 0.9 + 0.1 * h.var(0)}
    for what, value in expected.items():
        torch.testing.assert_close(one.client_states[0]["model"][f"body.1.running_{what}"], value, rtol=0, atol=1e-9)
