"""What every registered method keeps to, whoever wrote it."""

import dataclasses
import importlib
import json
import pickle
from pathlib import Path

import pytest
import torch

import pflbench
from pflbench import settings
from pflbench.core import registry

METHODS = sorted(registry.algorithms())
CASES = [(name, {}) for name in METHODS] + [
    ("fedas", {"alignment": "in-place"}),
    ("fedas", {"alignment": "off", "weighting": "samples"}),
    ("apfl", {"adaptive": True}),
    ("per-fedavg", {"variant": "fo"}),
]
SIZES = (24, 18, 40, 6)


def _case_id(value):
    return value if isinstance(value, str) else "-".join(map(str, value.values())) or "default"


cases = pytest.mark.parametrize(("algo", "hyper"), CASES, ids=_case_id)


def _clone(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, pflbench.Message):
        return pflbench.Message(_clone(value.tensors), value.weight)
    if isinstance(value, dict):
        return {k: _clone(v) for k, v in value.items()}
    return [_clone(v) for v in value]


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, pflbench.Message):
        return a.weight == b.weight and _equal(a.tensors, b.tensors)
    if isinstance(a, dict):
        return list(a) == list(b) and all(_equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(_equal, a, b))


class Watched:
    """A method whose every input and output is compared with what it was, at the end."""

    def __init__(self, method):
        self.method = method
        self.seen = []
        self.messages = []

    def __getattr__(self, name):
        value = getattr(self.method, name)
        if name not in {
            "init_server",
            "init_client",
            "broadcast",
            "local_update",
            "aggregate",
            "relay",
            "personalised",
        }:
            return value

        def call(*args):
            values = [a for a in args if isinstance(a, dict | list | pflbench.Message)]
            self.seen += [(f"input of {name}", v, _clone(v)) for v in values]
            out = value(*args)
            outs = list(out) if isinstance(out, tuple) else [out]
            self.seen += [(f"output of {name}", v, _clone(v)) for v in outs]
            self.messages += [v for v in outs if isinstance(v, pflbench.Message)]
            return out

        return call


@pytest.fixture(scope="module")
def drive(toy):
    """What `_drive` returns, once for each case."""
    done = {}

    def get(algo, hyper):
        key = (algo, *hyper.items())
        if key not in done:
            done[key] = _drive(toy, algo, hyper)
        return done[key]

    return get


def _drive(toy, algo, hyper, rounds=2):
    """Run the method by hand on three clients that share one toolbox network, as clients in one worker do."""
    method = Watched(registry.algorithm(algo)(**hyper))
    data = toy.arrays((6, 4, 5))
    net = toy.net_for(algo)
    initial = toy.initial(net)
    bench = toy.local(*data[0][:2], net=net)._bench

    def local(i, r):
        made = toy.local(*data[i][:2], net=net, round=r, client=i)
        made._bench = bench
        return made

    server = method.init_server(initial)
    states = {i: method.init_client(initial) for i in range(3)}
    for r in range(1, rounds + 1):
        ups, now = [], server
        for i in (0, 1):
            up, states[i] = method.local_update(local(i, r), method.broadcast(now, i), states[i])
            ups.append(dataclasses.replace(up, sender=i))
            if method.sequential:
                now = method.relay(now, up)
        server = method.aggregate(server, ups)
        for i in range(3):
            method.personalised(local(i, r), method.broadcast(server, i), states[i])
    return method


@cases
def test_nothing_that_goes_in_or_came_out_is_ever_changed(drive, algo, hyper):
    changed = [what for what, value, copy in drive(algo, hyper).seen if not _equal(value, copy)]
    assert changed == []


ALONE = ["fedamp", "fedfomo"]  # their broadcasts are costly, and no test reads them


def test_who_is_tested_alone():
    assert [algo for algo in METHODS if registry.algorithm(algo).tested_alone] == ALONE


@pytest.mark.parametrize("algo", ALONE)
def test_who_is_tested_alone_is_sent_nothing_for_a_test_and_scores_the_same(toy, algo, monkeypatch):
    method, sent = registry.algorithm(algo), []
    broadcast = method.broadcast

    def noted(self, server, client):
        sent.append(client)
        return broadcast(self, server, client)

    monkeypatch.setattr(method, "broadcast", noted)
    alone = toy.run(algo, join_ratio=0.5)
    assert sent == [c for row in alone.rounds for c in row["participants"]]
    monkeypatch.setattr(method, "tested_alone", False)
    together = toy.run(algo, join_ratio=0.5)
    assert len(sent) > 2 * len(alone.rounds)
    assert alone.fingerprints == together.fingerprints


@cases
def test_personal_parameters_are_in_no_message(drive, toy, algo, hyper):
    method = drive(algo, hyper)
    names = {name for message in method.messages for part in message.tensors.values() for name in part}
    assert method.messages
    model = toy.initial(toy.net_for(algo))
    assert names & model.keys() == model.keys() - method.personal(model).keys()


@cases
def test_a_methods_instance_keeps_its_hyperparameters_and_nothing_else(drive, algo, hyper):
    method = drive(algo, hyper).method
    assert vars(method) == {"h": method.h}
    assert method.h == registry.algorithm(algo)(**hyper).h
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.h.anything = 1


@cases
def test_instances_pickle(algo, hyper):
    method = registry.algorithm(algo)(**hyper)
    copy = pickle.loads(pickle.dumps(method))
    assert type(copy) is type(method)
    assert copy.h == method.h


@cases
def test_who_does_not_take_part_keeps_its_state_bit_for_bit(toy, algo, hyper):
    settings = {"join_ratio": 0.25, "rounds": 2, "sampling_seed": 1}
    record = toy.run(algo, hyper, federation=toy.federation(SIZES), **settings)
    took_part = {c for row in record.rounds for c in row["participants"]}
    untouched = set(range(4)) - took_part
    assert untouched
    initial = registry.algorithm(algo)(**hyper).init_client(toy.initial(toy.net_for(algo)))
    for client in untouched:
        assert _equal(record.client_states[client], initial)


TRAINED = {"fedfomo": 9, "pfedme": 5 * 12, "per-fedavg": 4 * 3}  # samples in the losses of an epoch, if not 12


@pytest.mark.parametrize("algo", METHODS)
def test_the_loss_in_the_record_is_of_the_training_and_of_all_its_samples(toy, algo):
    x, y, _, _ = toy.arrays((12,))[0]
    net, method = toy.net_for(algo), registry.algorithm(algo)()
    start, local = toy.initial(net), toy.local(x, y, net=net)
    method.local_update(local, method.broadcast(method.init_server(start), 0), method.init_client(start))
    assert local.counts.samples == 2 * TRAINED.get(algo, 12)
    assert 0 < local.counts.loss_sum < 10 * local.counts.samples


def test_the_toolbox_starts_from_what_it_is_given_every_time(toy):
    x, y, _, _ = toy.arrays()[0]
    start = toy.initial()
    local = toy.local(x, y)
    first = local.sgd(start)
    assert toy.same(local.sgd(start), first)  # the network has moved on, `start` has not
    assert torch.equal(local.features(start), toy.local(x, y).features(start))
    assert toy.same(local.grad(start, x, y), toy.local(x, y).grad(start, x, y))
    assert toy.same(local.sgd(first), toy.local(x, y).sgd(first))
    assert toy.same(start, toy.initial())


BODY, HEAD = 8 * (3 * 4 + 4), 8 * (4 * 3 + 3)  # bytes of the two parts of a network with four features
PROTOTYPES = 8 * 3 * (4 + 1)  # of a mean feature and a count for each class
BYTES = {  # of one client in one round: up, down; docs/fidelity.md shows the expressions
    "local": (0, 0),
    "fedavg": (BODY + HEAD, BODY + HEAD),
    "fedavg-ft": (BODY + HEAD, BODY + HEAD),
    "fedper": (BODY, BODY),
    "fedrep": (BODY, BODY),
    "fedas": (BODY, BODY),
    "fedprox": (BODY + HEAD, BODY + HEAD),
    "scaffold": (2 * (BODY + HEAD), 2 * (BODY + HEAD)),
    "feddyn": (BODY + HEAD, BODY + HEAD),
    "moon": (BODY + HEAD, BODY + HEAD),
    "fedala": (BODY + HEAD, BODY + HEAD),
    "ditto": (BODY + HEAD, BODY + HEAD),
    "apfl": (BODY + HEAD, BODY + HEAD),
    "pfedme": (BODY + HEAD, BODY + HEAD),
    "per-fedavg": (BODY + HEAD, BODY + HEAD),
    "fedas alignment=in-place": (2 * BODY, BODY),
    "lg-fedavg": (HEAD, HEAD),
    "fedbabu": (BODY, BODY),
    "fedbn": (BODY + HEAD, BODY + HEAD),
    "fedproto": (PROTOTYPES, PROTOTYPES),
    "fedamp": (BODY + HEAD, BODY + HEAD + 8),
    "fedrod": (BODY + HEAD, BODY + HEAD),
    # With more models it depends on who took part before: tests/algorithms/test_fedfomo.py.
    "fedfomo models=1": (BODY + HEAD, 0),
}


def test_every_method_has_a_closed_form_of_its_bytes():
    assert {case.split()[0] for case in BYTES} == set(METHODS)


@pytest.mark.parametrize("case", sorted(BYTES))
def test_the_bytes_sent_have_a_closed_form_for_each_participant(toy, tmp_path, case):
    up, down = BYTES[case]
    algo, *settings = case.split()
    hyper = dict(setting.split("=") for setting in settings)
    spec = toy.spec(algo, hyper, clients=4, join_ratio=0.75)
    record = pflbench.run(spec, toy.federation(SIZES), toy.net_for(algo, features=4), executor="serial", out=tmp_path)
    rows = [json.loads(line) for line in (record.path / "rounds.jsonl").read_text().splitlines()]
    assert [(r["bytes_up"], r["bytes_down"]) for r in rows] == [(3 * up, 3 * down)] * 2
    assert (record.summary["bytes_up"], record.summary["bytes_down"]) == (6 * up, 6 * down)


@pytest.mark.parametrize("algo", METHODS)
def test_the_docstring_says_paper_personal_and_evaluated(algo):
    text = importlib.import_module(registry.algorithm(algo).__module__).__doc__
    starts = {line.split(":")[0] for line in text.splitlines() if ":" in line}
    assert {"Paper", "Personal", "Evaluated"} <= starts


@pytest.mark.parametrize("algo", METHODS)
def test_the_file_is_named_like_the_method(algo):
    cls = registry.algorithm(algo)
    assert cls.name == algo
    module = importlib.import_module(cls.__module__)
    if cls.__module__.startswith("pflbench."):
        assert Path(module.__file__).stem == algo.replace("-", "_")


def _others(cls):
    """Each hyperparameter with another valid value."""
    for name, field in settings.fields(cls.Hyper).items():
        if field.metadata["choices"]:
            yield from ((name, c) for c in field.metadata["choices"] if c != field.default)
        elif isinstance(field.default, bool):
            yield name, not field.default
        elif isinstance(field.default, int):
            yield name, field.default + 1
        else:
            yield name, field.default * 0.5


COUNTS = {  # hyperparameters, clients' sizes and rounds with which every hyperparameter counts
    "fedamp": ({"decay_every": 1}, (24, 40), 2),
    "fedfomo": ({"models": 2, "epsilon": 0.9, "epsilon_decay": 0.1}, (24, 40, 18, 12), 5),
    "fedrod": ({}, (25, 41), 2),  # of unequal classes
}
CHANGES = [(algo, name, value) for algo in METHODS for name, value in _others(registry.algorithm(algo))]


@pytest.mark.parametrize(("algo", "name", "value"), CHANGES)
def test_every_hyperparameter_changes_the_result(toy, algo, name, value):
    hyper, sizes, rounds = COUNTS.get(algo, ({}, (24, 40), 2))
    settings = {"federation": toy.federation(sizes), "rounds": rounds}
    default, other = (toy.run(algo, h, **settings) for h in (hyper, {**hyper, name: value}))
    prints = ("metrics", "states")
    assert [default.fingerprints[p] for p in prints] != [other.fingerprints[p] for p in prints]
    # Not by the bytes alone, nor by rounding.
    assert max(abs(a["test_loss"] - b["test_loss"]) for a, b in zip(default.rounds, other.rounds, strict=True)) > 1e-12


PROTOCOL = [
    ("rounds", 3), ("local_epochs", 3), ("batch_size", 4), ("lr", 0.05), ("momentum", 0.5), ("weight_decay", 0.1),
    ("lr_decay", 0.5), ("shuffle", True), ("drop_last", True), ("join_ratio", 0.5),
]  # fmt: skip


@pytest.mark.parametrize("algo", METHODS)
def test_every_setting_of_the_protocol_changes_the_result(toy, algo):
    default = toy.run(algo).fingerprints["states"]
    same = [name for name, value in PROTOCOL if toy.run(algo, **{name: value}).fingerprints["states"] == default]
    assert same == []


DRAWING = {"fedala", "fedfomo"}  # methods that use a random part of the samples, shuffled or not


@pytest.mark.parametrize("algo", METHODS)
def test_the_order_seed_changes_shuffled_runs_alone_unless_a_method_draws_samples(toy, algo):
    def states(**settings):
        return toy.run(algo, **settings).fingerprints["states"]

    assert states(shuffle=True, order_seed=1) != states(shuffle=True, order_seed=2)
    same = states(shuffle=False, order_seed=1) == states(shuffle=False, order_seed=2)
    assert same == (algo not in DRAWING)


@pytest.mark.parametrize("algo", METHODS)
def test_a_convolutional_run_in_memory_is_the_run_on_disk_bit_by_bit(algo, tmp_path):
    random = torch.Generator().manual_seed(0)
    clients = []
    for n in (9, 7, 8):
        x, y = torch.randn(n + 6, 3, 16, 16, generator=random), torch.arange(n + 6) % 3
        clients.append((x[:n], y[:n], x[n:], y[n:]))
    federation = pflbench.Federation.from_arrays(clients, classes=3)
    spec = pflbench.RunSpec(
        algo=algo, clients=3, rounds=3, join_ratio=0.67, batch_size=4, local_epochs=1, lr=0.05,
        norm="batch" if algo == "fedbn" else None,
    )  # fmt: skip
    memory, disk = (pflbench.run(spec, federation, executor="serial", out=out) for out in (None, tmp_path))
    assert memory.fingerprints == disk.fingerprints
