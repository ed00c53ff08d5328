import math

import numpy as np
import pytest
import torch
from torch import nn

import pflbench
from pflbench import Message
from pflbench.core import registry
from pflbench.core.client import Local
from pflbench.rng import rng

LAST = {1: ("head.weight", "head.bias"), 2: ("body.0.weight", "body.0.bias", "head.weight", "head.bias")}


def drawn(n, share, r, i, seed=0):
    """The numbers of the samples that client i uses in round r for its weights."""
    return sorted(rng(seed, "parts", "weights", r, i).permutation(n)[: math.ceil(share * n)].tolist())


def mixed(received, own, weights):
    return {k: own[k] + (t - own[k]) * weights[k] if k in weights else t for k, t in received.items()}


def ala(toy, received, own, weights, x, y, eta, names):
    """The paper's local aggregation on the drawn samples: the weights after training, and how many epochs it took."""
    first = not weights
    if first:
        weights = {k: torch.ones_like(own[k]) for k in names}
    losses = []
    while True:
        for b in toy.batches(len(y), 3):
            g = toy.gradient(lambda w, b=b: toy.nll(mixed(received, own, w), x[b], y[b]), weights, tuple(names))
            weights = {k: torch.clamp(weights[k] - eta * g[k], 0, 1) for k in names}
        losses.append(float(toy.nll(mixed(received, own, weights), x, y)))
        settled = len(losses) > 10 and np.std(losses[-10:]) < 0.1
        if not first or settled or len(losses) == 100:
            return weights, len(losses)


def fedala(toy, chosen, eta=1.0, share=0.8, layers=1, **sgd):
    """The server's model, the clients' models and weights after each round of two epochs."""
    server, own, weights = toy.initial(), [toy.initial()] * 2, [{}, {}]
    for r, taking_part in enumerate(chosen):
        models, sizes = [], []
        for i in taking_part:
            x, y, _, _ = toy.arrays()[i]
            start = server
            if not toy.same(server, own[i]):
                part = drawn(len(y), share, r + 1, i)
                weights[i], _ = ala(toy, server, own[i], weights[i], x[part], y[part], eta, LAST[layers])
                start = mixed(server, own[i], weights[i])
            own[i] = toy.train(start, x, y, 2, lr=0.1 * 0.5**r, **sgd)
            models.append(own[i])
            sizes.append(len(y))
        server = toy.mean(models, sizes)
        yield server, list(own), list(weights)


@pytest.mark.parametrize("hyper", [{}, {"eta": 10.0, "share": 0.5}, {"layers": 2}], ids=["default", "fast", "all"])
def test_four_rounds_learn_weights_mix_train_and_average_by_samples(toy, turns, hyper):
    settings, chosen = turns
    chosen = [*chosen, *(pflbench.participants(toy.spec("local", **settings), r) for r in (3, 4))]
    record = toy.run("fedala", hyper, **{**settings, "rounds": 4}, **toy.FULL)
    rounds = list(fedala(toy, chosen, **hyper, momentum=0.5, weight_decay=0.02))
    server, own, weights = rounds[-1]
    toy.close(record.server["model"], server)
    for i in range(2):
        toy.close(record.client_states[i]["model"], own[i])
        toy.close(record.client_states[i]["weights"], weights[i])
    toy.check_tested(record, [models for _, models, _ in rounds])


def test_the_oracles_weights_are_0_and_1_and_between(toy):
    *_, (_, _, weights) = fedala(toy, [[0, 1]] * 4, eta=10.0)
    every = torch.cat([t.flatten() for each in weights for t in each.values()])
    assert {0.0, 1.0} <= set(every.tolist())
    assert ((every > 0) & (every < 1)).any()


def models(toy):
    """A received model and a client's own."""
    return {k: t + 0.4 * torch.cos(7 * t) for k, t in toy.initial().items()}, toy.initial()


def test_only_the_last_layers_are_mixed_and_the_others_are_the_received_ones_bit_by_bit(toy):
    x, y, _, _ = toy.arrays()[0]
    received, own = models(toy)
    start, weights = registry.algorithm("fedala")(eta=30.0).mix(toy.local(x, y), received, own, {})
    assert toy.same(toy.body(start), toy.body(received))
    assert weights.keys() == toy.head(own).keys()
    toy.close(toy.head(start), {k: own[k] + (received[k] - own[k]) * w for k, w in weights.items()})
    assert not toy.same(toy.head(start), toy.head(received))


def test_more_layers_than_there_are_mix_them_all(toy):
    x, y, _, _ = toy.arrays()[0]
    two, many = (registry.algorithm("fedala")(layers=n).mix(toy.local(x, y), *models(toy), {}) for n in (2, 9))
    assert toy.same(two[0], many[0])
    assert many[1].keys() == toy.initial().keys()


def test_the_last_layers_are_the_networks_and_not_the_alphabets_also_if_the_model_was_on_disk(toy, tmp_path):
    net = pflbench.Net(nn.Sequential(*(nn.Linear(3, 3) for _ in range(11))), nn.Linear(3, 3)).double()
    spec = toy.spec("fedala", {"layers": 2})
    memory, disk = (pflbench.run(spec, toy.federation(), net, executor="serial", out=o) for o in (None, tmp_path))
    for record in (memory, disk):
        weights = record.client_states[0]["weights"]
        assert set(weights) == {"body.10.weight", "body.10.bias", "head.weight", "head.bias"}
    assert memory.fingerprints == disk.fingerprints


def test_mixing_lowers_the_loss_of_the_received_model(toy):
    x, y, _, _ = toy.arrays()[0]
    received, own = models(toy)
    start, _ = registry.algorithm("fedala")(share=1.0).mix(toy.local(x, y), received, own, {})
    assert toy.nll(start, x, y) < 0.95 * toy.nll(received, x, y)


def test_weights_are_trained_for_several_epochs_the_first_time_and_for_one_later(toy):
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("fedala")()
    local = toy.local(x, y)
    _, weights = method.mix(local, *models(toy), {})
    assert local.counts.steps == 11 * 2  # of 6 samples, in batches of 3
    local = toy.local(x, y, round=2)
    method.mix(local, *models(toy), weights)
    assert local.counts.steps == 2


def first_steps(toy, monkeypatch, losses):
    """The steps of the first training of the weights, where these are its losses."""
    left = iter(losses)
    monkeypatch.setattr(Local, "loss", lambda self, model: next(left))
    x, y, _, _ = toy.arrays()[0]
    local = toy.local(x, y)
    registry.algorithm("fedala")().mix(local, *models(toy), {})
    return local.counts.steps


def test_the_first_training_of_the_weights_ends_though_they_never_converge(toy, monkeypatch):
    losses = map(float, range(1000))
    assert first_steps(toy, monkeypatch, losses) == 100 * 2


def test_the_first_training_of_the_weights_goes_on_until_ten_losses_are_close_to_each_other(toy, monkeypatch):
    losses = [9.0 - i for i in range(6)] + [3.0] * 50  # the last six, 9 to 4, are out of sight after 16 epochs
    assert first_steps(toy, monkeypatch, losses) == 16 * 2


def test_the_losses_that_converge_are_the_mixtures_over_the_share(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(Local, "loss", lambda self, model: seen.append((self.n, model)) or 0.0)
    x, y, _, _ = toy.arrays()[0]
    start, _ = registry.algorithm("fedala")().mix(toy.local(x, y), *models(toy), {})
    assert {n for n, _ in seen} == {6}
    assert toy.same(seen[-1][1], start)


def test_the_standard_deviation_of_ten_losses_divides_by_ten(toy, monkeypatch):
    losses = [0.097, -0.097] * 50  # 0.102, were it by nine
    assert first_steps(toy, monkeypatch, losses) == 11 * 2


@pytest.mark.parametrize("same", [("head.weight", "head.bias"), ("body.0.bias",)], ids=["head", "a-bias"])
def test_a_received_model_that_is_the_clients_own_in_part_is_mixed(toy, same):
    x, y, _, _ = toy.arrays()[0]
    received, own = models(toy)
    local = toy.local(x, y)
    _, weights = registry.algorithm("fedala")(layers=2).mix(
        local, {k: own[k] if k in same else t for k, t in received.items()}, own, {}
    )
    assert set(weights) == set(LAST[2])
    assert local.counts.steps > 0


def test_the_loss_in_the_record_is_that_of_the_training_alone(toy):
    record = toy.run("fedala", rounds=2)
    server, own, _ = next(fedala(toy, [[0, 1]]))
    total = 0.0
    for i, (x, y, _, _) in enumerate(toy.arrays()):
        part = drawn(len(y), 0.8, 2, i)
        p = mixed(server, own[i], ala(toy, server, own[i], {}, x[part], y[part], 1.0, LAST[1])[0])
        for batch in toy.batches(len(y), 3) * 2:
            total += float(toy.nll(p, x[batch], y[batch])) * len(batch)
            p = toy.descend(p, [batch], lambda q, b, x=x, y=y: toy.nll(q, x[b], y[b]), lr=0.1)
    assert record.rounds[1]["train_loss"] == pytest.approx(total / 22, rel=0, abs=1e-9)


def test_without_a_learning_rate_it_is_fedavg(toy):
    a, b = toy.run("fedala", {"eta": 1e-30}, rounds=4, shuffle=True), toy.run("fedavg", rounds=4, shuffle=True)
    toy.close(a.server["model"], b.server["model"])


def test_the_first_round_is_fedavg_and_leaves_the_weights_untrained(toy):
    a, b = toy.run("fedala", rounds=1, shuffle=True), toy.run("fedavg", rounds=1, shuffle=True)
    assert toy.same(a.server["model"], b.server["model"])
    assert [a.client_states[i]["weights"] for i in range(2)] == [{}, {}]
    assert a.rounds[0]["steps"] == b.rounds[0]["steps"]


def test_a_client_alone_is_fedavg_bit_by_bit_as_it_receives_its_own_model(toy):
    settings = {"federation": toy.federation((7,)), "rounds": 4, "shuffle": True}
    a, b = toy.run("fedala", **settings), toy.run("fedavg", **settings)
    assert toy.same(a.server["model"], b.server["model"])
    assert a.client_states[0]["weights"] == {}


def test_evaluation_trains_nothing_and_who_does_not_take_part_learns_no_weights(toy):
    settings, chosen = toy.TURNS[1]
    assert chosen == [[0], [1]]
    one, two = (toy.run("fedala", **{**settings, "rounds": r}) for r in (1, 2))
    assert toy.same(one.client_states[1]["model"], toy.initial())
    assert toy.same(two.client_states[0]["model"], one.client_states[0]["model"])
    assert [two.client_states[i]["weights"].keys() for i in range(2)] == [set(), set(toy.HEAD)]
    method, state = registry.algorithm("fedala")(), {"model": models(toy)[1], "weights": {}}
    tested = method.personalised(None, Message({"model": models(toy)[0]}), state)  # no toolbox to train with
    assert toy.same(tested, state["model"])


def test_models_and_weights_stay_with_their_clients_in_worker_processes(toy):
    settings = {"rounds": 3, "shuffle": True}
    a, b = toy.run("fedala", **settings), toy.run("fedala", executor="processes", workers=2, **settings)
    for i in range(2):
        for part in ("model", "weights"):
            assert toy.same(a.client_states[i][part], b.client_states[i][part])
    assert not toy.same(a.client_states[0]["weights"], a.client_states[1]["weights"])


def test_the_buffers_of_batch_norm_are_the_received_ones_and_have_no_weights(toy):
    net = toy.batch_norm()
    own = {k: t.clone() for k, t in net.state_dict().items() if t.is_floating_point()}
    received = {k: t + 0.3 for k, t in own.items()}
    x, y, _, _ = toy.arrays((8,))[0]
    local = toy.local(x, y, net=net, batch_size=4)
    start, weights = registry.algorithm("fedala")(layers=2, share=1.0).mix(local, received, own, {})
    assert weights.keys() == {"body.1.weight", "body.1.bias", "head.weight", "head.bias"}
    for name in own.keys() - weights.keys():
        assert torch.equal(start[name], received[name])
    settings = {"federation": toy.federation((8, 4)), "net": net, "batch_size": 4, "rounds": 3}
    record = toy.run("fedala", {"layers": 2, "share": 1.0}, **settings)
    assert record.status == "finished"
    toy.close(record.server["model"], toy.mean([record.client_states[i]["model"] for i in range(2)], [8, 4]))


@pytest.mark.parametrize("hyper", [{"eta": 0.5}, {"share": 0.5}, {"layers": 2}])
def test_every_hyperparameter_changes_the_result(toy, hyper):
    a, b = toy.run("fedala", hyper), toy.run("fedala")
    assert not toy.same(a.server["model"], b.server["model"])


def test_the_defaults_are_the_authors(toy):
    h = registry.algorithm("fedala")().h
    assert (h.eta, h.share, h.layers) == (1.0, 0.8, 1)
