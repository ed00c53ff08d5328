import pytest
import torch
from torch import nn

from pflbench.core.client import cross_entropy


def test_two_rounds_train_the_head_on_the_received_body_then_the_body_under_that_head(toy, turns):
    settings, chosen = turns
    record = toy.run("fedrep", {"head_epochs": 3}, **settings, **toy.FULL)

    body, heads = toy.body(toy.initial()), [toy.head(toy.initial())] * 2
    tested = []
    for r in range(2):
        sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
        ups = []
        for i in chosen[r]:
            x, y, _, _ = toy.arrays()[i]
            p = toy.train({**body, **heads[i]}, x, y, 3, names=toy.HEAD, **sgd)
            heads[i] = toy.head(p)
            ups.append(toy.body(toy.train(p, x, y, 2, names=toy.BODY, **sgd)))
        body = toy.mean(ups, [1.0] * len(ups))  # equal weights, though the clients have 7 and 4 samples
        tested.append([{**body, **head} for head in heads])

    toy.close(record.server["model"], body)
    for i in range(2):
        toy.close(record.client_states[i]["model"], heads[i])
    toy.check_tested(record, tested)


def test_the_head_gets_ten_epochs_unless_told(toy):
    record = toy.run("fedrep", rounds=1, local_epochs=1)
    x, y, _, _ = toy.arrays()[0]
    p = toy.train(toy.initial(), x, y, 10, names=toy.HEAD, lr=0.1)
    toy.close(record.client_states[0]["model"], toy.head(p))
    assert record.rounds[0]["steps"] == (10 + 1) * 3 + (10 + 1) * 2


def test_the_loss_in_the_record_is_that_of_the_bodys_epochs_alone(toy):
    record = toy.run("fedrep", {"head_epochs": 3}, rounds=1)
    total = 0.0
    for x, y, _, _ in toy.arrays():
        p = toy.train(toy.initial(), x, y, 3, names=toy.HEAD, lr=0.1)
        for b in toy.batches(len(y), 3) * 2:
            total += len(b) * float(toy.nll(p, x[b], y[b]))
            p = toy.descend(p, [b], lambda q, b, x=x, y=y: toy.nll(q, x[b], y[b]), names=toy.BODY, lr=0.1)
    assert record.rounds[0]["train_loss"] == pytest.approx(total / (2 * 11), abs=1e-9)


def test_no_head_epochs_leave_the_heads_as_they_were(toy):
    record = toy.run("fedrep", {"head_epochs": 0}, **toy.FULL)
    for i in range(2):
        assert toy.same(record.client_states[i]["model"], toy.head(toy.initial()))
    assert not toy.same(record.server["model"], toy.body(toy.initial()))


def test_bodies_have_equal_weights_whatever_the_clients_sizes(toy):
    record = toy.run("fedrep", {"head_epochs": 0}, federation=toy.federation((12, 2)), rounds=1)
    ups = [toy.train(toy.initial(), x, y, 2, names=toy.BODY, lr=0.1) for x, y, _, _ in toy.arrays((12, 2))]
    toy.close(record.server["model"], toy.mean([toy.body(p) for p in ups], [1, 1]))


def test_the_body_is_frozen_while_the_head_trains(toy):
    x, y, _, _ = toy.arrays()[0]
    start = toy.initial()
    done = toy.local(x, y, **toy.FULL).sgd(start, epochs=3, only=lambda name: name.startswith("head."))
    assert toy.same(toy.body(done), toy.body(start))
    assert not toy.same(toy.head(done), toy.head(start))


def test_the_buffers_of_a_frozen_body_stay_too(toy):
    net = toy.batch_norm()
    start = {k: t.clone() for k, t in net.state_dict().items() if t.is_floating_point()}
    x, y, _, _ = toy.arrays((6,))[0]
    done = toy.local(x, y, net=net).sgd(start, only=lambda name: name.startswith("head."))
    changed = {k for k in start if not torch.equal(start[k], done[k])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("shuffle", [False, True])
def test_training_the_head_on_kept_features_equals_training_it_through_the_body(toy, shuffle):
    x, y, _, _ = toy.arrays((70,))[0]
    net = toy.net(act=nn.ReLU)  # of the layers whose features are kept
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    calls = []
    net.body.register_forward_hook(lambda *_: calls.append(1))

    def other_loss(net, x, y):
        return cross_entropy(net, x, y)

    def train(loss):
        calls.clear()
        local = toy.local(x, y, net=net, shuffle=shuffle, batch_size=16, **toy.FULL)
        done = local.sgd(start, epochs=4, only=lambda name: name.startswith("head."), loss=loss)
        return done, len(calls), local.counts.loss_sum, local.counts.steps

    kept, calls_kept, loss_kept, steps_kept = train(cross_entropy)
    plain, calls_plain, loss_plain, steps_plain = train(other_loss)
    assert (calls_kept, calls_plain) == (1, 20)
    toy.close(kept, plain)
    assert loss_kept == pytest.approx(loss_plain, abs=1e-9)
    assert steps_kept == steps_plain == 20


def test_features_are_not_kept_when_the_body_differs_between_training_and_evaluation(toy):
    net = toy.dropping(act=nn.ReLU)
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    calls = []
    net.body.register_forward_hook(lambda *_: calls.append(1))
    x, y, _, _ = toy.arrays()[0]
    toy.local(x, y, net=net).sgd(start, epochs=2, only=lambda name: name.startswith("head."))
    assert len(calls) == 2 * 3
