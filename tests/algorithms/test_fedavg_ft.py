import pytest
import torch

from pflbench import Message
from pflbench.core import registry
from pflbench.rng import rng


def test_two_rounds_are_fedavg_evaluated_after_fine_tuning(toy, turns):
    settings, chosen = turns
    record = toy.run("fedavg-ft", {"ft_epochs": 3}, **settings, **toy.FULL)

    server = toy.initial()
    tested, right = [], []
    for r in range(2):
        sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
        data = toy.arrays()
        ups = [toy.train(server, *data[i][:2], 2, **sgd) for i in chosen[r]]
        server = toy.mean(ups, [len(data[i][1]) for i in chosen[r]])
        tested.append([toy.train(server, x, y, 3, **sgd) for x, y, _, _ in data])
        right.append(sum(int((toy.logits(server, x).argmax(1) == y).sum()) for _, _, x, y in data))

    toy.close(record.server["model"], server)
    toy.check_tested(record, tested)
    assert [row["global_accuracy"] for row in record.rounds] == [k / 120 for k in right]


@pytest.mark.parametrize("epochs", [0, 1, 4])
def test_the_server_is_fedavgs_whatever_the_fine_tuning(toy, epochs):
    tuned = toy.run("fedavg-ft", {"ft_epochs": epochs}, shuffle=True, **toy.FULL)
    plain = toy.run("fedavg", shuffle=True, **toy.FULL)
    assert toy.same(tuned.server["model"], plain.server["model"])
    assert [r["global_accuracy"] for r in tuned.rounds] == [r["global_accuracy"] for r in plain.rounds]
    assert [r["steps"] for r in tuned.rounds] == [r["steps"] for r in plain.rounds]
    assert [r["train_loss"] for r in tuned.rounds] == [r["train_loss"] for r in plain.rounds]


def test_no_epochs_of_fine_tuning_evaluate_as_fedavg(toy):
    tuned = toy.run("fedavg-ft", {"ft_epochs": 0}, shuffle=True)
    plain = toy.run("fedavg", shuffle=True)
    assert tuned.clients == plain.clients
    assert [r["test_loss"] for r in tuned.rounds] == [r["test_loss"] for r in plain.rounds]


def test_fine_tuning_leaves_nothing_behind_for_the_next_round(toy):
    often = toy.run("fedavg-ft", rounds=4, shuffle=True)
    once = toy.run("fedavg-ft", rounds=4, shuffle=True, eval_every=4)
    assert toy.same(often.server["model"], once.server["model"])
    assert often.client_states == once.client_states
    assert often.rounds[-1]["test_loss"] == once.rounds[-1]["test_loss"]


def test_fine_tuning_is_one_epoch_unless_told():
    assert registry.algorithm("fedavg-ft")().h.ft_epochs == 1


def test_fine_tuning_has_batch_orders_of_its_own(toy):
    x, y, _, _ = toy.arrays()[0]
    local = toy.local(x, y, shuffle=True, seed=5, round=3)
    tuned = registry.algorithm("fedavg-ft")().personalised(local, Message({"model": toy.initial()}), {"model": {}})
    order = rng(5, "batches", "fine-tune", 0, 3, 0).permutation(7)
    batches = [list(order[b]) for b in toy.batches(7, 3)]
    toy.close(tuned, toy.descend(toy.initial(), batches, lambda q, b: toy.nll(q, x[b], y[b]), lr=0.1))


@pytest.mark.parametrize("algo", ["fedavg-ft", "fedbabu"])
def test_fine_tuning_follows_the_running_statistics(toy, algo):
    net = toy.batch_norm()
    start = toy.initial(net)
    x, y, _, _ = toy.arrays((8,))[0]
    method = registry.algorithm(algo)()
    down, state = method.broadcast(method.init_server(start), 0), method.init_client(start)
    tuned = method.personalised(toy.local(x, y, net=net, batch_size=4), down, state)
    for name in ("body.1.running_mean", "body.1.running_var"):
        assert not torch.equal(tuned[name], start[name])
