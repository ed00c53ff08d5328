import math

import pytest
import torch

import pflbench
from pflbench import Message, UsageError
from pflbench.core import registry

HYPER = {"lam": 0.8, "alpha": 0.9, "alpha_decay": 0.5, "decay_every": 1, "sigma": 3.0}


# The oracle, from the paper's equations.


def cloud_model(w, i, others, alpha, sigma):
    """u_i from the models `w`, of which client i attends to `others`."""
    xi = {
        j: alpha * math.exp(-sum(float(((w[i][k] - w[j][k]) ** 2).sum()) for k in w[i]) / sigma) / sigma for j in others
    }
    return {k: (1 - sum(xi.values())) * w[i][k] + sum(xi[j] * w[j][k] for j in others) for k in w[i]}


def fedamp(toy, data, chosen, h, *, lr_decay=1.0, **sgd):
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
                return toy.nll(q, x[b], y[b]) + h["lam"] / (2 * alpha) * pull

            new[i] = toy.descend(u, toy.batches(len(y), 3) * 2, loss, lr=0.1 * lr_decay**r, **sgd)
        w, seen = new, seen | set(taking_part)
        tested.append(list(w))
    return w, seen, tested


@pytest.mark.parametrize("decay_every", [1, 2])
def test_two_rounds(toy, turns, decay_every):
    settings, chosen = turns
    h = {**HYPER, "decay_every": decay_every}
    record = toy.run("fedamp", h, **settings, **toy.FULL)
    w, seen, tested = fedamp(toy, toy.arrays(), chosen, h, lr_decay=0.5, momentum=0.5, weight_decay=0.02)

    assert record.server.keys() == {"initial", "rounds", *(f"model {i}" for i in seen)}
    toy.close(record.server["initial"], toy.initial())
    assert float(record.server["rounds"]["done"]) == 2
    for i in range(2):
        assert record.client_states[i].keys() == {"model"}
        toy.close(record.client_states[i]["model"], w[i])
        if i in seen:
            toy.close(record.server[f"model {i}"], w[i])
    toy.check_tested(record, tested)
    assert all(row["global_accuracy"] is None for row in record.rounds)

    method = registry.algorithm("fedamp")(**h)
    alpha = 0.9 * 0.5 ** (2 // decay_every)
    for i in range(2):
        down = method.broadcast(record.server, i)
        toy.close(down["model"], cloud_model(w, i, sorted(seen - {i}), alpha, 3.0))
        assert down["step"].keys() == {"alpha"}
        assert float(down["step"]["alpha"]) == alpha


def test_three_rounds_of_three_clients_of_whom_two_take_part(toy):
    sizes, settings = (7, 4, 5), {"join_ratio": 0.67, "rounds": 3, "sampling_seed": 38}
    spec = toy.spec("fedamp", clients=3, **settings)
    chosen = [pflbench.participants(spec, r) for r in (1, 2, 3)]
    assert chosen == [[1, 2], [0, 2], [1, 2]]  # 0 comes late, and who is away is attended to
    record = toy.run("fedamp", HYPER, federation=toy.federation(sizes), **settings)
    w, _, _ = fedamp(toy, toy.arrays(sizes), chosen, HYPER)
    for i in range(3):
        toy.close(record.client_states[i]["model"], w[i])


# The cloud model.


def scalar(value):
    return {"w": torch.tensor([value], dtype=torch.float64)}


def server_of(values, done=0):
    clients = {f"model {i}": scalar(v) for i, v in values.items()}
    return {"initial": scalar(0.0), "rounds": {"done": torch.tensor(float(done))}, **clients}


def test_a_client_attends_more_to_the_more_similar_client(toy):
    method = registry.algorithm("fedamp")(alpha=0.5, sigma=2.0)
    found = float(method.broadcast(server_of({0: 1.0, 1: 2.0, 2: 4.0}), 0)["model"]["w"])
    near, far = 0.25 * math.exp(-1 / 2), 0.25 * math.exp(-9 / 2)
    assert found == pytest.approx((1 - near - far) * 1 + near * 2 + far * 4, abs=1e-12)


def test_attention_that_leaves_less_than_nothing_for_the_client_itself_is_refused():
    method = registry.algorithm("fedamp")(alpha=4.0, sigma=2.0)
    with pytest.raises(UsageError, match=r"client 0 to 1 others sums to 1.21, above 1; lower alpha \(4\)"):
        method.broadcast(server_of({0: 1.0, 1: 2.0}), 0)


def test_attention_may_leave_nothing_for_the_client_itself():
    found = registry.algorithm("fedamp")(alpha=2.0, sigma=2.0).broadcast(server_of({0: 3.0, 1: 3.0}), 0)
    assert float(found["model"]["w"]) == 3


def test_client_1_attends_to_client_10():
    found = registry.algorithm("fedamp")(alpha=0.5, sigma=2.0).broadcast(server_of({1: 1.0, 10: 2.0}), 1)
    assert float(found["model"]["w"]) == pytest.approx(1 + 0.25 * math.exp(-1 / 2), abs=1e-12)


def test_the_defaults():
    h = registry.algorithm("fedamp")().h
    assert (h.lam, h.sigma) == (1.0, 1e6)


@pytest.mark.parametrize(("number", "lr"), [(1, 0.1), (3, 0.025)])
def test_the_pull_is_never_further_than_to_the_cloud_model_however_small_alpha_has_become(toy, number, lr):
    x, y, _, _ = toy.arrays()[0]
    cloud, own = toy.initial(), {k: 2 * t for k, t in toy.initial().items()}
    down = Message({"model": cloud, "step": {"alpha": torch.tensor(1e-3).double()}})  # lr lambda / alpha is 100
    local = toy.local(x, y, local_epochs=1, round=number, lr_decay=0.5)
    _, new = registry.algorithm("fedamp")().local_update(local, down, {"model": own})
    p = cloud
    for b in toy.batches(7, 3):
        g = toy.gradient(lambda q, b=b: toy.nll(q, x[b], y[b]), p, toy.BODY + toy.HEAD)
        p = {k: cloud[k] - lr * g[k] for k in p}
    toy.close(new["model"], p)


def test_who_has_not_taken_part_attends_from_the_initial_model_and_nobody_attends_to_it():
    method = registry.algorithm("fedamp")(alpha=0.5, sigma=2.0)
    server = server_of({1: 1.0})
    assert float(method.broadcast(server, 0)["model"]["w"]) == pytest.approx(0.25 * math.exp(-1 / 2), abs=1e-12)
    assert float(method.broadcast(server, 1)["model"]["w"]) == 1.0


@pytest.mark.parametrize(("done", "alpha"), [(0, 1e4), (29, 1e4), (30, 1e3), (59, 1e3), (60, 1e2)])
def test_alpha_falls_to_a_tenth_every_thirty_rounds_unless_told(done, alpha):
    method = registry.algorithm("fedamp")()
    assert float(method.broadcast(server_of({}, done), 0)["step"]["alpha"]) == pytest.approx(alpha)


def test_a_client_keeps_its_influence_while_it_is_away(toy):
    changed = toy.arrays((7, 4, 5))
    changed[1] = (changed[1][0] * -3, *changed[1][1:])
    settings = {"join_ratio": 0.67, "rounds": 2, "sampling_seed": 38}  # [1, 2], then [0, 2]
    federations = (toy.federation((7, 4, 5)), pflbench.Federation.from_arrays(changed, classes=3))
    a, b = (toy.run("fedamp", HYPER, federation=f, **settings) for f in federations)
    assert not toy.same(a.client_states[0]["model"], b.client_states[0]["model"])


# The pull.


def test_the_pull_to_the_cloud_model_has_a_gradient(toy):
    x, y, _, _ = toy.arrays()[0]
    cloud = {k: p + 0.3 for k, p in toy.initial().items()}
    down = Message({"model": cloud, "step": {"alpha": torch.tensor(2.0)}})
    away = []
    for lam in (0.0, 2.0, 8.0):
        method = registry.algorithm("fedamp")(lam=lam)
        _, state = method.local_update(toy.local(x, y), down, {"model": toy.initial()})
        away.append(math.sqrt(sum(float(((state["model"][k] - cloud[k]) ** 2).sum()) for k in cloud)))
    assert away[0] > 1.1 * away[1] > 1.1 * 1.1 * away[2]


def test_the_pull_weighs_lambda_over_alpha(toy):
    x, y, _, _ = toy.arrays()[0]

    def trained(lam, alpha):
        down = Message({"model": toy.initial(), "step": {"alpha": torch.tensor(alpha)}})
        method = registry.algorithm("fedamp")(lam=lam)
        return method.local_update(toy.local(x, y), down, {"model": toy.initial()})[1]["model"]

    assert toy.same(trained(1.0, 2.0), trained(2.0, 4.0))
    assert not toy.same(trained(1.0, 2.0), trained(1.0, 4.0))


# Identities.


@pytest.mark.parametrize("turn", range(3))
def test_without_pull_and_attention_it_is_local_bit_by_bit(toy, turn):
    settings = {**toy.TURNS[turn][0], **toy.FULL, "shuffle": True, "rounds": 3}
    a = toy.run("fedamp", {"lam": 0.0, "sigma": 1e-9, "alpha": 1e-9}, **settings)
    b = toy.run("local", **settings)
    for i in range(2):
        assert toy.same(a.client_states[i]["model"], b.client_states[i]["model"])
    assert [r["test_loss"] for r in a.rounds] == [r["test_loss"] for r in b.rounds]


def test_one_client_without_pull_is_local(toy):
    a, b = (toy.run(m, h, federation=toy.federation((7,))) for m, h in (("fedamp", {"lam": 0.0}), ("local", {})))
    assert toy.same(a.client_states[0]["model"], b.client_states[0]["model"])


def test_without_pull_and_with_the_same_attention_for_all_it_is_fedavg_with_equal_weights(toy):
    federation = toy.federation((6, 6, 6))
    settings = {"federation": federation, "rounds": 3}
    a = toy.run("fedamp", {"lam": 0.0, "sigma": 1e12, "alpha": 1e12 / 3}, **settings)
    b = toy.run("fedavg", **settings)
    method = registry.algorithm("fedamp")(lam=0.0, sigma=1e12, alpha=1e12 / 3)
    for i in range(3):
        toy.close(method.broadcast(a.server, i)["model"], b.server["model"])


def test_the_state_of_a_client_does_not_leak_to_another_but_through_the_cloud_model(toy):
    changed = toy.arrays()
    changed[0] = (changed[0][0] * -3, *changed[0][1:])
    changed = pflbench.Federation.from_arrays(changed, classes=3)
    deaf = {**HYPER, "sigma": 1e-9, "alpha": 1e-9}
    for hyper, leaks in ((deaf, False), (HYPER, True)):
        a, b = (toy.run("fedamp", hyper, federation=f) for f in (None, changed))
        assert toy.same(a.client_states[1]["model"], b.client_states[1]["model"]) != leaks


@pytest.mark.parametrize("name", HYPER)
def test_every_hyperparameter_changes_the_result(toy, name):
    a, b = (toy.run("fedamp", h).rounds[-1]["test_loss"] for h in (HYPER, {**HYPER, name: HYPER[name] * 2}))
    assert a != b


def test_fewer_clients_than_planned_work(toy):
    record = toy.run("fedamp", HYPER, join_ratio=0.5, rounds=3)
    assert record.status == "finished"
    assert [len(row["participants"]) for row in record.rounds] == [1, 1, 1]


def test_uploads_on_disk_and_two_processes_give_the_same_bits(toy, tmp_path):
    spec = toy.spec("fedamp", HYPER, clients=3, rounds=3, join_ratio=0.67)
    federation = toy.federation((7, 4, 5))
    plain = pflbench.run(spec, federation, toy.net(), executor="serial")
    written = pflbench.run(spec, federation, toy.net(), executor="processes", workers=2, out=tmp_path)
    assert plain.fingerprints == written.fingerprints


def test_a_run_that_is_interrupted_and_resumed_gives_the_same_bits(toy, tmp_path):
    spec = toy.spec("fedamp", HYPER, clients=3, rounds=5, join_ratio=0.67, shuffle=True)
    federation = toy.federation((7, 4, 5))
    plain, resumed = toy.interrupted(spec, federation, tmp_path)
    assert resumed.fingerprints == plain.fingerprints


def test_batch_norm_buffers_are_mixed_and_not_pulled(toy):
    net = toy.batch_norm()
    settings = {"net": net, "federation": toy.federation((8, 4)), "batch_size": 4}
    record = toy.run("fedamp", HYPER, **settings)
    assert record.status == "finished"
    model = record.server["model 0"]
    cloud = registry.algorithm("fedamp")(**HYPER).broadcast(record.server, 0)["model"]
    for name in ("body.1.running_mean", "body.1.running_var"):
        low, high = (torch.minimum, torch.maximum)
        other = record.server["model 1"][name]
        assert ((cloud[name] >= low(model[name], other)) & (cloud[name] <= high(model[name], other))).all()
        assert not torch.equal(cloud[name], model[name])
    # The training of one batch begins at the cloud model, where the pull is zero; the statistics are the batch's.
    a, b = (toy.run("fedamp", {**HYPER, "lam": lam}, rounds=1, local_epochs=1, **settings) for lam in (0.0, 0.8))
    for name in ("body.1.running_mean", "body.1.running_var"):
        assert torch.equal(a.server["model 1"][name], b.server["model 1"][name])
