import oracle
import toy
from facts import Facts

FACTS = Facts(bytes={"": (0, 0)})


def test_two_rounds_are_each_clients_own_sgd(turns):
    settings, chosen = turns
    record = toy.run("local", **settings, **toy.FULL)

    models = [toy.initial(), toy.initial()]
    tested = []
    for r in range(2):
        for i in chosen[r]:
            x, y, _, _ = oracle.arrays()[i]
            models[i] = oracle.train(models[i], x, y, 2, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02)
        tested.append(list(models))

    for i in range(2):
        oracle.close(record.client_states[i]["model"], models[i])
    toy.check_tested(record, tested)


def test_a_client_does_not_depend_on_the_others():
    alone = toy.run("local", federation=toy.federation((7,)), shuffle=True)
    among = toy.run("local", shuffle=True)
    assert oracle.same(alone.client_states[0]["model"], among.client_states[0]["model"])


def test_one_client_equals_fedavg_with_one_client():
    one = toy.federation((7,))
    alone, fedavg = (toy.run(name, federation=one, shuffle=True, **toy.FULL) for name in ("local", "fedavg"))
    assert oracle.same(alone.client_states[0]["model"], fedavg.server["model"])
    assert [r["accuracy"] for r in alone.evaluations] == [r["accuracy"] for r in fedavg.evaluations]


def test_there_is_no_global_model():
    record = toy.run("local")
    assert record.server["model"] == {}
    assert [r["global_accuracy"] for r in record.evaluations] == [None, None]
