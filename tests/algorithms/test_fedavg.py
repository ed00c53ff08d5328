import numpy as np
import oracle
import torch
import toy
from facts import Facts
from torch import nn

import pflbench
from pflbench.rng import rng

FACTS = Facts()


def test_two_rounds_are_the_papers_client_update_and_weighted_mean(turns):
    settings, chosen = turns
    record = toy.run("fedavg", **settings, **toy.FULL)

    server = toy.initial()
    tested = []
    for r in range(2):
        uploads, sizes = [], []
        for i in chosen[r]:
            x, y, _, _ = oracle.arrays()[i]
            uploads.append(oracle.train(server, x, y, 2, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02))
            sizes.append(len(y))
        server = oracle.mean(uploads, sizes)
        tested.append([server, server])

    oracle.close(record.server["model"], server)
    assert [record.client_states[i]["model"] for i in range(2)] == [{}, {}]
    toy.check_tested(record, tested)
    assert all(row["global_accuracy"] == row["accuracy"] for row in record.evaluations)


def test_shuffled_batches_are_a_permutation_for_each_epoch_round_and_client():
    record = toy.run("fedavg", shuffle=True, seed=11)

    server = toy.initial()
    seen = []
    for r in (1, 2):
        uploads = []
        for i in range(2):
            x, y, _, _ = oracle.arrays()[i]
            generator = rng(11, "batches", "train", 0, r, i)
            orders = [generator.permutation(len(y)) for _ in range(2)]
            seen += [tuple(order) for order in orders if len(order) == 7]
            batches = [list(order[at]) for order in orders for at in oracle.batches(len(y), 3)]
            uploads.append(oracle.descend(server, batches, lambda q, b, x=x, y=y: oracle.nll(q, x[b], y[b]), lr=0.1))
        server = oracle.mean(uploads, [7, 4])

    oracle.close(record.server["model"], server)
    assert len(set(seen)) == 4


def test_drop_last_leaves_out_the_incomplete_batch_unless_it_is_the_only_one():
    record = toy.run("fedavg", federation=toy.federation((7, 2)), drop_last=True, rounds=1)

    uploads = []
    for (x, y, _, _), batches in zip(oracle.arrays((7, 2)), ([[0, 1, 2], [3, 4, 5]], [[0, 1]]), strict=True):
        uploads.append(
            oracle.descend(toy.initial(), batches * 2, lambda q, b, x=x, y=y: oracle.nll(q, x[b], y[b]), lr=0.1)
        )
    oracle.close(record.server["model"], oracle.mean(uploads, [7, 2]))
    assert record.rounds[0]["steps"] == 4 + 2


def test_the_train_loss_is_the_mean_over_the_samples_of_all_epochs():
    record = toy.run("fedavg", rounds=1)
    total = 0.0
    for x, y, _, _ in oracle.arrays():
        p = toy.initial()
        for batch in oracle.batches(len(y), 3) * 2:
            total += float(oracle.nll(p, x[batch], y[batch])) * len(batch)
            p = oracle.descend(p, [batch], lambda q, b, x=x, y=y: oracle.nll(q, x[b], y[b]), lr=0.1)
    np.testing.assert_allclose(record.rounds[0]["train_loss"], total / (2 * 11), rtol=0, atol=1e-9)


def test_one_client_is_centralised_sgd():
    record = toy.run("fedavg", federation=toy.federation((7,)), rounds=3)

    net = toy.net()
    x, y, _, _ = oracle.arrays()[0]
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3 * 2):
        for batch in oracle.batches(7, 3):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    oracle.close(record.server["model"], {name: p.detach() for name, p in net.named_parameters()})


def test_full_batches_and_one_epoch_are_gradient_descent_on_the_pooled_data():
    record = toy.run("fedavg", batch_size=7, local_epochs=1, rounds=1)
    x, y = (torch.cat([client[k] for client in oracle.arrays()]) for k in (0, 1))
    oracle.close(record.server["model"], oracle.train(toy.initial(), x, y, 1, size=11, lr=0.1))


def test_clients_with_the_same_data_average_to_the_model_of_one():
    client = oracle.arrays()[0]
    two = toy.run("fedavg", federation=pflbench.Federation.from_arrays([client, client], classes=3))
    one = toy.run("fedavg", federation=pflbench.Federation.from_arrays([client], classes=3))
    oracle.close(two.server["model"], one.server["model"])


def test_a_client_that_does_not_take_part_has_no_influence():
    changed = oracle.arrays()
    changed[0] = (changed[0][0] * -3, *changed[0][1:])
    settings, chosen = toy.TURNS[2]
    assert chosen == [[1], [1]]
    a = toy.run("fedavg", **settings)
    b = toy.run("fedavg", federation=pflbench.Federation.from_arrays(changed, classes=3), **settings)
    assert oracle.same(a.server["model"], b.server["model"])


def _normalised():
    net = toy.net()
    norm = nn.BatchNorm1d(3, track_running_stats=True)
    norm.num_batches_tracked = None
    return pflbench.Net(nn.Sequential(net.body[0], norm, nn.Tanh()), net.head).double()


def test_batch_norm_buffers_are_averaged():
    federation = toy.federation((8, 4))
    record = toy.run("fedavg", net=_normalised(), federation=federation, rounds=1, local_epochs=1, batch_size=4)

    uploads = []
    for x, y, _, _ in oracle.arrays((8, 4)):
        net = _normalised().train()
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        for batch in oracle.batches(len(y), 4):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
        uploads.append({k: t for k, t in net.state_dict().items() if t.is_floating_point()})

    assert {"body.1.running_mean", "body.1.running_var"} <= uploads[0].keys()
    oracle.close(record.server["model"], oracle.mean(uploads, [8, 4]))
    assert [record.client_states[i]["model"] for i in range(2)] == [{}, {}]


def test_batch_norm_buffers_of_the_body_are_shared_where_the_head_is_personal():
    for name in ("fedper", "fedrep", "fedas"):
        record = toy.run(
            name, net=_normalised(), federation=toy.federation((8, 4)), rounds=1, batch_size=4,
        )  # fmt: skip
        names = {k for k in record.server["model"] if "running" in k}
        assert names == {"body.1.running_mean", "body.1.running_var"}
        initial = _normalised().state_dict()
        assert all(not torch.equal(record.server["model"][k], initial[k]) for k in names)
