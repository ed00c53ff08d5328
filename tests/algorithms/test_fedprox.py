import oracle
import pytest
import toy
from facts import Facts

from pflbench import Message
from pflbench.core import registry

FACTS = Facts()


def proximal(start, x, y, mu, batches, **sgd):
    """SGD on F_k(w) + mu / 2 ||w - w^t||^2."""

    def objective(q, b):
        return oracle.nll(q, x[b], y[b]) + mu / 2 * sum(((q[k] - start[k]) ** 2).sum() for k in q)

    return oracle.descend(start, batches, objective, **sgd)


def test_two_rounds_minimise_the_loss_and_the_proximal_term_and_average_by_samples(turns):
    settings, chosen = turns
    record = toy.run("fedprox", {"mu": 0.7}, **settings, **toy.FULL)

    server, tested = toy.initial(), []
    for r in range(2):
        uploads, sizes = [], []
        for i in chosen[r]:
            x, y, _, _ = oracle.arrays()[i]
            sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
            uploads.append(proximal(server, x, y, 0.7, oracle.batches(len(y), 3) * 2, **sgd))
            sizes.append(len(y))
        server = oracle.mean(uploads, sizes)
        tested.append([server, server])

    oracle.close(record.server["model"], server)
    assert [record.client_states[i] for i in range(2)] == [{"model": {}}] * 2
    toy.check_tested(record, tested)
    assert all(row["global_accuracy"] == row["accuracy"] for row in record.evaluations)


@pytest.mark.parametrize("turn", range(3))
def test_mu_0_is_fedavg_bit_by_bit(turn):
    settings = {**toy.TURNS[turn][0], **toy.FULL, "shuffle": True, "rounds": 3}
    a, b = toy.run("fedprox", {"mu": 0}, **settings), toy.run("fedavg", **settings)
    assert oracle.same(a.server["model"], b.server["model"])
    assert [row["train_loss"] for row in a.rounds] == [row["train_loss"] for row in b.rounds]


def test_the_default_mu_is_not_0():
    assert registry.algorithm("fedprox")().mu == 1.0


def test_one_step_a_round_is_fedavg_because_the_term_has_no_gradient_at_the_received_model():
    one = {"batch_size": 7, "local_epochs": 1}
    a, b = toy.run("fedprox", {"mu": 5.0}, **one), toy.run("fedavg", **one)
    assert oracle.same(a.server["model"], b.server["model"])


def test_the_term_has_a_gradient_from_the_second_step_on():
    two = {"batch_size": 7, "local_epochs": 2, "rounds": 1}
    a, b = toy.run("fedprox", {"mu": 0.5}, **two), toy.run("fedavg", **two)
    assert not oracle.same(a.server["model"], b.server["model"])


def test_a_larger_mu_keeps_clients_nearer_to_the_received_model():
    x, y, _, _ = oracle.arrays()[0]

    def distance(mu):
        method, client = registry.algorithm("fedprox")(mu=mu), toy.client(x, y, local_epochs=20)
        upload, _ = method.local_update(client, Message({"model": toy.initial()}), {"model": {}})
        return float(sum(((upload["model"][k] - t) ** 2).sum() for k, t in toy.initial().items()))

    distances = [distance(mu) for mu in (0.0, 0.5, 1.0, 4.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.2 * distances[0]


def test_the_loss_in_the_record_is_without_the_term():
    settings = {"batch_size": 7, "local_epochs": 2, "rounds": 1}
    record = toy.run("fedprox", {"mu": 3.0}, **settings)
    total = 0.0
    for x, y, _, _ in oracle.arrays():
        p = proximal(toy.initial(), x, y, 3.0, [list(range(len(y)))], lr=0.1)
        total += (float(oracle.nll(toy.initial(), x, y)) + float(oracle.nll(p, x, y))) * len(y)
    assert record.rounds[0]["train_loss"] == pytest.approx(total / 22, rel=0, abs=1e-9)


def test_the_running_statistics_of_batch_norm_are_averaged_and_not_pulled():
    net = toy.batch_norm()
    settings = {"federation": toy.federation((8, 4)), "net": net, "batch_size": 4, "lr": 1e-12}
    a, b = toy.run("fedprox", {"mu": 1e9}, **settings), toy.run("fedavg", **settings)
    for name in ("body.1.running_mean", "body.1.running_var"):
        initial = net.state_dict()[name]
        assert (a.server["model"][name] - initial).abs().max() > 0.01
        assert (a.server["model"][name] - b.server["model"][name]).abs().max() < 1e-6


@pytest.mark.parametrize("hyper", [{"mu": 0.5}, {"mu": 2.0}])
def test_every_hyperparameter_changes_the_result(hyper):
    a, b = toy.run("fedprox", hyper), toy.run("fedprox")
    assert not oracle.same(a.server["model"], b.server["model"])
