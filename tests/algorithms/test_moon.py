import oracle
import pytest
import torch
import toy
from facts import Facts
from torch import nn

import pflbench
from pflbench import Message, UsageError
from pflbench.core import Batch, registry

FACTS = Facts()


def cosine(a, b):
    return (a * b).sum(1) / (a.square().sum(1).sqrt() * b.square().sum(1).sqrt())


def contrast(q, x, z_glob, z_prev, tau):
    """The mean over samples of -log(exp(sim_glob / tau) / (exp(sim_glob / tau) + exp(sim_prev / tau)))."""
    z = oracle.features(q, x)
    positive, negative = torch.exp(cosine(z, z_glob) / tau), torch.exp(cosine(z, z_prev) / tau)
    return -torch.log(positive / (positive + negative)).mean()


def moon(chosen, mu, tau, **sgd):
    """The server's model and the clients' previous models after each round of two epochs."""
    server, previous = toy.initial(), [toy.initial()] * 2
    for r, taking_part in enumerate(chosen):
        models, sizes = [], []
        for i in taking_part:
            x, y, _, _ = oracle.arrays()[i]
            z_glob, z_prev = oracle.features(server, x), oracle.features(previous[i], x)

            def loss(q, b, x=x, y=y, z_glob=z_glob, z_prev=z_prev):
                return oracle.nll(q, x[b], y[b]) + mu * contrast(q, x[b], z_glob[b], z_prev[b], tau)

            previous[i] = oracle.descend(server, oracle.batches(len(y), 3) * 2, loss, lr=0.1 * 0.5**r, **sgd)
            models.append(previous[i])
            sizes.append(len(y))
        server = oracle.mean(models, sizes)
        yield server, list(previous)


@pytest.mark.parametrize(("mu", "tau"), [(1.0, 0.5), (5.0, 0.2)])
def test_three_rounds_add_the_model_contrastive_loss_and_average_by_samples(turns, mu, tau):
    settings, chosen = turns
    chosen = [*chosen, pflbench.participants(toy.spec("local", **settings), 3)]
    record = toy.run("moon", {"mu": mu, "temperature": tau}, **{**settings, "rounds": 3}, **toy.FULL)
    rounds = list(moon(chosen, mu, tau, momentum=0.5, weight_decay=0.02))
    server, previous = rounds[-1]
    oracle.close(record.server["model"], server)
    for i in range(2):
        oracle.close(record.client_states[i]["previous"], previous[i])
    toy.check_tested(record, [[model, model] for model, _ in rounds])
    assert all(row["global_accuracy"] == row["accuracy"] for row in record.evaluations)


@pytest.mark.parametrize("turn", range(3))
def test_mu_0_is_fedavg_bit_by_bit(turn):
    settings = {**toy.TURNS[turn][0], **toy.FULL, "shuffle": True, "rounds": 3}
    a, b = toy.run("moon", {"mu": 0}, **settings), toy.run("fedavg", **settings)
    assert oracle.same(a.server["model"], b.server["model"])


def test_the_default_mu_and_temperature_are_the_authors_and_not_0():
    method = registry.algorithm("moon")()
    assert (method.mu, method.temperature) == (1.0, 0.5)


def test_the_first_round_is_fedavg_as_the_received_and_the_previous_model_are_the_initial_one():
    a, b = toy.run("moon", {"mu": 5.0}, rounds=1), toy.run("fedavg", rounds=1)
    oracle.close(a.server["model"], b.server["model"])
    a, b = toy.run("moon", {"mu": 5.0}, rounds=2), toy.run("fedavg", rounds=2)
    assert any((a.server["model"][k] - b.server["model"][k]).abs().max() > 1e-3 for k in toy.initial())


def test_a_client_alone_is_fedavg_as_the_received_model_is_its_previous_one():
    settings = {"federation": toy.federation((7,)), "rounds": 4, "shuffle": True}
    a, b = toy.run("moon", {"mu": 5.0}, **settings), toy.run("fedavg", **settings)
    oracle.close(a.server["model"], b.server["model"])


def test_the_loss_draws_features_to_the_received_models_and_away_from_the_previous_ones():
    x, y, _, _ = oracle.arrays()[0]
    previous = {k: -t + 0.3 for k, t in toy.initial().items()}

    def similarities(mu):
        method = registry.algorithm("moon")(mu=mu)
        client = toy.client(x, y, local_epochs=20)
        upload, _ = method.local_update(client, Message({"model": toy.initial()}), {"previous": previous})
        z = oracle.features(upload["model"], x)
        others = toy.initial(), previous
        return [float(cosine(z, oracle.features(other, x)).mean()) for other in others]

    (glob, prev), (strong_glob, strong_prev) = similarities(0.0), similarities(10.0)
    assert strong_glob > glob + 0.01
    assert strong_prev < prev - 0.01


def test_previous_models_stay_with_their_clients_in_worker_processes():
    settings = {"rounds": 3, "shuffle": True}
    a, b = toy.run("moon", **settings), toy.run("moon", executor="processes", workers=2, **settings)
    for i in range(2):
        assert oracle.same(a.client_states[i]["previous"], b.client_states[i]["previous"])
    assert not oracle.same(a.client_states[0]["previous"], a.client_states[1]["previous"])


def test_a_client_that_does_not_take_part_keeps_its_previous_model():
    settings, chosen = toy.TURNS[1]
    assert chosen == [[0], [1]]
    one, two = (toy.run("moon", **{**settings, "rounds": r}) for r in (1, 2))
    assert oracle.same(one.client_states[0]["previous"], two.client_states[0]["previous"])
    assert oracle.same(one.client_states[1]["previous"], toy.initial())


def test_the_two_fixed_features_are_taken_in_evaluation_mode():
    x, y, _, _ = oracle.arrays()[0]
    dropping = toy.dropping()
    client, seen = toy.client(x, y, net=dropping), {}
    sgd = client.sgd

    def watched(start, **kw):
        seen.update(kw)
        return sgd(start, **kw)

    client.sgd = watched
    previous = {k: t + 0.3 for k, t in toy.initial().items()}
    registry.algorithm("moon")().local_update(client, Message({"model": toy.initial()}), {"previous": previous})
    fixed = [oracle.features(model, x) for model in (toy.initial(), previous)]
    other = toy.net(seed=1)  # without dropout, so the fixed features alone could differ from the oracle's
    q, b = toy.initial(other), torch.tensor([5, 0, 3])
    expected = oracle.nll(q, x[b], y[b]) + contrast(q, x[b], *(z[b] for z in fixed), 0.5)
    found = seen["loss"](other, Batch(x[b], y[b], b, "train"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_networks_with_batch_norm_run_and_their_buffers_are_averaged():
    net = toy.batch_norm()
    record = toy.run("moon", {"mu": 5.0}, net=net, federation=toy.federation((8, 4)), batch_size=4, rounds=3)
    assert record.status == "finished"
    own = [record.client_states[i]["previous"] for i in range(2)]
    oracle.close(record.server["model"], oracle.mean(own, [8, 4]))
    assert not torch.equal(own[0]["body.1.running_mean"], own[1]["body.1.running_mean"])


def test_a_body_whose_features_are_no_vectors_is_refused():
    net = toy.net()
    net = pflbench.Net(nn.Sequential(*net.body, nn.Unflatten(1, (1, 3))), nn.Sequential(nn.Flatten(), net.head))
    with pytest.raises(UsageError, match="moon: the network's body must give a vector of features"):
        toy.run("moon", net=net)


def test_features_that_are_all_0_give_no_nan():
    x, y, _, _ = oracle.arrays()[0]
    net = toy.net(act=nn.ReLU)
    dead = {k: t.clone() for k, t in toy.initial().items()}
    dead["body.0.bias"] -= 100
    upload, _ = registry.algorithm("moon")().local_update(
        toy.client(x, y, net=net), Message({"model": dead}), {"previous": toy.initial()}
    )
    assert all(t.isfinite().all() for t in upload["model"].values())


@pytest.mark.parametrize("hyper", [{"mu": 0.5}, {"temperature": 0.25}])
def test_every_hyperparameter_changes_the_result(hyper):
    a, b = toy.run("moon", hyper), toy.run("moon")
    assert not oracle.same(a.server["model"], b.server["model"])
