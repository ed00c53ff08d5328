"""The contract of every registered method, also of other packages' methods."""

import ast
import dataclasses
import importlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import facts
import oracle
import pytest
import torch
import toy

import pflbench
from pflbench import settings
from pflbench.core import Algorithm, Replica, Round, Setup, registry

METHODS = sorted(registry.algorithms())
FACTS = {name: facts.of(name) for name in METHODS}
CASES = [(name, hyper) for name in METHODS for hyper in ({}, *FACTS[name].variants)]
SIZES = (24, 18, 40, 6)


def _case_id(value):
    return value if isinstance(value, str) else "-".join(map(str, value.values())) or "default"


cases = pytest.mark.parametrize(("algo", "hyper"), CASES, ids=_case_id)


def _clone(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, pflbench.Message):
        return _clone([value.content, value.weight])
    if isinstance(value, Setup):
        return _clone(value.model)
    if isinstance(value, Round):
        return _clone([list(value.cohort), value.setup])
    if isinstance(value, Mapping):
        return {k: _clone(v) for k, v in value.items()}
    return [_clone(v) for v in value] if isinstance(value, list | tuple) else value


def _equal(a, b):
    a, b = ([v.content, v.weight] if isinstance(v, pflbench.Message) else v for v in (a, b))
    a, b = (v.model if isinstance(v, Setup) else v for v in (a, b))
    a, b = ([list(v.cohort), v.setup.model] if isinstance(v, Round) else v for v in (a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


WATCHED = (
    "init_server", "init_client", "broadcast", "local_update", "aggregate", "play", "serve", "personalise", "predict",
    "global_model", "personal", "shared",
)  # fmt: skip
VALUES = Mapping | list | torch.Tensor | pflbench.Message | Setup | Round


class Watched:
    """A method whose every input and output is compared with what it was, at the end."""

    def __init__(self, cls, hyper):
        self.seen = []
        self.messages = []
        watchers = {name: self._watcher(name, getattr(cls, name)) for name in WATCHED}
        self.method = type(f"Watched{cls.__name__}", (cls,), watchers)(**hyper)

    def _watcher(self, name, function):
        def call(method, *args):
            self.seen += [(f"input of {name}", v, _clone(v)) for v in args if isinstance(v, VALUES)]
            out = function(method, *args)
            outs = list(out) if isinstance(out, tuple) else [out]
            self.seen += [(f"output of {name}", v, _clone(v)) for v in outs]
            self.messages += [v for v in outs if isinstance(v, pflbench.Message)]
            return out

        return call


@pytest.fixture(scope="module")
def drive():
    """What `_drive` returns, once for each case."""
    done = {}

    def get(algo, hyper):
        key = (algo, *hyper.items())
        if key not in done:
            done[key] = _drive(algo, hyper)
        return done[key]

    return get


def _drive(algo, hyper, rounds=2):
    """Run the method by hand on three clients that share one network, as clients in one worker do."""
    watched = Watched(registry.algorithm(algo), hyper)
    method = watched.method
    data = oracle.arrays((6, 4, 5))
    net = toy.net_for(algo)
    setup = toy.setup(net, clients=3)
    replica = Replica(net)
    watched.seen += [("a client's data", arrays, _clone(arrays)) for arrays in data]
    states = {i: method.init_client(setup) for i in range(3)}

    def client(i, round):
        return toy.client(*data[i][:2], net=net, replica=replica, round=round.number, id=i, clients=3)

    @dataclasses.dataclass
    class Cohort:
        round: Round

        def update(self, server, clients=None):
            return [self.one(server, i) for i in (self.round.cohort if clients is None else clients)]

        def one(self, server, i):
            received = method.broadcast(self.round, server, i)
            message, states[i] = method.local_update(client(i, self.round), received, states[i])
            return pflbench.Upload(message.content, message.weight, i)

    server = method.init_server(setup)
    for number in range(1, rounds + 1):
        round_ = Round(number, (0, 1), setup)
        server = method.play(round_, server, Cohort(round_))
        method.global_model(server)
        for i in range(3):
            deployed = method.personalise(client(i, round_), method.serve(round_, server, i), states[i])
            method.predict(replica, deployed, data[i][2])
    return watched


@cases
def test_nothing_that_goes_in_or_came_out_is_ever_changed(drive, algo, hyper):
    changed = [what for what, value, copy in drive(algo, hyper).seen if not _equal(value, copy)]
    assert changed == []


def test_the_oracle_imports_neither_pflbench_nor_other_tests():
    nodes = list(ast.walk(ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported == {"collections.abc", "typing", "numpy", "torch"}


ALONE = [algo for algo in METHODS if FACTS[algo].alone]


def test_which_methods_send_nothing_for_an_evaluation():
    assert [algo for algo in METHODS if registry.algorithm(algo).serve is not Algorithm.serve] == ALONE


@pytest.mark.parametrize("algo", ALONE)
def test_a_client_that_is_sent_nothing_for_its_evaluation_scores_the_same(algo, monkeypatch):
    method, sent = registry.algorithm(algo), []
    broadcast = method.broadcast

    def noted(self, round, server, client):
        sent.append(client)
        return broadcast(self, round, server, client)

    monkeypatch.setattr(method, "broadcast", noted)
    alone = toy.run(algo, join_ratio=0.5)
    assert sent == [c for row in alone.rounds for c in row["participants"]]
    monkeypatch.setattr(method, "serve", Algorithm.serve)
    together = toy.run(algo, join_ratio=0.5)
    assert len(sent) > 2 * len(alone.rounds)
    assert alone.fingerprints == together.fingerprints


def _keys(tree):
    for key, value in tree.items():
        yield key
        yield from _keys(value) if isinstance(value, Mapping) else ()


@cases
def test_personal_parameters_are_in_no_message(drive, algo, hyper):
    watched = drive(algo, hyper)
    names = {name for message in watched.messages for name in _keys(message.content)}
    assert watched.messages
    model = toy.initial(toy.net_for(algo))
    assert names & model.keys() == model.keys() - watched.method.personal(model).keys()


@cases
def test_a_methods_instance_keeps_its_hyperparameters_and_nothing_else(drive, algo, hyper):
    cls = registry.algorithm(algo)
    method = cls(**hyper)
    assert vars(method).keys() == settings.fields(cls).keys()
    assert vars(drive(algo, hyper).method) == vars(method)
    for name in (*vars(method), "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, name, 1)


@cases
def test_instances_pickle(algo, hyper):
    method = registry.algorithm(algo)(**hyper)
    copy = pickle.loads(pickle.dumps(method))
    assert type(copy) is type(method)
    assert copy == method


@cases
def test_hyperparameters_are_read_from_text(algo, hyper):
    method = registry.algorithm(algo)(**hyper)
    assert registry.make(algo, {name: str(value) for name, value in vars(method).items()}) == method


@cases
def test_who_does_not_take_part_keeps_its_state_bit_for_bit(algo, hyper):
    settings = {"join_ratio": 0.25, "rounds": 2, "sampling_seed": 1}
    record = toy.run(algo, hyper, federation=toy.federation(SIZES), **settings)
    took_part = {c for row in record.rounds for c in row["participants"]}
    untouched = set(range(4)) - took_part
    assert untouched
    setup = toy.setup(toy.net_for(algo), clients=4)
    initial = registry.algorithm(algo)(**hyper).init_client(setup)
    for client in untouched:
        assert _equal(record.client_states[client], initial)


@pytest.mark.parametrize("algo", METHODS)
def test_the_loss_in_the_record_is_of_the_training_and_of_all_its_samples(algo):
    x, y, _, _ = oracle.arrays((12,))[0]
    net, method = toy.net_for(algo), registry.algorithm(algo)()
    setup, client = toy.setup(net), toy.client(x, y, net=net)
    received = method.broadcast(Round(1, (0, 1), setup), method.init_server(setup), 0)
    method.local_update(client, received, method.init_client(setup))
    assert client.counts.samples == 2 * FACTS[algo].samples
    assert 0 < client.counts.loss_sum < 10 * client.counts.samples


def test_a_client_starts_from_what_it_is_given_every_time():
    x, y, _, _ = oracle.arrays()[0]
    start = toy.initial()
    client = toy.client(x, y)
    batch = next(client.batches(stream="any"))
    first = client.sgd(start)
    assert oracle.same(client.sgd(start), first)  # the network has moved on, `start` has not
    assert torch.equal(client.features(start), toy.client(x, y).features(start))
    assert oracle.same(client.grad(start, batch), toy.client(x, y).grad(start, batch))
    assert oracle.same(client.sgd(first), toy.client(x, y).sgd(first))
    assert oracle.same(start, toy.initial())


@pytest.mark.parametrize("algo", METHODS)
def test_the_methods_test_file_declares_its_facts(algo):
    declared = facts.declared(algo)
    assert declared, f"write tests/algorithms/{facts.path(algo).name} with FACTS = Facts(...), see tests/facts.py"
    assert declared.bytes, "a method has a closed form of its bytes for at least one setting"


BYTES = [(algo, setting) for algo in METHODS for setting in FACTS[algo].bytes]


@pytest.mark.parametrize(("algo", "setting"), BYTES, ids=lambda value: value or "default")
def test_the_bytes_sent_have_a_closed_form_for_each_participant(tmp_path, algo, setting):
    up, down = FACTS[algo].bytes[setting]
    hyper = dict(part.split("=") for part in setting.split())
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
    for name, field in settings.fields(cls).items():
        if field.metadata["choices"]:
            yield from ((name, c) for c in field.metadata["choices"] if c != field.default)
        elif isinstance(field.default, bool):
            yield name, not field.default
        elif isinstance(field.default, int):
            yield name, field.default + 1
        else:
            yield name, field.default * 0.5


CHANGES = [(algo, name, value) for algo in METHODS for name, value in _others(registry.algorithm(algo))]


@pytest.mark.parametrize(("algo", "name", "value"), CHANGES)
def test_every_hyperparameter_changes_the_result(algo, name, value):
    hyper, sizes, rounds = FACTS[algo].sensitive
    settings = {"federation": toy.federation(sizes), "rounds": rounds}
    default, other = (toy.run(algo, h, **settings) for h in (hyper, {**hyper, name: value}))
    prints = ("metrics", "states")
    assert [default.fingerprints[p] for p in prints] != [other.fingerprints[p] for p in prints]
    # Not by the bytes alone, nor by rounding.
    losses = ([row["test_loss"] for row in record.evaluations] for record in (default, other))
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) > 1e-12


PROTOCOL = [
    ("rounds", 3), ("local_epochs", 3), ("batch_size", 4), ("lr", 0.05), ("momentum", 0.5), ("weight_decay", 0.1),
    ("lr_decay", 0.5), ("shuffle", True), ("drop_last", True), ("join_ratio", 0.5),
]  # fmt: skip


@pytest.mark.parametrize("algo", METHODS)
def test_every_setting_of_the_protocol_changes_the_result(algo):
    default = toy.run(algo).fingerprints["states"]
    same = [name for name, value in PROTOCOL if toy.run(algo, **{name: value}).fingerprints["states"] == default]
    assert same == []


@pytest.mark.parametrize("algo", METHODS)
def test_the_order_seed_changes_shuffled_runs_alone_unless_a_method_draws_samples(algo):
    def states(**settings):
        return toy.run(algo, **settings).fingerprints["states"]

    assert states(shuffle=True, order_seed=1) != states(shuffle=True, order_seed=2)
    same = states(shuffle=False, order_seed=1) == states(shuffle=False, order_seed=2)
    assert same == (not FACTS[algo].draws)


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
        norm="batch" if FACTS[algo].norm else None,
    )  # fmt: skip
    memory, disk = (pflbench.run(spec, federation, executor="serial", out=out) for out in (None, tmp_path))
    assert memory.fingerprints == disk.fingerprints
