import math
import sys

import pytest
import torch
from torch import nn

import pflbench
from pflbench import Diverged, Message
from pflbench.algorithms.fedas import fisher_trace, pull
from pflbench.core import registry
from pflbench.rng import rng

HYPER = {"align_lr": 0.7, "align_epochs": 2, "align_batch_size": 2}  # unlike the protocol's, all three


# The oracle, from the paper's equations and the authors' code.


def class_means(toy, p, x, y):
    f = toy.features(p, x)
    return {c: f[y == c].mean(0) for c in y.unique().tolist()}


def alignment_loss(toy, q, x, y, means):
    return sum(
        nn.MSELoss()(toy.features(q, x[y == c]), means[c].expand(int((y == c).sum()), -1)) for c in y.unique().tolist()
    )


def align(toy, body, own, x, y, batches):
    """The received `body` after plain SGD towards the prototypes of the client's `own` previous model."""
    means = class_means(toy, own, x, y)
    p = {**body, **toy.head(own)}
    done = toy.descend(p, batches, lambda q, b: alignment_loss(toy, q, x[b], y[b], means), names=toy.BODY, lr=0.7)
    return toy.body(done)


def trace(toy, p, x, y, batches):
    total = 0.0
    for b in batches:
        g = toy.gradient(lambda q, b=b: toy.nll(q, x[b], y[b]), p, toy.BODY + toy.HEAD)
        total += sum(float((t**2).sum()) for t in g.values())
    return total


def fedas(toy, chosen, *, alignment="own-copy", weighting="fisher"):
    """Server bodies, clients' models and what was evaluated, after two rounds."""
    server, own = toy.body(toy.initial()), [toy.initial()] * 2
    tested = []
    for r, taking_part in enumerate(chosen):
        received = {}
        live = server  # the authors' code aligns the server's own model, client after client, before anybody trains
        for i in taking_part:
            x, y, _, _ = toy.arrays()[i]
            source = live if alignment == "in-place" else server
            received[i] = source if alignment == "off" else align(toy, source, own[i], x, y, toy.batches(len(y), 2) * 2)
            live = received[i]
        weights = []
        for i in taking_part:
            x, y, _, _ = toy.arrays()[i]
            start = {**received[i], **toy.head(own[i])}
            own[i] = toy.train(start, x, y, 2, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02)
            weights.append(trace(toy, own[i], x, y, toy.batches(len(y), 3)) if weighting == "fisher" else len(y))
        server = toy.mean([toy.body(own[i]) for i in taking_part], weights)
        tested.append(list(own))
    return server, own, tested


OPTIONS = [
    {},
    {"alignment": "off"},
    {"weighting": "samples"},
    {"alignment": "off", "weighting": "samples"},
    {"alignment": "in-place"},
    {"alignment": "in-place", "weighting": "samples"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()) or "default")
def test_two_rounds(toy, turns, options):
    settings, chosen = turns
    record = toy.run("fedas", {**HYPER, **options}, **settings, **toy.FULL)
    server, own, tested = fedas(toy, chosen, **options)
    toy.close(record.server["model"], server)
    for i in range(2):
        toy.close(record.client_states[i]["model"], own[i])
    toy.check_tested(record, tested)


def test_two_rounds_with_shuffled_batches(toy):
    record = toy.run("fedas", {**HYPER, "align_epochs": 1}, shuffle=True, seed=5, local_epochs=1)

    server, own = toy.body(toy.initial()), [toy.initial()] * 2
    for r in (1, 2):
        weights = []
        for i in range(2):
            x, y, _, _ = toy.arrays()[i]

            def shuffled(purpose, size, r=r, i=i, y=y):
                order = rng(5, "batches", purpose, 0, r, i).permutation(len(y))
                return [list(order[at]) for at in toy.batches(len(y), size)]

            p = {**align(toy, server, own[i], x, y, shuffled("align", 2)), **toy.head(own[i])}
            own[i] = toy.descend(p, shuffled("train", 3), lambda q, b, x=x, y=y: toy.nll(q, x[b], y[b]), lr=0.1)
            weights.append(trace(toy, own[i], x, y, shuffled("fisher", 3)))
        server = toy.mean([toy.body(p) for p in own], weights)

    toy.close(record.server["model"], server)
    for i in range(2):
        toy.close(record.client_states[i]["model"], own[i])


# Prototypes.


def test_prototypes_are_the_classes_mean_features(toy):
    x, y, _, _ = toy.arrays()[0]
    means = class_means(toy, toy.initial(), x, y)
    torch.testing.assert_close(
        toy.local(x, y).prototypes(toy.initial()), torch.stack([means[c] for c in range(3)]), rtol=0, atol=1e-12
    )


def test_prototypes_of_absent_classes_are_finite_and_nobody_is_pulled_to_them(toy):
    x, y, _, _ = toy.arrays()[1]
    assert y.unique().tolist() == [0, 1]
    found = toy.local(x, y).prototypes(toy.initial())
    assert found.shape == (3, 3)
    assert found.isfinite().all()
    moved = found.clone()
    moved[2] = 1e6
    net = toy.net()
    assert torch.equal(pull(found)(net, x, y), pull(moved)(net, x, y))


def test_prototypes_come_from_the_previous_local_model_and_not_from_the_received_body(toy):
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("fedas")(**HYPER, weighting="samples")
    previous = {k: p + 0.5 for k, p in toy.initial().items()}
    received = toy.body(toy.initial())
    up, state = method.local_update(toy.local(x, y, local_epochs=1), Message({"model": received}), {"model": previous})
    aligned = align(toy, received, previous, x, y, toy.batches(7, 2) * 2)
    expected = toy.train({**aligned, **toy.head(previous)}, x, y, 1, lr=0.1)
    toy.close(state["model"], expected)
    toy.close(up["model"], toy.body(expected))


def test_prototypes_use_the_evaluation_mode(toy):
    x, y, _, _ = toy.arrays()[0]
    dropping = toy.dropping()
    assert torch.equal(
        toy.local(x, y, net=dropping).prototypes(toy.initial()), toy.local(x, y).prototypes(toy.initial())
    )


# Alignment.


def test_the_alignment_loss_is_the_sum_over_classes_of_torchs_mse(toy):
    x, y, _, _ = toy.arrays()[0]
    targets = torch.arange(9, dtype=torch.float64).reshape(3, 3) / 10
    for batch in ([0], [0, 3], [0, 1, 3, 6], [2, 0, 1, 5, 3, 4, 6]):
        expected = alignment_loss(toy, toy.initial(), x[batch], y[batch], targets)
        torch.testing.assert_close(pull(targets)(toy.net(), x[batch], y[batch]).mean(), expected, rtol=0, atol=1e-12)


def test_one_step_of_alignment_is_plain_sgd_on_the_body_alone(toy):
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("fedas")(align_lr=0.7, align_epochs=1, align_batch_size=7, alignment="in-place")
    previous = {k: p * 0.5 + 0.1 for k, p in toy.initial().items()}
    # The protocol's momentum, weight decay and decayed rate must not leak into the alignment.
    local = toy.local(x, y, round=5, momentum=0.9, weight_decay=0.3, lr_decay=0.5)
    up, _ = method.local_update(local, Message({"model": toy.body(toy.initial())}), {"model": previous})
    means = class_means(toy, previous, x, y)
    g = toy.gradient(lambda q: alignment_loss(toy, q, x, y, means), toy.initial(), toy.BODY)
    toy.close(up["aligned"], {k: toy.initial()[k] - 0.7 * g[k] for k in toy.BODY})


def test_the_defaults_are_the_published_ones(toy):
    h = registry.algorithm("fedas")().h
    assert (h.alignment, h.weighting, h.align_lr, h.align_epochs, h.align_batch_size) == (
        "own-copy",
        "fisher",
        0.01,
        1,
        16,
    )


def test_alignment_brings_the_features_nearer_to_the_prototypes(toy):
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("fedas")(align_lr=0.1, align_epochs=20, align_batch_size=7, alignment="in-place")
    previous = {k: p * 0.5 + 0.1 for k, p in toy.initial().items()}
    up, _ = method.local_update(toy.local(x, y), Message({"model": toy.body(toy.initial())}), {"model": previous})
    means = class_means(toy, previous, x, y)
    before = alignment_loss(toy, toy.initial(), x, y, means)
    after = alignment_loss(toy, {**toy.initial(), **up["aligned"]}, x, y, means)
    assert after < 0.8 * before


def test_the_server_and_its_message_stay_as_they_are_during_alignment(toy):
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("fedas")(**HYPER)
    server = method.init_server(toy.initial())
    before = {k: t.clone() for k, t in server["model"].items()}
    previous = {"model": {k: p + 0.5 for k, p in toy.initial().items()}}
    method.local_update(toy.local(x, y), method.broadcast(server, 0), previous)
    assert toy.same(server["model"], before)


def test_with_its_own_copy_a_client_does_not_depend_on_those_before_it(toy):
    changed = toy.arrays()
    changed[0] = (-2 * changed[0][0], *changed[0][1:])
    changed = pflbench.Federation.from_arrays(changed, classes=3)

    def second(alignment, federation=None):
        record = toy.run("fedas", {**HYPER, "alignment": alignment}, rounds=1, federation=federation)
        return record.client_states[1]["model"]

    assert toy.same(second("own-copy"), second("own-copy", changed))
    assert not toy.same(second("in-place"), second("in-place", changed))


def test_in_place_alignment_equals_an_own_copy_for_the_first_client_and_differs_for_the_next(toy):
    own = toy.run("fedas", {**HYPER, "alignment": "own-copy"}, rounds=1)
    live = toy.run("fedas", {**HYPER, "alignment": "in-place"}, rounds=1)
    assert toy.same(own.client_states[0]["model"], live.client_states[0]["model"])
    assert not toy.same(own.client_states[1]["model"], live.client_states[1]["model"])


# The Fisher trace and the weights.


@pytest.mark.parametrize("size", [1, 3, 7, 16])
def test_the_fisher_trace_sums_squared_gradients_of_the_batches_mean_losses_over_all_parameters(toy, size):
    x, y, _, _ = toy.arrays()[0]
    found = fisher_trace(toy.local(x, y, batch_size=size), toy.initial())
    assert found == pytest.approx(trace(toy, toy.initial(), x, y, toy.batches(7, size)), rel=0, abs=1e-12)


def test_the_fisher_trace_is_a_sum_so_that_a_client_with_its_data_twice_weighs_twice(toy):
    x, y, _, _ = toy.arrays((6,))[0]
    twice = toy.local(torch.cat([x, x]), torch.cat([y, y]))
    assert fisher_trace(twice, toy.initial()) == pytest.approx(2 * fisher_trace(toy.local(x, y), toy.initial()))


def test_fisher_traces_are_taken_of_uploads_alone(toy, turns, monkeypatch):
    traced = []
    monkeypatch.setattr(
        sys.modules["pflbench.algorithms.fedas"],
        "fisher_trace",
        lambda local, model: traced.append(model) or fisher_trace(local, model),
    )
    settings, chosen = turns
    toy.run("fedas", **settings)
    assert len(traced) == sum(map(len, chosen))


def test_the_fisher_trace_uses_the_evaluation_mode(toy):
    x, y, _, _ = toy.arrays()[0]
    dropping = toy.dropping()
    assert fisher_trace(toy.local(x, y, net=dropping), toy.initial()) == fisher_trace(toy.local(x, y), toy.initial())


def test_an_upload_weighs_its_trace_after_training(toy):
    x, y, _, _ = toy.arrays()[0]
    method = registry.algorithm("fedas")(alignment="off")
    up, state = method.local_update(
        toy.local(x, y), Message({"model": toy.body(toy.initial())}), {"model": toy.initial()}
    )
    assert up.weight == pytest.approx(trace(toy, state["model"], x, y, toy.batches(7, 3)), rel=0, abs=1e-12)
    assert up.weight != pytest.approx(trace(toy, toy.initial(), x, y, toy.batches(7, 3)), rel=1e-3)


def test_weights_are_normalised_traces(toy):
    ups = [Message({"model": {"w": torch.tensor([v], dtype=torch.float64)}}, w) for v, w in ((1.0, 0.3), (5.0, 0.1))]
    method = registry.algorithm("fedas")()
    assert float(method.aggregate({"model": {}}, ups)["model"]["w"]) == pytest.approx(
        (1 * 0.3 + 5 * 0.1) / 0.4, abs=1e-12
    )
    ten = [Message(up.tensors, 10 * up.weight) for up in ups]
    toy.close(method.aggregate({"model": {}}, ten)["model"], method.aggregate({"model": {}}, ups)["model"])


# Divergence.


@pytest.mark.parametrize("traces", [[math.nan, 1.0], [1.0, math.inf], [0.0, 0.0]])
def test_traces_without_a_positive_finite_sum_are_diverged(traces):
    ups = [Message({"model": {"w": torch.ones(1)}}, w) for w in traces]
    with pytest.raises(Diverged, match="Fisher"):
        registry.algorithm("fedas")().aggregate({"model": {"w": torch.ones(1)}}, ups)


def test_one_client_with_a_zero_trace_is_left_out_of_the_average(toy):
    ups = [Message({"model": {"w": torch.full((1,), v)}}, w) for v, w in ((1.0, 0.0), (5.0, 0.2))]
    assert float(registry.algorithm("fedas")().aggregate({"model": {}}, ups)["model"]["w"]) == 5.0


def test_zero_traces_end_the_run_as_diverged_and_the_reason_names_the_round(toy):
    arrays = [(x, y * 0, xt, yt * 0) for x, y, xt, yt in toy.arrays()]  # one class: the loss and its gradient are 0
    net = pflbench.Net(toy.net().body, nn.Linear(3, 1).double())
    record = toy.run("fedas", federation=pflbench.Federation.from_arrays(arrays), net=net)
    assert record.status == "diverged"
    assert record.rounds == []
    assert "Fisher" in record.reason
    assert "round 1" in record.reason


def test_a_model_that_is_not_a_number_ends_the_run_as_diverged(toy):
    # One batch a round, so that the training loss is still finite when the parameters overflow.
    settings = {"lr": 3e38, "weight_decay": 1e3, "batch_size": 7, "local_epochs": 1}
    record = toy.run("fedas", {"alignment": "off"}, net=toy.net().float(), **settings)
    assert record.status == "diverged"
    assert "round 1" in record.reason
    assert record.rounds == []
    assert all(t.isfinite().all() for t in record.server["model"].values())


# Evaluation and identities.


def test_a_client_that_was_never_chosen_is_evaluated_with_the_initial_model(toy):
    settings, chosen = toy.TURNS[2]
    assert chosen == [[1], [1]]
    record = toy.run("fedas", **settings)
    assert toy.same(record.client_states[0]["model"], toy.initial())
    _, _, x, y = toy.arrays()[0]
    accuracy = float((toy.logits(toy.initial(), x).argmax(1) == y).double().mean())
    assert [c["accuracy"] for c in record.clients if c["client"] == 0] == [accuracy, accuracy]


@pytest.mark.parametrize("turn", range(3))
def test_without_alignment_and_fisher_weights_server_and_heads_are_fedpers(toy, turn):
    settings, _ = toy.TURNS[turn]
    settings = {**settings, **toy.FULL, "shuffle": True, "rounds": 3}
    a = toy.run("fedas", {"alignment": "off", "weighting": "samples"}, **settings)
    b = toy.run("fedper", **settings)
    assert toy.same(a.server["model"], b.server["model"])
    for i in range(2):
        assert toy.same(toy.head(a.client_states[i]["model"]), b.client_states[i]["model"])
    assert [r["train_loss"] for r in a.rounds] == [r["train_loss"] for r in b.rounds]


def test_without_alignment_clients_with_the_same_data_have_fedpers_weights(toy):
    client = toy.arrays()[0]
    same = pflbench.Federation.from_arrays([client, client], classes=3)
    a = toy.run("fedas", {"alignment": "off"}, federation=same)
    b = toy.run("fedper", federation=same)
    toy.close(a.server["model"], b.server["model"])


def test_without_alignment_one_client_is_fedavg_with_one_client(toy):
    one = toy.federation((7,))
    a = toy.run("fedas", {"alignment": "off"}, federation=one, shuffle=True, **toy.FULL)
    b = toy.run("fedavg", federation=one, shuffle=True, **toy.FULL)
    assert toy.same(a.client_states[0]["model"], b.server["model"])
    assert toy.same(a.server["model"], toy.body(b.server["model"]))


def test_alone_in_its_rounds_a_client_sees_no_weights(toy):
    settings, _ = toy.TURNS[1]
    a, b = (toy.run("fedas", {"weighting": w}, **settings) for w in ("fisher", "samples"))
    assert toy.same(a.server["model"], b.server["model"])


def test_in_the_first_round_alignment_starts_at_its_own_prototypes(toy):
    # All start from the initial model, so the received body's features differ from their class means by scatter only;
    # with one sample a class, they do not differ at all, and alignment has nothing to do.
    x = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    federation = pflbench.Federation.from_arrays([(x, y, x, y)] * 2, classes=3)
    a, b = (toy.run("fedas", {"alignment": how}, rounds=1, federation=federation) for how in ("own-copy", "off"))
    toy.close(a.server["model"], b.server["model"])
