import pytest
import torch
from torch import nn

import pflbench
from pflbench import Message
from pflbench.core import registry


def mix(v, w, alpha):
    return {k: alpha * v[k] + (1 - alpha) * w[k] for k in v}


def gradient(toy, p, x, y):
    return toy.gradient(lambda q: toy.nll(q, x, y), p, toy.BODY + toy.HEAD)


def local_descent(toy, w, v, alpha, batches, x, y, *, lr, momentum=0.0, weight_decay=0.0):
    """Algorithm 1 between two synchronisations: both steps are taken at the same w and v."""
    speed_w, speed_v = ({k: torch.zeros_like(t) for k, t in w.items()} for _ in range(2))
    for b in batches:
        at_w = gradient(toy, w, x[b], y[b])
        at_mixture = gradient(toy, mix(v, w, alpha), x[b], y[b])
        speed_w = {k: momentum * speed_w[k] + at_w[k] + weight_decay * w[k] for k in w}
        speed_v = {k: momentum * speed_v[k] + alpha * at_mixture[k] + weight_decay * v[k] for k in v}
        w, v = {k: w[k] - lr * speed_w[k] for k in w}, {k: v[k] - lr * speed_v[k] for k in v}
    return w, v


def alpha_step(toy, w, v, alpha, x, y, lr):
    g = gradient(toy, mix(v, w, alpha), x[:3], y[:3])
    slope = sum(float(((v[k] - w[k]) * g[k]).sum()) for k in g)
    return min(max(alpha - lr * slope, 0.0), 1.0)


@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])
def test_two_rounds_are_local_descent_and_the_plain_mean(toy, turns, adaptive):
    settings, chosen = turns
    record = toy.run("apfl", {"alpha": 0.3, "adaptive": adaptive}, **settings, **toy.FULL)

    data = toy.arrays()
    server, own, alphas = toy.initial(), [toy.initial()] * 2, [0.3] * 2
    tested, right = [], []
    for r in range(2):
        sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
        ups = []
        for i in chosen[r]:
            x, y, _, _ = data[i]
            if adaptive:
                alphas[i] = alpha_step(toy, server, own[i], alphas[i], x, y, sgd["lr"])
            batches = toy.batches(len(y), 3) * 2
            up, own[i] = local_descent(toy, server, own[i], alphas[i], batches, x, y, **sgd)
            ups.append(up)
        server = toy.mean(ups, [1.0] * len(ups))  # equal weights, though the clients have 7 and 4 samples
        tested.append([mix(v, server, alpha) for v, alpha in zip(own, alphas, strict=True)])
        right.append(sum(int((toy.logits(server, x).argmax(1) == y).sum()) for _, _, x, y in data))

    toy.close(record.server["model"], server)
    for i in range(2):
        toy.close(record.client_states[i]["model"], own[i])
        assert float(record.client_states[i]["mixture"]["alpha"]) == pytest.approx(alphas[i], rel=0, abs=1e-9)
    toy.check_tested(record, tested)
    assert [row["global_accuracy"] for row in record.rounds] == [k / 120 for k in right]
    # alpha stays while v_i is the received model, as it is in the first round.
    assert [alpha != 0.3 for alpha in alphas] == [adaptive and i in chosen[1] for i in range(2)]


def test_alpha_zero_is_fedavg_whose_own_models_never_train(toy):
    equal = {"federation": toy.federation((6, 6)), "shuffle": True, "momentum": 0.5, "lr_decay": 0.5}
    apfl, fedavg = toy.run("apfl", {"alpha": 0.0}, **equal), toy.run("fedavg", **equal)
    assert toy.same(apfl.server["model"], fedavg.server["model"])
    assert [r["test_loss"] for r in apfl.rounds] == [r["test_loss"] for r in fedavg.rounds]
    assert toy.same(apfl.client_states[0]["model"], toy.initial())


def test_alpha_one_is_local_training(toy):
    apfl, local = toy.run("apfl", {"alpha": 1.0}, shuffle=True, **toy.FULL), toy.run("local", shuffle=True, **toy.FULL)
    for i in range(2):
        assert toy.same(apfl.client_states[i]["model"], local.client_states[i]["model"])
    assert [r["test_loss"] for r in apfl.rounds] == [r["test_loss"] for r in local.rounds]


def test_both_models_see_the_same_batch_though_the_first_layer_works_in_place(toy):
    net = toy.halving()
    x, y, _, _ = toy.arrays()[0]
    start, method = toy.initial(net), registry.algorithm("apfl")(alpha=1.0)
    _, state = method.local_update(toy.local(x, y, net=net), Message({"model": start}), method.init_client(start))
    toy.close(state["model"], toy.local(x, y, net=net).sgd(start))


@pytest.mark.parametrize("hyper", [{"alpha": 0.2}, {"alpha": 1.0}, {"adaptive": True}], ids=str)
def test_the_global_model_is_fedavgs_of_clients_of_equal_size_whatever_alpha(toy, hyper):
    equal = {"federation": toy.federation((6, 6)), "shuffle": True, **toy.FULL}
    apfl, fedavg = toy.run("apfl", hyper, **equal), toy.run("fedavg", **equal)
    assert toy.same(apfl.server["model"], fedavg.server["model"])
    assert [r["global_accuracy"] for r in apfl.rounds] == [r["accuracy"] for r in fedavg.rounds]


def test_one_step_moves_v_along_alpha_times_the_gradient_at_the_mixture(toy):
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("apfl")(alpha=0.25)
    w, v = toy.initial(), {k: t * 1.5 for k, t in toy.initial().items()}
    state = method.init_client(v)
    local = toy.local(x, y, local_epochs=1, batch_size=7)
    _, new = method.local_update(local, Message({"model": w}), state)
    at_mixture, at_v = gradient(toy, mix(v, w, 0.25), x, y), gradient(toy, v, x, y)
    toy.close(new["model"], {k: v[k] - 0.1 * 0.25 * at_mixture[k] for k in v})
    for k in v:
        assert not torch.allclose(at_mixture[k], at_v[k])
        assert not torch.equal(new["model"][k], v[k])  # it learns
        assert not torch.allclose(new["model"][k], mix(v, w, 0.25)[k])  # and is not the mixture


def test_alpha_is_learnt_in_the_direction_that_lowers_the_loss_of_the_mixture(toy):
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("apfl")(adaptive=True)
    good = toy.train(toy.initial(), x, y, 100, lr=0.1)

    def learnt(own, received, lr=0.001):
        local = toy.local(x, y, lr=lr, batch_size=7)
        _, new = method.local_update(local, Message({"model": received}), method.init_client(own))
        return float(new["mixture"]["alpha"])

    assert learnt(good, toy.initial()) > 0.5 > learnt(toy.initial(), good)
    assert learnt(good, toy.initial(), lr=10.0) == 1.0  # clipped
    assert learnt(toy.initial(), good, lr=10.0) == 0.0


def test_alpha_stays_where_it_was_put_unless_it_is_adaptive(toy):
    fixed, adaptive = (toy.run("apfl", {"adaptive": a}, rounds=3) for a in (False, True))
    assert [float(fixed.client_states[i]["mixture"]["alpha"]) for i in range(2)] == [0.5, 0.5]
    alphas = [float(adaptive.client_states[i]["mixture"]["alpha"]) for i in range(2)]
    assert alphas[0] != alphas[1]  # each client's own
    assert 0.5 not in alphas


def _normalised(toy):
    net = toy.net()
    norm = nn.BatchNorm1d(3)
    norm.num_batches_tracked = None
    return pflbench.Net(nn.Sequential(net.body[0], norm, nn.Tanh()), net.head).double()


def test_batch_norm_statistics_are_the_global_models_and_the_mixtures(toy):
    net = _normalised(toy)
    x, y, _, _ = toy.arrays((6,))[0]
    w = {k: t.clone() for k, t in net.state_dict().items()}
    v = {k: t + 0.5 if "running" not in k else t for k, t in w.items()}
    method = registry.algorithm("apfl")(alpha=0.25)
    local = toy.local(x, y, net=net, local_epochs=1, batch_size=6, weight_decay=0.1)
    up, new = method.local_update(local, Message({"model": w}), method.init_client(v))

    def statistics(p):
        h = x @ p["body.0.weight"].T + p["body.0.bias"]
        return {"body.1.running_mean": 0.1 * h.mean(0), "body.1.running_var": 0.9 + 0.1 * h.var(0)}

    def running(p):
        return {k: t for k, t in p.items() if "running" in k}

    toy.close(running(up["model"]), statistics(w))
    toy.close(running(new["model"]), statistics(mix(v, w, 0.25)))
    tested = method.personalised(local, Message({"model": up["model"]}), new)
    toy.close(running(tested), running(new["model"]))
    toy.close(
        {k: tested[k] for k in toy.initial()},
        mix(*({k: p[k] for k in toy.initial()} for p in (new["model"], up["model"])), 0.25),
    )


@pytest.mark.parametrize("adaptive", [False, True])
def test_networks_with_batch_norm_run(toy, adaptive):
    record = toy.run(
        "apfl", {"adaptive": adaptive}, net=_normalised(toy), federation=toy.federation((8, 4)), batch_size=4,
    )  # fmt: skip
    initial = _normalised(toy).state_dict()
    for model in (record.server["model"], record.client_states[0]["model"]):
        same = {k for k in initial if torch.equal(model[k], initial[k])}
        assert same <= {"body.0.bias"}  # the normalisation takes its gradient away
