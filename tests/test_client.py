"""The functions of a client, compared with plain tensors and autograd."""

import dataclasses

import oracle
import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn
from torch.func import functional_call

import pflbench
from pflbench.core import class_counts, params, prototypes, zeros_like
from pflbench.errors import Diverged, MethodError


def test_the_loss_gets_the_rows_of_its_batch():
    x, y, _, _ = oracle.arrays()[0]
    rows = torch.arange(7.0, dtype=torch.float64)
    seen = []

    def loss(net, batch):
        seen.append(rows[batch.index])
        assert torch.equal(y[batch.index], batch.y)
        assert torch.equal(x[batch.index], batch.x)
        assert len(batch) == len(batch.y)
        assert batch.stream == "train"
        return (rows[batch.index] * F.cross_entropy(net(batch.x), batch.y, reduction="none")).mean()

    client = toy.client(x, y, shuffle=False)
    done = client.sgd(toy.initial(), loss=loss, config=dataclasses.replace(client.protocol, epochs=1))

    def weighted(p, b):
        return (rows[b] * torch.stack([oracle.nll(p, x[[i]], y[[i]]) for i in b])).mean()

    oracle.close(done, oracle.descend(toy.initial(), oracle.batches(7, 3), weighted, lr=0.1))
    assert [len(s) for s in seen] == [3, 3, 1]


def test_what_the_network_lacks_is_trained_with_it_and_found_in_extra():
    """Two heads, of which the second gets the features without a gradient into the body."""
    x, y, _, _ = oracle.arrays()[0]
    own = {"own.weight": torch.eye(3, dtype=torch.float64), "own.bias": torch.zeros(3).double()}
    start = toy.initial() | own

    def loss(net, batch):
        z = net.body(batch.x)
        second = F.linear(z.detach(), net.extra["own.weight"], net.extra["own.bias"])
        return sum(F.cross_entropy(out, batch.y) for out in (net.head(z), second))

    model, beside = toy.client(x, y).sgd(toy.initial(), extra=own, loss=loss)
    assert beside.keys() == own.keys()
    assert not any(t.requires_grad for t in (*model.values(), *beside.values()))
    done = {**model, **beside}

    def both(p, b):
        z = oracle.features(p, x[b]).detach() @ p["own.weight"].T + p["own.bias"]
        return oracle.nll(p, x[b], y[b]) + (torch.logsumexp(z, 1) - z[torch.arange(len(b)), y[b]]).mean()

    expected = oracle.descend(start, oracle.batches(7, 3) * 2, both, lr=0.1, names=tuple(start))
    oracle.close(done, expected)
    assert not torch.equal(done["own.weight"], start["own.weight"])
    assert torch.equal(own["own.weight"], torch.eye(3, dtype=torch.float64))


def test_extra_tensors_are_trained_whatever_is_trainable_of_the_network():
    x, y, _, _ = oracle.arrays()[0]
    own = {"own": torch.ones(1).double()}

    def loss(net, batch):
        return (net.extra["own"] * F.cross_entropy(net(batch.x), batch.y)).sum()

    for trainable, changed in ((("head.bias",), {"own", "head.bias"}), ((), {"own"})):
        client = toy.client(x, y, weight_decay=0.5)
        model, beside = client.sgd(toy.initial(), extra=own, loss=loss, trainable=trainable)
        start, done = toy.initial() | own, {**model, **beside}
        assert {k for k in start if not torch.equal(start[k], done[k])} == changed
    assert oracle.same(toy.client(x, y).sgd(toy.initial(), trainable=()), toy.initial())
    model, beside = toy.client(x, y).sgd(toy.initial(), extra={}, trainable=())
    assert oracle.same(model, toy.initial())
    assert beside == {}


def test_a_network_has_nothing_extra_when_nothing_is_given():
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y)
    client.sgd(toy.initial(), extra={"own": torch.ones(1).double()})

    def loss(net, batch):
        assert net.extra == {}
        return F.cross_entropy(net(batch.x), batch.y)

    client.sgd(toy.initial(), loss=loss)


def test_descend_subtracts_the_direction_of_consecutive_batches():
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y)

    def direction(at, first, second):
        ahead = {k: at[k] - 0.3 * g for k, g in client.grad(at, first, train_mode=True).items()}
        return client.grad(ahead, second, train_mode=True)

    done = client.descend(toy.initial(), direction, batches=2, config=dataclasses.replace(client.protocol, lr=0.2))
    p, losses = toy.initial(), []
    batches = oracle.batches(7, 3) * 2  # six batches: three steps
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        g = oracle.gradient(lambda q, b=first: oracle.nll(q, x[b], y[b]), p, oracle.BODY + oracle.HEAD)
        ahead = {k: p[k] - 0.3 * g[k] for k in p}
        losses += [
            (oracle.nll(p, x[first], y[first]), len(first)),
            (oracle.nll(ahead, x[second], y[second]), len(second)),
        ]
        g = oracle.gradient(lambda q, b=second: oracle.nll(q, x[b], y[b]), ahead, oracle.BODY + oracle.HEAD)
        p = {k: p[k] - 0.2 * g[k] for k in p}
    oracle.close(done, p)
    assert (client.counts.steps, client.counts.forward, client.counts.samples) == (3, 14, 14)
    assert client.counts.loss_sum == pytest.approx(float(sum(v * n for v, n in losses)), abs=1e-9)


def test_every_pass_of_a_loss_through_the_body_counts_and_only_those():
    x, y, _, _ = oracle.arrays()[0]

    def twice(net, batch):
        with_others = functional_call(net, {k: t * 2 for k, t in toy.initial().items()}, (batch.x,))
        return F.cross_entropy(net(batch.x), batch.y) + F.cross_entropy(with_others, batch.y)

    client = toy.client(x, y)
    once = dataclasses.replace(client.protocol, epochs=1)
    client.sgd(toy.initial(), config=once, loss=twice)
    assert (client.counts.forward, client.counts.backward, client.counts.samples) == (14, 14, 7)
    client.loss(toy.initial())
    client.sgd(toy.initial(), config=once, loss=lambda net, batch: net.head(batch.x).mean())  # not through the body
    assert (client.counts.forward, client.counts.backward) == (21, 14)


def test_a_batch_that_comes_again_is_the_same_though_the_first_layer_works_in_place():
    x, y, _, _ = oracle.arrays()[0]
    net = toy.halving()
    model = toy.initial(net)
    client = toy.client(x, y, net=net)
    batch = next(client.batches(stream="any"))
    once, twice = client.grad(model, batch), client.grad(model, batch)
    assert oracle.same(once, twice)
    assert float(once["head.weight"].abs().sum()) > 0


def test_descend_keeps_the_running_statistics_and_trains_in_training_mode():
    net = pflbench.Net(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 3)).double()
    x, y, _, _ = oracle.arrays((6,))[0]
    start = {k: t.clone() for k, t in net.state_dict().items() if t.is_floating_point()}
    settings = {"batch_size": 6, "local_epochs": 3}
    client = toy.client(x, y, net=net, **settings)
    done = client.descend(start, lambda at, batch: client.grad(at, batch, train_mode=True))
    oracle.close(done, toy.client(x, y, net=net, **settings).sgd(start))
    assert not torch.equal(done["body.1.running_mean"], start["body.1.running_mean"])


def test_the_losses_of_another_descent_than_training_are_not_the_records():
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y)
    client.descend(toy.initial(), lambda at, batch: client.grad(at, batch, train_mode=True), stream="weights")
    assert (client.counts.steps, client.counts.samples, client.counts.loss_sum) == (6, 0, 0.0)


def test_the_gradient_of_chosen_parameters_is_that_of_all_and_leaves_the_others_trainable():
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y)
    batch = next(client.batches(stream="any"))
    every = client.grad(toy.initial(), batch)
    assert oracle.same(client.grad(toy.initial(), batch, trainable=oracle.HEAD), oracle.head(every))
    assert oracle.same(client.grad(toy.initial(), batch), every)


def test_a_gradient_is_in_evaluation_mode_unless_training_mode_is_asked_for():
    net = toy.dropping()
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y, net=net, batch_size=7)
    batch = next(client.batches(stream="any"))
    expected = oracle.gradient(lambda p: oracle.nll(p, x, y), toy.initial(), oracle.BODY + oracle.HEAD)
    oracle.close(client.grad(toy.initial(), batch), expected)
    assert not oracle.same(client.grad(toy.initial(), batch, train_mode=True), client.grad(toy.initial(), batch))


@pytest.mark.parametrize(("stream", "train_mode", "samples"), [("train", True, 7), ("train", False, 0), ("a", True, 0)])
def test_a_gradients_loss_is_the_records_in_training_mode_on_a_batch_of_training(stream, train_mode, samples):
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y, batch_size=7)
    client.grad(toy.initial(), next(client.batches(stream=stream)), train_mode=train_mode)
    assert client.counts.samples == samples
    loss = 7 * float(oracle.nll(toy.initial(), x, y)) if samples else 0.0
    assert client.counts.loss_sum == pytest.approx(loss, abs=1e-9)


def test_trainable_are_the_parameters_without_the_buffers():
    net = pflbench.Net(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 3)).double()
    x, y, _, _ = oracle.arrays()[0]
    model = {k: t for k, t in net.state_dict().items() if t.is_floating_point()}
    assert "body.1.running_var" in model
    assert list(toy.client(x, y, net=net).setup.trainable(model)) == [name for name, _ in net.named_parameters()]


def test_a_client_knows_what_is_known_of_the_federation():
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y, clients=17, id=3)
    assert (client.id, client.n, client.setup.clients, client.setup.classes, client.setup.features) == (3, 7, 17, 3, 3)
    assert torch.equal(client.y, y)
    oracle.close(client.setup.model, toy.initial())


def test_the_protocol_says_how_a_client_trains_in_this_round():
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y, round=3, lr=0.8, lr_decay=0.5, local_epochs=4, drop_last=True)
    assert client.protocol.lr == 0.2
    assert (client.protocol.steps(7), client.protocol.steps(2)) == (4 * 2, 4)
    client.sgd(toy.initial())
    assert client.counts.steps == 8


def test_zeros_have_the_shapes_and_types_of_the_parameters():
    zeros = zeros_like(toy.initial())
    assert oracle.same(zeros, {k: 0 * t for k, t in toy.initial().items()})


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"weight_decay": 0.1}, {"drop_last": True}], ids=str)
def test_descend_along_the_gradient_is_sgd(settings):
    x, y, _, _ = oracle.arrays()[0]
    client, other = toy.client(x, y, shuffle=True, **settings), toy.client(x, y, shuffle=True, **settings)
    done = client.descend(toy.initial(), lambda at, batch: client.grad(at, batch, train_mode=True))
    oracle.close(done, other.sgd(toy.initial()))
    assert client.counts == other.counts


@pytest.mark.parametrize(("samples", "drop_last", "steps"), [(7, False, 2), (7, True, 1), (4, False, 1), (2, True, 1)])
def test_descend_makes_a_step_though_an_epoch_has_too_few_batches(samples, drop_last, steps):
    x, y, _, _ = oracle.arrays((samples,))[0]
    client = toy.client(x, y, local_epochs=2, batch_size=3, drop_last=drop_last)
    done = client.descend(toy.initial(), lambda at, *three: client.grad(at, three[2], train_mode=True), batches=3)
    assert client.counts.steps == steps
    assert not oracle.same(done, toy.initial())
    none = dataclasses.replace(client.protocol, epochs=0)
    assert oracle.same(client.descend(toy.initial(), lambda at, *three: at, batches=3, config=none), toy.initial())


def test_descend_says_when_it_diverges():
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y)
    with pytest.raises(Diverged, match=r"client 0: the parameters \(train\) are not finite; lower lr"):
        client.descend(toy.initial(), lambda at, batch: {k: t * float("inf") for k, t in at.items()})


def test_sgd_says_when_its_loss_and_when_its_parameters_are_not_finite():
    x, y, _, _ = oracle.arrays()[0]
    with pytest.raises(Diverged, match=r"client 0: the loss \(train\) is nan; lower lr"):
        toy.client(x * float("nan"), y).sgd(toy.initial())
    start = {name: t.float() for name, t in toy.initial().items()}  # one step: its loss was finite
    last = toy.client(x.float(), y, net=toy.net().float(), lr=3e38, weight_decay=1e3, batch_size=7, local_epochs=1)
    with pytest.raises(Diverged, match=r"client 0: the parameters \(train\) are not finite; lower lr"):
        last.sgd(start)


def test_the_loss_over_all_samples_is_the_mean():
    x, y, _, _ = oracle.arrays((200,))[0]
    client = toy.client(x, y)
    assert client.loss(toy.initial()) == pytest.approx(float(oracle.nll(toy.initial(), x, y)), abs=1e-9)
    assert client.counts.forward == 200


def test_a_loss_over_no_samples_is_an_error_that_says_so():
    x, y, _, _ = oracle.arrays()[0]
    everything, nothing = toy.client(x, y).part(1.0, stream="validation")
    assert (everything.n, nothing.n) == (7, 0)
    with pytest.raises(MethodError, match="client 0: a loss needs samples"):
        nothing.loss(toy.initial())


def test_prototypes_are_the_mean_features_of_each_class_in_evaluation_mode():
    x, y, _, _ = oracle.arrays()[1]  # nothing of class 2
    dropping = toy.dropping()
    client = toy.client(x, y, net=dropping)
    found = prototypes(client, toy.initial())
    features = oracle.features(toy.initial(), x)
    for c in (0, 1):
        torch.testing.assert_close(found[c], features[y == c].mean(0), rtol=0, atol=1e-12)
    assert found[2].tolist() == [0, 0, 0]
    assert class_counts(client).tolist() == [2, 2, 0]
    assert (client.counts.forward, client.counts.backward) == (4, 0)


@pytest.mark.parametrize("every_round", [True, False])
def test_parts_share_the_samples_between_them_and_the_counts_with_the_whole(every_round):
    x, y, _, _ = oracle.arrays((11,))[0]

    def parts(**which):
        client = toy.client(x, y, **which)
        return client, *client.part(0.2, stream="validation", every_round=every_round)

    client, some, rest = parts()
    assert (some.n, rest.n) == (3, 8)
    rows = torch.cat([some.features(toy.initial()), rest.features(toy.initial())])
    assert torch.equal(rows.sort(0).values, oracle.features(toy.initial(), x).sort(0).values)
    some.sgd(toy.initial())
    assert client.counts.samples == 6  # two epochs of three

    def chosen(**which):
        return parts(**which)[1].features(toy.initial())

    assert torch.equal(chosen(), chosen())
    assert torch.equal(chosen(), chosen(round=2)) != every_round
    assert not torch.equal(chosen(), chosen(id=1))


def test_the_distance_of_models_is_euclidean():
    torch.manual_seed(0)
    a, b = ({f"p{i}": torch.randn(7, 3) for i in range(8)} for _ in range(2))
    expected = float(torch.cat([(a[k].double() - b[k].double()).flatten() for k in a]).norm())
    assert params.distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert params.distance(a, a) == 0.0


def test_the_distance_of_models_does_not_depend_on_the_order_of_names():
    """A state that was read from a file may have its names in another order."""
    a = {"large": torch.tensor([1e8]).double()} | {f"p{i}": torch.ones(1).double() for i in range(100)}
    b = {k: torch.zeros(1).double() for k in reversed(a)}
    assert params.distance(a, b) == params.distance(b, a) > 1e8


def test_random_numbers_are_those_of_seed_key_round_and_client():
    x, y, _, _ = oracle.arrays()[0]

    def draw(*key, **which):
        return toy.client(x, y, **which).rng(*key).rand(3).tolist()

    assert draw("a") == draw("a")
    others = [draw("b"), draw("a", 1), draw("a", round=2), draw("a", id=1), draw("a", order_seed=1)]
    assert len({tuple(d) for d in [draw("a"), *others]}) == 6


def test_the_server_draws_by_seed_round_and_key_and_once_for_all_rounds_by_seed_and_key():
    def draws(number=1, order_seed=0, key="a"):
        one = toy.round(number, order_seed=order_seed)
        return tuple(one.rng(key).rand(3)), tuple(one.setup.rng(key).rand(3))

    assert draws() == draws()
    others = [draws(), draws(2), draws(order_seed=1), draws(key="b")]
    assert len({of_round for of_round, _ in others}) == 4
    assert len({of_setup for _, of_setup in others}) == 3
    assert draws()[1] == draws(2)[1]


@pytest.mark.parametrize("verb", ["sgd", "descend", "batches"])
def test_every_stream_and_every_pass_over_it_has_its_own_order_of_batches(verb):
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y, shuffle=True, local_epochs=1)

    def orders(client, stream):
        seen = []

        def loss(net, batch):
            seen.extend(batch.index.tolist())
            return F.cross_entropy(net(batch.x), batch.y)

        def direction(at, batch):
            seen.extend(batch.index.tolist())
            return at

        if verb == "sgd":
            client.sgd(toy.initial(), loss=loss, stream=stream)
        elif verb == "descend":
            client.descend(toy.initial(), direction, stream=stream)
        else:
            seen = [i for batch in client.batches(stream=stream) for i in batch.index.tolist()]
        assert sorted(seen) == list(range(7))
        return tuple(seen)

    found = [orders(client, stream) for stream in ("train", "other", "train", "other")]
    assert len(set(found)) == 4
    again = toy.client(x, y, shuffle=True, local_epochs=1)
    assert [orders(again, "other"), orders(again, "train")] == [found[1], found[0]]


def test_a_part_for_all_rounds_is_the_same_in_every_exchange():
    x, y, _, _ = oracle.arrays((20,))[0]
    first = toy.client(x, y)
    second = toy.client(x, y)
    second._key = (1, 0, 1)
    a, b = (client.part(0.3, stream="held", every_round=False)[0].y for client in (first, second))
    assert torch.equal(a, b)
