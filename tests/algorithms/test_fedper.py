import pytest

import pflbench


def test_two_rounds_average_the_bodies_by_samples_and_keep_the_heads(toy, turns):
    settings, chosen = turns
    record = toy.run("fedper", **settings, **toy.FULL)

    body, heads = toy.body(toy.initial()), [toy.head(toy.initial())] * 2
    tested = []
    data = toy.arrays()
    for r in range(2):
        ups = []
        for i in chosen[r]:
            x, y, _, _ = data[i]
            p = toy.train({**body, **heads[i]}, x, y, 2, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02)
            ups.append(toy.body(p))
            heads[i] = toy.head(p)
        body = toy.mean(ups, [len(data[i][1]) for i in chosen[r]])
        tested.append([{**body, **head} for head in heads])

    toy.close(record.server["model"], body)
    for i in range(2):
        toy.close(record.client_states[i]["model"], heads[i])
    toy.check_tested(record, tested)


def test_one_client_equals_fedavg_with_one_client(toy):
    one = toy.federation((7,))
    fedper, fedavg = (toy.run(name, federation=one, shuffle=True, **toy.FULL) for name in ("fedper", "fedavg"))
    assert toy.same({**fedper.server["model"], **fedper.client_states[0]["model"]}, fedavg.server["model"])
    assert [r["test_loss"] for r in fedper.rounds] == [r["test_loss"] for r in fedavg.rounds]


def test_clients_of_equal_size_have_equal_weights(toy):
    record = toy.run("fedper", federation=toy.federation((6, 6)), rounds=1)
    ups = [toy.train(toy.initial(), x, y, 2, lr=0.1) for x, y, _, _ in toy.arrays((6, 6))]
    toy.close(record.server["model"], toy.mean([toy.body(p) for p in ups], [1, 1]))


def test_clients_with_the_same_data_are_one_client(toy):
    client = toy.arrays()[0]
    two = toy.run("fedper", federation=pflbench.Federation.from_arrays([client, client], classes=3))
    one = toy.run("fedper", federation=pflbench.Federation.from_arrays([client], classes=3))
    toy.close(two.server["model"], one.server["model"])
    toy.close(two.client_states[1]["model"], one.client_states[0]["model"])


@pytest.mark.parametrize("algo", ["fedper", "fedrep", "fedas"])
def test_there_is_no_global_model(toy, algo):
    record = toy.run(algo)
    assert [r["global_accuracy"] for r in record.rounds] == [None, None]
