import oracle
import pytest
import torch
import toy
from facts import Facts
from torch import nn

import pflbench
from pflbench import UsageError
from pflbench.core import registry
from pflbench.core.models import build_model

FACTS = Facts(norm=True)

SUFFIXES = ("weight", "bias", "running_mean", "running_var")
NORM = tuple(f"body.2.{s}" for s in SUFFIXES)
LINEAR = ("body.0.weight", "body.0.bias", "head.weight", "head.bias")


# The oracle: BatchNorm over all features of all samples of a batch, which are one channel.


def normalise(z, p, mean, var):
    return (z - mean) / torch.sqrt(var + 1e-5) * p["body.2.weight"] + p["body.2.bias"]


def nll(p, x, y, mean=None, var=None):
    z = x @ p["body.0.weight"].T + p["body.0.bias"]
    mean, var = (z.mean(), z.var(unbiased=False)) if mean is None else (mean, var)
    z = torch.tanh(normalise(z, p, mean, var)) @ p["head.weight"].T + p["head.bias"]
    return (torch.logsumexp(z, 1) - z[torch.arange(len(y)), y]).mean(), z


def train(p, x, y, epochs, *, lr, momentum, weight_decay):
    """SGD with BatchNorm in training mode; the running statistics move by a tenth of the way."""
    names = tuple(k for k in p if "running" not in k)
    v = dict.fromkeys(names, 0.0)
    for b in oracle.batches(len(y), 3) * epochs:
        g = oracle.gradient(lambda q, b=b: nll(q, x[b], y[b])[0], p, names)
        v = {k: momentum * v[k] + g[k] + weight_decay * p[k] for k in names}
        z = x[b] @ p["body.0.weight"].T + p["body.0.bias"]
        p = {
            **{k: p[k] - lr * v[k] for k in names},
            "body.2.running_mean": 0.9 * p["body.2.running_mean"] + 0.1 * z.mean(),
            "body.2.running_var": 0.9 * p["body.2.running_var"] + 0.1 * z.var(),
        }
    return p


def part(p, names):
    return {k: p[k] for k in names}


def test_two_rounds_average_what_is_not_batch_norm_with_equal_weights_and_keep_batch_norm(turns):
    settings, chosen = turns
    record = toy.run("fedbn", **settings, **toy.FULL)

    initial = toy.initial(toy.net(norm=True))
    server, own = part(initial, LINEAR), [part(initial, NORM)] * 2
    for r in range(2):
        uploads = []
        for i in chosen[r]:
            x, y, _, _ = oracle.arrays()[i]
            p = train({**server, **own[i]}, x, y, 2, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02)
            uploads.append(part(p, LINEAR))
            own[i] = part(p, NORM)
        server = oracle.mean(uploads, [1] * len(uploads))
        loss, right = 0.0, []
        for i, (_, _, x, y) in enumerate(oracle.arrays()):
            p = {**server, **own[i]}
            mean, out = nll(p, x, y, p["body.2.running_mean"], p["body.2.running_var"])
            loss += float(mean) / 2
            right.append(int((out.argmax(1) == y).sum()) / len(y))
        assert record.evaluations[r]["test_loss"] == pytest.approx(loss, abs=1e-9)
        assert [c["accuracy"] for c in record.clients if c["round"] == r + 1] == right

    oracle.close(record.server["model"], server)
    for i in range(2):
        oracle.close(record.client_states[i]["model"], own[i])


def _personal(net):
    params = {k: t for k, t in net.state_dict().items() if t.is_floating_point()}
    method = registry.algorithm("fedbn")()
    own, shared = method.personal(params), method.shared(params)
    assert own.keys() | shared.keys() == params.keys()
    assert not own.keys() & shared.keys()
    return set(own)


def test_batch_norm_is_found_in_any_network_and_nothing_else():
    cnn = build_model("cnn", (1, 16, 16), 3, norm="batch")
    assert _personal(cnn) == {f"body.{i}.{s}" for i in (1, 5) for s in SUFFIXES}
    layers = {n for n, m in build_model("resnet18", (3, 32, 32), 3).named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert len(layers) == 20
    assert _personal(build_model("resnet18", (3, 32, 32), 3)) == {f"{n}.{s}" for n in layers for s in SUFFIXES}
    # Without parameters of its own; beside a layer that is no BatchNorm; a name that begins alike.
    body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), nn.GroupNorm(1, 3))
    body.add_module("10", nn.Linear(3, 3))
    assert _personal(pflbench.Net(body, nn.Linear(3, 3))) == {"body.1.running_mean", "body.1.running_var"}


@pytest.mark.parametrize("net", [toy.net(norm=True), toy.batch_norm()], ids=["one-channel", "channels"])
def test_personal_and_shared_are_complementary_and_a_batch_norms_weight_is_personal(net):
    method, model = registry.algorithm("fedbn")(), toy.initial(net)
    personal, shared = method.personal(model), method.shared(model)
    assert personal.keys().isdisjoint(shared)
    assert oracle.same({**personal, **shared}, model)
    (norm,) = (name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm1d))
    assert personal.keys() == {f"{norm}.{suffix}" for suffix in SUFFIXES}
    assert shared.keys() == set(LINEAR)
    setup = toy.setup(net)
    assert oracle.same(method.init_client(setup)["model"], personal)
    assert oracle.same(method.init_server(setup)["model"], shared)


def test_the_check_refuses_a_network_without_batch_norm():
    method = registry.algorithm("fedbn")()
    group_norm = pflbench.Net(nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3)), nn.Linear(3, 3))
    for net in (toy.net(), group_norm):
        with pytest.raises(UsageError, match=r"fedbn: the model has no BatchNorm; use --model resnet18"):
            method.check(toy.setup(net))
    method.check(toy.setup(toy.batch_norm()))


@pytest.mark.parametrize("model", [{"model": "cnn"}, {"model": "mlp"}, {"model": "resnet18", "norm": "group"}])
def test_a_network_without_batch_norm_is_refused_with_the_models_that_have_one_and_nothing_is_written(tmp_path, model):
    spec = pflbench.RunSpec(
        algo="fedbn", dataset="synthetic10", clients=2, join_ratio=0.5, rounds=1, local_epochs=1, **model
    )
    with pytest.raises(UsageError, match=r"fedbn: .*--model resnet18, or --model cnn --norm batch"):
        pflbench.run(spec, executor="serial", out=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_short_run_of_the_cnn_with_batch_norm_keeps_it_on_the_clients():
    settings = {"dataset": "synthetic10", "clients": 4, "join_ratio": 0.5, "rounds": 1, "local_epochs": 1}
    record = pflbench.run(pflbench.RunSpec(algo="fedbn", model="cnn", norm="batch", **settings), executor="serial")
    assert record.status == "finished"
    assert not any("running" in name for name in record.server["model"])
    (a, b) = (record.client_states[c]["model"] for c in record.rounds[0]["participants"])
    assert a.keys() == b.keys() == {f"body.{i}.{s}" for i in (1, 5) for s in SUFFIXES}
    assert not any(torch.equal(a[k], b[k]) for k in a)


def test_clients_of_unequal_size_have_equal_weights():
    record = toy.run("fedbn", federation=toy.federation((12, 2)), rounds=1, local_epochs=1)
    sgd = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    initial = toy.initial(toy.net(norm=True))
    uploads = [part(train(initial, x, y, 1, **sgd), LINEAR) for x, y, _, _ in oracle.arrays((12, 2))]
    oracle.close(record.server["model"], oracle.mean(uploads, [1, 1]))


def test_one_client_is_fedavg_with_one_client():
    kw = {"federation": toy.federation((7,)), "net": toy.net(norm=True), "shuffle": True, "rounds": 3, **toy.FULL}
    fedbn, fedavg = (toy.run(name, **kw) for name in ("fedbn", "fedavg"))
    assert oracle.same({**fedbn.server["model"], **fedbn.client_states[0]["model"]}, fedavg.server["model"])
    assert [r["test_loss"] for r in fedbn.evaluations] == [r["test_loss"] for r in fedavg.evaluations]


def test_in_the_first_round_it_is_fedavg_but_for_batch_norm_where_clients_are_of_equal_size():
    kw = {"federation": toy.federation((6, 6)), "net": toy.net(norm=True), "rounds": 1}
    fedbn, fedavg, local = (toy.run(name, **kw) for name in ("fedbn", "fedavg", "local"))
    oracle.close(fedbn.server["model"], part(fedavg.server["model"], LINEAR))
    for i in range(2):
        assert oracle.same(fedbn.client_states[i]["model"], part(local.client_states[i]["model"], NORM))


def test_fedavgs_batch_norm_is_averaged_so_that_it_is_not_fedbn():
    kw = {"federation": toy.federation((6, 6)), "net": toy.net(norm=True)}
    fedbn, fedavg = (toy.run(name, **kw) for name in ("fedbn", "fedavg"))
    assert fedavg.server["model"].keys() - fedbn.server["model"].keys() == set(NORM)
    assert fedbn.evaluations[-1]["test_loss"] != fedavg.evaluations[-1]["test_loss"]
    assert [r["global_accuracy"] for r in fedbn.evaluations] == [None, None]
