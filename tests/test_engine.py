"""The engine: the functions of a method that it calls, and the rows that it writes."""

import dataclasses
import time

import oracle
import pytest
import torch
import toy
from torch import nn

import pflbench
from pflbench import MethodError, Record, UsageError
from pflbench.algorithms.fedavg import FedAvg
from pflbench.core import Message, register
from pflbench.engine.work import Work
from pflbench.store import schema

SIZES = (9, 4, 7, 5)


def _prints(record):
    return record.fingerprints["metrics"], record.fingerprints["states"]


# The setup before the first round.


def test_a_setup_says_what_there_is():
    net = toy.batch_norm()
    setup = pflbench.prepare(toy.spec("fedavg", order_seed=5), toy.federation(), net).setup
    assert (setup.clients, setup.classes, setup.features, setup.seed) == (2, 3, 3, 5)
    assert setup.buffers == {"body.1.running_mean", "body.1.running_var"}
    assert list(setup.model) == [*(name for name, _ in net.named_parameters()), *sorted(setup.buffers)]
    assert list(setup.trainable(setup.model)) == [name for name, _ in net.named_parameters()]
    assert list(setup.trainable({"head.bias": 1, "body.1.running_mean": 2})) == ["head.bias"]
    assert setup.zeros(2, 3).dtype == torch.float64
    assert setup.zeros(2, 3).tolist() == [[0, 0, 0]] * 2


def test_features_that_are_no_vectors_have_no_length():
    net = pflbench.Net(nn.Unflatten(1, (1, 3)), nn.Sequential(nn.Flatten(), nn.Linear(3, 3))).double()
    assert pflbench.prepare(toy.spec("fedavg"), toy.federation(), net).setup.features == 0


def test_what_is_done_to_the_network_after_it_was_prepared_is_no_part_of_the_run():
    net = toy.net()
    experiment = pflbench.prepare(toy.spec("fedavg"), toy.federation(), net)
    with torch.no_grad():
        net.head.bias.fill_(7.0)
    assert oracle.same(experiment.setup.model, toy.initial())
    assert experiment.id == pflbench.prepare(toy.spec("fedavg"), toy.federation(), toy.net()).id


def _experiment(kind, **settings):
    if kind == "ours":
        return pflbench.prepare(toy.spec("fedavg", model="mlp", **settings), toy.federation())
    net = {"theirs": toy.net, "with BatchNorm": toy.batch_norm}[kind]()
    return pflbench.prepare(toy.spec("fedavg", **settings), toy.federation(), net)


@pytest.mark.parametrize("kind", ["ours", "theirs", "with BatchNorm"])
def test_fresh_parameters_are_others_and_the_same_for_the_same_key(kind):
    setup = _experiment(kind).setup
    state = torch.random.get_rng_state()
    one, two, three = setup.fresh("client", 1), setup.fresh("client", 2), setup.fresh()
    assert torch.equal(torch.random.get_rng_state(), state)
    shapes = [{k: (t.shape, t.dtype) for k, t in p.items()} for p in (setup.model, one, two, three)]
    assert shapes[1:] == shapes[:1] * 3
    for a, b in ((one, two), (one, three), (two, three), (one, setup.model)):
        assert not any(torch.equal(a[k], b[k]) for k in ("head.weight", "head.bias"))
    assert oracle.same(setup.fresh("client", 1), one)
    assert oracle.same(_experiment(kind).setup.fresh("client", 1), one)
    assert not oracle.same(_experiment(kind, order_seed=1).setup.fresh("client", 1), one)
    assert not any(t.requires_grad for t in one.values())
    for name in setup.buffers:
        assert one[name].unique().tolist() == [float("var" in name)]


def test_fresh_parameters_that_cannot_be_drawn_are_an_error_that_says_why():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(3).double())

        def forward(self, x):
            return x * self.by

    net = pflbench.Net(nn.Sequential(Scale(), toy.net().body), toy.net().head)
    setup = pflbench.prepare(toy.spec("fedavg"), toy.federation(), net).setup
    with pytest.raises(UsageError, match=r"model: Scale has no reset_parameters\(\), which draws new ones"):
        setup.fresh("a")
    with pytest.raises(MethodError, match="no others can be drawn"):
        toy.setup().fresh("a")


def test_server_and_clients_draw_the_same_fresh_parameters_in_every_process(methods, tmp_path):
    @register("fresh")
    class Fresh(FedAvg):
        def init_server(self, setup):
            return {"model": setup.model, "models": {i: setup.fresh(i) for i in range(setup.clients)}}

        def local_update(self, client, received, state):
            message, _ = super().local_update(client, received, {"model": {}})
            return message, {"model": {}, "own": client.setup.fresh(client.id)}

        def aggregate(self, round, server, uploads):
            return {**server, **super().aggregate(round, server, uploads)}

    records = [toy.run_in(way, "fresh", tmp_path) for way in toy.WAYS]
    assert len({_prints(record) for record in records}) == 1
    for i in range(2):
        assert oracle.same(records[0].client_states[i]["own"], records[0].server["models"][i])


# Rounds of several exchanges, and of none.


def test_a_round_of_two_exchanges_is_two_rounds_with_their_bytes_passes_and_losses(twice):
    found, expected = toy.run(twice, rounds=2), toy.run("fedavg", rounds=4)
    assert oracle.same(found.server["model"], expected.server["model"])
    for i, row in enumerate(found.rounds):
        pair = expected.rounds[2 * i : 2 * i + 2]
        for name in ("bytes_up", "bytes_down", "steps", "forward", "backward"):
            assert row[name] == sum(r[name] for r in pair) > 0, name
        assert row["train_loss"] == pytest.approx(sum(r["train_loss"] for r in pair) / 2, rel=1e-12)
        for name in schema.EVALUATION[1:7]:
            assert found.evaluations[i][name] == expected.evaluations[2 * i + 1][name], name
    assert [found.client_states[i]["asked"] for i in range(2)] == [4, 4]


def test_every_exchange_has_its_own_order_of_batches_and_the_first_the_order_of_any_method(twice):
    record = toy.run(twice, rounds=2, shuffle=True)
    for i, (x, y, _, _) in enumerate(oracle.arrays()):
        orders = record.client_states[i]["orders"]
        assert list(orders) == [0, 1, 2, 3]
        assert all(sorted(order.tolist()) == list(range(len(y))) for order in orders.values())
        assert len({tuple(order.tolist()) for order in orders.values()}) == 4
        for number in (1, 2):
            client = toy.client(x, y, round=number, id=i, shuffle=True)
            first = torch.cat([batch.index for batch in client.batches(stream="order")])
            assert torch.equal(orders[2 * (number - 1)], first)


def test_what_the_clients_of_two_exchanges_give_does_not_depend_on_who_computes_it(twice, tmp_path):
    settings = {"sizes": SIZES, "join_ratio": 0.5, "shuffle": True, "rounds": 4, "eval_every": 2}
    records = [toy.run_in(way, twice, tmp_path, **settings) for way in toy.WAYS]
    assert len({_prints(record) for record in records}) == 1
    asked = [records[2].client_states[i]["asked"] for i in range(4)]
    assert asked == [2 * sum(i in row["participants"] for row in records[0].rounds) for i in range(4)]
    records[2].load_states()
    assert list(records[2].client_states[asked.index(max(asked))]["orders"]) == list(range(max(asked)))


@toy.ways
def test_an_upload_of_the_first_exchange_is_good_until_the_round_ends(methods, tmp_path, way):
    @register("both")
    class Both(FedAvg):
        """The server keeps the mean of each exchange's models; it reads the first ones last."""

        def init_server(self, setup):
            return {"model": setup.model, "means": {}}

        def play(self, round, server, cohort):
            first = cohort.update(server)
            second = cohort.update(self.aggregate(round, server, first))
            means = {
                1: self.aggregate(round, server, second)["model"],
                0: self.aggregate(round, server, first)["model"],
            }
            return {"model": means[1], "means": means}

    record = toy.run_in(way, "both", tmp_path, rounds=1)
    for i in (0, 1):
        expected = toy.run("fedavg", rounds=i + 1).server["model"]
        assert oracle.same(record.server["means"][i], expected)


@toy.ways
def test_a_server_may_send_and_keep_what_lies_in_an_uploads_file(methods, tmp_path, way):
    @register("pass-on")
    class PassOn(FedAvg):
        """Client 1 starts from client 0's upload, which the server does not look into."""

        def play(self, round, server, cohort):
            (first,) = cohort.update(server, [0])
            (second,) = cohort.update({"model": first["model"]}, [1])
            return {"model": second["model"], "of": {0: first["model"]}}

    record = toy.run_in(way, "pass-on", tmp_path, rounds=1)
    (x, y, _, _), (x2, y2, _, _) = oracle.arrays()
    first = oracle.train(toy.initial(), x, y, 2, lr=0.1)
    oracle.close(record.server["of"][0], first)
    oracle.close(record.server["model"], oracle.train(first, x2, y2, 2, lr=0.1))
    assert type(record.server["of"]) is dict


@toy.ways
def test_a_method_that_asks_nobody_trains_nobody_and_is_evaluated(methods, tmp_path, way):
    @register("silent")
    class Silent(FedAvg):
        def play(self, round, server, cohort):
            return {**server, "rounds": server.get("rounds", 0) + 1}

    record = toy.run_in(way, "silent", tmp_path, rounds=3)
    assert record.status == "finished"
    for row in record.rounds:
        assert row["train_loss"] is None
        assert [row[n] for n in ("bytes_up", "bytes_down", "steps", "forward", "backward")] == [0] * 5
        assert row["busy_seconds"] == 0.0
    assert [row["round"] for row in record.evaluations] == [1, 2, 3]
    assert len({row["accuracy"] for row in record.evaluations}) == 1
    assert record.server["rounds"] == 3
    assert oracle.same(record.server["model"], toy.initial())
    assert all(record.client_states[i] == {"model": {}} for i in range(2))
    if way == "disk":
        assert pflbench.Record.load(record.path).summary == record.summary


def test_a_client_that_is_not_asked_keeps_its_state_though_it_takes_part(methods):
    @register("first-only")
    class FirstOnly(FedAvg):
        def init_client(self, setup):
            return {"asked": 0}

        def local_update(self, client, received, state):
            return Message({"model": client.sgd(received["model"])}, client.n), {"asked": state["asked"] + 1}

        def play(self, round, server, cohort):
            return self.aggregate(round, server, cohort.update(server, round.cohort[:1]))

    record = toy.run("first-only")
    assert [row["participants"] for row in record.rounds] == [[0, 1], [0, 1]]
    assert [record.client_states[i]["asked"] for i in range(2)] == [2, 0]


# Rows.

COSTS = {"steps", "forward", "backward", "seconds", "busy_seconds"}
TRAINING = {"round", "participants", "train_loss", "bytes_up", "bytes_down", *COSTS}
EVALUATION = {
    "round", "accuracy", "accuracy_mean", "accuracy_std", "accuracy_worst10", "global_accuracy", "test_loss", *COSTS,
}  # fmt: skip


def test_training_and_evaluations_have_rows_of_their_own():
    record = toy.run("fedper", rounds=5, eval_every=2)
    assert set(schema.ROUND) == TRAINING
    assert set(schema.EVALUATION) == EVALUATION
    assert all(row.keys() == TRAINING for row in record.rounds)
    assert all(row.keys() == EVALUATION for row in record.evaluations)
    assert [row["round"] for row in record.rounds] == [1, 2, 3, 4, 5]
    assert [row["round"] for row in record.evaluations] == [2, 4, 5]


PASSES = [
    ("fedavg", {}, (0, 0, 0)),
    ("fedas", {}, (0, 0, 0)),
    ("fedavg-ft", {}, (5, 11, 11)),  # an epoch over 7 and 4 samples in batches of 3
    ("fedavg-ft", {"ft_epochs": 0}, (0, 0, 0)),
    ("fedbabu", {}, (25, 55, 55)),
    ("per-fedavg", {}, (0, 11, 11)),  # a gradient of all samples, which is no step of SGD
]


@pytest.mark.parametrize(("algo", "hyper", "passes"), PASSES)
@pytest.mark.parametrize("executor", ["serial", "processes"])
def test_the_training_inside_an_evaluation_is_counted_there_and_not_in_the_round(algo, hyper, passes, executor):
    record = toy.run(algo, hyper, executor=executor, workers=2)
    assert [(row["steps"], row["forward"], row["backward"]) for row in record.evaluations] == [passes] * 2
    seldom = toy.run(algo, hyper, eval_every=2)
    names = ("steps", "forward", "backward", "train_loss")
    assert [[row[n] for n in names] for row in seldom.rounds] == [[row[n] for n in names] for row in record.rounds]


@pytest.mark.parametrize(("executor", "workers"), [("serial", 1), ("processes", 2)])
@pytest.mark.parametrize("algo", ["fedavg", "fedbabu"])
def test_the_seconds_of_training_and_of_evaluations_sum_to_no_more_than_the_wall_time(algo, executor, workers):
    federation = toy.federation((60, 40, 50))
    began = time.perf_counter()
    record = toy.run(algo, federation=federation, executor=executor, workers=workers, rounds=4, eval_every=2)
    wall = time.perf_counter() - began
    rows = [*record.rounds, *record.evaluations]
    rounding = 0.0005 * len(rows)
    assert all(row["seconds"] >= 0 and row["busy_seconds"] > 0 for row in rows)
    assert sum(row["seconds"] for row in rows) <= wall + rounding
    assert sum(row["busy_seconds"] for row in rows) <= workers * (wall + rounding)
    trained, evaluated = ([row["seconds"] for row in part] for part in (record.rounds, record.evaluations))
    assert record.summary["seconds"] == pytest.approx(sum(trained))
    assert record.summary["evaluation"]["seconds"] == pytest.approx(sum(evaluated))
    if algo == "fedbabu":  # it trains longer in an evaluation than in a round
        assert sum(evaluated) > 0


def test_the_wall_time_of_a_step_is_divided_like_the_workers_time(methods):
    @register("sleepy")
    class Sleepy(FedAvg):
        def local_update(self, client, received, state):
            time.sleep(0.03)
            return super().local_update(client, received, state)

        def personalise(self, client, received, state):
            time.sleep(0.09)
            return super().personalise(client, received, state)

    record = toy.run("sleepy", rounds=3)
    first, *later = record.rounds
    assert first["seconds"] > 0.055
    for row in (*later, first):
        assert 0.055 < row["busy_seconds"] <= row["seconds"] + 0.001
    for row in record.evaluations:
        assert row["seconds"] == pytest.approx(row["busy_seconds"], rel=0.2)
        assert row["busy_seconds"] > 0.175


def test_observers_see_the_rows_of_the_record_in_the_order_in_which_they_are_written(tmp_path):
    told = []

    class Watch(pflbench.Observer):
        def start(self, experiment):
            told.append(("start", experiment.id))

        def round(self, row):
            told.append(("round", row))

        def evaluation(self, row):
            told.append(("evaluation", row))

        def close(self):
            told.append("close")

    def run(**kw):
        told.clear()
        return pflbench.run(
            toy.spec("fedavg", rounds=3), toy.federation(), toy.net(), executor="serial", out=tmp_path, **kw
        )

    record = run(observers=[pflbench.Observer(), Watch()])
    (r1, r2, r3), (e1, e2, e3) = record.rounds, record.evaluations
    assert told == [
        ("start", record.id), ("round", r1), ("evaluation", e1), ("round", r2), ("evaluation", e2), ("round", r3),
        ("evaluation", e3), "close",
    ]  # fmt: skip
    run(observers=[Watch()])
    assert told == []  # nothing was computed
    with pytest.raises(KeyboardInterrupt):
        run(observers=[Watch(), toy.Stop(2)], force=True)
    assert told[-1] == "close"
    assert [kind for kind, _ in told[:-1]] == ["start", "round", "evaluation", "round"]


def test_a_prepared_experiment_is_run_into_either_store(tmp_path):
    experiment = pflbench.prepare(toy.spec("fedper"), toy.federation(), toy.net())
    plain = pflbench.run(toy.spec("fedper"), toy.federation(), toy.net(), executor="serial")
    stores = [None, pflbench.Memory(), pflbench.Folder(tmp_path)]
    serial = pflbench.Execution("serial")
    records = [pflbench.run_experiment(experiment, execution=serial, store=store) for store in stores]
    assert {record.id for record in records} == {experiment.id}
    assert all(record.fingerprints == plain.fingerprints for record in records)
    assert [record.path for record in records] == [None, None, tmp_path / experiment.id]
    assert {k: plain.fingerprints[k] for k in experiment.fingerprints} == experiment.fingerprints


# Evaluations.


def test_the_answers_are_those_of_predict_and_those_of_the_global_model_are_the_networks(methods):
    @register("zero")
    class Zero(FedAvg):
        """Every client answers class 0."""

        def predict(self, net, deployed, x):
            logits = net(deployed["model"], x).new_zeros(len(x), 3)
            logits[:, 0] = 1.0
            return logits

    zero, network = toy.run("zero"), toy.run("fedavg")
    labels = [y_test for _, _, _, y_test in oracle.arrays()]
    assert [c["accuracy"] for c in zero.clients] == [float((y == 0).double().mean()) for y in labels] * 2
    assert [c["global_accuracy"] for c in zero.clients] == [c["accuracy"] for c in network.clients]


def test_a_class_that_is_ruled_out_makes_the_test_loss_unknown_and_nan_makes_the_run_diverge(methods, tmp_path):
    @register("ruling")
    class Ruling(FedAvg):
        value: float = pflbench.setting(0.0, "0: class 2 is ruled out; 1: logits are NaN; 2: they are inf")

        def predict(self, net, deployed, x):
            logits = net(deployed["model"], x).clone()
            logits[:, 2] = [-torch.inf, torch.nan, torch.inf][int(self.value)]
            return logits

    for way in toy.WAYS:
        record = toy.run_in(way, "ruling", tmp_path)
        assert record.status == "finished"
        assert [row["test_loss"] for row in record.evaluations] == [None, None]
        assert all(0 < row["accuracy"] < 1 for row in record.evaluations)
    for value in (1.0, 2.0):
        record = toy.run("ruling", {"value": value})
        assert record.status == "diverged"
        assert record.reason == "round 1: client 0: the loss on the test data is nan; lower lr"
        assert record.evaluations == []
        assert len(record.rounds) == 1


def test_a_model_without_its_personal_part_is_no_global_model(methods):
    @register("none")
    class NoGlobal(FedAvg):
        def global_model(self, server):
            return None

    for algo in ("none", "fedper", "local"):
        record = toy.run(algo)
        assert {row["global_accuracy"] for row in (*record.evaluations, *record.clients)} == {None}
    assert all(row["global_accuracy"] == row["accuracy"] for row in toy.run("fedavg").clients)


def test_the_setup_a_round_has_is_the_experiments_and_its_cohort_those_who_take_part(methods):
    seen = []

    @register("looking")
    class Looking(FedAvg):
        def play(self, round, server, cohort):
            seen.append(("play", round))
            return super().play(round, server, cohort)

        def serve(self, round, server, client):
            seen.append(("serve", round))
            return super().serve(round, server, client)

    record = toy.run("looking", rounds=2, join_ratio=0.5)
    played = [r for what, r in seen if what == "play"]
    served = [r for what, r in seen if what == "serve"]
    assert [r.number for r in played] == [1, 2]
    assert [list(r.cohort) for r in played] == [row["participants"] for row in record.rounds]
    assert [r.number for r in served] == [1, 1, 2, 2]
    assert [r.cohort for r in served[::2]] == [r.cohort for r in played]
    assert len({id(r.setup) for _, r in seen}) == 1


def test_a_global_model_that_appears_later_has_no_mean_of_five(methods, tmp_path):
    @register("late")
    class Late(FedAvg):
        """Has no global model in the first round."""

        def aggregate(self, round, server, uploads):
            return {**super().aggregate(round, server, uploads), "number": round.number}

        def global_model(self, server):
            return server["model"] if server["number"] > 1 else None

    spec = toy.spec("late", rounds=3)
    record = pflbench.run(spec, toy.federation(), toy.net(), executor="serial", out=tmp_path)
    assert record.summary["last"]["global_accuracy"] is not None
    assert record.summary["last5"]["global_accuracy"] is None
    assert record.summary["last5"]["accuracy"] is not None


@pytest.mark.parametrize("asked", [[0, 0], [0, 9]])
def test_a_cohort_is_asked_for_different_clients_of_the_federation(methods, asked):
    @register("asking")
    class Asking(FedAvg):
        """Asks for the wrong clients."""

        def play(self, round, server, cohort):
            return self.aggregate(round, server, cohort.update(server, asked))

    with pytest.raises(MethodError, match="are not different clients of the federation"):
        toy.run("asking")


def test_uploads_come_in_the_order_of_the_clients_numbers_however_they_are_asked(methods):
    seen = []

    @register("asking")
    class Asking(FedAvg):
        """Asks backwards."""

        def play(self, round, server, cohort):
            uploads = cohort.update(server, [1, 0])
            seen.extend(upload.client for upload in uploads)
            return self.aggregate(round, server, uploads)

    toy.run("asking", rounds=1)
    assert seen == [0, 1]


class Rude(pflbench.Observer):
    """Changes the rows that it gets, and fails in `close`."""

    def round(self, row):
        row.clear()

    def evaluation(self, row):
        row.clear()

    def close(self):
        raise OSError("the disk of the log is full")


def test_an_observer_can_neither_change_a_record_nor_keep_it_from_being_written(tmp_path):
    spec = toy.spec("fedavg")
    with pytest.raises(OSError, match="the disk of the log"):
        pflbench.run(spec, toy.federation(), toy.net(), executor="serial", out=tmp_path, observers=[Rude()])
    run = pflbench.prepare(spec, toy.federation(), toy.net()).id
    record = Record.load(tmp_path / run)
    assert [row["round"] for row in record.rounds] == [1, 2]
    assert dataclasses.asdict(record.spec)["algo"] == "fedavg"


def test_a_probe_of_a_network_that_cannot_train_on_one_sample_has_no_batch_of_one():
    net = pflbench.Net(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)), torch.nn.Linear(3, 3))
    experiment = pflbench.prepare(toy.spec("fedavg"), toy.federation((9, 4)), net.double())
    assert len(Work(experiment, None).probe()) == 64
    assert Work(pflbench.prepare(toy.spec("fedavg"), toy.federation((1, 4)), net), None).probe() == "ValueError"
