import oracle
import pytest
import torch
import toy
from facts import Facts
from torch import nn

import pflbench
from pflbench import Message, Upload
from pflbench.core import registry

FACTS = Facts(samples=5 * 12, bench={"hyperparameters": {"inner_lr": 0.01}})  # with 0.09 it diverges

HYPER = {"lam": 4.0, "inner_steps": 3, "inner_lr": 0.06}


def local_rounds(w, batches, x, y, *, lam, inner_steps, inner_lr, lr, momentum=0.0, weight_decay=0.0):
    """Algorithm 1 on one client: w and theta after its batches. The outer step is the protocol's SGD."""
    theta, speed = w, {k: torch.zeros_like(t) for k, t in w.items()}
    for b in batches:

        def h(q, b=b, w=w):
            return oracle.nll(q, x[b], y[b]) + lam / 2 * sum(((q[k] - w[k]) ** 2).sum() for k in q)

        theta = oracle.descend(theta, [b] * inner_steps, lambda q, _, h=h: h(q), lr=inner_lr)
        speed = {k: momentum * speed[k] + lam * (w[k] - theta[k]) + weight_decay * w[k] for k in w}
        w = {k: w[k] - lr * speed[k] for k in w}
    return w, theta


@pytest.mark.parametrize("beta", [1.0, 0.4, 2.0])
def test_two_rounds_descend_the_moreau_envelope_and_mix_the_plain_mean_into_the_server(turns, beta):
    settings, chosen = turns
    record = toy.run("pfedme", {**HYPER, "beta": beta}, **settings, **toy.FULL)

    data = oracle.arrays()
    server, own = toy.initial(), [toy.initial()] * 2
    tested, right = [], []
    for r in range(2):
        sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
        uploads = []
        for i in chosen[r]:
            x, y, _, _ = data[i]
            upload, own[i] = local_rounds(server, oracle.batches(len(y), 3) * 2, x, y, **HYPER, **sgd)
            uploads.append(upload)
        mean = oracle.mean(uploads, [1.0] * len(uploads))  # equal weights, though the clients have 7 and 4 samples
        server = {k: (1 - beta) * server[k] + beta * mean[k] for k in mean}
        tested.append(list(own))
        right.append(sum(int((oracle.logits(server, x).argmax(1) == y).sum()) for _, _, x, y in data))

    oracle.close(record.server["model"], server)
    for i in range(2):
        oracle.close(record.client_states[i]["model"], own[i])
    toy.check_tested(record, tested)
    assert [row["global_accuracy"] for row in record.evaluations] == [k / 120 for k in right]


def test_many_inner_steps_reach_the_proximal_point_and_w_steps_along_the_gradient_of_the_envelope():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("pfedme")(lam=4.0, inner_steps=500, inner_lr=0.1)
    w = toy.initial()
    client = toy.client(x, y, local_epochs=1, batch_size=7)
    upload, state = method.local_update(client, Message({"model": w}), method.init_client(client.setup))
    theta = state["model"]
    g = oracle.gradient(lambda q: oracle.nll(q, x, y), theta, oracle.BODY + oracle.HEAD)
    # grad f(theta) + lambda (theta - w) = 0, and the envelope's gradient is lambda (w - theta) = grad f(theta).
    oracle.close({k: 4.0 * (w[k] - theta[k]) for k in w}, g)
    oracle.close(upload["model"], {k: w[k] - 0.1 * g[k] for k in w})
    assert all(float(t.abs().max()) > 1e-3 for t in g.values())


def test_one_inner_step_on_one_batch_is_fedavg_at_the_product_of_the_rates_and_lambda():
    equal = {"federation": toy.federation((6, 6)), "batch_size": 6, "local_epochs": 1}
    pfedme = toy.run("pfedme", {"lam": 4.0, "inner_steps": 1, "inner_lr": 0.05}, lr=0.5, **equal)
    fedavg = toy.run("fedavg", lr=0.5 * 4.0 * 0.05, **equal)
    oracle.close(pfedme.server["model"], fedavg.server["model"])


def test_the_defaults_are_the_papers_and_the_global_model_moves_with_them():
    method = registry.algorithm("pfedme")()
    assert (method.lam, method.inner_steps, method.inner_lr, method.beta) == (15.0, 5, 0.09, 1.0)
    record = toy.run("pfedme")
    initial = toy.initial()
    assert all(not torch.equal(record.server["model"][k], initial[k]) for k in initial)
    with pytest.raises(pflbench.UsageError, match="beta"):
        toy.run("pfedme", {"beta": 0.0})


def test_beta_one_is_the_mean_of_the_uploads():
    method = registry.algorithm("pfedme")()

    def constant(value):
        return {k: torch.full_like(t.float(), value) for k, t in toy.initial().items()}

    uploads = [Upload({"model": constant(value)}, client=i) for i, value in enumerate((0.1, 0.7))]
    new = method.aggregate(toy.round(), {"model": constant(3e8)}, uploads)["model"]
    assert oracle.same(new, constant(0.4))


def test_the_personal_model_is_neither_the_uploaded_nor_the_received_one():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("pfedme")()
    w = toy.initial()
    client = toy.client(x, y)
    upload, state = method.local_update(client, Message({"model": w}), method.init_client(client.setup))
    for k in w:
        models = (w[k], upload["model"][k], state["model"][k])
        assert len({t.data_ptr() for t in models}) == 3
        assert not any(torch.equal(a, b) for a, b in zip(models, (*models[1:], w[k]), strict=True))


def test_the_smaller_lambda_the_further_theta_is_from_w():
    def distance(lam):
        x, y, _, _ = oracle.arrays()[0]
        method = registry.algorithm("pfedme")(lam=lam, inner_steps=50, inner_lr=0.05)
        upload, state = method.local_update(toy.client(x, y), Message({"model": toy.initial()}), {})
        return float(sum(((state["model"][k] - t) ** 2).sum() for k, t in upload["model"].items()))

    assert distance(1.0) > distance(5.0) > distance(15.0) > 0


def _normalised():
    net = toy.net()
    norm = nn.BatchNorm1d(3)
    norm.num_batches_tracked = None
    return pflbench.Net(nn.Sequential(net.body[0], norm, nn.Tanh()), net.head).double()


def test_batch_norm_statistics_see_every_batch_once_and_are_averaged_whatever_beta():
    record = toy.run(
        "pfedme", {"beta": 3.0, "inner_steps": 3, "inner_lr": 1e-13}, net=_normalised(),
        federation=toy.federation((4, 4)), rounds=1, batch_size=4,
    )  # fmt: skip
    initial = toy.initial()
    expected = []
    for x, _, _, _ in oracle.arrays((4, 4)):  # theta and w stand still, so every step sees the same activations
        h = x @ initial["body.0.weight"].T + initial["body.0.bias"]
        mean, var = torch.zeros(3).double(), torch.ones(3).double()
        for _ in range(2):
            mean, var = 0.9 * mean + 0.1 * h.mean(0), 0.9 * var + 0.1 * h.var(0)
        expected.append({"mean": mean, "var": var})
    for i in range(2):
        for what in ("mean", "var"):
            found = record.client_states[i]["model"][f"body.1.running_{what}"]
            torch.testing.assert_close(found, expected[i][what], rtol=0, atol=1e-9)
    for what in ("mean", "var"):
        found = record.server["model"][f"body.1.running_{what}"]
        torch.testing.assert_close(found, (expected[0][what] + expected[1][what]) / 2, rtol=0, atol=1e-9)
