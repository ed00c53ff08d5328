"""`tested="both"`: besides the deployed model, each client's own model, as its last local training left it."""

import json

import facts
import oracle
import pytest
import torch
import toy

import pflbench
from pflbench import Message, MethodError
from pflbench.algorithms.fedavg import FedAvg
from pflbench.core import registry
from pflbench.store import schema

METHODS = sorted(registry.algorithms())
OWN = "own_model"


def _without(state):
    return {part: value for part, value in state.items() if part != OWN}


def _same(a, b):
    return a.keys() == b.keys() and all(
        _same(a[k], b[k]) if isinstance(a[k], dict) else torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k]))
        for k in a
    )


def _score(p, client):
    _, _, x, y = oracle.arrays()[client]
    return int((oracle.logits(p, x).argmax(1) == y).sum()) / len(y)


def _scores(record, number):
    return [row["own_accuracy"] for row in record.clients if row["round"] == number]


@pytest.mark.parametrize("algo", METHODS)
def test_testing_own_models_changes_no_other_number(algo):
    settings = {"federation": toy.federation((24, 18, 12)), "join_ratio": 0.67, "rounds": 3}
    plain, both = (toy.run(algo, tested=tested, **settings) for tested in ("deployed", "both"))
    assert plain.id != both.id
    for name in schema.EVALUATION[:7]:
        assert [r[name] for r in plain.evaluations] == [r[name] for r in both.evaluations]
    assert [r["train_loss"] for r in plain.rounds] == [r["train_loss"] for r in both.rounds]
    assert _same(plain.server, both.server)
    for client in range(3):
        assert _same(plain.client_states[client], _without(both.client_states[client]))
        own = both.client_states[client][OWN]
        assert own.keys() == toy.initial(toy.net_for(algo)).keys()


def test_the_own_model_of_fedavg_is_what_the_client_uploaded_last(turns):
    settings, chosen = turns
    record = toy.run("fedavg", tested="both", **settings)
    server, own = toy.initial(), [toy.initial()] * 2
    for number, cohort in enumerate(chosen, 1):
        for i in cohort:
            x, y, _, _ = oracle.arrays()[i]
            own[i] = oracle.train(server, x, y, 2, lr=0.1)
        server = oracle.mean([own[i] for i in cohort], [(7, 4)[i] for i in cohort])
        assert _scores(record, number) == [_score(p, i) for i, p in enumerate(own)]
    for i, p in enumerate(own):
        oracle.close(record.client_states[i][OWN], p)


def test_the_four_metrics_are_over_all_clients():
    record = toy.run("fedavg", federation=toy.federation((7, 4, 5)), tested="both", join_ratio=0.34)
    each = sorted(_scores(record, 2))
    last = record.summary["last"]
    assert last["own_accuracy"] == pytest.approx(sum(each) / 3, rel=1e-12)  # all test sets have the same size
    assert last["own_accuracy_mean"] == pytest.approx(sum(each) / 3, rel=1e-12)
    assert last["own_accuracy_worst10"] == each[0]
    assert last["own_accuracy_std"] == pytest.approx(
        float(torch.tensor(each, dtype=torch.float64).std(correction=0)), rel=1e-9
    )


def test_the_best_round_on_test_is_that_of_each_model():
    record = toy.run("fedavg", tested="both", rounds=6)
    for name, metric in (("best_on_test", "accuracy"), ("own_best_on_test", "own_accuracy")):
        best = max(row[metric] for row in record.evaluations)
        assert record.summary[name][metric] == best
        assert record.evaluations[record.summary[name]["round"] - 1][metric] == best
    assert "own_best_on_test" not in toy.run("fedavg").summary


# Methods that keep the whole trained network for the evaluation: both models are one.
@pytest.mark.parametrize("algo", ["ditto", "fedala", "fedamp", "fedas", "fedfomo", "local"])
def test_where_the_deployed_model_is_the_own_model_both_score_the_same(algo):
    record = toy.run(algo, federation=toy.federation((24, 18, 12)), tested="both", join_ratio=0.67, rounds=3)
    assert [r["own_accuracy"] for r in record.evaluations] == [r["accuracy"] for r in record.evaluations]
    said = " ".join(registry.describe(algo).text.split())
    assert "Reported: the deployed model, which is also the client's own model." in said


def test_the_own_model_of_fedbabu_is_not_fine_tuned():
    record = toy.run("fedbabu", tested="both")
    for client in range(2):
        assert oracle.same(oracle.head(record.client_states[client][OWN]), oracle.head(toy.initial()))


def test_the_own_model_of_fedrep_has_the_head_and_the_body_that_were_trained_in_turn():
    record = toy.run("fedrep", tested="both", federation=toy.federation((7,)))
    own = record.client_states[0][OWN]
    assert oracle.same(oracle.body(own), record.server["model"])
    assert oracle.same(oracle.head(own), record.client_states[0]["model"])


@toy.ways
def test_every_executor_and_store_gives_the_same_own_models(way, tmp_path):
    expected = toy.run("fedavg", tested="both", join_ratio=0.5)
    found = toy.run_in(way, "fedavg", tmp_path, tested="both", join_ratio=0.5)
    assert found.fingerprints == expected.fingerprints


def test_a_resumed_run_has_the_own_models_of_an_uninterrupted_one(tmp_path):
    spec = toy.spec("fedavg", tested="both", rounds=5, join_ratio=0.5)
    whole, resumed = toy.interrupted(spec, toy.federation(), tmp_path)
    assert whole.fingerprints == resumed.fingerprints
    assert whole.evaluations[-1]["own_accuracy"] == resumed.evaluations[-1]["own_accuracy"]


def test_the_record_on_disk_has_them(tmp_path):
    spec = toy.spec("fedavg", tested="both")
    record = pflbench.run(spec, toy.federation(), toy.net(), executor="serial", out=tmp_path)
    found = pflbench.Record.load(record.path)
    assert found.evaluations == record.evaluations
    assert found.clients == record.clients
    assert json.loads((record.path / "run.json").read_text())["summary"]["last"]["own_accuracy"] > 0
    found.load_states()
    assert oracle.same(found.client_states[0][OWN], record.client_states[0][OWN])


def test_a_method_that_trains_no_whole_network_is_refused(methods):
    @pflbench.register("by-hand")
    class ByHand(FedAvg):
        def local_update(self, client, received, state):
            return Message(received.content), state

    with pytest.raises(MethodError, match=r"tested=both needs the network of the last local training"):
        toy.run(ByHand.name, tested="both", net=toy.net())


def test_a_method_with_a_part_of_that_name_is_refused(methods):
    @pflbench.register("taken")
    class Taken(FedAvg):
        def init_client(self, setup):
            return {"model": {}, OWN: setup.zeros(1)}

        def local_update(self, client, received, state):
            message, new = super().local_update(client, received, state)
            return message, {**state, **new}

    toy.run(Taken.name, tested="deployed", net=toy.net(), rounds=1)
    with pytest.raises(MethodError, match="rename that part"):
        toy.run(Taken.name, tested="both", net=toy.net())


def test_nothing_but_the_last_training_of_a_whole_network_counts():
    x, y, _, _ = oracle.arrays()[0]
    client = toy.client(x, y)
    assert client.trained == {}
    client.grad(toy.initial(), next(client.batches(stream="any")))
    client.descend({"w": torch.ones(1)}, lambda w, _: w)
    assert client.trained == {}
    first, _ = client.part(0.5, stream="some")
    model = first.sgd(toy.initial())
    assert oracle.same(client.trained, model)


def test_every_method_says_which_of_them_its_paper_reports():
    for algo in METHODS:
        if facts.path(algo).exists():
            assert "\nReported: " in registry.describe(algo).text


def test_a_network_without_parameters_to_train_is_its_own_model():
    net = pflbench.Net(torch.nn.Flatten(), torch.nn.Linear(3, 3)).double()
    record = toy.run("fedbabu", tested="both", net=net)
    assert oracle.same(record.client_states[0][OWN], toy.initial(net))
