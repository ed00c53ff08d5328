from dataclasses import replace

import oracle
import pytest
import torch
import toy
from facts import BODY, Facts
from torch import nn

from pflbench.core import cross_entropy

FACTS = Facts(bytes={"": (BODY, BODY)})


def test_two_rounds_train_the_head_on_the_received_body_then_the_body_under_that_head(turns):
    settings, chosen = turns
    record = toy.run("fedrep", {"head_epochs": 3}, **settings, **toy.FULL)

    body, heads = oracle.body(toy.initial()), [oracle.head(toy.initial())] * 2
    tested = []
    for r in range(2):
        sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
        uploads = []
        for i in chosen[r]:
            x, y, _, _ = oracle.arrays()[i]
            p = oracle.train({**body, **heads[i]}, x, y, 3, names=oracle.HEAD, **sgd)
            heads[i] = oracle.head(p)
            uploads.append(oracle.body(oracle.train(p, x, y, 2, names=oracle.BODY, **sgd)))
        body = oracle.mean(uploads, [1.0] * len(uploads))  # equal weights, though the clients have 7 and 4 samples
        tested.append([{**body, **head} for head in heads])

    oracle.close(record.server["model"], body)
    for i in range(2):
        oracle.close(record.client_states[i]["model"], heads[i])
    toy.check_tested(record, tested)


def test_the_head_gets_ten_epochs_unless_told():
    record = toy.run("fedrep", rounds=1, local_epochs=1)
    x, y, _, _ = oracle.arrays()[0]
    p = oracle.train(toy.initial(), x, y, 10, names=oracle.HEAD, lr=0.1)
    oracle.close(record.client_states[0]["model"], oracle.head(p))
    assert record.rounds[0]["steps"] == (10 + 1) * 3 + (10 + 1) * 2


def test_the_loss_in_the_record_is_that_of_the_bodys_epochs_alone():
    record = toy.run("fedrep", {"head_epochs": 3}, rounds=1)
    total = 0.0
    for x, y, _, _ in oracle.arrays():
        p = oracle.train(toy.initial(), x, y, 3, names=oracle.HEAD, lr=0.1)
        for b in oracle.batches(len(y), 3) * 2:
            total += len(b) * float(oracle.nll(p, x[b], y[b]))
            p = oracle.descend(p, [b], lambda q, b, x=x, y=y: oracle.nll(q, x[b], y[b]), names=oracle.BODY, lr=0.1)
    assert record.rounds[0]["train_loss"] == pytest.approx(total / (2 * 11), abs=1e-9)


def test_no_head_epochs_leave_the_heads_as_they_were():
    record = toy.run("fedrep", {"head_epochs": 0}, **toy.FULL)
    for i in range(2):
        assert oracle.same(record.client_states[i]["model"], oracle.head(toy.initial()))
    assert not oracle.same(record.server["model"], oracle.body(toy.initial()))


def test_bodies_have_equal_weights_whatever_the_clients_sizes():
    record = toy.run("fedrep", {"head_epochs": 0}, federation=toy.federation((12, 2)), rounds=1)
    uploads = [oracle.train(toy.initial(), x, y, 2, names=oracle.BODY, lr=0.1) for x, y, _, _ in oracle.arrays((12, 2))]
    oracle.close(record.server["model"], oracle.mean([oracle.body(p) for p in uploads], [1, 1]))


def test_the_body_is_frozen_while_the_head_trains():
    x, y, _, _ = oracle.arrays()[0]
    start = toy.initial()
    client = toy.client(x, y, **toy.FULL)
    done = client.sgd(start, config=replace(client.protocol, epochs=3), trainable=oracle.HEAD)
    assert oracle.same(oracle.body(done), oracle.body(start))
    assert not oracle.same(oracle.head(done), oracle.head(start))


def test_the_buffers_of_a_frozen_body_stay_too():
    net = toy.batch_norm()
    start = {k: t.clone() for k, t in net.state_dict().items() if t.is_floating_point()}
    x, y, _, _ = oracle.arrays((6,))[0]
    done = toy.client(x, y, net=net).sgd(start, trainable=oracle.HEAD)
    changed = {k for k in start if not torch.equal(start[k], done[k])}
    assert changed == {"head.weight", "head.bias"}


@pytest.mark.parametrize("shuffle", [False, True])
def test_training_the_head_on_kept_features_equals_training_it_through_the_body(shuffle):
    x, y, _, _ = oracle.arrays((70,))[0]
    net = toy.net(act=nn.ReLU)  # of the layers whose features are kept
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    calls = []
    net.body.register_forward_hook(lambda *_: calls.append(1))

    def other_loss(net, batch):
        return cross_entropy(net, batch)

    def train(loss):
        calls.clear()
        client = toy.client(x, y, net=net, shuffle=shuffle, batch_size=16, local_epochs=4, **toy.FULL)
        done = client.sgd(start, trainable=oracle.HEAD, loss=loss)
        return done, len(calls), client.counts.loss_sum, client.counts.steps

    kept, calls_kept, loss_kept, steps_kept = train(cross_entropy)
    plain, calls_plain, loss_plain, steps_plain = train(other_loss)
    assert (calls_kept, calls_plain) == (1, 20)
    oracle.close(kept, plain)
    assert loss_kept == pytest.approx(loss_plain, abs=1e-9)
    assert steps_kept == steps_plain == 20


def test_features_are_not_kept_when_the_body_differs_between_training_and_evaluation():
    net = toy.dropping(act=nn.ReLU)
    start = {k: p.detach().clone() for k, p in net.named_parameters()}
    calls = []
    net.body.register_forward_hook(lambda *_: calls.append(1))
    x, y, _, _ = oracle.arrays()[0]
    toy.client(x, y, net=net).sgd(start, trainable=oracle.HEAD)
    assert len(calls) == 2 * 3
