import oracle
import torch
import toy
from facts import HEAD, Facts

import pflbench

FACTS = Facts(bytes={"": (HEAD, HEAD)})


def test_two_rounds_average_the_heads_by_samples_and_keep_the_bodies(turns):
    settings, chosen = turns
    record = toy.run("lg-fedavg", **settings, **toy.FULL)

    head, bodies = oracle.head(toy.initial()), [oracle.body(toy.initial())] * 2
    tested = []
    data = oracle.arrays()
    for r in range(2):
        uploads = []
        for i in chosen[r]:
            x, y, _, _ = data[i]
            p = oracle.train({**bodies[i], **head}, x, y, 2, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02)
            uploads.append(oracle.head(p))
            bodies[i] = oracle.body(p)
        head = oracle.mean(uploads, [len(data[i][1]) for i in chosen[r]])
        tested.append([{**body, **head} for body in bodies])

    oracle.close(record.server["model"], head)
    for i in range(2):
        oracle.close(record.client_states[i]["model"], bodies[i])
    toy.check_tested(record, tested)


def test_a_step_on_both_parts_has_one_gradient_and_is_not_taken_in_turn():
    x, y, _, _ = oracle.arrays((6,))[0]
    one = pflbench.Federation.from_arrays([(x, y, x, y)], classes=3)
    record = toy.run("lg-fedavg", federation=one, rounds=1, local_epochs=1, batch_size=6)
    p = toy.initial()
    g = oracle.gradient(lambda q: oracle.nll(q, x, y), p, oracle.BODY + oracle.HEAD)
    oracle.close(record.server["model"], {k: p[k] - 0.1 * g[k] for k in oracle.HEAD})
    oracle.close(record.client_states[0]["model"], {k: p[k] - 0.1 * g[k] for k in oracle.BODY})


def test_one_client_equals_fedavg_with_one_client():
    one = toy.federation((7,))
    lg, fedavg = (toy.run(name, federation=one, shuffle=True, **toy.FULL) for name in ("lg-fedavg", "fedavg"))
    assert oracle.same({**lg.client_states[0]["model"], **lg.server["model"]}, fedavg.server["model"])
    assert [r["test_loss"] for r in lg.evaluations] == [r["test_loss"] for r in fedavg.evaluations]


def test_in_the_first_round_heads_and_bodies_are_fedavgs_before_and_after_its_average():
    lg, fedavg, alone = (toy.run(name, rounds=1, shuffle=True) for name in ("lg-fedavg", "fedavg", "local"))
    assert oracle.same(lg.server["model"], oracle.head(fedavg.server["model"]))
    for i in range(2):
        assert oracle.same(lg.client_states[i]["model"], oracle.body(alone.client_states[i]["model"]))


def test_it_is_fedper_with_the_parts_exchanged():
    lg, fedper = (toy.run(name, rounds=1, shuffle=True) for name in ("lg-fedavg", "fedper"))
    assert not lg.server["model"].keys() & fedper.server["model"].keys()
    assert lg.server["model"].keys() | fedper.server["model"].keys() == toy.initial().keys()


def test_there_is_no_global_model():
    assert [r["global_accuracy"] for r in toy.run("lg-fedavg").evaluations] == [None, None]


def test_the_bodys_batch_norm_stays_on_the_client():
    net = toy.batch_norm()
    record = toy.run("lg-fedavg", net=net, federation=toy.federation((8, 4)), batch_size=4)
    assert record.server["model"].keys() == set(oracle.HEAD)
    means = [record.client_states[i]["model"]["body.1.running_mean"] for i in range(2)]
    assert not torch.equal(*means)
    assert all(bool((m != 0).all()) for m in means)
