import math

import numpy as np
import oracle
import pytest
import torch
import toy
from facts import Facts
from torch import nn

import pflbench
from pflbench import Message
from pflbench.core import Client, registry
from pflbench.rng import rng

FACTS = Facts(draws=True)

LAST = {1: ("head.weight", "head.bias"), 2: ("body.0.weight", "body.0.bias", "head.weight", "head.bias")}


def drawn(n, share, r, i, seed=0):
    """The numbers of the samples that client i uses in round r for its weights."""
    return sorted(rng(seed, "parts", "weights", r, i).permutation(n)[: math.ceil(share * n)].tolist())


def mixed(received, own, weights):
    return {k: own[k] + (t - own[k]) * weights[k] if k in weights else t for k, t in received.items()}


def ala(received, own, weights, x, y, eta, names):
    """The paper's local aggregation on the drawn samples: the weights after training, and how many epochs it took."""
    first = not weights
    if first:
        weights = {k: torch.ones_like(own[k]) for k in names}
    losses = []
    while True:
        for b in oracle.batches(len(y), 3):
            g = oracle.gradient(lambda w, b=b: oracle.nll(mixed(received, own, w), x[b], y[b]), weights, tuple(names))
            weights = {k: torch.clamp(weights[k] - eta * g[k], 0, 1) for k in names}
        losses.append(float(oracle.nll(mixed(received, own, weights), x, y)))
        settled = len(losses) > 10 and np.std(losses[-10:]) < 0.1
        if not first or settled or len(losses) == 100:
            return weights, len(losses)


def fedala(chosen, eta=1.0, share=0.8, layers=1, **sgd):
    """The server's model, the clients' models and weights after each round of two epochs."""
    server, own, weights = toy.initial(), [toy.initial()] * 2, [{}, {}]
    for r, taking_part in enumerate(chosen):
        models, sizes = [], []
        for i in taking_part:
            x, y, _, _ = oracle.arrays()[i]
            start = server
            if not oracle.same(server, own[i]):
                part = drawn(len(y), share, r + 1, i)
                weights[i], _ = ala(server, own[i], weights[i], x[part], y[part], eta, LAST[layers])
                start = mixed(server, own[i], weights[i])
            own[i] = oracle.train(start, x, y, 2, lr=0.1 * 0.5**r, **sgd)
            models.append(own[i])
            sizes.append(len(y))
        server = oracle.mean(models, sizes)
        yield server, list(own), list(weights)


@pytest.mark.parametrize("hyper", [{}, {"eta": 10.0, "share": 0.5}, {"layers": 2}], ids=["default", "fast", "all"])
def test_four_rounds_learn_weights_mix_train_and_average_by_samples(turns, hyper):
    settings, chosen = turns
    chosen = [*chosen, *(pflbench.participants(toy.spec("local", **settings), r) for r in (3, 4))]
    record = toy.run("fedala", hyper, **{**settings, "rounds": 4}, **toy.FULL)
    rounds = list(fedala(chosen, **hyper, momentum=0.5, weight_decay=0.02))
    server, own, weights = rounds[-1]
    oracle.close(record.server["model"], server)
    for i in range(2):
        oracle.close(record.client_states[i]["model"], own[i])
        oracle.close(record.client_states[i]["weights"], weights[i])
    toy.check_tested(record, [models for _, models, _ in rounds])


def test_the_oracles_weights_are_0_and_1_and_between():
    *_, (_, _, weights) = fedala([[0, 1]] * 4, eta=10.0)
    every = torch.cat([t.flatten() for each in weights for t in each.values()])
    assert {0.0, 1.0} <= set(every.tolist())
    assert ((every > 0) & (every < 1)).any()


def models():
    """A received model and a client's own."""
    return {k: t + 0.4 * torch.cos(7 * t) for k, t in toy.initial().items()}, toy.initial()


def test_only_the_last_layers_are_mixed_and_the_others_are_the_received_ones_bit_by_bit():
    x, y, _, _ = oracle.arrays()[0]
    received, own = models()
    start, weights = registry.algorithm("fedala")(eta=30.0).mix(toy.client(x, y), received, own, {})
    assert oracle.same(oracle.body(start), oracle.body(received))
    assert weights.keys() == oracle.head(own).keys()
    oracle.close(oracle.head(start), {k: own[k] + (received[k] - own[k]) * w for k, w in weights.items()})
    assert not oracle.same(oracle.head(start), oracle.head(received))


def test_more_layers_than_there_are_mix_them_all():
    x, y, _, _ = oracle.arrays()[0]
    two, many = (registry.algorithm("fedala")(layers=n).mix(toy.client(x, y), *models(), {}) for n in (2, 9))
    assert oracle.same(two[0], many[0])
    assert many[1].keys() == toy.initial().keys()


def test_the_last_layers_are_the_networks_and_not_the_alphabets_also_if_the_model_was_on_disk(tmp_path):
    net = pflbench.Net(nn.Sequential(*(nn.Linear(3, 3) for _ in range(11))), nn.Linear(3, 3)).double()
    spec = toy.spec("fedala", {"layers": 2})
    memory, disk = (pflbench.run(spec, toy.federation(), net, executor="serial", out=o) for o in (None, tmp_path))
    for record in (memory, disk):
        weights = record.client_states[0]["weights"]
        assert set(weights) == {"body.10.weight", "body.10.bias", "head.weight", "head.bias"}
    assert memory.fingerprints == disk.fingerprints


def test_mixing_lowers_the_loss_of_the_received_model():
    x, y, _, _ = oracle.arrays()[0]
    received, own = models()
    start, _ = registry.algorithm("fedala")(share=1.0).mix(toy.client(x, y), received, own, {})
    assert oracle.nll(start, x, y) < 0.95 * oracle.nll(received, x, y)


def test_weights_are_trained_for_several_epochs_the_first_time_and_for_one_later():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("fedala")()
    client = toy.client(x, y)
    _, weights = method.mix(client, *models(), {})
    assert client.counts.steps == 11 * 2  # of 6 samples, in batches of 3
    client = toy.client(x, y, round=2)
    method.mix(client, *models(), weights)
    assert client.counts.steps == 2


def first_steps(monkeypatch, losses):
    """The steps of the first training of the weights, where these are its losses."""
    left = iter(losses)
    monkeypatch.setattr(Client, "loss", lambda self, model: next(left))
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y)
    registry.algorithm("fedala")().mix(client, *models(), {})
    return client.counts.steps


def test_the_first_training_of_the_weights_ends_though_they_never_converge(monkeypatch):
    losses = map(float, range(1000))
    assert first_steps(monkeypatch, losses) == 100 * 2


def test_the_first_training_of_the_weights_goes_on_until_ten_losses_are_close_to_each_other(monkeypatch):
    losses = [9.0 - i for i in range(6)] + [3.0] * 50  # the last six, 9 to 4, are out of sight after 16 epochs
    assert first_steps(monkeypatch, losses) == 16 * 2


def test_the_losses_that_converge_are_the_mixtures_over_the_share(monkeypatch):
    seen = []
    monkeypatch.setattr(Client, "loss", lambda self, model: seen.append((self.n, model)) or 0.0)
    x, y, _, _ = oracle.arrays()[0]
    start, _ = registry.algorithm("fedala")().mix(toy.client(x, y), *models(), {})
    assert {n for n, _ in seen} == {6}
    assert oracle.same(seen[-1][1], start)


def test_the_standard_deviation_of_ten_losses_divides_by_ten(monkeypatch):
    losses = [0.097, -0.097] * 50  # 0.102, were it by nine
    assert first_steps(monkeypatch, losses) == 11 * 2


@pytest.mark.parametrize("same", [("head.weight", "head.bias"), ("body.0.bias",)], ids=["head", "a-bias"])
def test_a_received_model_that_is_the_clients_own_in_part_is_mixed(same):
    x, y, _, _ = oracle.arrays()[0]
    received, own = models()
    client = toy.client(x, y)
    _, weights = registry.algorithm("fedala")(layers=2).mix(
        client, {k: own[k] if k in same else t for k, t in received.items()}, own, {}
    )
    assert set(weights) == set(LAST[2])
    assert client.counts.steps > 0


def test_the_loss_in_the_record_is_that_of_the_training_alone():
    record = toy.run("fedala", rounds=2)
    server, own, _ = next(fedala([[0, 1]]))
    total = 0.0
    for i, (x, y, _, _) in enumerate(oracle.arrays()):
        part = drawn(len(y), 0.8, 2, i)
        p = mixed(server, own[i], ala(server, own[i], {}, x[part], y[part], 1.0, LAST[1])[0])
        for batch in oracle.batches(len(y), 3) * 2:
            total += float(oracle.nll(p, x[batch], y[batch])) * len(batch)
            p = oracle.descend(p, [batch], lambda q, b, x=x, y=y: oracle.nll(q, x[b], y[b]), lr=0.1)
    assert record.rounds[1]["train_loss"] == pytest.approx(total / 22, rel=0, abs=1e-9)


def test_without_a_learning_rate_it_is_fedavg():
    a, b = toy.run("fedala", {"eta": 1e-30}, rounds=4, shuffle=True), toy.run("fedavg", rounds=4, shuffle=True)
    oracle.close(a.server["model"], b.server["model"])


def test_the_first_round_is_fedavg_and_leaves_the_weights_untrained():
    a, b = toy.run("fedala", rounds=1, shuffle=True), toy.run("fedavg", rounds=1, shuffle=True)
    assert oracle.same(a.server["model"], b.server["model"])
    assert [a.client_states[i]["weights"] for i in range(2)] == [{}, {}]
    assert a.rounds[0]["steps"] == b.rounds[0]["steps"]


def test_a_client_alone_is_fedavg_bit_by_bit_as_it_receives_its_own_model():
    settings = {"federation": toy.federation((7,)), "rounds": 4, "shuffle": True}
    a, b = toy.run("fedala", **settings), toy.run("fedavg", **settings)
    assert oracle.same(a.server["model"], b.server["model"])
    assert a.client_states[0]["weights"] == {}


def test_evaluation_trains_nothing_and_who_does_not_take_part_learns_no_weights():
    settings, chosen = toy.TURNS[1]
    assert chosen == [[0], [1]]
    one, two = (toy.run("fedala", **{**settings, "rounds": r}) for r in (1, 2))
    assert oracle.same(one.client_states[1]["model"], toy.initial())
    assert oracle.same(two.client_states[0]["model"], one.client_states[0]["model"])
    assert [two.client_states[i]["weights"].keys() for i in range(2)] == [set(), set(oracle.HEAD)]
    method, state = registry.algorithm("fedala")(), {"model": models()[1], "weights": {}}
    tested = method.personalise(None, Message({"model": models()[0]}), state)["model"]  # no client to train with
    assert oracle.same(tested, state["model"])


def test_models_and_weights_stay_with_their_clients_in_worker_processes():
    settings = {"rounds": 3, "shuffle": True}
    a, b = toy.run("fedala", **settings), toy.run("fedala", executor="processes", workers=2, **settings)
    for i in range(2):
        for part in ("model", "weights"):
            assert oracle.same(a.client_states[i][part], b.client_states[i][part])
    assert not oracle.same(a.client_states[0]["weights"], a.client_states[1]["weights"])


def test_the_buffers_of_batch_norm_are_the_received_ones_and_have_no_weights():
    net = toy.batch_norm()
    own = {k: t.clone() for k, t in net.state_dict().items() if t.is_floating_point()}
    received = {k: t + 0.3 for k, t in own.items()}
    x, y, _, _ = oracle.arrays((8,))[0]
    client = toy.client(x, y, net=net, batch_size=4)
    start, weights = registry.algorithm("fedala")(layers=2, share=1.0).mix(client, received, own, {})
    assert weights.keys() == {"body.1.weight", "body.1.bias", "head.weight", "head.bias"}
    for name in own.keys() - weights.keys():
        assert torch.equal(start[name], received[name])
    settings = {"federation": toy.federation((8, 4)), "net": net, "batch_size": 4, "rounds": 3}
    record = toy.run("fedala", {"layers": 2, "share": 1.0}, **settings)
    assert record.status == "finished"
    oracle.close(record.server["model"], oracle.mean([record.client_states[i]["model"] for i in range(2)], [8, 4]))


@pytest.mark.parametrize("hyper", [{"eta": 0.5}, {"share": 0.5}, {"layers": 2}])
def test_every_hyperparameter_changes_the_result(hyper):
    a, b = toy.run("fedala", hyper), toy.run("fedala")
    assert not oracle.same(a.server["model"], b.server["model"])


def test_the_defaults_are_the_authors():
    h = registry.algorithm("fedala")()
    assert (h.eta, h.share, h.layers) == (1.0, 0.8, 1)


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_training_of_the_weights_drops_no_batch_whatever_the_protocol_says(drop_last):
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y, drop_last=drop_last, batch_size=4)
    _, weights = registry.algorithm("fedala")(eta=10.0).mix(client, *models(), {})
    part = drawn(7, 0.8, 1, 0)
    received, own = models()
    expected = {k: torch.ones_like(own[k]) for k in LAST[1]}
    for _ in range(client.counts.steps // 2):  # two batches an epoch, of 4 and 2 samples
        for b in oracle.batches(6, 4):
            rows = [part[i] for i in b]
            g = oracle.gradient(
                lambda w, rows=rows: oracle.nll(mixed(received, own, w), x[rows], y[rows]), expected, LAST[1]
            )
            expected = {k: torch.clamp(expected[k] - 10.0 * g[k], 0, 1) for k in LAST[1]}
    assert client.counts.steps % 2 == 0
    oracle.close(weights, expected)


def test_the_training_after_the_mixing_drops_the_last_batch_where_the_protocol_says_so():
    x, y, _, _ = oracle.arrays()[0]
    received, own = models()
    client = toy.client(x, y, drop_last=True)
    method = registry.algorithm("fedala")(share=1.0)
    message, state = method.local_update(client, Message({"model": received}), {"model": own, "weights": {}})
    weights, epochs = ala(received, own, {}, x, y, 1.0, LAST[1])
    oracle.close(state["weights"], weights)
    oracle.close(message["model"], oracle.train(mixed(received, own, weights), x[:6], y[:6], 2, lr=0.1))
    assert client.counts.steps == epochs * 3 + 2 * 2  # of 7 samples in batches of 3, and of 6
