import math
import sys

import oracle
import pytest
import torch
import toy
from facts import BODY, Facts
from torch import nn

import pflbench
from pflbench import Diverged, Message, Upload, UsageError
from pflbench.algorithms.fedas import fisher_trace, to_prototypes
from pflbench.core import Batch, prototypes, registry
from pflbench.rng import rng

FACTS = Facts(
    bytes={"": (BODY, BODY), "alignment=in-place": (2 * BODY, BODY)},
    variants=[{"alignment": "in-place"}, {"alignment": "off", "weighting": "samples"}],
)

HYPER = {"align_lr": 0.7, "align_epochs": 2, "align_batch_size": 2}  # unlike the protocol's, all three


# The oracle, from the paper's equations and the authors' code.


def class_means(p, x, y):
    f = oracle.features(p, x)
    return {c: f[y == c].mean(0) for c in y.unique().tolist()}


def alignment_loss(q, x, y, means):
    return sum(
        nn.MSELoss()(oracle.features(q, x[y == c]), means[c].expand(int((y == c).sum()), -1))
        for c in y.unique().tolist()
    )


def align(body, own, x, y, batches):
    """The received `body` after plain SGD towards the prototypes of the client's `own` previous model."""
    means = class_means(own, x, y)
    p = {**body, **oracle.head(own)}
    done = oracle.descend(p, batches, lambda q, b: alignment_loss(q, x[b], y[b], means), names=oracle.BODY, lr=0.7)
    return oracle.body(done)


def trace(p, x, y, batches):
    total = 0.0
    for b in batches:
        g = oracle.gradient(lambda q, b=b: oracle.nll(q, x[b], y[b]), p, oracle.BODY + oracle.HEAD)
        total += sum(float((t**2).sum()) for t in g.values())
    return total


def fedas(chosen, *, alignment="own-copy", weighting="fisher"):
    """Server bodies, clients' models and what was evaluated, after two rounds."""
    server, own = oracle.body(toy.initial()), [toy.initial()] * 2
    tested = []
    for r, taking_part in enumerate(chosen):
        received = {}
        live = server  # the authors' code aligns the server's own model, client after client, before anybody trains
        for i in taking_part:
            x, y, _, _ = oracle.arrays()[i]
            source = live if alignment == "in-place" else server
            received[i] = source if alignment == "off" else align(source, own[i], x, y, oracle.batches(len(y), 2) * 2)
            live = received[i]
        weights = []
        for i in taking_part:
            x, y, _, _ = oracle.arrays()[i]
            start = {**received[i], **oracle.head(own[i])}
            own[i] = oracle.train(start, x, y, 2, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02)
            weights.append(trace(own[i], x, y, oracle.batches(len(y), 3)) if weighting == "fisher" else len(y))
        server = oracle.mean([oracle.body(own[i]) for i in taking_part], weights)
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
def test_two_rounds(turns, options):
    settings, chosen = turns
    record = toy.run("fedas", {**HYPER, **options}, **settings, **toy.FULL)
    server, own, tested = fedas(chosen, **options)
    oracle.close(record.server["model"], server)
    for i in range(2):
        oracle.close(record.client_states[i]["model"], own[i])
    toy.check_tested(record, tested)


def test_two_rounds_with_shuffled_batches():
    record = toy.run("fedas", {**HYPER, "align_epochs": 1}, shuffle=True, seed=5, local_epochs=1)

    server, own = oracle.body(toy.initial()), [toy.initial()] * 2
    for r in (1, 2):
        weights = []
        for i in range(2):
            x, y, _, _ = oracle.arrays()[i]

            def shuffled(stream, size, r=r, i=i, y=y):
                order = rng(5, "batches", stream, 0, r, i).permutation(len(y))
                return [list(order[at]) for at in oracle.batches(len(y), size)]

            p = {**align(server, own[i], x, y, shuffled("align", 2)), **oracle.head(own[i])}
            own[i] = oracle.descend(p, shuffled("train", 3), lambda q, b, x=x, y=y: oracle.nll(q, x[b], y[b]), lr=0.1)
            weights.append(trace(own[i], x, y, shuffled("fisher", 3)))
        server = oracle.mean([oracle.body(p) for p in own], weights)

    oracle.close(record.server["model"], server)
    for i in range(2):
        oracle.close(record.client_states[i]["model"], own[i])


def whole(x, y):
    """All samples as one batch."""
    return Batch(x, y, torch.arange(len(y)), "align")


# Prototypes.


def test_prototypes_are_the_classes_mean_features():
    x, y, _, _ = oracle.arrays()[0]
    means = class_means(toy.initial(), x, y)
    found = prototypes(toy.client(x, y), toy.initial())
    torch.testing.assert_close(found, torch.stack([means[c] for c in range(3)]), rtol=0, atol=1e-12)


def test_prototypes_of_absent_classes_are_finite_and_nobody_is_pulled_to_them():
    x, y, _, _ = oracle.arrays()[1]
    assert y.unique().tolist() == [0, 1]
    found = prototypes(toy.client(x, y), toy.initial())
    assert found.shape == (3, 3)
    assert found.isfinite().all()
    moved = found.clone()
    moved[2] = 1e6
    net = toy.net()
    assert torch.equal(to_prototypes(found)(net, whole(x, y)), to_prototypes(moved)(net, whole(x, y)))


def test_prototypes_come_from_the_previous_local_model_and_not_from_the_received_body():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("fedas")(**HYPER, weighting="samples")
    previous = {k: p + 0.5 for k, p in toy.initial().items()}
    received = oracle.body(toy.initial())
    upload, state = method.local_update(
        toy.client(x, y, local_epochs=1), Message({"model": received}), {"model": previous}
    )
    aligned = align(received, previous, x, y, oracle.batches(7, 2) * 2)
    expected = oracle.train({**aligned, **oracle.head(previous)}, x, y, 1, lr=0.1)
    oracle.close(state["model"], expected)
    oracle.close(upload["model"], oracle.body(expected))


def test_prototypes_use_the_evaluation_mode():
    x, y, _, _ = oracle.arrays()[0]
    dropping = toy.dropping()
    found, plain = (prototypes(client, toy.initial()) for client in (toy.client(x, y, net=dropping), toy.client(x, y)))
    assert torch.equal(found, plain)


# Alignment.


def test_the_alignment_loss_is_the_sum_over_classes_of_torchs_mse():
    x, y, _, _ = oracle.arrays()[0]
    targets = torch.arange(9, dtype=torch.float64).reshape(3, 3) / 10
    for batch in ([0], [0, 3], [0, 1, 3, 6], [2, 0, 1, 5, 3, 4, 6]):
        expected = alignment_loss(toy.initial(), x[batch], y[batch], targets)
        found = to_prototypes(targets)(toy.net(), whole(x[batch], y[batch]))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_one_step_of_alignment_is_plain_sgd_on_the_body_alone():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("fedas")(align_lr=0.7, align_epochs=1, align_batch_size=7, alignment="in-place")
    previous = {k: p * 0.5 + 0.1 for k, p in toy.initial().items()}
    # The protocol's momentum, weight decay and decayed rate must not leak into the alignment.
    client = toy.client(x, y, round=5, momentum=0.9, weight_decay=0.3, lr_decay=0.5)
    upload, _ = method.local_update(client, Message({"model": oracle.body(toy.initial())}), {"model": previous})
    means = class_means(previous, x, y)
    g = oracle.gradient(lambda q: alignment_loss(q, x, y, means), toy.initial(), oracle.BODY)
    oracle.close(upload["aligned"], {k: toy.initial()[k] - 0.7 * g[k] for k in oracle.BODY})


def test_the_defaults_are_the_published_ones():
    h = registry.algorithm("fedas")()
    assert (h.alignment, h.weighting, h.align_lr, h.align_epochs, h.align_batch_size) == (
        "own-copy",
        "fisher",
        0.01,
        1,
        16,
    )


def test_alignment_brings_the_features_nearer_to_the_prototypes():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("fedas")(align_lr=0.1, align_epochs=20, align_batch_size=7, alignment="in-place")
    previous = {k: p * 0.5 + 0.1 for k, p in toy.initial().items()}
    upload, _ = method.local_update(
        toy.client(x, y), Message({"model": oracle.body(toy.initial())}), {"model": previous}
    )
    means = class_means(previous, x, y)
    before = alignment_loss(toy.initial(), x, y, means)
    after = alignment_loss({**toy.initial(), **upload["aligned"]}, x, y, means)
    assert after < 0.8 * before


def test_the_server_and_its_message_stay_as_they_are_during_alignment():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("fedas")(**HYPER)
    server = method.init_server(toy.setup())
    before = {k: t.clone() for k, t in server["model"].items()}
    previous = {"model": {k: p + 0.5 for k, p in toy.initial().items()}}
    method.local_update(toy.client(x, y), method.broadcast(toy.round(), server, 0), previous)
    assert oracle.same(server["model"], before)


def test_with_its_own_copy_a_client_does_not_depend_on_those_before_it():
    changed = oracle.arrays()
    changed[0] = (-2 * changed[0][0], *changed[0][1:])
    changed = pflbench.Federation.from_arrays(changed, classes=3)

    def second(alignment, federation=None):
        record = toy.run("fedas", {**HYPER, "alignment": alignment}, rounds=1, federation=federation)
        return record.client_states[1]["model"]

    assert oracle.same(second("own-copy"), second("own-copy", changed))
    assert not oracle.same(second("in-place"), second("in-place", changed))


def test_in_place_alignment_equals_an_own_copy_for_the_first_client_and_differs_for_the_next():
    own = toy.run("fedas", {**HYPER, "alignment": "own-copy"}, rounds=1)
    live = toy.run("fedas", {**HYPER, "alignment": "in-place"}, rounds=1)
    assert oracle.same(own.client_states[0]["model"], live.client_states[0]["model"])
    assert not oracle.same(own.client_states[1]["model"], live.client_states[1]["model"])


def test_in_place_alignment_asks_the_clients_one_by_one_and_sends_each_what_the_last_aligned():
    method = registry.algorithm("fedas")(alignment="in-place")
    asked = []

    class Cohort:
        def update(self, server, clients):
            asked.append((server["model"]["w"].item(), clients))
            number = float(len(asked))
            aligned = {"w": torch.tensor([10 * number])}
            return [Upload({"model": {"w": torch.tensor([number])}, "aligned": aligned}, 1.0, clients[0])]

    new = method.play(toy.round(cohort=(0, 1, 4)), {"model": {"w": torch.tensor([7.0])}}, Cohort())
    assert asked == [(7.0, [0]), (10.0, [1]), (20.0, [4])]
    assert new["model"]["w"].item() == 2.0  # the mean of what they trained


def test_in_place_alignment_lets_the_second_client_start_from_the_body_that_the_first_aligned():
    method, round_ = registry.algorithm("fedas")(**HYPER, alignment="in-place"), toy.round()
    data, starts = oracle.arrays(), []

    class Cohort:
        def update(self, server, clients):
            (i,) = clients
            received = method.broadcast(round_, server, i)
            starts.append(received["model"])
            client = toy.client(*data[i][:2], id=i)
            message, _ = method.local_update(client, received, method.init_client(round_.setup))
            return [Upload(message.content, message.weight, client=i)]

    first = oracle.body(toy.initial())
    method.play(round_, method.init_server(round_.setup), Cohort())
    x, y, _, _ = data[0]
    oracle.close(starts[0], first)
    oracle.close(starts[1], align(first, toy.initial(), x, y, oracle.batches(len(y), 2) * 2))
    assert not oracle.same(*starts)


def test_features_that_are_no_vectors_are_refused_where_there_is_alignment(tmp_path):
    net = pflbench.Net(nn.Unflatten(1, (3, 1)), nn.Sequential(nn.Flatten(), nn.Linear(3, 3))).double()
    with pytest.raises(UsageError, match="fedas: the network's body must give a vector of features for each sample"):
        pflbench.run(toy.spec("fedas"), toy.federation(), net, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert toy.run("fedas", {"alignment": "off"}, net=net).status == "finished"


# The Fisher trace and the weights.


@pytest.mark.parametrize("size", [1, 3, 7, 16])
def test_the_fisher_trace_sums_squared_gradients_of_the_batches_mean_losses_over_all_parameters(size):
    x, y, _, _ = oracle.arrays()[0]
    found = fisher_trace(toy.client(x, y, batch_size=size), toy.initial())
    assert found == pytest.approx(trace(toy.initial(), x, y, oracle.batches(7, size)), rel=0, abs=1e-12)


def test_the_fisher_trace_is_a_sum_so_that_a_client_with_its_data_twice_weighs_twice():
    x, y, _, _ = oracle.arrays((6,))[0]
    twice = toy.client(torch.cat([x, x]), torch.cat([y, y]))
    assert fisher_trace(twice, toy.initial()) == pytest.approx(2 * fisher_trace(toy.client(x, y), toy.initial()))


def test_fisher_traces_are_taken_of_uploads_alone(turns, monkeypatch):
    traced = []
    monkeypatch.setattr(
        sys.modules["pflbench.algorithms.fedas"],
        "fisher_trace",
        lambda client, model: traced.append(model) or fisher_trace(client, model),
    )
    settings, chosen = turns
    toy.run("fedas", **settings)
    assert len(traced) == sum(map(len, chosen))


def test_the_fisher_trace_uses_the_evaluation_mode():
    x, y, _, _ = oracle.arrays()[0]
    dropping = toy.dropping()
    assert fisher_trace(toy.client(x, y, net=dropping), toy.initial()) == fisher_trace(toy.client(x, y), toy.initial())


def test_an_upload_weighs_its_trace_after_training():
    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("fedas")(alignment="off")
    upload, state = method.local_update(
        toy.client(x, y), Message({"model": oracle.body(toy.initial())}), {"model": toy.initial()}
    )
    assert upload.weight == pytest.approx(trace(state["model"], x, y, oracle.batches(7, 3)), rel=0, abs=1e-12)
    assert upload.weight != pytest.approx(trace(toy.initial(), x, y, oracle.batches(7, 3)), rel=1e-3)


def test_weights_are_normalised_traces():
    uploads = [Upload({"model": {"w": torch.tensor([v]).double()}}, w) for v, w in ((1.0, 0.3), (5.0, 0.1))]
    method = registry.algorithm("fedas")()
    assert float(method.aggregate(toy.round(), {"model": {}}, uploads)["model"]["w"]) == pytest.approx(
        (1 * 0.3 + 5 * 0.1) / 0.4, abs=1e-12
    )
    ten = [Upload(upload.content, 10 * upload.weight) for upload in uploads]
    once, tenfold = (method.aggregate(toy.round(), {"model": {}}, some)["model"] for some in (uploads, ten))
    oracle.close(tenfold, once)


# Divergence.


@pytest.mark.parametrize("traces", [[math.nan, 1.0], [1.0, math.inf], [0.0, 0.0]])
def test_traces_without_a_positive_finite_sum_are_diverged(traces):
    uploads = [Upload({"model": {"w": torch.ones(1)}}, w) for w in traces]
    with pytest.raises(Diverged, match="Fisher"):
        registry.algorithm("fedas")().aggregate(toy.round(), {"model": {"w": torch.ones(1)}}, uploads)


def test_one_client_with_a_zero_trace_is_left_out_of_the_average():
    uploads = [Upload({"model": {"w": torch.full((1,), v)}}, w) for v, w in ((1.0, 0.0), (5.0, 0.2))]
    assert float(registry.algorithm("fedas")().aggregate(toy.round(), {"model": {}}, uploads)["model"]["w"]) == 5.0


def test_zero_traces_end_the_run_as_diverged_and_the_reason_names_the_round():
    arrays = [(x, y * 0, xt, yt * 0) for x, y, xt, yt in oracle.arrays()]  # one class: the loss and its gradient are 0
    net = pflbench.Net(toy.net().body, nn.Linear(3, 1).double())
    record = toy.run("fedas", federation=pflbench.Federation.from_arrays(arrays), net=net)
    assert record.status == "diverged"
    assert record.rounds == record.evaluations == []
    assert "Fisher" in record.reason
    assert "round 1" in record.reason


def test_a_model_that_is_not_a_number_ends_the_run_as_diverged():
    # One batch a round, so that the training loss is still finite when the parameters overflow.
    settings = {"lr": 3e38, "weight_decay": 1e3, "batch_size": 7, "local_epochs": 1}
    record = toy.run("fedas", {"alignment": "off"}, net=toy.net().float(), **settings)
    assert record.status == "diverged"
    assert "round 1" in record.reason
    assert record.rounds == record.evaluations == []
    assert all(t.isfinite().all() for t in record.server["model"].values())


# Evaluation and identities.


def test_a_client_that_was_never_chosen_is_evaluated_with_the_initial_model():
    settings, chosen = toy.TURNS[2]
    assert chosen == [[1], [1]]
    record = toy.run("fedas", **settings)
    assert oracle.same(record.client_states[0]["model"], toy.initial())
    _, _, x, y = oracle.arrays()[0]
    accuracy = float((oracle.logits(toy.initial(), x).argmax(1) == y).double().mean())
    assert [c["accuracy"] for c in record.clients if c["client"] == 0] == [accuracy, accuracy]


@pytest.mark.parametrize("turn", range(3))
def test_without_alignment_and_fisher_weights_server_and_heads_are_fedpers(turn):
    settings, _ = toy.TURNS[turn]
    settings = {**settings, **toy.FULL, "shuffle": True, "rounds": 3}
    a = toy.run("fedas", {"alignment": "off", "weighting": "samples"}, **settings)
    b = toy.run("fedper", **settings)
    assert oracle.same(a.server["model"], b.server["model"])
    for i in range(2):
        assert oracle.same(oracle.head(a.client_states[i]["model"]), b.client_states[i]["model"])
    assert [r["train_loss"] for r in a.rounds] == [r["train_loss"] for r in b.rounds]


def test_without_alignment_clients_with_the_same_data_have_fedpers_weights():
    client = oracle.arrays()[0]
    same = pflbench.Federation.from_arrays([client, client], classes=3)
    a = toy.run("fedas", {"alignment": "off"}, federation=same)
    b = toy.run("fedper", federation=same)
    oracle.close(a.server["model"], b.server["model"])


def test_without_alignment_one_client_is_fedavg_with_one_client():
    one = toy.federation((7,))
    a = toy.run("fedas", {"alignment": "off"}, federation=one, shuffle=True, **toy.FULL)
    b = toy.run("fedavg", federation=one, shuffle=True, **toy.FULL)
    assert oracle.same(a.client_states[0]["model"], b.server["model"])
    assert oracle.same(a.server["model"], oracle.body(b.server["model"]))


def test_alone_in_its_rounds_a_client_sees_no_weights():
    settings, _ = toy.TURNS[1]
    a, b = (toy.run("fedas", {"weighting": w}, **settings) for w in ("fisher", "samples"))
    assert oracle.same(a.server["model"], b.server["model"])


def test_in_the_first_round_alignment_starts_at_its_own_prototypes():
    # All start from the initial model, so the received body's features differ from their class means by scatter only;
    # with one sample a class, they do not differ at all, and alignment has nothing to do.
    x = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    federation = pflbench.Federation.from_arrays([(x, y, x, y)] * 2, classes=3)
    a, b = (toy.run("fedas", {"alignment": how}, rounds=1, federation=federation) for how in ("own-copy", "off"))
    oracle.close(a.server["model"], b.server["model"])
