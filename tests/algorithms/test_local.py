def test_two_rounds_are_each_clients_own_sgd(toy, turns):
    settings, chosen = turns
    record = toy.run("local", **settings, **toy.FULL)

    models = [toy.initial(), toy.initial()]
    tested = []
    for r in range(2):
        for i in chosen[r]:
            x, y, _, _ = toy.arrays()[i]
            models[i] = toy.train(models[i], x, y, 2, lr=0.1 * 0.5**r, momentum=0.5, weight_decay=0.02)
        tested.append(list(models))

    for i in range(2):
        toy.close(record.client_states[i]["model"], models[i])
    toy.check_tested(record, tested)


def test_a_client_does_not_depend_on_the_others(toy):
    alone = toy.run("local", federation=toy.federation((7,)), shuffle=True)
    among = toy.run("local", shuffle=True)
    assert toy.same(alone.client_states[0]["model"], among.client_states[0]["model"])


def test_one_client_equals_fedavg_with_one_client(toy):
    one = toy.federation((7,))
    local, fedavg = (toy.run(name, federation=one, shuffle=True, **toy.FULL) for name in ("local", "fedavg"))
    assert toy.same(local.client_states[0]["model"], fedavg.server["model"])
    assert [r["accuracy"] for r in local.rounds] == [r["accuracy"] for r in fedavg.rounds]


def test_there_is_no_global_model(toy):
    record = toy.run("local")
    assert record.server["model"] == {}
    assert [r["global_accuracy"] for r in record.rounds] == [None, None]
