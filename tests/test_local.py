"""The toolbox, against plain tensors and autograd."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import pflbench
from pflbench.core import params
from pflbench.core.params import zeros_like
from pflbench.errors import Diverged


def test_the_loss_gets_the_rows_of_its_batch(toy):
    x, y, _, _ = toy.arrays()[0]
    rows = torch.arange(7.0, dtype=torch.float64)
    seen = []

    def loss(net, x, y, weight, label):
        seen.append(weight.clone())
        assert torch.equal(label, y)
        return weight * nn.functional.cross_entropy(net(x), y, reduction="none")

    done = toy.local(x, y).sgd(toy.initial(), loss=loss, beside=[rows, y], epochs=1)

    def weighted(p, b):
        return (rows[b] * torch.stack([toy.nll(p, x[[i]], y[[i]]) for i in b])).mean()

    toy.close(done, toy.descend(toy.initial(), toy.batches(7, 3), weighted, lr=0.1))
    assert [len(s) for s in seen] == [3, 3, 1]


def test_what_the_network_lacks_is_trained_with_it_and_found_in_free(toy):
    """Two heads, of which the second gets the features without a gradient into the body."""
    x, y, _, _ = toy.arrays()[0]
    start = toy.initial() | {"own.weight": torch.eye(3, dtype=torch.float64), "own.bias": torch.zeros(3).double()}

    def loss(net, x, y):
        z = net.body(x)
        own = nn.functional.linear(z.detach(), net.free["own.weight"], net.free["own.bias"])
        return sum(nn.functional.cross_entropy(out, y, reduction="none") for out in (net.head(z), own))

    done = toy.local(x, y).sgd(start, loss=loss)

    def both(p, b):
        z = toy.features(p, x[b]).detach() @ p["own.weight"].T + p["own.bias"]
        return toy.nll(p, x[b], y[b]) + (torch.logsumexp(z, 1) - z[torch.arange(len(b)), y[b]]).mean()

    expected = toy.descend(start, toy.batches(7, 3) * 2, both, lr=0.1, names=tuple(start))
    toy.close(done, expected)
    assert not torch.equal(done["own.weight"], start["own.weight"])


def test_free_tensors_that_are_left_out_of_the_training_keep_what_the_loss_writes(toy):
    x, y, _, _ = toy.arrays()[0]
    start = toy.initial() | {"seen": torch.zeros(1).double(), "own": torch.ones(1).double()}

    def loss(net, x, y):
        net.free["seen"] += len(y)
        return net.free["own"] * nn.functional.cross_entropy(net(x), y, reduction="none")

    done = toy.local(x, y, weight_decay=0.5).sgd(start, loss=loss, only=lambda name: name in ("own", "head.bias"))
    assert float(done["seen"]) == 14
    assert float(start["seen"]) == 0
    changed = {k for k in start if not torch.equal(start[k], done[k])}
    assert changed == {"seen", "own", "head.bias"}


def test_descend_subtracts_the_direction_of_consecutive_batches(toy):
    x, y, _, _ = toy.arrays()[0]
    local = toy.local(x, y)

    def direction(at, first, second):
        ahead = {k: at[k] - 0.3 * g for k, g in local.grad(at, *first).items()}
        return local.grad(ahead, *second)

    done = local.descend(toy.initial(), direction, batches=2, lr=0.2)
    p, losses = toy.initial(), []
    batches = toy.batches(7, 3) * 2  # six batches: three steps
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        g = toy.gradient(lambda q, b=first: toy.nll(q, x[b], y[b]), p, toy.BODY + toy.HEAD)
        ahead = {k: p[k] - 0.3 * g[k] for k in p}
        losses += [(toy.nll(p, x[first], y[first]), len(first)), (toy.nll(ahead, x[second], y[second]), len(second))]
        g = toy.gradient(lambda q, b=second: toy.nll(q, x[b], y[b]), ahead, toy.BODY + toy.HEAD)
        p = {k: p[k] - 0.2 * g[k] for k in p}
    toy.close(done, p)
    assert (local.counts.steps, local.counts.forward, local.counts.samples) == (3, 14, 14)
    assert local.counts.loss_sum == pytest.approx(float(sum(v * n for v, n in losses)), abs=1e-9)


def test_every_pass_of_a_loss_through_the_body_counts_and_only_those(toy):
    x, y, _, _ = toy.arrays()[0]

    def twice(net, x, y):
        with_others = functional_call(net, {k: t * 2 for k, t in toy.initial().items()}, (x,))
        return F.cross_entropy(net(x), y, reduction="none") + F.cross_entropy(with_others, y, reduction="none")

    local = toy.local(x, y)
    local.sgd(toy.initial(), epochs=1, loss=twice)
    assert (local.counts.forward, local.counts.backward, local.counts.samples) == (14, 14, 7)
    local.loss(toy.initial())
    local.sgd(toy.initial(), epochs=1, loss=lambda net, x, y: net.head(x).sum(1))  # no pass through the body
    assert (local.counts.forward, local.counts.backward) == (21, 14)


def test_a_batch_that_comes_again_is_the_same_though_the_first_layer_works_in_place(toy):
    x, y, _, _ = toy.arrays()[0]
    net = toy.halving()
    model = toy.initial(net)
    local = toy.local(x, y, net=net)
    batch = next(local.batches())
    once, twice = local.grad(model, *batch), local.grad(model, *batch)
    assert toy.same(once, twice)
    assert float(once["head.weight"].abs().sum()) > 0


def test_descend_keeps_the_running_statistics_and_trains_in_training_mode(toy):
    net = pflbench.Net(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 3)).double()
    x, y, _, _ = toy.arrays((6,))[0]
    start = {k: t.clone() for k, t in net.state_dict().items() if t.is_floating_point()}
    settings = {"batch_size": 6, "local_epochs": 3}
    local = toy.local(x, y, net=net, **settings)
    done = local.descend(start, lambda at, batch: local.grad(at, *batch))
    toy.close(done, toy.local(x, y, net=net, **settings).sgd(start))
    assert not torch.equal(done["body.1.running_mean"], start["body.1.running_mean"])


def test_the_losses_of_another_descent_than_training_are_not_the_records(toy):
    x, y, _, _ = toy.arrays()[0]
    local = toy.local(x, y)
    local.descend(toy.initial(), lambda at, batch: local.grad(at, *batch), purpose="weights")
    assert (local.counts.steps, local.counts.samples, local.counts.loss_sum) == (6, 0, 0.0)


def test_the_gradient_of_chosen_parameters_is_that_of_all_and_leaves_the_others_trainable(toy):
    x, y, _, _ = toy.arrays()[0]
    local = toy.local(x, y)
    every = local.grad(toy.initial(), x, y)
    assert toy.same(local.grad(toy.initial(), x, y, only=lambda name: name in toy.HEAD), toy.head(every))
    assert toy.same(local.grad(toy.initial(), x, y), every)


def test_trainable_are_the_parameters_without_the_buffers(toy):
    net = pflbench.Net(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 3)).double()
    x, y, _, _ = toy.arrays()[0]
    model = {k: t for k, t in net.state_dict().items() if t.is_floating_point()}
    assert "body.1.running_var" in model
    assert list(toy.local(x, y, net=net).trainable(model)) == [name for name, _ in net.named_parameters()]


def test_a_client_knows_how_many_there_are(toy):
    x, y, _, _ = toy.arrays()[0]
    assert toy.local(x, y, clients=17).clients == 17


def test_zeros_have_the_shapes_and_types_of_the_parameters(toy):
    zeros = zeros_like(toy.initial())
    assert toy.same(zeros, {k: 0 * t for k, t in toy.initial().items()})


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.5}, {"weight_decay": 0.1}, {"drop_last": True}], ids=str)
def test_descend_along_the_gradient_is_sgd(toy, settings):
    x, y, _, _ = toy.arrays()[0]
    local, other = toy.local(x, y, shuffle=True, **settings), toy.local(x, y, shuffle=True, **settings)
    toy.close(local.descend(toy.initial(), lambda at, batch: local.grad(at, *batch)), other.sgd(toy.initial()))


@pytest.mark.parametrize(("samples", "drop_last", "steps"), [(7, False, 2), (7, True, 1), (4, False, 1), (2, True, 1)])
def test_descend_makes_a_step_though_an_epoch_has_too_few_batches(toy, samples, drop_last, steps):
    x, y, _, _ = toy.arrays((samples,))[0]
    local = toy.local(x, y, local_epochs=2, batch_size=3, drop_last=drop_last)
    done = local.descend(toy.initial(), lambda at, *three: local.grad(at, *three[2]), batches=3)
    assert local.counts.steps == steps
    assert not toy.same(done, toy.initial())
    assert toy.same(local.descend(toy.initial(), lambda at, *three: at, batches=3, epochs=0), toy.initial())


def test_descend_says_when_it_diverges(toy):
    x, y, _, _ = toy.arrays()[0]
    local = toy.local(x, y)
    with pytest.raises(Diverged, match=r"client 0: the parameters \(train\) are not finite; lower lr"):
        local.descend(toy.initial(), lambda at, batch: {k: t * float("inf") for k, t in at.items()})


def test_sgd_says_when_its_loss_and_when_its_parameters_are_not_finite(toy):
    x, y, _, _ = toy.arrays()[0]
    with pytest.raises(Diverged, match=r"client 0: the loss \(train\) is nan; lower lr"):
        toy.local(x * float("nan"), y).sgd(toy.initial())
    start = {name: t.float() for name, t in toy.initial().items()}  # one step: its loss was finite
    last = toy.local(x.float(), y, net=toy.net().float(), lr=3e38, weight_decay=1e3, batch_size=7, local_epochs=1)
    with pytest.raises(Diverged, match=r"client 0: the parameters \(train\) are not finite; lower lr"):
        last.sgd(start)


def test_the_loss_over_all_samples_is_the_mean(toy):
    x, y, _, _ = toy.arrays((200,))[0]
    local = toy.local(x, y)
    assert local.loss(toy.initial()) == pytest.approx(float(toy.nll(toy.initial(), x, y)), abs=1e-9)
    assert local.counts.forward == 200


def test_prototypes_are_the_mean_features_of_each_class_in_evaluation_mode(toy):
    x, y, _, _ = toy.arrays()[1]  # nothing of class 2
    dropping = toy.dropping()
    local = toy.local(x, y, net=dropping)
    found = local.prototypes(toy.initial())
    features = toy.features(toy.initial(), x)
    for c in (0, 1):
        torch.testing.assert_close(found[c], features[y == c].mean(0), rtol=0, atol=1e-12)
    assert found[2].tolist() == [0, 0, 0]
    assert local.class_counts.tolist() == [2, 2, 0]
    assert (local.counts.forward, local.counts.backward) == (4, 0)


@pytest.mark.parametrize("every_round", [True, False])
def test_parts_share_the_samples_between_them_and_the_counts_with_the_whole(toy, every_round):
    x, y, _, _ = toy.arrays((11,))[0]

    def parts(**which):
        local = toy.local(x, y, **which)
        return local, *local.parts(0.2, purpose="validation", every_round=every_round)

    local, some, rest = parts()
    assert (some.n, rest.n) == (3, 8)
    rows = torch.cat([some.features(toy.initial()), rest.features(toy.initial())])
    assert torch.equal(rows.sort(0).values, toy.features(toy.initial(), x).sort(0).values)
    some.sgd(toy.initial())
    assert dataclasses.asdict(local.counts)["samples"] == 6  # two epochs of three

    def chosen(**which):
        return parts(**which)[1].features(toy.initial())

    assert torch.equal(chosen(), chosen())
    assert torch.equal(chosen(), chosen(round=2)) != every_round
    assert not torch.equal(chosen(), chosen(client=1))


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


def test_random_numbers_are_those_of_seed_purpose_round_and_client(toy):
    x, y, _, _ = toy.arrays()[0]

    def draw(purpose="a", **which):
        return toy.local(x, y, **which).random(purpose).rand(3).tolist()

    assert draw() == draw()
    others = [draw("b"), draw(round=2), draw(client=1), draw(order_seed=1)]
    assert len({tuple(d) for d in [draw(), *others]}) == 5
