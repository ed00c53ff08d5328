import oracle
import pytest
import torch
import toy
from facts import Facts
from torch import nn

import pflbench
from pflbench import Message
from pflbench.core import registry

FACTS = Facts(variants=[{"adaptive": True}])


def mix(v, w, alpha):
    return {k: alpha * v[k] + (1 - alpha) * w[k] for k in v}


def gradient(p, x, y):
    return oracle.gradient(lambda q: oracle.nll(q, x, y), p, oracle.BODY + oracle.HEAD)


def local_descent(w, v, alpha, batches, x, y, *, lr, momentum=0.0, weight_decay=0.0):
    """Algorithm 1 between two synchronisations: both steps are taken at the same w and v."""
    speed_w, speed_v = ({k: torch.zeros_like(t) for k, t in w.items()} for _ in range(2))
    for b in batches:
        at_w = gradient(w, x[b], y[b])
        at_mixture = gradient(mix(v, w, alpha), x[b], y[b])
        speed_w = {k: momentum * speed_w[k] + at_w[k] + weight_decay * w[k] for k in w}
        speed_v = {k: momentum * speed_v[k] + alpha * at_mixture[k] + weight_decay * v[k] for k in v}
        w, v = {k: w[k] - lr * speed_w[k] for k in w}, {k: v[k] - lr * speed_v[k] for k in v}
    return w, v


def alpha_step(w, v, alpha, x, y, lr):
    g = gradient(mix(v, w, alpha), x[:3], y[:3])
    slope = sum(float(((v[k] - w[k]) * g[k]).sum()) for k in g)
    return min(max(alpha - lr * slope, 0.0), 1.0)


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
def test_two_rounds_are_local_descent_and_the_plain_mean(turns, adaptive):
    settings, chosen = turns
    record = toy.run("apfl", {"alpha": 0.3, "adaptive": adaptive}, **settings, **toy.FULL)

    data = oracle.arrays()
    server, own, alphas = toy.initial(), [toy.initial()] * 2, [0.3] * 2
    tested, right = [], []
    for r in range(2):
        sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
        uploads = []
        for i in chosen[r]:
            x, y, _, _ = data[i]
            if adaptive:
                alphas[i] = alpha_step(server, own[i], alphas[i], x, y, sgd["lr"])
            batches = oracle.batches(len(y), 3) * 2
            upload, own[i] = local_descent(server, own[i], alphas[i], batches, x, y, **sgd)
            uploads.append(upload)
        server = oracle.mean(uploads, [1.0] * len(uploads))  # equal weights, though the clients have 7 and 4 samples
        tested.append([mix(v, server, alpha) for v, alpha in zip(own, alphas, strict=True)])
        right.append(sum(int((oracle.logits(server, x).argmax(1) == y).sum()) for _, _, x, y in data))

    oracle.close(record.server["model"], server)
    for i in range(2):
        oracle.close(record.client_states[i]["model"], own[i])
        assert record.client_states[i]["alpha"] == pytest.approx(alphas[i], rel=0, abs=1e-9)
    toy.check_tested(record, tested)
    assert [row["global_accuracy"] for row in record.evaluations] == [k / 120 for k in right]
    # alpha stays while v_i is the received model, as it is in the first round.
    assert [alpha != 0.3 for alpha in alphas] == [adaptive and i in chosen[1] for i in range(2)]


def test_alpha_zero_is_fedavg_whose_own_models_never_train():
    equal = {"federation": toy.federation((6, 6)), "shuffle": True, "momentum": 0.5, "lr_decay": 0.5}
    apfl, fedavg = toy.run("apfl", {"alpha": 0.0}, **equal), toy.run("fedavg", **equal)
    assert oracle.same(apfl.server["model"], fedavg.server["model"])
    assert [r["test_loss"] for r in apfl.evaluations] == [r["test_loss"] for r in fedavg.evaluations]
    assert oracle.same(apfl.client_states[0]["model"], toy.initial())


def test_alpha_one_is_local_training():
    apfl, local = toy.run("apfl", {"alpha": 1.0}, shuffle=True, **toy.FULL), toy.run("local", shuffle=True, **toy.FULL)
    for i in range(2):
        assert oracle.same(apfl.client_states[i]["model"], local.client_states[i]["model"])
    assert [r["test_loss"] for r in apfl.evaluations] == [r["test_loss"] for r in local.evaluations]


def test_both_models_see_the_same_batch_though_the_first_layer_works_in_place():
    net = toy.halving()
    x, y, _, _ = oracle.arrays()[0]
    start, method = toy.initial(net), registry.algorithm("apfl")(alpha=1.0)
    first = method.init_client(toy.setup(net))
    _, state = method.local_update(toy.client(x, y, net=net), Message({"model": start}), first)
    oracle.close(state["model"], toy.client(x, y, net=net).sgd(start))


@pytest.mark.parametrize("hyper", [{"alpha": 0.2}, {"alpha": 1.0}, {"adaptive": True}], ids=str)
def test_the_global_model_is_fedavgs_of_clients_of_equal_size_whatever_alpha(hyper):
    equal = {"federation": toy.federation((6, 6)), "shuffle": True, **toy.FULL}
    apfl, fedavg = toy.run("apfl", hyper, **equal), toy.run("fedavg", **equal)
    assert oracle.same(apfl.server["model"], fedavg.server["model"])
    assert [r["global_accuracy"] for r in apfl.evaluations] == [r["accuracy"] for r in fedavg.evaluations]


def test_one_step_moves_v_along_alpha_times_the_gradient_at_the_mixture():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("apfl")(alpha=0.25)
    w, v = toy.initial(), {k: t * 1.5 for k, t in toy.initial().items()}
    client = toy.client(x, y, local_epochs=1, batch_size=7)
    _, new = method.local_update(client, Message({"model": w}), {"model": v, "alpha": 0.25})
    at_mixture, at_v = gradient(mix(v, w, 0.25), x, y), gradient(v, x, y)
    oracle.close(new["model"], {k: v[k] - 0.1 * 0.25 * at_mixture[k] for k in v})
    for k in v:
        assert not torch.allclose(at_mixture[k], at_v[k])
        assert not torch.equal(new["model"][k], v[k])  # it learns
        assert not torch.allclose(new["model"][k], mix(v, w, 0.25)[k])  # and is not the mixture


def test_alpha_is_learnt_in_the_direction_that_lowers_the_loss_of_the_mixture():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("apfl")(adaptive=True)
    good = oracle.train(toy.initial(), x, y, 100, lr=0.1)

    def learnt(own, received, lr=0.001):
        client = toy.client(x, y, lr=lr, batch_size=7)
        _, new = method.local_update(client, Message({"model": received}), {"model": own, "alpha": 0.5})
        return new["alpha"]

    assert learnt(good, toy.initial()) > 0.5 > learnt(toy.initial(), good)
    assert learnt(good, toy.initial(), lr=10.0) == 1.0  # clipped
    assert learnt(toy.initial(), good, lr=10.0) == 0.0


def test_a_client_starts_with_the_initial_model_and_the_given_alpha():
    state = registry.algorithm("apfl")(alpha=0.3).init_client(toy.setup())
    assert state.keys() == {"model", "alpha"}
    assert oracle.same(state["model"], toy.initial())
    assert state["alpha"] == 0.3


def test_alpha_stays_where_it_was_put_unless_it_is_adaptive():
    fixed, adaptive = (toy.run("apfl", {"adaptive": a}, rounds=3) for a in (False, True))
    assert [fixed.client_states[i]["alpha"] for i in range(2)] == [0.5, 0.5]
    alphas = [adaptive.client_states[i]["alpha"] for i in range(2)]
    assert alphas[0] != alphas[1]  # each client's own
    assert 0.5 not in alphas


def _normalised():
    net = toy.net()
    norm = nn.BatchNorm1d(3)
    norm.num_batches_tracked = None
    return pflbench.Net(nn.Sequential(net.body[0], norm, nn.Tanh()), net.head).double()


def test_batch_norm_statistics_are_the_global_models_and_the_mixtures():
    net = _normalised()
    x, y, _, _ = oracle.arrays((6,))[0]
    w = {k: t.clone() for k, t in net.state_dict().items()}
    v = {k: t + 0.5 if "running" not in k else t for k, t in w.items()}
    method = registry.algorithm("apfl")(alpha=0.25)
    client = toy.client(x, y, net=net, local_epochs=1, batch_size=6, weight_decay=0.1)
    upload, new = method.local_update(client, Message({"model": w}), {"model": v, "alpha": 0.25})

    def statistics(p):
        h = x @ p["body.0.weight"].T + p["body.0.bias"]
        return {"body.1.running_mean": 0.1 * h.mean(0), "body.1.running_var": 0.9 + 0.1 * h.var(0)}

    def running(p):
        return {k: t for k, t in p.items() if "running" in k}

    oracle.close(running(upload["model"]), statistics(w))
    oracle.close(running(new["model"]), statistics(mix(v, w, 0.25)))
    tested = method.personalise(client, Message({"model": upload["model"]}), new)["model"]
    oracle.close(running(tested), running(new["model"]))
    oracle.close(
        {k: tested[k] for k in toy.initial()},
        mix(*({k: p[k] for k in toy.initial()} for p in (new["model"], upload["model"])), 0.25),
    )


@pytest.mark.parametrize("adaptive", [False, True])
def test_networks_with_batch_norm_run(adaptive):
    record = toy.run(
        "apfl", {"adaptive": adaptive}, net=_normalised(), federation=toy.federation((8, 4)), batch_size=4,
    )  # fmt: skip
    initial = _normalised().state_dict()
    for model in (record.server["model"], record.client_states[0]["model"]):
        same = {k for k in initial if torch.equal(model[k], initial[k])}
        assert same <= {"body.0.bias"}  # the normalisation takes its gradient away
