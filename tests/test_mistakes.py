"""Mistakes of authors and users in Python: each raises an error of one line that says what there is."""

import multiprocessing

import numpy as np
import pytest
import torch
import toy
from torch import nn

import pflbench
from pflbench import Federation, MethodError, UsageError
from pflbench.algorithms.fedavg import FedAvg
from pflbench.core import Message, register


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


@toy.ways
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_method_is_one_line_that_says_what_there_is(methods, tmp_path, name, way):
    functions, message = MISTAKES[name]
    register("wrong")(type("Wrong", (FedAvg,), functions))
    with pytest.raises(MethodError) as error:
        toy.run_in(way, "wrong", tmp_path)
    assert _one_line(error) == message
    assert error.value.exit_code == 1
    assert multiprocessing.active_children() == []


def test_a_mistake_that_comes_late_leaves_the_rounds_before_to_be_resumed(methods, tmp_path):
    register("wrong")(FedAvgThatErrs)
    with pytest.raises(MethodError, match="the message has no part 'nothing'"):
        toy.run_in("disk", "wrong", tmp_path, rounds=4)
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
        toy.run_in("disk", "many", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert toy.run_in("disk", "many", tmp_path, sizes=(4, 5, 6)).status == "finished"
