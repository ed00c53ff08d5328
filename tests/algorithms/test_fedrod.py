import numpy as np
import oracle
import pytest
import torch
import toy
from facts import Facts
from torch import nn

import pflbench
from pflbench import Message, UsageError
from pflbench.core import registry

FACTS = Facts(sensitive=({}, (25, 41), 2))  # of unequal classes

PERSONAL = ("personal.weight", "personal.bias")  # the names in the oracle


# The oracle, from the paper's equations.


def zero():
    return {"personal.weight": torch.zeros(3, 3).double(), "personal.bias": torch.zeros(3).double()}


def balanced(p, x, y, counts, gamma):
    """-log(N_y^gamma exp g_y / sum_c N_c^gamma exp g_c), the mean."""
    scores = oracle.logits(p, x).exp() * counts**gamma
    return -(scores[torch.arange(len(y)), y] / scores.sum(1)).log().mean()


def own_logits(p, x):
    """Generic and personalised logits, the former and the features without a gradient."""
    return oracle.logits(p, x).detach() + oracle.features(p, x).detach() @ p["personal.weight"].T + p["personal.bias"]


def train(p, x, y, gamma, epochs=2, **kw):
    counts = torch.tensor([int((y == c).sum()) for c in range(3)], dtype=torch.float64)

    def both(q, b):
        z = own_logits(q, x[b])
        personal = (torch.logsumexp(z, 1) - z[torch.arange(len(b)), y[b]]).mean()
        return balanced(q, x[b], y[b], counts, gamma) + personal

    return oracle.descend(p, oracle.batches(len(y), 3) * epochs, both, names=oracle.BODY + oracle.HEAD + PERSONAL, **kw)


def own_head(p):
    """The personalised head under the network's names, as a client keeps it."""
    return {name.replace("personal.", "head."): p[name] for name in PERSONAL}


def one_network(p):
    head = {
        "head.weight": p["head.weight"] + p["personal.weight"],
        "head.bias": p["head.bias"] + p["personal.bias"],
    }
    return {**oracle.body(p), **head}


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_two_rounds_train_both_heads_and_only_the_generic_model_travels(turns, gamma):
    settings, chosen = turns
    record = toy.run("fedrod", {"gamma": gamma}, **settings, **toy.FULL)

    server, own = toy.initial(), [zero()] * 2
    tested, everyones = [], []
    for r in range(2):
        uploads, sizes = [], []
        for i in chosen[r]:
            x, y, _, _ = oracle.arrays()[i]
            sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
            p = train({**server, **own[i]}, x, y, gamma, **sgd)
            uploads.append({k: p[k] for k in oracle.BODY + oracle.HEAD})
            own[i] = {k: p[k] for k in PERSONAL}
            sizes.append(len(y))
        server = oracle.mean(uploads, sizes)
        tested.append([one_network({**server, **own[i]}) for i in range(2)])
        right = [int((oracle.logits(server, x).argmax(1) == y).sum()) for _, _, x, y in oracle.arrays()]
        everyones.append(sum(right) / 120)

    oracle.close(record.server["model"], server)
    for i in range(2):
        assert record.client_states[i].keys() == {"head"}
        oracle.close(record.client_states[i]["head"], own_head(own[i]))
    toy.check_tested(record, tested)
    assert [row["global_accuracy"] for row in record.evaluations] == everyones


def test_the_evaluated_network_gives_the_sum_of_both_heads_logits():
    torch.manual_seed(0)
    own = {"personal.weight": torch.randn(3, 3).double(), "personal.bias": torch.randn(3).double()}
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("fedrod")()
    found = method.personalise(toy.client(x, y), Message({"model": toy.initial()}), {"head": own_head(own)})["model"]
    assert found.keys() == toy.initial().keys()
    expected = own_logits({**toy.initial(), **own}, x)
    torch.testing.assert_close(oracle.logits(found, x), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(expected, oracle.logits(toy.initial(), x))


def test_a_client_that_never_took_part_is_evaluated_with_the_generic_model():
    settings, chosen = toy.TURNS[2]
    assert chosen == [[1], [1]]
    record = toy.run("fedrod", **settings)
    oracle.close(record.client_states[0]["head"], own_head(zero()))
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("fedrod")()
    received = method.serve(toy.round(2), record.server, 0)
    deployed = method.personalise(toy.client(x, y), received, record.client_states[0])
    assert oracle.same(deployed["model"], record.server["model"])


# Identities.


@pytest.mark.parametrize("turn", range(3))
def test_with_gamma_0_the_generic_model_is_fedavgs_bit_by_bit(turn):
    settings = {**toy.TURNS[turn][0], **toy.FULL, "shuffle": True, "rounds": 3}
    a = toy.run("fedrod", {"gamma": 0.0}, **settings)
    b = toy.run("fedavg", **settings)
    assert oracle.same(a.server["model"], b.server["model"])
    assert [r["global_accuracy"] for r in a.evaluations] == [r["accuracy"] for r in b.evaluations]
    assert a.evaluations[0]["test_loss"] != b.evaluations[0]["test_loss"]  # the personalised heads were trained


def test_with_as_many_samples_of_each_class_the_generic_model_is_fedavgs():
    x, y, xt, yt = oracle.arrays((9,))[0]
    assert y.bincount().tolist() == [3, 3, 3]
    federation = pflbench.Federation.from_arrays([(x, y, xt, yt), (x * 2, y, xt, yt)], classes=3)
    a, b = (toy.run(algo, federation=federation) for algo in ("fedrod", "fedavg"))
    oracle.close(a.server["model"], b.server["model"])


def test_the_personalised_head_has_no_influence_on_the_generic_model():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("fedrod")()
    received = Message({"model": toy.initial()})
    other = {k: t + 5 for k, t in own_head(zero()).items()}
    (upload, state), (upload_of_other, state_of_other) = (
        method.local_update(toy.client(x, y), received, {"head": own}) for own in (own_head(zero()), other)
    )
    assert oracle.same(upload["model"], upload_of_other["model"])
    assert not oracle.same(state["head"], state_of_other["head"])


# Class counts.


def test_the_counts_are_those_of_all_samples_and_not_of_one_pass_that_drops_the_last_batch():
    """The 7 samples hold a class once, in the batch that is dropped: a pass over the batches would count it 0 times."""
    x, _, _, _ = oracle.arrays()[0]
    y = torch.tensor([0, 1, 0, 1, 0, 1, 2])
    method = registry.algorithm("fedrod")()
    received, state = Message({"model": toy.initial()}), {"head": own_head(zero())}
    client = toy.client(x, y, drop_last=True, local_epochs=1)
    upload, _ = method.local_update(client, received, state)
    assert client.counts.samples == 6

    counts = torch.tensor([3.0, 3.0, 1.0]).double()
    expected = oracle.descend(
        toy.initial(), oracle.batches(6, 3), lambda q, b: balanced(q, x[b], y[b], counts, 1.0), lr=0.1
    )
    oracle.close(upload["model"], expected)


@pytest.mark.parametrize("gamma", [1.0, 0.3, 0.0])
def test_a_class_that_the_client_lacks_gives_finite_losses_and_heads(gamma):
    x, y, _, _ = oracle.arrays()[1]
    assert y.unique().tolist() == [0, 1]
    client = toy.client(x, y)
    method = registry.algorithm("fedrod")(gamma=gamma)
    upload, state = method.local_update(client, Message({"model": toy.initial()}), {"head": own_head(zero())})
    assert np.isfinite(client.counts.loss_sum)
    assert all(t.isfinite().all() for t in (*upload["model"].values(), *state["head"].values()))
    # The balanced softmax leaves the absent class's row alone; plain cross-entropy pushes it down.
    moved = not torch.equal(upload["model"]["head.weight"][2], toy.initial()["head.weight"][2])
    assert moved == (gamma == 0)
    assert not torch.equal(state["head"]["head.bias"][2], torch.zeros(()).double())


# Networks.


def test_a_head_without_bias_works():
    net = pflbench.Net(toy.net().body, nn.Linear(3, 3, bias=False).double())
    record = toy.run("fedrod", net=net)
    assert record.status == "finished"
    assert record.client_states[0]["head"].keys() == {"head.weight"}


@pytest.mark.parametrize(
    "head",
    [nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.LayerNorm(3)],
    ids=["nested", "two-layers", "norm"],
)
def test_a_head_that_is_not_one_linear_layer_is_refused_before_anything_is_written(tmp_path, head):
    net = pflbench.Net(toy.net().body, head.double())
    with pytest.raises(UsageError, match=r"fedrod: the network's head must be one nn\.Linear"):
        pflbench.run(toy.spec("fedrod"), toy.federation(), net, executor="serial", out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_batch_norm_networks_run_and_their_buffers_are_averaged():
    net = toy.batch_norm()
    a, b = (
        toy.run(algo, hyper, net=net, federation=toy.federation((8, 4)), batch_size=4)
        for algo, hyper in (("fedrod", {"gamma": 0.0}), ("fedavg", {}))
    )
    assert a.status == "finished"
    assert not torch.equal(a.server["model"]["body.1.running_mean"], torch.zeros(3).double())
    assert oracle.same(a.server["model"], b.server["model"])


def test_gamma_changes_the_result():
    a, b = (toy.run("fedrod", {"gamma": g}).evaluations[-1]["test_loss"] for g in (1.0, 0.5))
    assert a != b
