import numpy as np
import pytest
import torch
from torch import nn

import pflbench
from pflbench import Message, UsageError
from pflbench.core import registry

PERSONAL = ("personal.weight", "personal.bias")


# The oracle, from the paper's equations.


def zero(toy):
    return {"personal.weight": torch.zeros(3, 3).double(), "personal.bias": torch.zeros(3).double()}


def balanced(toy, p, x, y, counts, gamma):
    """-log(N_y^gamma exp g_y / sum_c N_c^gamma exp g_c), the mean."""
    scores = toy.logits(p, x).exp() * counts**gamma
    return -(scores[torch.arange(len(y)), y] / scores.sum(1)).log().mean()


def own_logits(toy, p, x):
    """Generic and personalised logits, the former and the features without a gradient."""
    return toy.logits(p, x).detach() + toy.features(p, x).detach() @ p["personal.weight"].T + p["personal.bias"]


def client(toy, p, x, y, gamma, epochs=2, **kw):
    counts = torch.tensor([int((y == c).sum()) for c in range(3)], dtype=torch.float64)

    def both(q, b):
        z = own_logits(toy, q, x[b])
        personal = (torch.logsumexp(z, 1) - z[torch.arange(len(b)), y[b]]).mean()
        return balanced(toy, q, x[b], y[b], counts, gamma) + personal

    return toy.descend(p, toy.batches(len(y), 3) * epochs, both, names=toy.BODY + toy.HEAD + PERSONAL, **kw)


def one_network(toy, p):
    head = {
        "head.weight": p["head.weight"] + p["personal.weight"],
        "head.bias": p["head.bias"] + p["personal.bias"],
    }
    return {**toy.body(p), **head}


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_two_rounds_train_both_heads_and_only_the_generic_model_travels(toy, turns, gamma):
    settings, chosen = turns
    record = toy.run("fedrod", {"gamma": gamma}, **settings, **toy.FULL)

    server, own = toy.initial(), [zero(toy)] * 2
    tested, everyones = [], []
    for r in range(2):
        ups, sizes = [], []
        for i in chosen[r]:
            x, y, _, _ = toy.arrays()[i]
            sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
            p = client(toy, {**server, **own[i]}, x, y, gamma, **sgd)
            ups.append({k: p[k] for k in toy.BODY + toy.HEAD})
            own[i] = {k: p[k] for k in PERSONAL}
            sizes.append(len(y))
        server = toy.mean(ups, sizes)
        tested.append([one_network(toy, {**server, **own[i]}) for i in range(2)])
        right = [int((toy.logits(server, x).argmax(1) == y).sum()) for _, _, x, y in toy.arrays()]
        everyones.append(sum(right) / 120)

    toy.close(record.server["model"], server)
    for i in range(2):
        assert record.client_states[i].keys() == {"model"}
        toy.close(record.client_states[i]["model"], own[i])
    toy.check_tested(record, tested)
    assert [row["global_accuracy"] for row in record.rounds] == everyones


def test_the_evaluated_network_gives_the_sum_of_both_heads_logits(toy):
    torch.manual_seed(0)
    own = {"personal.weight": torch.randn(3, 3).double(), "personal.bias": torch.randn(3).double()}
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("fedrod")()
    found = method.personalised(toy.local(x, y), Message({"model": toy.initial()}), {"model": own})
    assert found.keys() == toy.initial().keys()
    expected = own_logits(toy, {**toy.initial(), **own}, x)
    torch.testing.assert_close(toy.logits(found, x), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(expected, toy.logits(toy.initial(), x))


def test_a_client_that_never_took_part_is_evaluated_with_the_generic_model(toy):
    settings, chosen = toy.TURNS[2]
    assert chosen == [[1], [1]]
    record = toy.run("fedrod", **settings)
    toy.close(record.client_states[0]["model"], zero(toy))
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("fedrod")()
    down = method.broadcast(record.server, 0)
    assert toy.same(method.personalised(toy.local(x, y), down, record.client_states[0]), record.server["model"])


# Identities.


@pytest.mark.parametrize("turn", range(3))
def test_with_gamma_0_the_generic_model_is_fedavgs_bit_by_bit(toy, turn):
    settings = {**toy.TURNS[turn][0], **toy.FULL, "shuffle": True, "rounds": 3}
    a = toy.run("fedrod", {"gamma": 0.0}, **settings)
    b = toy.run("fedavg", **settings)
    assert toy.same(a.server["model"], b.server["model"])
    assert [r["global_accuracy"] for r in a.rounds] == [r["accuracy"] for r in b.rounds]
    assert a.rounds[0]["test_loss"] != b.rounds[0]["test_loss"]  # the personalised heads were trained


def test_with_as_many_samples_of_each_class_the_generic_model_is_fedavgs(toy):
    x, y, xt, yt = toy.arrays((9,))[0]
    assert y.bincount().tolist() == [3, 3, 3]
    federation = pflbench.Federation.from_arrays([(x, y, xt, yt), (x * 2, y, xt, yt)], classes=3)
    a, b = (toy.run(algo, federation=federation) for algo in ("fedrod", "fedavg"))
    toy.close(a.server["model"], b.server["model"])


def test_the_personalised_head_has_no_influence_on_the_generic_model(toy):
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("fedrod")()
    down = Message({"model": toy.initial()})
    other = {k: t + 5 for k, t in zero(toy).items()}
    ups = [method.local_update(toy.local(x, y), down, {"model": own}) for own in (zero(toy), other)]
    assert toy.same(ups[0][0]["model"], ups[1][0]["model"])
    assert not toy.same(ups[0][1]["model"], ups[1][1]["model"])


# Class counts.


def test_the_counts_are_those_of_all_samples_and_not_of_one_pass_that_drops_the_last_batch(toy):
    """The 7 samples hold a class once, in the batch that is dropped: a pass over the batches would count it 0 times."""
    x, _, _, _ = toy.arrays()[0]
    y = torch.tensor([0, 1, 0, 1, 0, 1, 2])
    method = registry.algorithm("fedrod")()
    down, state = Message({"model": toy.initial()}), {"model": zero(toy)}
    local = toy.local(x, y, drop_last=True, local_epochs=1)
    up, _ = method.local_update(local, down, state)
    assert local.counts.samples == 6

    counts = torch.tensor([3.0, 3.0, 1.0]).double()
    expected = toy.descend(
        toy.initial(), toy.batches(6, 3), lambda q, b: balanced(toy, q, x[b], y[b], counts, 1.0), lr=0.1
    )
    toy.close(up["model"], expected)


@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.0])
def test_a_class_that_the_client_lacks_gives_finite_losses_and_heads(toy, gamma):
    x, y, _, _ = toy.arrays()[1]
    assert y.unique().tolist() == [0, 1]
    local = toy.local(x, y)
    method = registry.algorithm("fedrod")(gamma=gamma)
    up, state = method.local_update(local, Message({"model": toy.initial()}), {"model": zero(toy)})
    assert np.isfinite(local.counts.loss_sum)
    assert all(t.isfinite().all() for t in (*up["model"].values(), *state["model"].values()))
    # The balanced softmax leaves the absent class's row alone; plain cross-entropy pushes it down.
    moved = not torch.equal(up["model"]["head.weight"][2], toy.initial()["head.weight"][2])
    assert moved == (gamma == 0)
    assert not torch.equal(state["model"]["personal.bias"][2], torch.zeros(()).double())


# Networks.


def test_a_head_without_bias_works(toy):
    net = pflbench.Net(toy.net().body, nn.Linear(3, 3, bias=False).double())
    record = toy.run("fedrod", net=net)
    assert record.status == "finished"
    assert record.client_states[0]["model"].keys() == {"personal.weight"}


@pytest.mark.parametrize(
    "head",
    [nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.LayerNorm(3)],
    ids=["nested", "two-layers", "norm"],
)
def test_a_head_that_is_not_one_linear_layer_is_refused_before_anything_is_written(toy, tmp_path, head):
    net = pflbench.Net(toy.net().body, head.double())
    with pytest.raises(UsageError, match=r"fedrod: the network's head must be one nn\.Linear"):
        pflbench.run(toy.spec("fedrod"), toy.federation(), net, executor="serial", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_batch_norm_networks_run_and_their_buffers_are_averaged(toy):
    net = toy.batch_norm()
    a, b = (
        toy.run(algo, hyper, net=net, federation=toy.federation((8, 4)), batch_size=4)
        for algo, hyper in (("fedrod", {"gamma": 0.0}), ("fedavg", {}))
    )
    assert a.status == "finished"
    assert not torch.equal(a.server["model"]["body.1.running_mean"], torch.zeros(3).double())
    assert toy.same(a.server["model"], b.server["model"])


def test_gamma_changes_the_result(toy):
    a, b = (toy.run("fedrod", {"gamma": g}).rounds[-1]["test_loss"] for g in (1.0, 0.5))
    assert a != b
