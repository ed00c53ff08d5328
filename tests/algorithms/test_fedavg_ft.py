import oracle
import pytest
import torch
import toy
from facts import Facts

from pflbench import Message
from pflbench.core import registry
from pflbench.rng import rng

FACTS = Facts()


def test_two_rounds_are_fedavg_evaluated_after_fine_tuning(turns):
    settings, chosen = turns
    record = toy.run("fedavg-ft", {"ft_epochs": 3}, **settings, **toy.FULL)

    server = toy.initial()
    tested, right = [], []
    for r in range(2):
        sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
        data = oracle.arrays()
        uploads = [oracle.train(server, *data[i][:2], 2, **sgd) for i in chosen[r]]
        server = oracle.mean(uploads, [len(data[i][1]) for i in chosen[r]])
        tested.append([oracle.train(server, x, y, 3, **sgd) for x, y, _, _ in data])
        right.append(sum(int((oracle.logits(server, x).argmax(1) == y).sum()) for _, _, x, y in data))

    oracle.close(record.server["model"], server)
    toy.check_tested(record, tested)
    assert [row["global_accuracy"] for row in record.evaluations] == [k / 120 for k in right]


@pytest.mark.parametrize("epochs", [0, 1, 4])
def test_the_server_is_fedavgs_whatever_the_fine_tuning(epochs):
    tuned = toy.run("fedavg-ft", {"ft_epochs": epochs}, shuffle=True, **toy.FULL)
    plain = toy.run("fedavg", shuffle=True, **toy.FULL)
    assert oracle.same(tuned.server["model"], plain.server["model"])
    assert [r["global_accuracy"] for r in tuned.evaluations] == [r["global_accuracy"] for r in plain.evaluations]
    assert [r["steps"] for r in tuned.rounds] == [r["steps"] for r in plain.rounds]
    assert [r["train_loss"] for r in tuned.rounds] == [r["train_loss"] for r in plain.rounds]


def test_no_epochs_of_fine_tuning_evaluate_as_fedavg():
    tuned = toy.run("fedavg-ft", {"ft_epochs": 0}, shuffle=True)
    plain = toy.run("fedavg", shuffle=True)
    assert tuned.clients == plain.clients
    assert [r["test_loss"] for r in tuned.evaluations] == [r["test_loss"] for r in plain.evaluations]


def test_fine_tuning_leaves_nothing_behind_for_the_next_round():
    often = toy.run("fedavg-ft", rounds=4, shuffle=True)
    once = toy.run("fedavg-ft", rounds=4, shuffle=True, eval_every=4)
    assert oracle.same(often.server["model"], once.server["model"])
    assert often.client_states == once.client_states
    assert often.evaluations[-1]["test_loss"] == once.evaluations[-1]["test_loss"]


def test_fine_tuning_is_one_epoch_unless_told():
    assert registry.algorithm("fedavg-ft")().ft_epochs == 1


def test_fine_tuning_has_batch_orders_of_its_own():
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y, shuffle=True, seed=5, round=3)
    method = registry.algorithm("fedavg-ft")()
    tuned = method.personalise(client, Message({"model": toy.initial()}), {"model": {}})["model"]
    order = rng(5, "batches", "fine-tune", 0, 3, 0).permutation(7)
    batches = [list(order[b]) for b in oracle.batches(7, 3)]
    oracle.close(tuned, oracle.descend(toy.initial(), batches, lambda q, b: oracle.nll(q, x[b], y[b]), lr=0.1))


@pytest.mark.parametrize("algo", ["fedavg-ft", "fedbabu"])
def test_fine_tuning_follows_the_running_statistics(algo):
    net = toy.batch_norm()
    start = toy.initial(net)
    x, y, _, _ = oracle.arrays((8,))[0]
    method = registry.algorithm(algo)()
    first = toy.round(network=net)
    received, state = method.serve(first, method.init_server(first.setup), 0), method.init_client(first.setup)
    tuned = method.personalise(toy.client(x, y, net=net, batch_size=4), received, state)["model"]
    for name in ("body.1.running_mean", "body.1.running_var"):
        assert not torch.equal(tuned[name], start[name])
