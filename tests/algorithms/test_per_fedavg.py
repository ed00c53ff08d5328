import oracle
import pytest
import torch
import torch.nn.functional as F
import toy
from facts import Facts
from torch import nn

import pflbench
from pflbench import Message
from pflbench.core import Replica, registry

FACTS = Facts(variants=[{"variant": "fo"}, {"variant": "exact"}], samples=4 * 3)

ALL = ("body.0.weight", "body.0.bias", "head.weight", "head.bias")


def gradient(p, x, y, *, nll=oracle.nll):
    return oracle.gradient(lambda q: nll(q, x, y), p, ALL)


def add(p, g, by):
    return {k: p[k] + by * g[k] for k in p}


def relu_nll(p, x, y):
    """`oracle.nll` of the network with ReLUs."""
    z = (x @ p["body.0.weight"].T + p["body.0.bias"]).relu() @ p["head.weight"].T + p["head.bias"]
    return (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean()


def first_order(w, data, alpha, _delta):
    (first, second) = data
    return gradient(add(w, gradient(w, *first), -alpha), *second)


def hessian_free(w, data, alpha, delta):
    (first, second, third) = data
    v = gradient(add(w, gradient(w, *first), -alpha), *second)
    ahead, behind = (gradient(add(w, v, by), *third) for by in (delta, -delta))
    return {k: v[k] - alpha * (ahead[k] - behind[k]) / (2 * delta) for k in v}


def exact(w, data, alpha, _delta=None, *, nll=oracle.nll):
    """(I - alpha Hessian) v, where the Hessian is the third batch's."""
    (first, second, third) = data
    v = gradient(add(w, gradient(w, *first, nll=nll), -alpha), *second, nll=nll)
    q = {k: t.clone().requires_grad_() for k, t in w.items()}
    g = torch.autograd.grad(nll(q, *third), list(q.values()), create_graph=True)
    product = torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, v.values(), strict=True)), list(q.values()))
    return {k: v[k] - alpha * h for k, h in zip(v, product, strict=True)}


VARIANTS = {"fo": (first_order, 2), "hf": (hessian_free, 3), "exact": (exact, 3)}


def meta_train(w, x, y, variant, alpha, delta, *, lr, momentum=0.0, weight_decay=0.0, epochs=2):
    step, size = VARIANTS[variant]
    batches = oracle.batches(len(y), 3) * epochs
    speed = {k: torch.zeros_like(t) for k, t in w.items()}
    for i in range(0, len(batches) - size + 1, size):
        by = step(w, [(x[b], y[b]) for b in batches[i : i + size]], alpha, delta)
        speed = {k: momentum * speed[k] + by[k] + weight_decay * w[k] for k in w}
        w = {k: w[k] - lr * speed[k] for k in w}
    return w


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_rounds_descend_the_loss_after_adaptation_and_are_tested_after_adaptation(turns, variant):
    settings, chosen = turns
    # A delta this large shows in the result: the steps of hf and exact differ by more than the tolerance.
    record = toy.run("per-fedavg", {"variant": variant, "alpha": 0.3, "delta": 0.2}, **settings, **toy.FULL)

    data = oracle.arrays()
    server = toy.initial()
    tested, right = [], []
    for r in range(2):
        sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
        uploads = [meta_train(server, *data[i][:2], variant, 0.3, 0.2, **sgd) for i in chosen[r]]
        server = oracle.mean(uploads, [1.0] * len(uploads))  # equal weights, though the clients have 7 and 4 samples
        tested.append([add(server, gradient(server, x, y), -0.3) for x, y, _, _ in data])
        right.append(sum(int((oracle.logits(server, x).argmax(1) == y).sum()) for _, _, x, y in data))

    oracle.close(record.server["model"], server)
    assert [record.client_states[i]["model"] for i in range(2)] == [{}, {}]
    toy.check_tested(record, tested)
    assert [row["global_accuracy"] for row in record.evaluations] == [k / 120 for k in right]


def step(variant, data, *, alpha, lr=0.1, delta=0.001, net=None):
    """One step of the method from the initial model, on batches of one size."""
    net = net or toy.net()
    x, y = (torch.cat([batch[k] for batch in data]) for k in (0, 1))
    method = registry.algorithm("per-fedavg")(variant=variant, alpha=alpha, delta=delta)
    client = toy.client(x, y, net=net, local_epochs=1, batch_size=len(data[0][1]), lr=lr)
    upload, _ = method.local_update(client, Message({"model": toy.initial(net)}), {"model": {}})
    assert client.counts.steps == 1
    return upload["model"]


def test_hessian_free_is_the_exact_step_but_for_an_error_of_the_order_of_delta_squared():
    x, y, _, _ = oracle.arrays((6,))[0]
    data = [(x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4)]
    w = add(toy.initial(), exact(toy.initial(), data, 0.5), -0.1)

    def error(delta):
        p = step("hf", data, alpha=0.5, delta=delta)
        return max(float((p[k] - w[k]).abs().max()) for k in p)

    assert error(0.001) < 1e-8
    assert error(0.1) > 1e-6
    assert error(0.1) / error(0.05) == pytest.approx(4, rel=0.05)
    oracle.close(step("exact", data, alpha=0.5), w)
    oracle.close(step("hf", data, alpha=0.5, delta=1e-4), step("exact", data, alpha=0.5))


@pytest.mark.parametrize("seed", range(3))
def test_on_a_network_of_relus_hessian_free_misses_the_product_at_the_default_delta_and_exact_does_not(seed):
    x, y, _, _ = oracle.arrays((6,), seed=seed)[0]
    data = [(x[i : i + 2], y[i : i + 2]) for i in (0, 2, 4)]
    net = toy.net(act=nn.ReLU, seed=seed)
    with torch.no_grad():  # a sample of the third batch is near the kinks of all units
        net.body[0].bias.sub_(net.body[0](x[4]) - 1e-6)
    start, alpha, lr = toy.initial(net), 0.5, 0.1
    right = add(start, exact(start, data, alpha, nll=relu_nll), -lr)
    oracle.close(step("exact", data, alpha=alpha, lr=lr, net=net), right)

    # The step along the first-order gradient is lr alpha H v away from the right one.
    v = gradient(add(start, gradient(start, *data[0], nll=relu_nll), -alpha), *data[1], nll=relu_nll)
    first = add(start, v, -lr)
    found = step("hf", data, alpha=alpha, lr=lr, net=net)

    def gap(p, q):
        return float(torch.cat([(p[k] - q[k]).flatten() for k in p]).norm())

    assert gap(found, right) > gap(first, right)


def test_the_slope_that_gives_the_product_is_no_loss_of_training():
    x, y, _, _ = oracle.arrays((6,))[0]
    client = toy.client(x, y, local_epochs=1, batch_size=2)
    method = registry.algorithm("per-fedavg")(variant="exact", alpha=0.5)
    method.local_update(client, Message({"model": toy.initial()}), {"model": {}})
    adapted = add(toy.initial(), gradient(toy.initial(), x[:2], y[:2]), -0.5)
    losses = oracle.nll(toy.initial(), x[:2], y[:2]), oracle.nll(adapted, x[2:4], y[2:4])
    assert (client.counts.steps, client.counts.samples) == (1, 4)
    assert client.counts.loss_sum == pytest.approx(2 * float(sum(losses)), rel=0, abs=1e-9)


def test_with_one_batch_three_times_the_step_is_the_gradient_of_the_loss_after_adaptation():
    x, y, _, _ = oracle.arrays((3,))[0]
    w = {k: t.clone().requires_grad_() for k, t in toy.initial().items()}
    g = torch.autograd.grad(oracle.nll(w, x, y), list(w.values()), create_graph=True)
    after = oracle.nll({k: w[k] - 0.5 * h for k, h in zip(w, g, strict=True)}, x, y)
    meta = dict(zip(w, torch.autograd.grad(after, list(w.values())), strict=True))

    p = step("hf", [(x, y)] * 3, alpha=0.5, delta=1e-4)
    oracle.close(p, add(toy.initial(), meta, -0.1))
    oracle.close(step("exact", [(x, y)] * 3, alpha=0.5), add(toy.initial(), meta, -0.1))
    # The first-order step is another one.
    p = step("fo", [(x, y)] * 2, alpha=0.5)
    assert max(float((p[k] - toy.initial()[k] + 0.1 * meta[k]).abs().max()) for k in p) > 1e-4


@pytest.mark.parametrize(("variant", "every"), [("fo", 2), ("hf", 3), ("exact", 3)])
def test_alpha_zero_is_sgd_on_the_second_batch_of_every_step(variant, every):
    record = toy.run("per-fedavg", {"variant": variant, "alpha": 0.0}, local_epochs=3, rounds=1)
    uploads = []
    for x, y, _, _ in oracle.arrays():
        batches = (oracle.batches(len(y), 3) * 3)[1::every][: len(oracle.batches(len(y), 3)) * 3 // every]
        uploads.append(oracle.descend(toy.initial(), batches, lambda q, b, x=x, y=y: oracle.nll(q, x[b], y[b]), lr=0.1))
    oracle.close(record.server["model"], oracle.mean(uploads, [1, 1]))
    # Without adaptation what is tested is the global model.
    assert [r["accuracy"] for r in record.evaluations] == [r["global_accuracy"] for r in record.evaluations]


def test_the_outer_step_starts_at_the_received_model_not_at_the_adapted_one():
    x, y, _, _ = oracle.arrays((6,))[0]
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    still = step("fo", data, alpha=0.7, lr=1e-12)
    oracle.close(still, toy.initial())


def test_beta_is_the_protocols_learning_rate():
    x, y, _, _ = oracle.arrays((6,))[0]
    data = [(x[:3], y[:3]), (x[3:], y[3:])]
    once, twice = (step("fo", data, alpha=0.7, lr=lr) for lr in (0.1, 0.2))
    w = toy.initial()
    oracle.close({k: twice[k] - w[k] for k in w}, {k: 2 * (once[k] - w[k]) for k in w})


def test_a_step_takes_its_batches_once():
    record = toy.run("per-fedavg", {"variant": "fo"}, federation=toy.federation((12, 12)), rounds=1)
    assert record.rounds[0]["steps"] == 2 * 2 * 4 // 2  # clients, epochs, batches; two batches a step
    for variant in ("hf", "exact"):
        record = toy.run("per-fedavg", {"variant": variant}, federation=toy.federation((9, 9)), rounds=1)
        assert record.rounds[0]["steps"] == 2 * 2 * 3 // 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_clients_with_a_single_batch_train_too(variant):
    record = toy.run("per-fedavg", {"variant": variant}, batch_size=50, local_epochs=1, rounds=1)
    assert record.rounds[0]["steps"] == 2
    assert all(not torch.equal(record.server["model"][k], t) for k, t in toy.initial().items())


def test_evaluation_leaves_nothing_behind_for_the_next_round():
    often = toy.run("per-fedavg", rounds=4, shuffle=True)
    once = toy.run("per-fedavg", rounds=4, shuffle=True, eval_every=4)
    assert oracle.same(often.server["model"], once.server["model"])
    assert often.evaluations[-1]["test_loss"] == once.evaluations[-1]["test_loss"]


def test_adaptation_leaves_the_last_incomplete_batch_out_as_training_does():
    x, y, _, _ = oracle.arrays()[0]
    start = toy.initial()
    client = toy.client(x, y, drop_last=True)
    deployed = registry.algorithm("per-fedavg")(alpha=0.3).personalise(client, Message({"model": start}), {"model": {}})
    oracle.close(deployed["model"], add(start, gradient(start, x[:6], y[:6]), -0.3))


def test_the_defaults():
    method = registry.algorithm("per-fedavg")()
    assert (method.variant, method.alpha, method.delta) == ("hf", 0.01, 0.001)


def test_batch_norm_statistics_are_the_last_gradients_and_stay_in_the_adaptation():
    def net():
        plain = toy.net()
        norm = nn.BatchNorm1d(3)
        norm.num_batches_tracked = None
        return pflbench.Net(nn.Sequential(plain.body[0], norm, nn.Tanh()), plain.head).double()

    x, y, _, _ = oracle.arrays((8,))[0]
    start = {k: t.clone() for k, t in net().state_dict().items()}
    method = registry.algorithm("per-fedavg")(variant="fo", alpha=0.5)
    client = toy.client(x, y, net=net(), local_epochs=1, batch_size=4)
    upload, _ = method.local_update(client, Message({"model": start}), {"model": {}})
    inner = toy.client(x[:4], y[:4], net=net(), local_epochs=1, batch_size=4, lr=0.5).sgd(start)
    h = x[4:] @ inner["body.0.weight"].T + inner["body.0.bias"]
    expected = {"mean": 0.1 * h.mean(0), "var": 0.9 + 0.1 * h.var(0)}
    tested = method.personalise(client, Message({"model": upload["model"]}), {"model": {}})["model"]
    for what, value in expected.items():
        torch.testing.assert_close(upload["model"][f"body.1.running_{what}"], value, rtol=0, atol=1e-9)
        assert torch.equal(tested[f"body.1.running_{what}"], upload["model"][f"body.1.running_{what}"])
    assert tested.keys() == start.keys()
    # The adaptation's gradient is that of the running statistics, not of the batch's: the evaluation mode.
    fixed = upload["model"]

    def tested_loss(p):
        h = x @ p["body.0.weight"].T + p["body.0.bias"] - fixed["body.1.running_mean"]
        h = h / (fixed["body.1.running_var"] + 1e-5).sqrt() * p["body.1.weight"] + p["body.1.bias"]
        return F.cross_entropy(h.tanh() @ p["head.weight"].T + p["head.bias"], y)

    names = tuple(name for name in fixed if "running" not in name)
    g = oracle.gradient(tested_loss, fixed, names)
    oracle.close({name: tested[name] for name in names}, {name: fixed[name] - 0.5 * g[name] for name in names})
    for variant in VARIANTS:
        toy.run("per-fedavg", {"variant": variant}, net=net(), federation=toy.federation((8, 4)), batch_size=4)


@pytest.mark.parametrize(("variant", "in_fp32"), [("hf", 2), ("exact", 1)])
def test_the_product_with_the_hessian_is_not_rounded_to_bf16(monkeypatch, variant, in_fp32):
    precisions = []
    cross_entropy = F.cross_entropy

    def noted(logits, *args, **kwargs):
        precisions.append(logits.dtype)
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(F, "cross_entropy", noted)
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x.float(), y, replica=Replica(toy.net().float(), "bf16"), local_epochs=1)
    start = {k: t.float() for k, t in toy.initial().items()}
    method = registry.algorithm("per-fedavg")(variant=variant)
    method.local_update(client, Message({"model": start}), {"model": {}})
    assert precisions == [torch.bfloat16] * 2 + [torch.float32] * in_fp32
