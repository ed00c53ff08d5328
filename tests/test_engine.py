"""The engine: the errors it raises, the functions of a method it calls, and the rows it writes."""

import multiprocessing
import time

import numpy as np
import oracle
import pytest
import torch
import toy
from torch import nn

import pflbench
from pflbench import Federation, MethodError, UsageError
from pflbench.algorithms.fedavg import FedAvg
from pflbench.core import Message, register
from pflbench.store import schema

WAYS = ["serial", "processes", "disk"]
SIZES = (9, 4, 7, 5)
ways = pytest.mark.parametrize("way", WAYS)


def _run(way, algo, tmp_path, sizes=(7, 4), **settings):
    executor = "serial" if way == "serial" else "processes"
    spec = toy.spec(algo, clients=len(sizes), **settings)
    out = tmp_path / "runs" if way == "disk" else None
    return pflbench.run(spec, toy.federation(sizes), toy.net(), executor=executor, workers=2, out=out)


def _prints(record):
    return record.fingerprints["metrics"], record.fingerprints["states"]


def _one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


# A method's mistakes: each gives an error of one line.


def _train(start=dict, **options):
    """Return a local update that trains from what `start` makes of the received model, with these options of `sgd`."""
    return lambda self, client, received, state: client.sgd(start(received["model"]), **options)


def _kept(state):
    return lambda self, client, received, old: (Message({"model": received["model"]}, client.n), state)


LEAF = "leaves are tensors, integers and floats"
MISTAKES = {
    "a part of the message": (
        {"local_update": lambda self, client, received, state: received["modle"]},
        "the message has no part 'modle'; its parts are: model",
    ),
    "a part of the client's state": (
        {"local_update": lambda self, client, received, state: state["control"]},
        "the state of client 0 has no part 'control'; its parts are: model",
    ),
    "a part of the server's state": (
        {"aggregate": lambda self, r, server, uploads: server["control"]},
        "the server's state has no part 'control'; its parts are: model",
    ),
    "a part of the server's state in broadcast": (
        {"broadcast": lambda self, r, server, client: Message({"control": server["control"]})},
        "the server's state has no part 'control'; its parts are: model",
    ),
    "a part of the server's state in serve": (
        {"serve": lambda self, r, server, client: Message({"control": server["control"]})},
        "the server's state has no part 'control'; its parts are: model",
    ),
    "a part of an upload": (
        {"aggregate": lambda self, r, server, uploads: uploads[0]["control"]},
        "the message has no part 'control'; its parts are: model",
    ),
    "a part of a message without parts": (
        {"serve": lambda self, r, server, client: Message({}), "personalise": lambda self, c, r, s: r["model"]},
        "the message has no part 'model'; its parts are: none",
    ),
    "a part of what is deployed": (
        {"personalise": lambda self, client, received, state: {"net": received["model"]}},
        "what is deployed has no part 'model'; its parts are: net",
    ),
    "a missing parameter": (
        {"local_update": _train(lambda model: {})},
        "the network needs the parameter 'body.0.weight'; the given parameters are: none",
    ),
    "a misshapen parameter": (
        {"local_update": _train(lambda model: {**model, "head.bias": torch.zeros(4).double()})},
        "the parameter 'head.bias' has the shape (4,); the network's has (3,)",
    ),
    "a deployed model that lacks parameters": (
        {"personalise": lambda self, client, received, state: {"model": {"body.0.weight": torch.zeros(3, 3)}}},
        "the network needs the parameter 'body.0.bias'; the given parameters are: body.0.weight",
    ),
    "a loss that is no scalar": (
        {"local_update": _train(loss=lambda net, batch: net(batch.x).sum(1))},
        "client 0: a loss must be a scalar tensor, such as a mean; this one has shape (3,)",
    ),
    "a loss that is no tensor": (
        {"local_update": _train(loss=lambda net, batch: 0.5)},
        "client 0: a loss must be a scalar tensor, such as a mean; this one is a float",
    ),
    "a string in a client's state": (
        {"local_update": _kept({"model": {}, "kind": "new"})},
        f"the state of client 0 has a str at 'kind'; {LEAF}",
    ),
    "an array in a client's state": (
        {"local_update": _kept({"model": {"head.bias": np.zeros(3)}})},
        f"the state of client 0 has a ndarray at 'model/head.bias'; {LEAF}",
    ),
    "a state that is none": (
        {"local_update": _kept(None)},
        "the state of client 0 is of type NoneType; a state is a dict of tensors and numbers",
    ),
    "an array in an upload": (
        {"local_update": lambda self, client, received, state: (Message({"losses": np.zeros(3)}), state)},
        f"the upload of client 0 has a ndarray at 'losses'; {LEAF}",
    ),
    "a misspelt name in trainable": (
        {"local_update": _train(trainable=["haed.weight"])},
        "trainable: the model has no parameter 'haed.weight'; "
        "it has body.0.weight, body.0.bias, head.weight, head.bias",
    ),
    "an update that is a message alone": (
        {"local_update": lambda self, client, received, state: Message({})},
        "wrong: local_update must return a Message and the client's new state; it returned Message",
    ),
    "an update that is no message": (
        {"local_update": lambda self, client, received, state: ({"model": received["model"]}, state)},
        "wrong: local_update must return a Message and the client's new state; it returned tuple",
    ),
    "a string in the server's state": (
        {"aggregate": lambda self, r, server, uploads: {**server, "kind": "new"}},
        f"the server's state has a str at 'kind'; {LEAF}",
    ),
    "no state of the server": (
        {"aggregate": lambda self, r, server, uploads: None},
        "the server's state is of type NoneType; a state is a dict of tensors and numbers",
    ),
    "an array in the server's first state": (
        {"init_server": lambda self, setup: {"model": setup.model, "n": np.zeros(2)}},
        f"the server's first state has a ndarray at 'n'; {LEAF}",
    ),
    "a list in a client's first state": (
        {"init_client": lambda self, setup: {"model": {}, "n": []}},
        f"a client's first state has a list at 'n'; {LEAF}",
    ),
    "an answer without classes": (
        {"predict": lambda self, net, deployed, x: net(deployed["model"], x).argmax(1)},
        "predict returned the shape (60,); logits are [60, classes]",
    ),
    "too few answers": (
        {"predict": lambda self, net, deployed, x: net(deployed["model"], x)[1:]},
        "predict returned the shape (59, 3); logits are [60, classes]",
    ),
    "answers with too few classes": (
        {"predict": lambda self, net, deployed, x: net(deployed["model"], x)[:, :2]},
        "predict returned the shape (60, 2); logits are [60, classes]",
    ),
}


@ways
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_method_is_one_line_that_says_what_there_is(methods, tmp_path, name, way):
    functions, message = MISTAKES[name]
    register("wrong")(type("Wrong", (FedAvg,), functions))
    with pytest.raises(MethodError) as error:
        _run(way, "wrong", tmp_path)
    assert _one_line(error) == message
    assert error.value.exit_code == 1
    assert multiprocessing.active_children() == []


def test_a_mistake_that_comes_late_leaves_the_rounds_before_to_be_resumed(methods, tmp_path):
    register("wrong")(FedAvgThatErrs)
    with pytest.raises(MethodError, match="the message has no part 'nothing'"):
        _run("disk", "wrong", tmp_path, rounds=4)
    (partial,) = (tmp_path / "runs").glob("*.partial")
    rows = [len((partial / name).read_text().splitlines()) for name in ("rounds.jsonl", "evaluations.jsonl")]
    assert rows == [2, 2]  # round 2 was evaluated, too


class FedAvgThatErrs(FedAvg):
    """FedAvg whose clients ask for a part that is missing in round 3."""

    def local_update(self, client, received, state):
        if client._key[0] == 3:
            received["nothing"]
        return super().local_update(client, received, state)


# Runs that are not possible.


class _Doubled(nn.Module):
    """A network with the two parts that is no `Net`."""

    def __init__(self):
        super().__init__()
        self.body, self.head = toy.net().body, toy.net().head

    def forward(self, x):
        return 2 * self.head(self.body(x))


def _conv(channels, classes=3):
    return pflbench.Net(nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Flatten()), nn.Linear(18, classes))


def _images(*shape):
    x, y = np.zeros((6, *shape), dtype=np.float32), np.arange(6) % 3
    return Federation.from_arrays([(x, y, x, y)] * 2, classes=3)


REFUSED = {
    "no body": (
        toy.federation, lambda: nn.Sequential(nn.Linear(3, 3)),
        "model: Sequential has no 'body', whose output are the features; its parts are: 0; "
        "give pflbench.Net(body, head)",
    ),
    "no head": (
        toy.federation, lambda: nn.ModuleDict({"body": nn.Linear(3, 3), "top": nn.Linear(3, 3)}),
        "model: ModuleDict has no 'head', which makes logits of them; its parts are: body, top; "
        "give pflbench.Net(body, head)",
    ),
    "fewer outputs than classes": (
        toy.federation, lambda: pflbench.Net(nn.Linear(3, 3), nn.Linear(3, 2)).double(),
        "model: the network's outputs have shape (2,); 3 classes need as many logits",
    ),
    "outputs that are no vectors": (
        toy.federation, lambda: pflbench.Net(nn.Unflatten(1, (1, 3)), nn.Linear(3, 3)).double(),
        "model: the network's outputs have shape (1, 3); 3 classes need as many logits",
    ),
    "other samples than the network takes": (
        toy.federation, lambda: pflbench.Net(nn.Linear(5, 3), nn.Linear(3, 3)).double(),
        "model: the network cannot take a sample of shape (3,): "
        "mat1 and mat2 shapes cannot be multiplied (1x3 and 5x3)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_that_does_not_fit_is_refused_in_one_line_before_anything_is_written(tmp_path, name):
    federation, network, message = REFUSED[name]
    with pytest.raises(UsageError) as error:
        pflbench.prepare(toy.spec("fedavg"), federation(), network()).check()
    assert _one_line(error) == message
    assert error.value.exit_code == 2
    with pytest.raises(UsageError) as error:
        pflbench.run(toy.spec("fedavg"), federation(), network(), executor="serial", out=tmp_path / "runs")
    assert _one_line(error) == message
    assert list(tmp_path.iterdir()) == []


def test_images_with_their_channels_last_are_refused_by_the_federation_or_by_the_network():
    with pytest.raises(UsageError, match=r"\(5, 5, 3\) look like images \[height, width, channels\]") as error:
        _images(5, 5, 3)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=r"sample of shape \(5, 5, 2\): .*images are \[n, channels, height, width\]$"):
        pflbench.prepare(toy.spec("fedavg"), _images(5, 5, 2), _conv(2)).check()
    pflbench.prepare(toy.spec("fedavg"), _images(2, 5, 5), _conv(2)).check()


def test_a_network_may_have_more_outputs_than_classes_and_need_not_be_a_net():
    wide = pflbench.Net(toy.net().body, nn.Linear(3, 7).double())
    assert toy.run("fedavg", net=wide).status == "finished"
    doubled = _Doubled()
    record = toy.run("fedavg", net=doubled)
    assert record.spec.model.startswith("_Doubled@")
    assert record.status == "finished"


def test_a_method_refuses_a_federation_before_anything_is_written(methods, tmp_path):
    @register("many")
    class Many(FedAvg):
        def check(self, setup):
            if setup.clients < 3:
                raise UsageError(f"many: {setup.clients} clients are too few")

    with pytest.raises(UsageError, match="many: 2 clients are too few"):
        _run("disk", "many", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert _run("disk", "many", tmp_path, sizes=(4, 5, 6)).status == "finished"


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

    records = [_run(way, "fresh", tmp_path) for way in WAYS]
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
        for name in (*schema.METRICS, "test_loss"):
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
    records = [_run(way, twice, tmp_path, **settings) for way in WAYS]
    assert len({_prints(record) for record in records}) == 1
    asked = [records[2].client_states[i]["asked"] for i in range(4)]
    assert asked == [2 * sum(i in row["participants"] for row in records[0].rounds) for i in range(4)]
    records[2].load_states()
    assert list(records[2].client_states[asked.index(max(asked))]["orders"]) == list(range(max(asked)))


@ways
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

    record = _run(way, "both", tmp_path, rounds=1)
    for i in (0, 1):
        expected = toy.run("fedavg", rounds=i + 1).server["model"]
        assert oracle.same(record.server["means"][i], expected)


@ways
def test_a_server_may_send_and_keep_what_lies_in_an_uploads_file(methods, tmp_path, way):
    @register("pass-on")
    class PassOn(FedAvg):
        """Client 1 starts from client 0's upload, which the server does not look into."""

        def play(self, round, server, cohort):
            (first,) = cohort.update(server, [0])
            (second,) = cohort.update({"model": first["model"]}, [1])
            return {"model": second["model"], "of": {0: first["model"]}}

    record = _run(way, "pass-on", tmp_path, rounds=1)
    (x, y, _, _), (x2, y2, _, _) = oracle.arrays()
    first = oracle.train(toy.initial(), x, y, 2, lr=0.1)
    oracle.close(record.server["of"][0], first)
    oracle.close(record.server["model"], oracle.train(first, x2, y2, 2, lr=0.1))
    assert type(record.server["of"]) is dict


@ways
def test_a_method_that_asks_nobody_trains_nobody_and_is_evaluated(methods, tmp_path, way):
    @register("silent")
    class Silent(FedAvg):
        def play(self, round, server, cohort):
            return {**server, "rounds": server.get("rounds", 0) + 1}

    record = _run(way, "silent", tmp_path, rounds=3)
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
    records = [pflbench.run_experiment(experiment, executor="serial", store=store) for store in stores]
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

    for way in WAYS:
        record = _run(way, "ruling", tmp_path)
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
