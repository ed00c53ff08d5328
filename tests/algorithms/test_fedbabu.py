import oracle
import pytest
import torch
import toy
from facts import BODY, Facts

FACTS = Facts(bytes={"": (BODY, BODY)})

PARTS = {"full": ("body", "head"), "head": ("head",), "body": ("body",)}


@pytest.mark.parametrize("part", list(PARTS))
def test_two_rounds_train_and_average_the_body_under_the_initial_head_and_fine_tune_what_is_tested(turns, part):
    settings, chosen = turns
    record = toy.run("fedbabu", {"ft_epochs": 3, "ft_part": part}, **settings, **toy.FULL)

    data = oracle.arrays()
    body, head = oracle.body(toy.initial()), oracle.head(toy.initial())
    tuned = [name for name in toy.initial() if name.startswith(PARTS[part])]
    tested = []
    for r in range(2):
        sgd = {"lr": 0.1 * 0.5**r, "momentum": 0.5, "weight_decay": 0.02}
        uploads = [
            oracle.body(oracle.train({**body, **head}, *data[i][:2], 2, names=oracle.BODY, **sgd)) for i in chosen[r]
        ]
        body = oracle.mean(uploads, [len(data[i][1]) for i in chosen[r]])
        tested.append([oracle.train({**body, **head}, x, y, 3, names=tuned, **sgd) for x, y, _, _ in data])

    oracle.close(record.server["model"], body)
    assert all(oracle.same(record.client_states[i]["model"], head) for i in range(2))
    toy.check_tested(record, tested)


def test_the_whole_network_is_fine_tuned_for_five_epochs_unless_told():
    settings = {"rounds": 1, "shuffle": True}
    default, told = (toy.run("fedbabu", h, **settings) for h in ({}, {"ft_epochs": 5, "ft_part": "full"}))
    assert default.clients == told.clients
    assert default.evaluations[0]["test_loss"] == told.evaluations[0]["test_loss"]


def test_fine_tuning_happens_before_the_evaluation_and_lowers_the_loss():
    losses = [toy.run("fedbabu", {"ft_epochs": e}).evaluations[-1]["test_loss"] for e in (0, 5)]
    assert losses[1] < 0.95 * losses[0]


@pytest.mark.parametrize("hyper", [{"ft_epochs": 0}, {"ft_epochs": 9}, {"ft_part": "head"}, {"ft_part": "body"}])
def test_the_body_is_the_same_whatever_the_fine_tuning(hyper):
    a, b = (toy.run("fedbabu", h, rounds=4, shuffle=True, **toy.FULL) for h in ({}, hyper))
    assert oracle.same(a.server["model"], b.server["model"])
    assert [r["steps"] for r in a.rounds] == [r["steps"] for r in b.rounds]
    assert [r["train_loss"] for r in a.rounds] == [r["train_loss"] for r in b.rounds]


def test_no_epochs_of_fine_tuning_evaluate_the_averaged_body_with_the_initial_head():
    record = toy.run("fedbabu", {"ft_epochs": 0})
    p = toy.initial()
    for r in range(2):
        trained = [oracle.body(oracle.train(p, x, y, 2, names=oracle.BODY, lr=0.1)) for x, y, _, _ in oracle.arrays()]
        p = {**oracle.mean(trained, [7, 4]), **oracle.head(toy.initial())}
        loss = sum(60 * float(oracle.nll(p, x, y)) for _, _, x, y in oracle.arrays()) / 120
        assert record.evaluations[r]["test_loss"] == pytest.approx(loss, abs=1e-9)


def test_the_body_is_that_of_fedrep_without_head_epochs_where_clients_are_of_equal_size():
    federation = toy.federation((6, 6))
    babu = toy.run("fedbabu", federation=federation, shuffle=True, **toy.FULL)
    fedrep = toy.run("fedrep", {"head_epochs": 0}, federation=federation, shuffle=True, **toy.FULL)
    oracle.close(babu.server["model"], fedrep.server["model"])


def test_weight_decay_and_momentum_leave_the_head_alone():
    record = toy.run("fedbabu", rounds=3, momentum=0.9, weight_decay=0.3)
    for i in range(2):
        assert oracle.same(record.client_states[i]["model"], oracle.head(toy.initial()))


def test_the_head_is_in_no_state_of_the_server_and_there_is_no_global_model():
    record = toy.run("fedbabu")
    assert record.server["model"].keys() == set(oracle.BODY)
    assert [r["global_accuracy"] for r in record.evaluations] == [None, None]


def test_batch_norm_of_the_body_is_averaged_with_it():
    net = toy.batch_norm()
    initial = net.state_dict()
    for part in PARTS:
        record = toy.run("fedbabu", {"ft_part": part}, net=net, federation=toy.federation((8, 4)), batch_size=4)
        for name in ("body.1.running_mean", "body.1.running_var"):
            assert not torch.equal(record.server["model"][name], initial[name])
