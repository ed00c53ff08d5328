import math

import oracle
import pytest
import torch
import torch.nn.functional as F
import toy
from facts import Facts
from torch import nn

import pflbench
from pflbench import Message, Upload, UsageError
from pflbench.core import Replica, registry

PROTOTYPES = 8 * 3 * (4 + 1)  # of a mean feature and a count for each class
FACTS = Facts(bytes={"": (PROTOTYPES, PROTOTYPES)})

# The oracle. Global prototypes are a dict of class to mean; the counts are beside it.


def train(p, x, y, means, lam, **sgd):
    """Two epochs on cross-entropy plus lambda times the mean square to the prototype of each sample's class."""

    def loss(q, b):
        off = [((oracle.features(q, x[[i]]) - means[int(y[i])]) ** 2).mean() for i in b if int(y[i]) in means]
        return oracle.nll(q, x[b], y[b]) + lam * sum(off) / len(b)

    return oracle.descend(p, oracle.batches(len(y), 3) * 2, loss, **sgd)


def prototypes(p, x, y):
    f = oracle.features(p, x)
    return {c: (f[y == c].mean(0), int((y == c).sum())) for c in y.unique().tolist()}


def combine(means, counts, uploads):
    """The mean over clients, weighted by how many samples of the class they have."""
    for c in {c for upload in uploads for c in upload}:
        total = sum(upload[c][1] for upload in uploads if c in upload)
        means = {**means, c: sum(upload[c][0] * upload[c][1] for upload in uploads if c in upload) / total}
        counts = {**counts, c: total}
    return means, counts


def answers(p, y, means, tests):
    """-|f - C_c|^2 for the client's classes c with a prototype, -inf for others; with none, the head's logits."""
    possible = [c for c in means if c in y]
    if not possible:
        return oracle.logits(p, tests)
    logits = torch.full((len(tests), 3), -math.inf).double()
    for c in possible:
        logits[:, c] = -((oracle.features(p, tests) - means[c]) ** 2).sum(1)
    return logits


def check_tested(record, logits, data=None):
    """Assert that `logits[r][i]` is what client i answered in round r + 1."""
    data = data or oracle.arrays()
    for number, (row, own) in enumerate(zip(record.evaluations, logits, strict=True), 1):
        labels = [y for _, _, _, y in data]
        n = sum(map(len, labels))
        right = [int((z.argmax(1) == y).sum()) for z, y in zip(own, labels, strict=True)]
        loss = float(sum(F.cross_entropy(z, y, reduction="sum") for z, y in zip(own, labels, strict=True))) / n
        assert row["test_loss"] == (pytest.approx(loss, rel=1e-13, abs=1e-9) if math.isfinite(loss) else None)
        assert row["accuracy"] == sum(right) / n
        rows = [c for c in record.clients if c["round"] == number]
        assert [c["accuracy"] for c in rows] == [k / len(y) for k, y in zip(right, labels, strict=True)]


def dense(means):
    return torch.stack([means.get(c, torch.zeros(3).double()) for c in range(3)])


@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_two_rounds_send_class_means_and_pull_features_to_their_weighted_means(turns, lam):
    settings, chosen = turns
    record = toy.run("fedproto", {"lam": lam}, **settings, **toy.FULL)

    own, means, counts, tested = [toy.initial()] * 2, {}, {}, []
    for r in range(2):
        uploads = []
        for i in chosen[r]:
            x, y, _, _ = oracle.arrays()[i]
            own[i] = train(own[i], x, y, means, lam, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02)
            uploads.append(prototypes(own[i], x, y))
        means, counts = combine(means, counts, uploads)
        tested.append([answers(p, y, means, xt) for p, (_, y, xt, _) in zip(own, oracle.arrays(), strict=True)])

    count = torch.tensor([counts.get(c, 0) for c in range(3)]).double()
    oracle.close(record.server, {"mean": dense(means), "count": count})
    for i in range(2):
        oracle.close(record.client_states[i]["model"], own[i])
    check_tested(record, tested)
    assert [r["global_accuracy"] for r in record.evaluations] == [None, None]


# Messages.


def _update(i=0, *, received=None, net=None, start=None, **settings):
    method, first = registry.algorithm("fedproto")(), toy.round()
    received = received or method.broadcast(first, method.init_server(first.setup), i)
    x, y, _, _ = oracle.arrays()[i]
    client = toy.client(x, y, net=net, id=i, **settings)
    upload, state = method.local_update(client, received, {"model": start or toy.initial()})
    return upload, state["model"]


def test_an_upload_is_the_prototypes_after_training_and_their_counts_and_no_parameter():
    upload, model = _update(1)
    assert upload.content.keys() == {"mean", "count"}
    x, y, _, _ = oracle.arrays()[1]
    found = prototypes(model, x, y)
    assert upload["count"].tolist() == [2, 2, 0]
    torch.testing.assert_close(upload["mean"], dense({c: m for c, (m, _) in found.items()}), rtol=0, atol=1e-9)


def test_prototypes_are_not_gathered_while_the_weights_move():
    upload, model = _update(local_epochs=1, lr=1.0)
    x, y, _, _ = oracle.arrays()[0]
    p, moving = toy.initial(), []
    for b in oracle.batches(7, 3):
        moving.append(oracle.features(p, x[b]))
        p = oracle.descend(p, [b], lambda q, b: oracle.nll(q, x[b], y[b]), lr=1.0)
    oracle.close(model, p)
    moving = torch.cat(moving)
    assert (upload["mean"][0] - moving[y == 0].mean(0)).abs().max() > 1e-2


def test_prototypes_are_taken_in_evaluation_mode():
    net = toy.dropping()
    upload, model = _update(net=net)
    x, y, _, _ = oracle.arrays()[0]
    expected = dense({c: m for c, (m, _) in prototypes(model, x, y).items()})
    torch.testing.assert_close(upload["mean"], expected, rtol=0, atol=1e-9)


# The loss.


def _message(mean, count):
    return Message({"mean": mean, "count": torch.tensor(count).double()})


def test_the_distance_has_a_gradient_that_moves_the_body_and_not_the_head():
    """One step, with and without a prototype."""
    x, y, _, _ = oracle.arrays()[0]
    mean = torch.full((3, 3), 0.75).double()
    step = {"local_epochs": 1, "batch_size": 7, "lr": 0.5}
    _, plain = _update(received=_message(mean, [0.0, 0.0, 0.0]), **step)
    _, pulled = _update(received=_message(mean, [2.0, 0.0, 1.0]), **step)

    def distance(q):
        return ((oracle.features(q, x) - 0.75) ** 2).mean(1)[y != 1].sum() / 7

    g = oracle.gradient(distance, toy.initial(), oracle.BODY)
    oracle.close(oracle.body(pulled), {k: plain[k] - 0.5 * g[k] for k in oracle.BODY})
    oracle.close(oracle.head(pulled), oracle.head(plain))
    assert all(float(t.abs().max()) > 1e-3 for t in g.values())


def test_the_prototype_of_a_class_that_a_client_does_not_have_does_not_matter_to_its_training():
    near, far = torch.zeros(3, 3).double(), torch.zeros(3, 3).double()
    far[2] = 1e6
    a, b = (_update(1, received=_message(mean, [1.0, 1.0, 1.0]))[1] for mean in (near, far))
    assert oracle.same(a, b)


def test_features_come_nearer_to_the_prototypes_with_a_larger_lambda():
    def spread(lam):
        record = toy.run("fedproto", {"lam": lam}, rounds=6)
        mean = record.server["mean"]
        return sum(
            float((oracle.features(record.client_states[i]["model"], x) - mean[y]).square().sum())
            for i, (x, y, _, _) in enumerate(oracle.arrays())
        )

    assert spread(20.0) < 0.7 * spread(0.0)


def test_lambda_is_1_unless_told():
    assert registry.algorithm("fedproto")().lam == 1


# The server.


def _aggregate(server, *prototypes):
    messages = [_message(torch.tensor(mean).double()[:, None].expand(3, 3), count) for mean, count in prototypes]
    uploads = [Upload(message.content, client=i) for i, message in enumerate(messages)]
    return registry.algorithm("fedproto")().aggregate(toy.round(), server, uploads)


def test_means_are_weighted_by_counts_and_sum_to_one():
    server = registry.algorithm("fedproto")().init_server(toy.setup())
    new = _aggregate(server, ([1.0, 4.0, 5.0], [1.0, 2.0, 0.0]), ([3.0, 4.0, 6.0], [3.0, 5.0, 0.0]))
    torch.testing.assert_close(new["mean"][:, 0], torch.tensor([2.5, 4.0, 0.0]).double(), rtol=0, atol=1e-12)
    assert new["count"].tolist() == [4, 7, 0]


def test_a_class_that_nobody_uploads_keeps_its_prototype_and_one_that_comes_back_starts_again():
    start = registry.algorithm("fedproto")().init_server(toy.setup())
    first = _aggregate(start, ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]))
    second = _aggregate(first, ([5.0, 9.0, 9.0], [2.0, 0.0, 0.0]))
    assert second["mean"][:, 0].tolist() == [5, 2, 3]
    assert second["count"].tolist() == [2, 1, 1]


def test_one_upload_comes_back_exactly_in_float32():
    method, first = registry.algorithm("fedproto")(), toy.round(network=toy.net().float())
    content = {"mean": torch.randn(3, 3), "count": torch.tensor([3.0, 7.0, 11.0])}
    for before in (method.init_server(first.setup), {"mean": torch.randn(3, 3) * 100, "count": torch.ones(3)}):
        assert {t.dtype for t in before.values()} == {torch.float32}
        assert oracle.same(method.aggregate(first, before, [Upload(content, client=0)]), content)


# Evaluation.


MEANS = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()


def _predict(x, y, received, tests, *, net=None):
    method = registry.algorithm("fedproto")()
    model = toy.initial(net)
    deployed = method.personalise(toy.client(x, y, net=net), received, {"model": model})
    assert deployed.keys() == {"model", "mean", "known"}
    assert oracle.same(deployed["model"], model)
    return method.predict(Replica(net or toy.net()), deployed, tests)


@pytest.mark.parametrize(("i", "classes"), [(0, [0, 1, 2]), (1, [0, 1])])
def test_what_is_deployed_answers_with_the_nearest_prototype_of_the_clients_own_classes(i, classes):
    x, y, tests, _ = oracle.arrays()[i]
    logits = _predict(x, y, _message(MEANS, [1.0, 1.0, 1.0]), tests)
    distance = torch.cdist(oracle.features(toy.initial(), tests), MEANS)
    found = logits.argmax(1)
    assert found.tolist() == [min(classes, key=row.__getitem__) for row in distance.tolist()]
    assert len(found.unique()) > 1


def test_logits_are_less_the_squared_distances_and_minus_infinity_for_classes_that_cannot_be_the_answer():
    x, y, tests, _ = oracle.arrays()[1]
    assert y.unique().tolist() == [0, 1]
    distance = (oracle.features(toy.initial(), tests)[:, None] - MEANS).square().sum(2)
    for count, possible in (([1.0, 1.0, 1.0], [0, 1]), ([0.0, 5.0, 1.0], [1])):  # of class 0 there is no prototype
        logits = _predict(x, y, _message(MEANS, count), tests)
        torch.testing.assert_close(logits[:, possible], -distance[:, possible], rtol=0, atol=1e-12)
        others = [c for c in range(3) if c not in possible]
        assert (logits[:, others] == -math.inf).all()


def test_a_client_none_of_whose_classes_has_a_prototype_is_evaluated_with_its_own_head():
    x, y, tests, _ = oracle.arrays()[1]
    logits = _predict(x, y, _message(torch.ones(3, 3).double(), [0.0, 0.0, 4.0]), tests)
    torch.testing.assert_close(logits, oracle.logits(toy.initial(), tests), rtol=0, atol=1e-12)


def test_a_class_of_which_the_client_has_one_sample_is_possible():
    x, _, tests, _ = oracle.arrays()[0]
    logits = _predict(x, torch.tensor([0, 0, 0, 0, 0, 0, 2]), _message(MEANS, [1.0, 1.0, 1.0]), tests)
    assert logits.isfinite().all(0).tolist() == [True, False, True]


def _one_client(x, y, tests, labels):
    return pflbench.Federation.from_arrays([(x, y, tests, labels)], classes=3)


def test_there_is_no_test_loss_where_a_class_that_the_client_lacks_is_tested():
    x, y, tests, labels = oracle.arrays()[1]  # no class 2, neither to train nor to test
    record = toy.run("fedproto", federation=_one_client(x, y, tests, labels))
    assert all(math.isfinite(row["test_loss"]) for row in record.evaluations)
    other = labels.clone()
    other[7] = 2
    record = toy.run("fedproto", federation=_one_client(x, y, tests, other))
    assert record.status == "finished"
    assert [row["test_loss"] for row in record.evaluations] == [None, None]
    deployed = record.client_states[0]["model"]
    means = {c: record.server["mean"][c] for c in (0, 1)}
    found = answers(deployed, y, means, tests).argmax(1)
    assert record.evaluations[-1]["accuracy"] == int((found == other).sum()) / len(other)


class _Fragile(nn.Module):
    """Features that are no numbers in evaluation mode."""

    def forward(self, x):
        return x if self.training else x * math.nan


@pytest.mark.parametrize("lacking", [False, True])
def test_features_that_are_no_numbers_are_a_divergence_whatever_classes_are_tested(lacking):
    net = toy.net()
    net = pflbench.Net(nn.Sequential(*net.body, _Fragile()), net.head).double()
    x, y, tests, labels = oracle.arrays()[1]
    labels = labels.clone()
    labels[7] = 2 if lacking else labels[7]
    record = toy.run("fedproto", net=net, federation=_one_client(x, y, tests, labels))
    assert record.status == "diverged"
    assert "the loss on the test data is nan" in record.reason


# Identities.


def test_without_the_distance_clients_train_as_in_local():
    a, b = (
        toy.run("fedproto", {"lam": 0}, rounds=3, shuffle=True, **toy.FULL),
        toy.run("local", rounds=3, shuffle=True, **toy.FULL),
    )
    for i in range(2):
        oracle.close(a.client_states[i]["model"], b.client_states[i]["model"])


def test_in_the_first_round_there_is_no_prototype_and_clients_train_as_in_local():
    a, b = (toy.run(name, rounds=1, shuffle=True, **toy.FULL) for name in ("fedproto", "local"))
    for i in range(2):
        oracle.close(a.client_states[i]["model"], b.client_states[i]["model"])
    assert a.rounds[0]["train_loss"] == pytest.approx(b.rounds[0]["train_loss"], abs=1e-12)


def test_clients_with_the_same_data_are_one_client():
    client = oracle.arrays()[0]
    two, one = (toy.run("fedproto", federation=pflbench.Federation.from_arrays([client] * n)) for n in (2, 1))
    torch.testing.assert_close(two.server["mean"], one.server["mean"], rtol=0, atol=1e-12)
    oracle.close(two.client_states[1]["model"], one.client_states[0]["model"])


def test_a_client_depends_on_the_others_by_their_prototypes_alone():
    """Where a changed client's classes are all another's, nothing changes but what that one is pulled to."""
    changed = oracle.arrays()
    changed[0] = (-2 * changed[0][0], *changed[0][1:])
    changed = pflbench.Federation.from_arrays(changed, classes=3)
    for rounds, same in ((1, True), (2, False)):
        a, b = (toy.run("fedproto", federation=f, rounds=rounds) for f in (None, changed))
        assert oracle.same(a.client_states[1]["model"], b.client_states[1]["model"]) == same


def test_batch_norm_stays_on_the_client():
    net = toy.batch_norm()
    record = toy.run("fedproto", net=net, federation=toy.federation((8, 4)), batch_size=4)
    means = [record.client_states[i]["model"]["body.1.running_mean"] for i in range(2)]
    assert not torch.equal(*means)
    assert record.server.keys() == {"mean", "count"}


def test_prototypes_of_a_float32_network_are_sent_in_float32():
    record = toy.run("fedproto", net=toy.net().float())
    assert {t.dtype for t in record.server.values()} == {torch.float32}
    assert {row["bytes_up"] for row in record.rounds} == {2 * 4 * 3 * (3 + 1)}


def test_a_body_whose_features_are_no_vectors_is_refused():
    net = toy.net()
    net = pflbench.Net(nn.Sequential(*net.body, nn.Unflatten(1, (1, 3))), nn.Sequential(nn.Flatten(), net.head))
    with pytest.raises(UsageError, match="fedproto: the network's body must give a vector of features"):
        toy.run("fedproto", net=net)


HEADS = {
    "no-bias": lambda: nn.Linear(3, 3, bias=False),
    "norm": lambda: nn.LayerNorm(3),
    "two-layers": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("head", HEADS)
def test_any_head_works_and_the_answers_do_not_depend_on_it(head):
    x, y, tests, _ = oracle.arrays()[1]
    received = _message(MEANS, [1.0, 1.0, 1.0])
    net = pflbench.Net(toy.net().body, HEADS[head]()).double()
    assert torch.equal(_predict(x, y, received, tests, net=net), _predict(x, y, received, tests))

    record = toy.run("fedproto", net=net)
    assert record.status == "finished"
    means = {c: record.server["mean"][c] for c in range(3)}
    own = [record.client_states[i]["model"] for i in range(2)]
    found = [answers(p, y, means, xt) for p, (_, y, xt, _) in zip(own, oracle.arrays(), strict=True)]
    right = [int((z.argmax(1) == yt).sum()) for z, (_, _, _, yt) in zip(found, oracle.arrays(), strict=True)]
    assert record.evaluations[-1]["accuracy"] == sum(right) / 120
