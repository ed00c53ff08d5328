import pytest
import torch
from torch import nn

import pflbench
from pflbench import Message, UsageError
from pflbench.core import registry

# The oracle. Global prototypes are a dict of class to mean; the counts are beside it.


def train(toy, p, x, y, means, lam, **sgd):
    """Two epochs on cross-entropy plus lambda times the mean square to the prototype of each sample's class."""

    def loss(q, b):
        off = [((toy.features(q, x[[i]]) - means[int(y[i])]) ** 2).mean() for i in b if int(y[i]) in means]
        return toy.nll(q, x[b], y[b]) + lam * sum(off) / len(b)

    return toy.descend(p, toy.batches(len(y), 3) * 2, loss, **sgd)


def prototypes(toy, p, x, y):
    f = toy.features(p, x)
    return {c: (f[y == c].mean(0), int((y == c).sum())) for c in y.unique().tolist()}


def combine(means, counts, ups):
    """The mean over clients, weighted by how many samples of the class they have."""
    for c in {c for up in ups for c in up}:
        total = sum(up[c][1] for up in ups if c in up)
        means = {**means, c: sum(up[c][0] * up[c][1] for up in ups if c in up) / total}
        counts = {**counts, c: total}
    return means, counts


def nearest(p, y, means):
    """The model whose logits are 2 f c - |c|^2, which is |f|^2 less the squared distance to c."""
    possible = [c for c in means if c in y]
    if not possible:
        return p
    weight, bias = torch.zeros(3, 3).double(), torch.full((3,), -1e9).double()
    for c in means:
        weight[c] = 2 * means[c]
    for c in possible:
        bias[c] = -(means[c] ** 2).sum()
    return {**p, "head.weight": weight, "head.bias": bias}


def dense(means):
    return torch.stack([means.get(c, torch.zeros(3).double()) for c in range(3)])


@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_two_rounds_send_class_means_and_pull_features_to_their_weighted_means(toy, turns, lam):
    settings, chosen = turns
    record = toy.run("fedproto", {"lam": lam}, **settings, **toy.FULL)

    own, means, counts, tested = [toy.initial()] * 2, {}, {}, []
    for r in range(2):
        ups = []
        for i in chosen[r]:
            x, y, _, _ = toy.arrays()[i]
            own[i] = train(toy, own[i], x, y, means, lam, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02)
            ups.append(prototypes(toy, own[i], x, y))
        means, counts = combine(means, counts, ups)
        tested.append([nearest(p, y, means) for p, (_, y, _, _) in zip(own, toy.arrays(), strict=True)])

    count = torch.tensor([counts.get(c, 0) for c in range(3)]).double()
    toy.close(record.server["prototypes"], {"mean": dense(means), "count": count})
    for i in range(2):
        toy.close(record.client_states[i]["model"], own[i])
    toy.check_tested(record, tested)
    assert [r["global_accuracy"] for r in record.rounds] == [None, None]


# Messages.


def _update(toy, client=0, *, down=None, net=None, start=None, **settings):
    method = registry.algorithm("fedproto")()
    down = down or method.broadcast(method.init_server(toy.initial()), client)
    x, y, _, _ = toy.arrays()[client]
    local = toy.local(x, y, net=net, client=client, **settings)
    up, state = method.local_update(local, down, {"model": start or toy.initial()})
    return up, state["model"]


def test_an_upload_is_the_prototypes_after_training_and_their_counts_and_no_parameter(toy):
    up, model = _update(toy, 1)
    assert up.tensors.keys() == {"prototypes"}
    assert up["prototypes"].keys() == {"mean", "count"}
    x, y, _, _ = toy.arrays()[1]
    found = prototypes(toy, model, x, y)
    assert up["prototypes"]["count"].tolist() == [2, 2, 0]
    torch.testing.assert_close(
        up["prototypes"]["mean"], dense({c: m for c, (m, _) in found.items()}), rtol=0, atol=1e-9
    )


def test_prototypes_are_not_gathered_while_the_weights_move(toy):
    up, model = _update(toy, local_epochs=1, lr=1.0)
    x, y, _, _ = toy.arrays()[0]
    p, moving = toy.initial(), []
    for b in toy.batches(7, 3):
        moving.append(toy.features(p, x[b]))
        p = toy.descend(p, [b], lambda q, b: toy.nll(q, x[b], y[b]), lr=1.0)
    toy.close(model, p)
    moving = torch.cat(moving)
    assert (up["prototypes"]["mean"][0] - moving[y == 0].mean(0)).abs().max() > 1e-2


def test_prototypes_are_taken_in_evaluation_mode(toy):
    net = toy.dropping()
    up, model = _update(toy, net=net)
    x, y, _, _ = toy.arrays()[0]
    expected = dense({c: m for c, (m, _) in prototypes(toy, model, x, y).items()})
    torch.testing.assert_close(up["prototypes"]["mean"], expected, rtol=0, atol=1e-9)


# The loss.


def _down(toy, mean, count):
    return Message({"prototypes": {"mean": mean, "count": torch.tensor(count).double()}})


def test_the_distance_has_a_gradient_that_moves_the_body_and_not_the_head(toy):
    """One step, with and without a prototype."""
    x, y, _, _ = toy.arrays()[0]
    mean = torch.full((3, 3), 0.75).double()
    step = {"local_epochs": 1, "batch_size": 7, "lr": 0.5}
    _, plain = _update(toy, down=_down(toy, mean, [0.0, 0.0, 0.0]), **step)
    _, pulled = _update(toy, down=_down(toy, mean, [2.0, 0.0, 1.0]), **step)

    def distance(q):
        return ((toy.features(q, x) - 0.75) ** 2).mean(1)[y != 1].sum() / 7

    g = toy.gradient(distance, toy.initial(), toy.BODY)
    toy.close(toy.body(pulled), {k: plain[k] - 0.5 * g[k] for k in toy.BODY})
    toy.close(toy.head(pulled), toy.head(plain))
    assert all(float(t.abs().max()) > 1e-3 for t in g.values())


def test_the_prototype_of_a_class_that_a_client_does_not_have_does_not_matter_to_its_training(toy):
    near, far = torch.zeros(3, 3).double(), torch.zeros(3, 3).double()
    far[2] = 1e6
    a, b = (_update(toy, 1, down=_down(toy, mean, [1.0, 1.0, 1.0]))[1] for mean in (near, far))
    assert toy.same(a, b)


def test_features_come_nearer_to_the_prototypes_with_a_larger_lambda(toy):
    def spread(lam):
        record = toy.run("fedproto", {"lam": lam}, rounds=6)
        mean = record.server["prototypes"]["mean"]
        return sum(
            float((toy.features(record.client_states[i]["model"], x) - mean[y]).square().sum())
            for i, (x, y, _, _) in enumerate(toy.arrays())
        )

    assert spread(20.0) < 0.7 * spread(0.0)


def test_lambda_is_1_unless_told(toy):
    assert registry.algorithm("fedproto")().h.lam == 1


# The server.


def _aggregate(toy, server, *ups):
    method = registry.algorithm("fedproto")()
    messages = [_down(toy, torch.tensor(mean).double()[:, None].expand(3, 3), count) for mean, count in ups]
    return method.aggregate({"prototypes": server["prototypes"]}, messages)["prototypes"]


def test_means_are_weighted_by_counts_and_sum_to_one(toy):
    server = registry.algorithm("fedproto")().init_server(toy.initial())
    new = _aggregate(toy, server, ([1.0, 4.0, 5.0], [1.0, 2.0, 0.0]), ([3.0, 4.0, 6.0], [3.0, 5.0, 0.0]))
    torch.testing.assert_close(new["mean"][:, 0], torch.tensor([2.5, 4.0, 0.0]).double(), rtol=0, atol=1e-12)
    assert new["count"].tolist() == [4, 7, 0]


def test_a_class_that_nobody_uploads_keeps_its_prototype_and_one_that_comes_back_is_made_anew(toy):
    start = registry.algorithm("fedproto")().init_server(toy.initial())
    first = _aggregate(toy, start, ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))
    second = _aggregate(toy, {"prototypes": first}, ([5.0, 9.0, 9.0], [2.0, 0.0, 0.0]))
    assert second["mean"][:, 0].tolist() == [5, 2, 3]
    assert second["count"].tolist() == [2, 1, 1]


def test_one_upload_comes_back_exactly_in_float32(toy):
    server = registry.algorithm("fedproto")().init_server({k: t.float() for k, t in toy.initial().items()})
    up = {"mean": torch.randn(3, 3), "count": torch.tensor([3.0, 7.0, 11.0])}
    for before in (server, {"prototypes": {"mean": torch.randn(3, 3) * 100, "count": torch.ones(3)}}):
        new = registry.algorithm("fedproto")().aggregate(before, [Message({"prototypes": up})])
        assert toy.same(new["prototypes"], up)


# Evaluation.


def test_what_is_evaluated_answers_with_the_nearest_prototype_of_the_clients_own_classes(toy):
    method = registry.algorithm("fedproto")()
    mean = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    for client, classes in ((0, [0, 1, 2]), (1, [0, 1])):
        x, y, tests, _ = toy.arrays()[client]
        own = method.personalised(toy.local(x, y), _down(toy, mean, [1.0, 1.0, 1.0]), {"model": toy.initial()})
        assert own.keys() == toy.initial().keys()
        assert toy.same(toy.body(own), toy.body(toy.initial()))
        distance = torch.cdist(toy.features(toy.initial(), tests), mean)
        answers = toy.logits(own, tests).argmax(1)
        assert answers.tolist() == [min(classes, key=row.__getitem__) for row in distance.tolist()]
        assert len(answers.unique()) > 1


def test_a_client_none_of_whose_classes_has_a_prototype_is_evaluated_with_its_own_head(toy):
    method = registry.algorithm("fedproto")()
    x, y, _, _ = toy.arrays()[1]
    mean = torch.ones(3, 3).double()
    own = method.personalised(toy.local(x, y), _down(toy, mean, [0.0, 0.0, 4.0]), {"model": toy.initial()})
    assert toy.same(own, toy.initial())


def test_a_class_of_which_the_client_has_one_sample_is_possible(toy):
    x, _, _, _ = toy.arrays()[0]
    local = toy.local(x, torch.tensor([0, 0, 0, 0, 0, 0, 2]))
    down = _down(toy, torch.ones(3, 3).double(), [1.0, 1.0, 1.0])
    own = registry.algorithm("fedproto")().personalised(local, down, {"model": toy.initial()})
    assert own["head.bias"].tolist() == [-3, -1e9, -3]


# Identities.


def test_without_the_distance_clients_train_as_in_local(toy):
    a, b = (
        toy.run("fedproto", {"lam": 0}, rounds=3, shuffle=True, **toy.FULL),
        toy.run("local", rounds=3, shuffle=True, **toy.FULL),
    )
    for i in range(2):
        toy.close(a.client_states[i]["model"], b.client_states[i]["model"])


def test_in_the_first_round_there_is_no_prototype_and_clients_train_as_in_local(toy):
    a, b = (toy.run(name, rounds=1, shuffle=True, **toy.FULL) for name in ("fedproto", "local"))
    for i in range(2):
        toy.close(a.client_states[i]["model"], b.client_states[i]["model"])
    assert a.rounds[0]["train_loss"] == pytest.approx(b.rounds[0]["train_loss"], abs=1e-12)


def test_clients_with_the_same_data_are_one_client(toy):
    client = toy.arrays()[0]
    two, one = (toy.run("fedproto", federation=pflbench.Federation.from_arrays([client] * n)) for n in (2, 1))
    torch.testing.assert_close(two.server["prototypes"]["mean"], one.server["prototypes"]["mean"], rtol=0, atol=1e-12)
    toy.close(two.client_states[1]["model"], one.client_states[0]["model"])


def test_a_client_depends_on_the_others_by_their_prototypes_alone(toy):
    """Where a changed client's classes are all another's, nothing changes but what that one is pulled to."""
    changed = toy.arrays()
    changed[0] = (-2 * changed[0][0], *changed[0][1:])
    changed = pflbench.Federation.from_arrays(changed, classes=3)
    for rounds, same in ((1, True), (2, False)):
        a, b = (toy.run("fedproto", federation=f, rounds=rounds) for f in (None, changed))
        assert toy.same(a.client_states[1]["model"], b.client_states[1]["model"]) == same


def test_batch_norm_stays_on_the_client(toy):
    net = toy.batch_norm()
    record = toy.run("fedproto", net=net, federation=toy.federation((8, 4)), batch_size=4)
    means = [record.client_states[i]["model"]["body.1.running_mean"] for i in range(2)]
    assert not torch.equal(*means)
    assert record.server.keys() == {"prototypes"}


def test_prototypes_of_a_float32_network_are_sent_in_float32(toy):
    record = toy.run("fedproto", net=toy.net().float())
    assert {t.dtype for t in record.server["prototypes"].values()} == {torch.float32}
    assert {row["bytes_up"] for row in record.rounds} == {2 * 4 * 3 * (3 + 1)}


@pytest.mark.parametrize("head", [nn.Linear(3, 3, bias=False), nn.LayerNorm(3)], ids=["no-bias", "norm"])
def test_a_head_that_prototypes_cannot_replace_is_refused(toy, head):
    net = pflbench.Net(toy.net().body, head).double()
    with pytest.raises(UsageError, match=r"fedproto: the network's head must be one nn.Linear with a bias"):
        toy.run("fedproto", net=net)
