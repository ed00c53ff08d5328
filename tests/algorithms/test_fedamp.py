import math

import oracle
import pytest
import torch
import toy
from facts import BODY, HEAD, Facts

import pflbench
from pflbench import Message, UsageError
from pflbench.core import Round, Setup, registry

FACTS = Facts(
    bytes={"": (BODY + HEAD, BODY + HEAD + 8)},
    sensitive=({"decay_every": 1}, (24, 40), 2),
    alone=True,  # its broadcast is costly, and no test reads it
)

HYPER = {"lam": 0.8, "alpha": 0.9, "alpha_decay": 0.5, "decay_every": 1, "sigma": 3.0}


# The oracle, from the paper's equations.


def cloud_model(w, i, others, alpha, sigma):
    """u_i from the models `w`, of which client i attends to `others`."""
    xi = {
        j: alpha * math.exp(-sum(float(((w[i][k] - w[j][k]) ** 2).sum()) for k in w[i]) / sigma) / sigma for j in others
    }
    return {k: (1 - sum(xi.values())) * w[i][k] + sum(xi[j] * w[j][k] for j in others) for k in w[i]}


def fedamp(data, chosen, h, *, lr_decay=1.0, **sgd):
    """The clients' models, who has taken part, and what was evaluated in each round."""
    w, seen, tested = [toy.initial()] * len(data), set(), []
    for r, taking_part in enumerate(chosen):
        alpha = h["alpha"] * h["alpha_decay"] ** (r // h["decay_every"])
        new = list(w)
        for i in taking_part:
            x, y, _, _ = data[i]
            u = cloud_model(w, i, sorted(seen - {i}), alpha, h["sigma"])

            def loss(q, b, u=u, x=x, y=y, alpha=alpha):
                pull = sum(((q[k] - u[k]) ** 2).sum() for k in u)
                return oracle.nll(q, x[b], y[b]) + h["lam"] / (2 * alpha) * pull

            new[i] = oracle.descend(u, oracle.batches(len(y), 3) * 2, loss, lr=0.1 * lr_decay**r, **sgd)
        w, seen = new, seen | set(taking_part)
        tested.append(list(w))
    return w, seen, tested


@pytest.mark.parametrize("decay_every", [1, 2])
def test_two_rounds(turns, decay_every):
    settings, chosen = turns
    h = {**HYPER, "decay_every": decay_every}
    record = toy.run("fedamp", h, **settings, **toy.FULL)
    w, seen, tested = fedamp(oracle.arrays(), chosen, h, lr_decay=0.5, momentum=0.5, weight_decay=0.02)

    assert record.server.keys() == {"models"}
    assert record.server["models"].keys() == seen
    for i in range(2):
        assert record.client_states[i].keys() == {"model"}
        oracle.close(record.client_states[i]["model"], w[i])
        if i in seen:
            oracle.close(record.server["models"][i], w[i])
    toy.check_tested(record, tested)
    assert all(row["global_accuracy"] is None for row in record.evaluations)

    method = registry.algorithm("fedamp")(**h)
    alpha = 0.9 * 0.5 ** (2 // decay_every)
    for i in range(2):
        sent = method.broadcast(toy.round(3), record.server, i)
        oracle.close(sent["model"], cloud_model(w, i, sorted(seen - {i}), alpha, 3.0))
        assert sent.content.keys() == {"model", "alpha"}
        assert sent["alpha"] == alpha


def test_three_rounds_of_three_clients_of_whom_two_take_part():
    sizes, settings = (7, 4, 5), {"join_ratio": 0.67, "rounds": 3, "sampling_seed": 38}
    spec = toy.spec("fedamp", clients=3, **settings)
    chosen = [pflbench.participants(spec, r) for r in (1, 2, 3)]
    assert chosen == [[1, 2], [0, 2], [1, 2]]  # 0 comes late, and who is away is attended to
    record = toy.run("fedamp", HYPER, federation=toy.federation(sizes), **settings)
    w, _, _ = fedamp(oracle.arrays(sizes), chosen, HYPER)
    for i in range(3):
        oracle.close(record.client_states[i]["model"], w[i])


# The cloud model.


def scalar(value):
    return {"w": torch.tensor([value], dtype=torch.float64)}


def send(method, values, client, number=1):
    """What `client` is sent in round `number` by a server with models of one number, the initial one 0."""
    setup = Setup(clients=11, classes=3, features=1, model=scalar(0.0))
    server = {"models": {i: scalar(v) for i, v in values.items()}}
    return method.broadcast(Round(number, (client,), setup), server, client)


def test_a_client_attends_more_to_the_more_similar_client():
    method = registry.algorithm("fedamp")(alpha=0.5, sigma=2.0)
    found = float(send(method, {0: 1.0, 1: 2.0, 2: 4.0}, 0)["model"]["w"])
    near, far = 0.25 * math.exp(-1 / 2), 0.25 * math.exp(-9 / 2)
    assert found == pytest.approx((1 - near - far) * 1 + near * 2 + far * 4, abs=1e-12)


def test_attention_that_could_leave_less_than_nothing_for_the_client_itself_is_refused_before_the_run(tmp_path):
    message = r"fedamp: the attention of a client to 1 others can sum to 2, above 1; lower alpha \(4\) or raise sigma"
    with pytest.raises(UsageError, match=message):
        registry.algorithm("fedamp")(alpha=4.0, sigma=2.0).check(toy.setup())
    registry.algorithm("fedamp")(alpha=2.0, sigma=2.0).check(toy.setup())
    for clients in range(2, 200):
        registry.algorithm("fedamp")(alpha=3.0 / (clients - 1), sigma=3.0).check(toy.setup(clients=clients))
    with pytest.raises(UsageError, match=message):
        pflbench.run(toy.spec("fedamp", {"alpha": 4.0, "sigma": 2.0}), toy.federation(), toy.net(), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_attention_may_leave_nothing_for_the_client_itself():
    found = send(registry.algorithm("fedamp")(alpha=2.0, sigma=2.0), {0: 3.0, 1: 3.0}, 0)
    assert float(found["model"]["w"]) == 3


def test_client_1_attends_to_client_10():
    found = send(registry.algorithm("fedamp")(alpha=0.5, sigma=2.0), {1: 1.0, 10: 2.0}, 1)
    assert float(found["model"]["w"]) == pytest.approx(1 + 0.25 * math.exp(-1 / 2), abs=1e-12)


def test_the_defaults():
    h = registry.algorithm("fedamp")()
    assert (h.lam, h.sigma) == (1.0, 1e6)


@pytest.mark.parametrize(("number", "lr"), [(1, 0.1), (3, 0.025)])
def test_the_pull_is_never_further_than_to_the_cloud_model_however_small_alpha_has_become(number, lr):
    x, y, _, _ = oracle.arrays()[0]
    cloud, own = toy.initial(), {k: 2 * t for k, t in toy.initial().items()}
    received = Message({"model": cloud, "alpha": 1e-3})  # lr lambda / alpha is 100
    client = toy.client(x, y, local_epochs=1, round=number, lr_decay=0.5)
    _, new = registry.algorithm("fedamp")().local_update(client, received, {"model": own})
    p = cloud
    for b in oracle.batches(7, 3):
        g = oracle.gradient(lambda q, b=b: oracle.nll(q, x[b], y[b]), p, oracle.BODY + oracle.HEAD)
        p = {k: cloud[k] - lr * g[k] for k in p}
    oracle.close(new["model"], p)


def test_who_has_not_taken_part_attends_from_the_initial_model_and_nobody_attends_to_it():
    method = registry.algorithm("fedamp")(alpha=0.5, sigma=2.0)
    assert float(send(method, {1: 1.0}, 0)["model"]["w"]) == pytest.approx(0.25 * math.exp(-1 / 2), abs=1e-12)
    assert float(send(method, {1: 1.0}, 1)["model"]["w"]) == 1.0


@pytest.mark.parametrize(("number", "alpha"), [(1, 1e4), (30, 1e4), (31, 1e3), (60, 1e3), (61, 1e2)])
def test_alpha_falls_to_a_tenth_every_thirty_rounds_unless_told(number, alpha):
    method = registry.algorithm("fedamp")()
    assert send(method, {}, 0, number)["alpha"] == pytest.approx(alpha)


def test_a_client_keeps_its_influence_while_it_is_away():
    changed = oracle.arrays((7, 4, 5))
    changed[1] = (changed[1][0] * -3, *changed[1][1:])
    settings = {"join_ratio": 0.67, "rounds": 2, "sampling_seed": 38}  # [1, 2], then [0, 2]
    federations = (toy.federation((7, 4, 5)), pflbench.Federation.from_arrays(changed, classes=3))
    a, b = (toy.run("fedamp", HYPER, federation=f, **settings) for f in federations)
    assert not oracle.same(a.client_states[0]["model"], b.client_states[0]["model"])


# The pull.


def test_the_pull_to_the_cloud_model_has_a_gradient():
    x, y, _, _ = oracle.arrays()[0]
    cloud = {k: p + 0.3 for k, p in toy.initial().items()}
    received = Message({"model": cloud, "alpha": 2.0})
    away = []
    for lam in (0.0, 2.0, 8.0):
        method = registry.algorithm("fedamp")(lam=lam)
        _, state = method.local_update(toy.client(x, y), received, {"model": toy.initial()})
        away.append(math.sqrt(sum(float(((state["model"][k] - cloud[k]) ** 2).sum()) for k in cloud)))
    assert away[0] > 1.1 * away[1] > 1.1 * 1.1 * away[2]


def test_the_pull_weighs_lambda_over_alpha():
    x, y, _, _ = oracle.arrays()[0]

    def trained(lam, alpha):
        received = Message({"model": toy.initial(), "alpha": alpha})
        method = registry.algorithm("fedamp")(lam=lam)
        return method.local_update(toy.client(x, y), received, {"model": toy.initial()})[1]["model"]

    assert oracle.same(trained(1.0, 2.0), trained(2.0, 4.0))
    assert not oracle.same(trained(1.0, 2.0), trained(1.0, 4.0))


# Identities.


@pytest.mark.parametrize("turn", range(3))
def test_without_pull_and_attention_it_is_local_bit_by_bit(turn):
    settings = {**toy.TURNS[turn][0], **toy.FULL, "shuffle": True, "rounds": 3}
    a = toy.run("fedamp", {"lam": 0.0, "sigma": 1e-9, "alpha": 1e-9}, **settings)
    b = toy.run("local", **settings)
    for i in range(2):
        assert oracle.same(a.client_states[i]["model"], b.client_states[i]["model"])
    assert [r["test_loss"] for r in a.evaluations] == [r["test_loss"] for r in b.evaluations]


def test_one_client_without_pull_is_local():
    a, b = (toy.run(m, h, federation=toy.federation((7,))) for m, h in (("fedamp", {"lam": 0.0}), ("local", {})))
    assert oracle.same(a.client_states[0]["model"], b.client_states[0]["model"])


def test_without_pull_and_with_the_same_attention_for_all_it_is_fedavg_with_equal_weights():
    federation = toy.federation((6, 6, 6))
    settings = {"federation": federation, "rounds": 3}
    a = toy.run("fedamp", {"lam": 0.0, "sigma": 1e12, "alpha": 1e12 / 3}, **settings)
    b = toy.run("fedavg", **settings)
    method = registry.algorithm("fedamp")(lam=0.0, sigma=1e12, alpha=1e12 / 3)
    for i in range(3):
        oracle.close(method.broadcast(toy.round(4, range(3), clients=3), a.server, i)["model"], b.server["model"])


def test_the_state_of_a_client_does_not_leak_to_another_but_through_the_cloud_model():
    changed = oracle.arrays()
    changed[0] = (changed[0][0] * -3, *changed[0][1:])
    changed = pflbench.Federation.from_arrays(changed, classes=3)
    deaf = {**HYPER, "sigma": 1e-9, "alpha": 1e-9}
    for hyper, leaks in ((deaf, False), (HYPER, True)):
        a, b = (toy.run("fedamp", hyper, federation=f) for f in (None, changed))
        assert oracle.same(a.client_states[1]["model"], b.client_states[1]["model"]) != leaks


@pytest.mark.parametrize("name", HYPER)
def test_every_hyperparameter_changes_the_result(name):
    a, b = (toy.run("fedamp", h).evaluations[-1]["test_loss"] for h in (HYPER, {**HYPER, name: HYPER[name] * 2}))
    assert a != b


def test_fewer_clients_than_planned_work():
    record = toy.run("fedamp", HYPER, join_ratio=0.5, rounds=3)
    assert record.status == "finished"
    assert [len(row["participants"]) for row in record.rounds] == [1, 1, 1]


def test_uploads_on_disk_and_two_processes_give_the_same_bits(tmp_path):
    spec = toy.spec("fedamp", HYPER, clients=3, rounds=3, join_ratio=0.67)
    federation = toy.federation((7, 4, 5))
    plain = pflbench.run(spec, federation, toy.net(), executor="serial")
    written = pflbench.run(spec, federation, toy.net(), executor="processes", workers=2, out=tmp_path)
    assert plain.fingerprints == written.fingerprints


def test_a_run_that_is_interrupted_and_resumed_gives_the_same_bits(tmp_path):
    spec = toy.spec("fedamp", HYPER, clients=3, rounds=5, join_ratio=0.67, shuffle=True)
    federation = toy.federation((7, 4, 5))
    plain, resumed = toy.interrupted(spec, federation, tmp_path)
    assert resumed.fingerprints == plain.fingerprints


def test_batch_norm_buffers_are_mixed_and_not_pulled():
    net = toy.batch_norm()
    settings = {"net": net, "federation": toy.federation((8, 4)), "batch_size": 4}
    record = toy.run("fedamp", HYPER, **settings)
    assert record.status == "finished"
    model = record.server["models"][0]
    cloud = registry.algorithm("fedamp")(**HYPER).broadcast(toy.round(3), record.server, 0)["model"]
    for name in ("body.1.running_mean", "body.1.running_var"):
        low, high = (torch.minimum, torch.maximum)
        other = record.server["models"][1][name]
        assert ((cloud[name] >= low(model[name], other)) & (cloud[name] <= high(model[name], other))).all()
        assert not torch.equal(cloud[name], model[name])
    # The training of one batch begins at the cloud model, where the pull is zero; the statistics are the batch's.
    a, b = (toy.run("fedamp", {**HYPER, "lam": lam}, rounds=1, local_epochs=1, **settings) for lam in (0.0, 0.8))
    for name in ("body.1.running_mean", "body.1.running_var"):
        assert torch.equal(a.server["models"][1][name], b.server["models"][1][name])
