import itertools

import numpy as np
import oracle
import pytest
import torch
import toy
from facts import BODY, HEAD, Facts
from torch.func import functional_call

import pflbench
from pflbench import Message, Upload
from pflbench.algorithms.fedpac import head_weights
from pflbench.core import registry

PROTOTYPES = 8 * 3 * (4 + 1)  # of a mean feature and a count for each class
STATISTICS = 8 * (3 * 4 + 1)  # of H and V
FACTS = Facts(bytes={"": (BODY + HEAD + PROTOTYPES + STATISTICS, BODY + HEAD + PROTOTYPES)})

# The oracle, from the paper's equations. Prototypes are a dict of class to mean.


def class_means(z, y):
    return {c: z[y == c].mean(0) for c in y.unique().tolist()}


def statistics(z, y, classes=3):
    """H, of a row p_c m_c for each class, and V = (sum_c p_c E_c|z|^2 - sum_c p_c^2 |m_c|^2) / n."""
    n, h, spread = len(y), torch.zeros(classes, z.shape[1]).double(), 0.0
    for c, m in class_means(z, y).items():
        p = int((y == c).sum()) / n
        h[c] = p * m
        spread += p * float((z[y == c] ** 2).sum(1).mean()) - p**2 * float(m @ m)
    return h, spread / n


def matrix(h, v, i):
    """diag(V) + D_i, D_i[j, k] = sum_c <H_i[c] - H_j[c], H_i[c] - H_k[c]>."""
    size = range(len(v))
    d = [[float(((h[i] - h[j]) * (h[i] - h[k])).sum()) + (j == k) * v[j] for k in size] for j in size]
    return np.array(d, dtype=np.float64)


def best_on_simplex(p):
    """The minimum of a'pa over the simplex: of all supports, the best feasible solution with the others at 0."""
    found = []
    p = p / max(np.abs(p).max(), 1e-300)
    for size in range(1, len(p) + 1):
        for support in map(list, itertools.combinations(range(len(p)), size)):
            kkt = np.ones((size + 1, size + 1))
            kkt[:size, :size], kkt[size, size] = p[np.ix_(support, support)], 0
            a = np.zeros(len(p))
            a[support] = np.linalg.lstsq(kkt, np.eye(size + 1)[size], rcond=None)[0][:size]
            if a.min() >= 0 and abs(a.sum() - 1) < 1e-9:
                found.append((a @ p @ a, a))
    return min(found, key=lambda pair: pair[0])[1]


def combination(h, v, i):
    """The weights of the heads for the participant in place i, without those of 0.001 and less."""
    a = best_on_simplex(matrix(h, v, i))
    a = np.where(a > 1e-3, a, 0)
    return a / a.sum()


def train(p, x, y, means, lam, *, head_lr=0.1, head_epochs=1, epochs=2, size=3, lr=0.1, **sgd):
    """Epochs of the head, then of the body with the pull to global prototypes, or to own ones of before."""
    own = class_means(oracle.features(p, x), y)
    p = oracle.train(p, x, y, head_epochs, size, names=oracle.HEAD, lr=head_lr, **sgd)

    def loss(q, b):
        z = oracle.features(q, x[b])
        target = torch.stack([{**own, **means}[c] for c in y[b].tolist()])
        return oracle.nll(q, x[b], y[b]) + (lam * ((z - target) ** 2).mean() if means else 0)

    return oracle.descend(p, oracle.batches(len(y), size) * epochs, loss, names=oracle.BODY, lr=lr, **sgd)


def fedpac(data, chosen, *, lam=1.0, lr_decay=1.0, **sgd):
    """The server's body, heads, prototypes and their counts, and the models evaluated in each round."""
    first = oracle.head(toy.initial())
    body, heads, means, counts, tested = oracle.body(toy.initial()), {}, {}, {}, []
    for r, taking_part in enumerate(chosen):
        models, h, v, sent = [], [], [], []
        for i in taking_part:
            x, y, _, _ = data[i]
            start = {**body, **heads.get(i, first)}
            for known, value in zip((h, v), statistics(oracle.features(start, x), y), strict=True):
                known.append(value)
            models.append(train(start, x, y, means, lam, lr=0.1 * lr_decay**r, **sgd))
            z = oracle.features(models[-1], x)
            sent.append({c: (m, int((y == c).sum())) for c, m in class_means(z, y).items()})
        body = oracle.mean(list(map(oracle.body, models)), [len(data[i][1]) for i in taking_part])
        own = [oracle.head(p) for p in models]
        heads |= {i: oracle.mean(own, combination(h, v, k).tolist()) for k, i in enumerate(taking_part)}
        for c in {c for s in sent for c in s}:
            counts[c] = sum(s[c][1] for s in sent if c in s)
            means = {**means, c: sum(s[c][1] * s[c][0] for s in sent if c in s) / counts[c]}
        tested.append([{**body, **heads.get(i, first)} for i in range(len(data))])
    return body, heads, means, counts, tested


def dense(means):
    return torch.stack([means.get(c, torch.zeros(3).double()) for c in range(3)])


def check_server(record, body, heads, means, counts):
    assert record.server.keys() == {"model", "mean", "count", "heads"}
    oracle.close(record.server["model"], body)
    assert record.server["heads"].keys() == heads.keys()
    for i, head in heads.items():
        oracle.close(record.server["heads"][i], head)
    torch.testing.assert_close(record.server["mean"], dense(means), rtol=0, atol=1e-9)
    assert record.server["count"].tolist() == [counts.get(c, 0) for c in range(3)]


@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_two_rounds_train_head_then_body_and_combine_the_heads_of_those_who_took_part(turns, lam):
    settings, chosen = turns
    record = toy.run("fedpac", {"lam": lam}, **settings, **toy.FULL)
    *server, tested = fedpac(oracle.arrays(), chosen, lam=lam, lr_decay=0.5, momentum=0.5, weight_decay=0.02)
    check_server(record, *server)
    assert all(record.client_states[i] == {} for i in range(2))
    toy.check_tested(record, tested)
    assert [row["global_accuracy"] for row in record.evaluations] == [None, None]


def test_three_rounds_of_five_clients_of_whom_three_take_part():
    sizes = (7, 4, 9, 5, 6)
    settings = {"join_ratio": 0.6, "rounds": 3, "sampling_seed": 1, "clients": 5}
    chosen = [pflbench.participants(toy.spec("fedpac", **settings), r) for r in (1, 2, 3)]
    assert chosen == [[2, 3, 4], [1, 3, 4], [1, 2, 4]]  # client 0 never
    hyper = {"lam": 0.5, "head_lr": 0.3, "head_epochs": 2}
    record = toy.run("fedpac", hyper, federation=toy.federation(sizes), **settings, **toy.FULL)
    sgd = {"lr_decay": 0.5, "momentum": 0.5, "weight_decay": 0.02}
    *server, tested = fedpac(oracle.arrays(sizes), chosen, **hyper, **sgd)
    check_server(record, *server)
    assert any(not oracle.same(*pair) for pair in itertools.pairwise(server[1].values()))
    deployed = registry.algorithm("fedpac")()
    last = toy.round(3, chosen[2], clients=5)
    for i in range(5):
        sent = deployed.serve(last, record.server, i)
        client = toy.client(*oracle.arrays(sizes)[i][:2], id=i)
        oracle.close(deployed.personalise(client, sent, {})["model"], tested[-1][i])


# Messages.


def _update(i=0, *, received=None, net=None, data=None, hyper=None, **settings):
    """The client's part of a round, without prototypes unless `received` has some: the upload's content."""
    method, first = registry.algorithm("fedpac")(**(hyper or {})), toy.round(network=net)
    received = received or method.broadcast(first, method.init_server(first.setup), i)
    x, y = data or oracle.arrays()[i][:2]
    upload, state = method.local_update(toy.client(x, y, net=net, id=i, **settings), received, {})
    assert state == {}
    assert upload.weight == len(y)
    return upload


def _received(count=(0, 0, 0), mean=0.75, model=None):
    mean = torch.full((3, 3), mean).double()
    return Message({"model": model or toy.initial(), "mean": mean, "count": torch.tensor(count).double()})


def test_an_upload_has_statistics_of_before_training_and_means_of_after_it():
    x, y, _, _ = oracle.arrays()[1]
    upload = _update(1)
    assert upload.content.keys() == {"model", "mean", "count", "statistics", "variance"}
    h, v = statistics(oracle.features(toy.initial(), x), y)
    torch.testing.assert_close(upload["statistics"], h, rtol=0, atol=1e-12)
    assert float(upload["variance"]) == pytest.approx(v, abs=1e-12)
    after = dense(class_means(oracle.features(upload["model"], x), y))
    torch.testing.assert_close(upload["mean"], after, rtol=0, atol=1e-12)
    assert upload["count"].tolist() == [2, 2, 0]
    assert (after[:2] - dense(class_means(oracle.features(toy.initial(), x), y))[:2]).abs().max() > 1e-3


def test_the_variance_is_that_of_the_estimated_statistics():
    """n^2 V / (n - 1) is the sample covariance's trace of the rows that hold z at the place of its class."""
    x, y, _, _ = oracle.arrays()[0]
    rows = torch.zeros(7, 3, 3).double()
    rows[torch.arange(7), y] = oracle.features(toy.initial(), x)
    upload = _update()
    assert float(upload["variance"]) == pytest.approx(float(rows.var(0, correction=0).sum()) / 7, abs=1e-12)
    torch.testing.assert_close(upload["statistics"], rows.mean(0), rtol=0, atol=1e-12)


def test_the_variance_of_samples_that_are_alike_is_not_negative_by_rounding():
    net = toy.net().float()
    for seed in range(10):
        x = torch.randn(1, 3, generator=torch.Generator().manual_seed(seed)).expand(5, 3)
        mean = torch.zeros(3, 3)
        received = Message({"model": toy.initial(net), "mean": mean, "count": mean[0]})
        variance = float(_update(net=net, data=(x, torch.ones(5).long()), received=received)["variance"])
        assert 0 <= variance < 1e-6


def test_statistics_and_means_are_taken_in_evaluation_mode():
    x, y, _, _ = oracle.arrays()[0]
    upload = _update(net=toy.dropping())
    h, v = statistics(oracle.features(toy.initial(), x), y)
    torch.testing.assert_close(upload["statistics"], h, rtol=0, atol=1e-12)
    assert float(upload["variance"]) == pytest.approx(v, abs=1e-12)
    after = dense(class_means(oracle.features(upload["model"], x), y))
    torch.testing.assert_close(upload["mean"], after, rtol=0, atol=1e-12)


def test_a_client_gets_its_own_head_and_one_that_never_took_part_the_initial_head():
    record = toy.run("fedpac", join_ratio=0.5, sampling_seed=4, rounds=1)  # client 0 alone
    method = registry.algorithm("fedpac")()
    assert method.init_server(toy.setup())["model"].keys() == record.server["model"].keys() == set(oracle.BODY)
    for send in (method.broadcast, method.serve):
        own, other = (send(toy.round(2), record.server, i)["model"] for i in (0, 1))
        oracle.close(oracle.body(other), record.server["model"])
        oracle.close(oracle.head(other), oracle.head(toy.initial()))
        oracle.close(oracle.head(own), record.server["heads"][0])
        assert not oracle.same(oracle.head(own), oracle.head(other))


def test_messages_of_a_float32_network_are_float32():
    record = toy.run("fedpac", net=toy.net().float())
    tensors = [*record.server["model"].values(), record.server["mean"], *record.server["heads"][0].values()]
    assert {t.dtype for t in tensors} == {torch.float32}
    model, means = 4 * 24, 4 * 3 * (3 + 1)
    assert {row["bytes_down"] for row in record.rounds} == {2 * (model + means)}
    assert {row["bytes_up"] for row in record.rounds} == {2 * (model + means + 4 * 9 + 8)}  # V is a number


# The client's training.


def test_without_a_prototype_of_any_class_the_body_trains_on_cross_entropy_alone():
    x, y, _, _ = oracle.arrays()[0]
    p = oracle.train(toy.initial(), x, y, 1, names=oracle.HEAD, lr=0.1)
    p = oracle.train(p, x, y, 2, names=oracle.BODY, lr=0.1)
    for lam in (0.0, 5.0):
        oracle.close(_update(hyper={"lam": lam})["model"], p)


def test_a_class_without_a_global_prototype_is_pulled_to_the_clients_own_of_before_training():
    x, y, _, _ = oracle.arrays()[0]
    for count, known in (((2, 0, 0), [0]), ((0, 0, 9), [2]), ((1, 2, 3), [0, 1, 2])):
        means = {c: torch.full((3,), 0.75).double() for c in known}
        found = _update(received=_received(count), hyper={"lam": 3.0})["model"]
        oracle.close(found, train(toy.initial(), x, y, means, 3.0))
        others = dense({c: m for c, m in class_means(oracle.features(found, x), y).items() if c not in means})
        assert len(known) == 3 or others.abs().max() > 1e-3


def test_the_prototype_of_a_class_that_the_client_lacks_starts_the_pull_to_its_own_ones():
    x, y, _, _ = oracle.arrays()[1]
    found = _update(1, received=_received((0, 0, 9)), hyper={"lam": 3.0})["model"]
    oracle.close(found, train(toy.initial(), x, y, {2: torch.zeros(3)}, 3.0))
    assert not oracle.same(found, _update(1, received=_received(), hyper={"lam": 3.0})["model"])


def test_the_pull_is_the_mean_over_samples_and_features_and_moves_the_body_alone():
    """One step of the body, with and without prototypes."""
    x = oracle.arrays()[0][0]
    step = {"local_epochs": 1, "batch_size": 7, "lr": 0.5, "hyper": {"lam": 2.0}}
    plain, pulled = (_update(received=_received(c), **step)["model"] for c in ((0, 0, 0), (1, 1, 1)))

    def distance(q):
        return sum((oracle.features(q, x[[s]]) - 0.75).pow(2).sum() for s in range(7)) / (7 * 3)

    g = oracle.gradient(distance, toy.initial(), oracle.BODY)
    oracle.close(oracle.body(pulled), {k: plain[k] - 0.5 * 2.0 * g[k] for k in oracle.BODY})
    assert oracle.same(oracle.head(pulled), oracle.head(plain))


def test_one_client_without_the_pull_trains_as_in_fedrep():
    """Also in shuffled order; FedRep's head trains at the protocol's rate, FedPAC's at its own."""
    one = toy.federation((9,))
    settings = {"federation": one, "rounds": 3, "shuffle": True, "momentum": 0.5, "weight_decay": 0.02}
    a = toy.run("fedpac", {"lam": 0, "head_lr": 0.1, "head_epochs": 2}, **settings)
    b = toy.run("fedrep", {"head_epochs": 2}, **settings)
    oracle.close(a.server["model"], b.server["model"])
    oracle.close(a.server["heads"][0], b.client_states[0]["model"])


def test_one_client_keeps_its_own_head():
    x, y, _, _ = oracle.arrays((9,))[0]
    record = toy.run("fedpac", {"lam": 0}, federation=toy.federation((9,)), rounds=3)
    p = toy.initial()
    for _ in range(3):
        p = oracle.train(p, x, y, 1, names=oracle.HEAD, lr=0.1)
        p = oracle.train(p, x, y, 2, names=oracle.BODY, lr=0.1)
    oracle.close({**record.server["model"], **record.server["heads"][0]}, p)


def test_the_heads_rate_is_its_own_and_does_not_decay():
    x, y, _, _ = oracle.arrays()[0]
    upload = _update(round=5, lr=0.4, lr_decay=0.5, hyper={"head_lr": 0.7})
    oracle.close(upload["model"], train(toy.initial(), x, y, {}, 1.0, head_lr=0.7, lr=0.4 * 0.5**4))


def test_one_local_epoch_trains_the_body_too():
    x, y, _, _ = oracle.arrays()[0]
    found = _update(local_epochs=1)["model"]
    oracle.close(found, train(toy.initial(), x, y, {}, 1.0, epochs=1))
    assert all(not torch.equal(found[k], toy.initial()[k]) for k in oracle.BODY)


@pytest.mark.parametrize("n", [1, 5])
def test_batches_of_one_sample_train(n):
    x, y, _, _ = oracle.arrays((n,))[0]
    upload = _update(data=(x, y), batch_size=1, received=_received((1, 1, 1)))
    means = {c: torch.full((3,), 0.75).double() for c in range(3)}
    oracle.close(upload["model"], train(toy.initial(), x, y, means, 1.0, size=1))
    if n == 1:
        assert float(upload["variance"]) == pytest.approx(0, abs=1e-15)


def test_a_round_is_one_epoch_of_the_head_at_0_1_and_a_pull_of_1_unless_told():
    method = registry.algorithm("fedpac")()
    assert (method.head_lr, method.head_epochs, method.lam) == (0.1, 1, 1)
    assert toy.run("fedpac", rounds=1).rounds[0]["steps"] == (1 + 2) * 3 + (1 + 2) * 2


def test_the_loss_in_the_record_is_that_of_the_bodys_epochs_with_the_pull():
    x, y, _, _ = oracle.arrays()[0]
    received = _received((1, 1, 1))
    client = toy.client(x, y)
    registry.algorithm("fedpac")(lam=2.0).local_update(client, received, {})
    p, total = oracle.train(toy.initial(), x, y, 1, names=oracle.HEAD, lr=0.1), 0.0
    for b in oracle.batches(7, 3) * 2:

        def loss(q, b):
            return oracle.nll(q, x[b], y[b]) + 2 * ((oracle.features(q, x[b]) - 0.75) ** 2).mean()

        total += len(b) * float(loss(p, b))
        p = oracle.descend(p, [b], loss, names=oracle.BODY, lr=0.1)
    assert client.counts.loss_sum == pytest.approx(total, abs=1e-9)


def test_buffers_of_the_body_are_averaged_and_stay_while_the_head_trains():
    net = toy.batch_norm()
    method, first = registry.algorithm("fedpac")(), toy.round(network=net)
    server = method.init_server(first.setup)
    uploads = []
    for i, (x, y, _, _) in enumerate(oracle.arrays((8, 4))):
        client = toy.client(x, y, net=net, id=i, batch_size=4, local_epochs=1)
        upload, _ = method.local_update(client, method.broadcast(first, server, i), {})
        uploads.append(Upload(upload.content, upload.weight, client=i))
    new = method.aggregate(first, server, uploads)
    for name in ("body.1.running_mean", "body.1.running_var"):
        a, b = (u["model"][name] for u in uploads)
        torch.testing.assert_close(new["model"][name], (8 * a + 4 * b) / 12, rtol=0, atol=1e-12)
    # One epoch over one batch: one update of the running mean, by the initial body.
    x = oracle.arrays((8, 4))[1][0]
    before = x @ toy.initial()["body.0.weight"].T + toy.initial()["body.0.bias"]
    torch.testing.assert_close(uploads[1]["model"]["body.1.running_mean"], 0.1 * before.mean(0), rtol=0, atol=1e-12)
    # The statistics use the received buffers.
    z = functional_call(net.eval().body, {k[5:]: t for k, t in first.setup.model.items() if k in server["model"]}, x)
    h, v = statistics(z.detach(), oracle.arrays((8, 4))[1][1])
    torch.testing.assert_close(uploads[1]["statistics"], h, rtol=0, atol=1e-12)
    assert float(uploads[1]["variance"]) == pytest.approx(v, abs=1e-12)


# The server. Head j is 1 in place j and 0 elsewhere, so a combined head shows its weights.


def _aggregate(h, v, *, ids=None, count=None, mean=None, samples=None, server=None, dtype=torch.float64):
    """The server after a round of uploads with these statistics, and the weights of the heads, a row per upload."""
    size = len(v)
    ids = list(ids or range(size))
    everyone = max(ids) + 1
    method, now = registry.algorithm("fedpac")(), toy.round(1, ids, clients=everyone, network=toy.net().to(dtype))
    server = server or method.init_server(now.setup)
    uploads = []
    for k, i in enumerate(ids):
        head = torch.zeros(9, dtype=dtype)
        head[k] = 1
        model = {**now.setup.model, "head.weight": head.view(3, 3), "head.bias": torch.zeros(3, dtype=dtype)}
        content = {
            "model": {k: t if k in oracle.HEAD else torch.full_like(t, i) for k, t in model.items()},
            "mean": torch.zeros(3, 3, dtype=dtype) if mean is None else mean[k],
            "count": torch.ones(3, dtype=dtype) if count is None else count[k],
            "statistics": h[k].to(dtype),
            "variance": v[k],
        }
        uploads.append(Upload(content, 1.0 if samples is None else samples[k], client=i))
    new = method.aggregate(now, server, uploads)
    return new, torch.stack([new["heads"][i]["head.weight"].flatten()[:size] for i in ids])


def _problem(size, seed, *, spread=1.0, noise=1.0):
    """Random H and V."""
    random = torch.Generator().manual_seed(seed)
    h = [spread * torch.randn(3, 3, generator=random).double() for _ in range(size)]
    return h, (noise * torch.rand(size, generator=random).double() * 4).tolist()


def _loss(p, a):
    a = np.asarray(a)
    return float(a @ p @ a)


@pytest.mark.parametrize("noise", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_heads_have_the_best_weights_of_all_supports(size, noise):
    for seed in range(6):
        h, v = _problem(size, seed, noise=noise)
        _, weights = _aggregate(h, v)
        expected = np.stack([combination(h, v, i) for i in range(size)])
        np.testing.assert_allclose(weights.numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("size", "noise"), [(20, 0.1), (20, 10.0), (40, 1.0)])
def test_of_many_heads_none_is_worth_more_weight(size, noise):
    """The conditions of a minimum: (P a)_k is the same for all k with a weight, and not less for the others."""
    random = np.random.RandomState(size)
    h, v = _problem(size, 0, noise=noise)
    v = [t * 10 ** random.uniform(-3, 1) for t in v]  # as of clients of very unequal sizes
    for i, weights in enumerate(head_weights(v, h)):
        a, p = np.array(weights), matrix(h, v, i)
        slope, least = p @ a, a @ p @ a
        assert a.min() >= 0
        assert a.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(slope[a > 0], least, rtol=1e-8)
        assert slope.min() >= least * (1 - 1e-8)


@pytest.mark.parametrize("size", [2, 3])
def test_no_weights_of_a_fine_grid_are_better(size):
    steps = 400
    grid = [a for a in itertools.product(range(steps + 1), repeat=size - 1) if sum(a) <= steps]
    grid = np.array([(*a, steps - sum(a)) for a in grid]) / steps
    for seed in range(4):
        h, v = _problem(size, seed, noise=5.0)
        _, weights = _aggregate(h, v)
        for i in range(size):
            p = matrix(h, v, i)
            least = np.einsum("gj,jk,gk->g", grid, p, grid).min()
            assert least - 0.01 * np.abs(p).max() < _loss(p, weights[i]) < least + 1e-3 * np.abs(p).max()


def test_of_two_clients_the_weights_have_a_closed_form():
    for seed in range(10):
        h, v = _problem(2, seed, spread=0.3)
        _, weights = _aggregate(h, v)
        far = float((h[0] - h[1]).square().sum())
        for i, j in ((0, 1), (1, 0)):  # i has no distance to itself, j has `far`: P = diag(v_i, v_j + far)
            own = (v[j] + far) / (v[i] + v[j] + far)
            assert weights[i, i] == pytest.approx(own, abs=1e-12)
            assert weights[i, j] == pytest.approx(1 - own, abs=1e-12)


def test_weights_of_0_001_and_less_are_left_out_and_the_others_sum_to_one():
    alike = [torch.ones(3, 3).double()] * 3  # the best weights are as 1 / V
    share = [0.0009, 0.4, 0.5991]
    _, weights = _aggregate(alike, [1 / a for a in share])
    np.testing.assert_allclose(weights, [[0, 0.4 / 0.9991, 0.5991 / 0.9991]] * 3, rtol=0, atol=1e-9)
    assert (weights[:, 0] == 0).all()
    share = [0.0011, 0.4, 0.5989]
    _, weights = _aggregate(alike, [1 / a for a in share])
    np.testing.assert_allclose(weights, [share] * 3, rtol=0, atol=1e-9)


def test_weights_do_not_depend_on_the_scale_of_the_features():
    h, v = _problem(4, 1)
    _, usual = _aggregate(h, v)
    for scale in (1e-12, 1e-4, 1e4, 1e12):
        _, weights = _aggregate([scale * t for t in h], [scale**2 * t for t in v])
        torch.testing.assert_close(weights, usual, rtol=0, atol=1e-9)
    for scale in (1e-4, 1.0, 1e4):
        _, weights = _aggregate([scale * t for t in h], [scale**2 * t for t in v], dtype=torch.float32)
        torch.testing.assert_close(weights.double(), usual, rtol=0, atol=1e-4)


def test_without_variance_everyone_keeps_its_own_head():
    """D_i is 0 for i alone."""
    for size in (2, 3, 5):
        h, _ = _problem(size, 3)
        _, weights = _aggregate(h, [0.0] * size)
        torch.testing.assert_close(weights, torch.eye(size).double(), rtol=0, atol=1e-6)


def test_one_participant_gets_its_own_head():
    for v in (0.0, 2.0):
        _, weights = _aggregate([torch.ones(3, 3).double()], [v])
        assert weights.tolist() == [[1]]


def test_alike_clients_get_the_plain_mean_or_at_least_one_of_the_best():
    alike = [torch.ones(3, 3).double()] * 4
    _, weights = _aggregate(alike, [2.0] * 4)
    torch.testing.assert_close(weights, torch.full((4, 4), 0.25).double(), rtol=0, atol=1e-9)
    for same in (alike, [torch.zeros(3, 3).double()] * 4):
        _, weights = _aggregate(same, [0.0] * 4)  # all weights are best
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(4).double(), rtol=0, atol=1e-12)


def test_a_client_that_has_no_variance_is_everything_to_one_that_is_like_it():
    h = [torch.ones(3, 3).double(), torch.ones(3, 3).double(), torch.zeros(3, 3).double()]
    _, weights = _aggregate(h, [1.0, 0.0, 0.5])
    torch.testing.assert_close(weights[:2], torch.tensor([[0.0, 1, 0]] * 2).double(), rtol=0, atol=1e-6)


def test_weights_belong_to_the_clients_whatever_their_numbers_and_the_order_of_uploads():
    h, v = _problem(4, 2)
    ids = [1, 3, 4, 7]
    new, weights = _aggregate(h, v, ids=ids)
    expected = np.stack([combination(h, v, i) for i in range(4)])
    np.testing.assert_allclose(weights, expected, rtol=0, atol=1e-9)
    assert new["heads"].keys() == set(ids)
    for order in ([2, 0, 3, 1], [3, 2, 1, 0]):
        _, other = _aggregate([h[k] for k in order], [v[k] for k in order], ids=[ids[k] for k in order])
        torch.testing.assert_close(other, weights[order][:, order], rtol=0, atol=1e-9)
    assert len({tuple(np.sort(row).round(6)) for row in expected}) == 4  # everyone has other weights


def test_heads_of_absent_clients_stay():
    h, v = _problem(3, 4)
    before, _ = _aggregate(h, v, ids=[0, 2, 5])
    after, _ = _aggregate(h[:2], v[:2], ids=[2, 3], server=before)
    assert after["heads"].keys() == {0, 2, 3, 5}
    assert all(oracle.same(after["heads"][i], before["heads"][i]) for i in (0, 5))
    assert not oracle.same(after["heads"][2], before["heads"][2])


def test_bodies_are_weighted_by_samples_and_not_by_the_weights_of_heads():
    h, v = _problem(2, 0)
    new, _ = _aggregate(h, v, ids=[1, 5], samples=[3.0, 1.0])
    oracle.close(new["model"], {k: torch.full_like(toy.initial()[k], 2.0) for k in oracle.BODY})


def test_prototypes_are_weighted_by_the_samples_of_their_class():
    count = torch.tensor([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]).double()
    mean = torch.tensor([[1.0, 4.0, 8.0], [3.0, 9.0, 7.0]]).double()[:, :, None].expand(2, 3, 3)
    h, v = _problem(2, 0)
    start, _ = _aggregate(h, v, samples=[1.0, 50.0], count=count, mean=mean)
    torch.testing.assert_close(start["mean"][:, 0], torch.tensor([2.5, 4.0, 0.0]).double(), rtol=0, atol=1e-12)
    assert start["count"].tolist() == [4, 2, 0]


def test_a_class_that_nobody_uploads_keeps_its_prototype_and_one_that_comes_back_starts_again():
    h, v = _problem(1, 0)
    first, _ = _aggregate(h, v, count=[torch.tensor([1.0, 6, 1]).double()], mean=[torch.full((3, 3), 2.0).double()])
    second, _ = _aggregate(
        h, v, count=[torch.tensor([2.0, 0, 0]).double()], mean=[torch.full((3, 3), 5.0).double()], server=first
    )
    assert second["mean"][:, 0].tolist() == [5, 2, 2]
    assert second["count"].tolist() == [2, 6, 1]


# Identities.


def test_clients_with_the_same_data_are_one_client():
    client = oracle.arrays()[0]
    two, one = (toy.run("fedpac", federation=pflbench.Federation.from_arrays([client] * n)) for n in (2, 1))
    torch.testing.assert_close(two.server["mean"], one.server["mean"], rtol=0, atol=1e-12)
    oracle.close(two.server["model"], one.server["model"])
    oracle.close(two.server["heads"][1], one.server["heads"][0])
