import oracle
import pytest
import toy
from facts import BODY, Facts

import pflbench

FACTS = Facts(bytes={"": (BODY, BODY)})


def test_two_rounds_average_the_bodies_by_samples_and_keep_the_heads(turns):
    settings, chosen = turns
    record = toy.run("fedper", **settings, **toy.FULL)

    body, heads = oracle.body(toy.initial()), [oracle.head(toy.initial())] * 2
    tested = []
    data = oracle.arrays()
    for r in range(2):
        uploads = []
        for i in chosen[r]:
            x, y, _, _ = data[i]
            p = oracle.train({**body, **heads[i]}, x, y, 2, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02)
            uploads.append(oracle.body(p))
            heads[i] = oracle.head(p)
        body = oracle.mean(uploads, [len(data[i][1]) for i in chosen[r]])
        tested.append([{**body, **head} for head in heads])

    oracle.close(record.server["model"], body)
    for i in range(2):
        oracle.close(record.client_states[i]["model"], heads[i])
    toy.check_tested(record, tested)


def test_one_client_equals_fedavg_with_one_client():
    one = toy.federation((7,))
    fedper, fedavg = (toy.run(name, federation=one, shuffle=True, **toy.FULL) for name in ("fedper", "fedavg"))
    assert oracle.same({**fedper.server["model"], **fedper.client_states[0]["model"]}, fedavg.server["model"])
    assert [r["test_loss"] for r in fedper.evaluations] == [r["test_loss"] for r in fedavg.evaluations]


def test_clients_of_equal_size_have_equal_weights():
    record = toy.run("fedper", federation=toy.federation((6, 6)), rounds=1)
    uploads = [oracle.train(toy.initial(), x, y, 2, lr=0.1) for x, y, _, _ in oracle.arrays((6, 6))]
    oracle.close(record.server["model"], oracle.mean([oracle.body(p) for p in uploads], [1, 1]))


def test_clients_with_the_same_data_are_one_client():
    client = oracle.arrays()[0]
    two = toy.run("fedper", federation=pflbench.Federation.from_arrays([client, client], classes=3))
    one = toy.run("fedper", federation=pflbench.Federation.from_arrays([client], classes=3))
    oracle.close(two.server["model"], one.server["model"])
    oracle.close(two.client_states[1]["model"], one.client_states[0]["model"])


@pytest.mark.parametrize("algo", ["fedper", "fedrep", "fedas"])
def test_there_is_no_global_model(algo):
    record = toy.run(algo)
    assert [r["global_accuracy"] for r in record.evaluations] == [None, None]
