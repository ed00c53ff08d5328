import dataclasses
import json
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import toy
from torch import nn

import pflbench
from pflbench import Federation, Folder, Record, RunSpec, UsageError
from pflbench.core import Replica
from pflbench.engine.evaluation import Score, summary

# Federations of the user.

MODELS = ("a", None, None)


def _numpy(arrays):
    return [tuple(a.numpy() for a in client) for client in arrays]


def test_numpy_and_torch_arrays_make_the_same_federation():
    a, b = Federation.from_arrays(oracle.arrays()), Federation.from_arrays(_numpy(oracle.arrays()))
    assert a.fingerprints == b.fingerprints
    assert (a.classes, a.shape, len(a.clients)) == (3, (3,), 2)
    for mine, (x, y, x_test, y_test) in zip(b.clients, oracle.arrays(), strict=True):
        assert torch.equal(mine.train.x, x)
        assert torch.equal(mine.train.y, y)
        assert torch.equal(mine.test.x, x_test)
        assert torch.equal(mine.test.y, y_test)


def test_every_sample_and_label_and_the_clients_order_are_in_the_fingerprint():
    prints = {toy.federation().fingerprints["data"]}
    for part in range(4):
        arrays = [[a.clone() for a in client] for client in oracle.arrays()]
        arrays[1][part][-1] = 1 - arrays[1][part][-1]
        prints.add(Federation.from_arrays(arrays).fingerprints["data"])
    prints.add(Federation.from_arrays(oracle.arrays()[::-1]).fingerprints["data"])
    assert len(prints) == 6


def test_uint8_samples_are_scaled_to_minus_one_to_one():
    pixels = torch.arange(0, 256, 5, dtype=torch.uint8)
    replica = Replica(toy.net())
    for x in (pixels.reshape(-1, 1), pixels.reshape(-1, 1, 1, 1)):
        scaled = replica.batch(x, slice(None))
        assert scaled.shape == x.shape
        torch.testing.assert_close(scaled.flatten(), pixels.double() / 127.5 - 1, rtol=0, atol=1e-12)
    assert (float(scaled.min()), float(scaled.max())) == (-1.0, 1.0)


def test_a_run_on_uint8_equals_a_run_on_the_scaled_samples():
    random = np.random.RandomState(0)
    raw = [(random.randint(0, 256, (6, 3)).astype(np.uint8), np.arange(6) % 3) for _ in range(2)]
    images = Federation.from_arrays([(x, y, x, y) for x, y in raw])
    floats = Federation.from_arrays([(x / 127.5 - 1, y, x / 127.5 - 1, y) for x, y in raw])
    a, b = toy.run("fedavg", federation=images), toy.run("fedavg", federation=floats)
    oracle.close(a.server["model"], b.server["model"])
    assert a.clients == b.clients


X, Y = np.zeros((4, 3)), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("clients", "classes", "message"),
    [
        ([], None, "no client"),
        ([(X, Y, X)], None, "client 0 has 3 arrays"),
        ([(X, Y, X, Y), (X, Y[:3], X, Y)], None, "client 1 has 4 training samples and 3 labels"),
        ([(X, Y, X[:1], Y)], None, "client 0 has 1 test samples and 4 labels"),
        ([(X[:0], Y[:0], X, Y)], None, "client 0 has 0 training samples"),
        ([(X, Y, X[:0], Y[:0])], None, "client 0 has 0 test samples"),
        ([(X, Y, X, Y), (X[:, :2], Y, X[:, :2], Y)], None, "different shapes"),
        ([(X, Y, X[:, :2], Y)], None, "different shapes"),
        ([(X, Y - 1, X, Y)], None, "labels must be 0 to 1"),
        ([(X, Y, X, Y + 1)], 2, "labels must be 0 to 1"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(clients, classes, message):
    with pytest.raises(UsageError, match=message) as error:
        Federation.from_arrays(clients, classes=classes)
    assert "\n" not in str(error.value)


def test_a_run_changes_no_samples_even_if_the_networks_first_layer_works_in_place():
    federation = toy.federation()
    before = [client.test.x.clone() for client in federation.clients] + [c.train.x.clone() for c in federation.clients]
    net = toy.net()
    net = pflbench.Net(nn.Sequential(nn.ReLU(inplace=True), *net.body), net.head)
    toy.run("fedas", federation=federation, net=net)
    after = [client.test.x for client in federation.clients] + [c.train.x for c in federation.clients]
    assert all(map(torch.equal, before, after))


# A network of the user.


def test_a_given_network_is_where_the_run_starts_and_is_not_changed():
    net = toy.net(seed=4).train()
    net.head.bias.requires_grad_(False)
    before = {k: t.clone() for k, t in net.state_dict().items()}
    settings, _ = toy.TURNS[2]
    for executor in ("serial", "processes"):
        record = toy.run("fedas", net=net, executor=executor, workers=2, **settings)
        assert oracle.same(record.client_states[0]["model"], before)  # never chosen
        assert oracle.same(dict(net.state_dict()), before)
        assert net.training
        assert [p.requires_grad for p in net.parameters()] == [True, True, True, False]
        assert all(p.grad is None for p in net.parameters())


def test_a_given_networks_memory_format_stays():
    random = np.random.RandomState(0)
    x, y = random.randn(4, 2, 5, 5), np.array([0, 1, 0, 1])
    net = pflbench.Net(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()), nn.Linear(27, 2)).double()
    strides = [p.stride() for p in net.parameters()]
    toy.run("fedavg", federation=Federation.from_arrays([(x, y, x, y)] * 2), net=net)
    assert [p.stride() for p in net.parameters()] == strides


def test_a_network_of_ours_starts_from_the_init_seed():
    federation = toy.federation()
    expected = pflbench.build_model("mlp", (3,), 3, seed=7)
    settings, _ = toy.TURNS[2]
    record = pflbench.run(toy.spec("fedas", model="mlp", init_seed=7, **settings), federation, executor="serial")
    names = dict(expected.named_parameters())
    assert oracle.same(record.client_states[0]["model"], {k: p.detach() for k, p in names.items()})


# Records in memory.


def test_a_record_holds_the_states_of_the_server_and_of_all_clients():
    settings, _ = toy.TURNS[2]
    record = toy.run("fedas", **settings)
    assert record.status == "finished"
    assert record.reason is None
    assert record.path is None
    assert sorted(record.client_states) == [0, 1]
    assert record.server["model"].keys() == set(oracle.BODY)
    assert all(record.client_states[i]["model"].keys() == set(oracle.BODY + oracle.HEAD) for i in range(2))
    with pytest.raises(KeyError):
        record.client_states[2]


def test_a_records_rows_have_every_participant_and_every_client():
    record = toy.run("fedavg", join_ratio=0.5, rounds=3)
    assert [r["round"] for r in record.rounds] == [1, 2, 3]
    assert [r["participants"] for r in record.rounds] == [pflbench.participants(record.spec, r) for r in (1, 2, 3)]
    assert [(c["round"], c["client"], c["n"]) for c in record.clients] == [
        (r, i, 60) for r in (1, 2, 3) for i in (0, 1)
    ]


def test_evaluation_every_k_rounds_and_after_the_last():
    record = toy.run("fedavg", rounds=7, eval_every=3)
    assert [r["round"] for r in record.evaluations] == [3, 6, 7]
    assert [r["round"] for r in record.rounds] == list(range(1, 8))
    assert sorted({c["round"] for c in record.clients}) == [3, 6, 7]
    every = toy.run("fedavg", rounds=7)
    assert oracle.same(record.server["model"], every.server["model"])
    assert [c for c in every.clients if c["round"] in (3, 6, 7)] == record.clients


# Specs and their ids.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "lr: 0.0 is out of bounds"),
        ({"lr": float("nan")}, "lr: nan is not a number"),
        ({"lr": "0.1"}, "lr: '0.1' is not a number"),
        ({"rounds": 0}, "rounds: 0 is out of bounds"),
        ({"rounds": 2.0}, "rounds: 2.0 is not an integer"),
        ({"rounds": True}, "rounds: True is not an integer"),
        ({"shuffle": 1}, "shuffle: 1 is not true or false"),
        ({"join_ratio": 1.5}, "join_ratio: 1.5 is out of bounds"),
        ({"join_ratio": 0.1, "clients": 4}, "leaves no client"),
        ({"momentum": -0.1}, "momentum: -0.1 is out of bounds"),
        ({"seed": -1}, "seed: -1 is out of bounds"),
        ({"split": "offical"}, "did you mean 'official'"),
        ({"partition": "diric"}, "unknown partition 'diric'"),
    ],
)
def test_a_spec_refuses_values_out_of_bounds(settings, message):
    with pytest.raises(UsageError, match=message) as error:
        RunSpec(**settings)
    assert "\n" not in str(error.value)


def test_a_run_refuses_unknown_methods_and_hyperparameters_and_models():
    with pytest.raises(UsageError, match="did you mean 'fedrep'"):
        toy.run("fedrap")
    with pytest.raises(UsageError, match="did you mean 'align_lr'"):
        toy.run("fedas", {"aligns_lr": 0.1})
    with pytest.raises(UsageError, match=r"align_lr: -1.0 is out of bounds"):
        toy.run("fedas", {"align_lr": -1})
    with pytest.raises(UsageError, match="unknown model"):
        pflbench.run(toy.spec("fedas", model="mpl"), toy.federation())
    with pytest.raises(UsageError, match="unknown setting 'learning_rate'"):
        RunSpec.from_dict({"learning_rate": 0.1})


def test_settings_that_the_partition_does_not_use_are_refused():
    for settings in ({"partition": "iid", "alpha": 0.1}, {"classes_per_client": 2}, {"model": "mlp", "norm": "batch"}):
        with pytest.raises(UsageError, match="leave it out"):
            RunSpec(**settings).normalised()


def _id(**settings):
    return pflbench.prepare(RunSpec(**{"dataset": "synthetic10", **settings}), download=False).id


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({}, {"seed": 0, "init_seed": 0, "partition_seed": 0, "sampling_seed": 0, "order_seed": 0}),
        ({"seed": 3}, {"seed": 3, "init_seed": 3}),
        ({}, {"alpha": 0.1, "balanced": False}),
        ({"partition": "iid"}, {"partition": "iid", "balanced": True}),
        ({"partition": "pathological"}, {"partition": "pathological", "classes_per_client": 2}),
        ({"model": "resnet18"}, {"model": "resnet18", "norm": "batch"}),
        ({"lr": 1}, {"lr": 1.0}),
        ({"momentum": 0}, {"momentum": 0.0}),
    ],
)
def test_equal_runs_have_equal_ids(a, b):
    assert _id(**a) == _id(**b)


def test_the_partition_follows_alpha_and_its_seed():
    made = [
        pflbench.prepare(
            RunSpec(dataset="synthetic10", clients=5, join_ratio=1.0, alpha=a, partition_seed=s)
        ).federation
        for a, s in ((0.1, 0), (0.3, 0), (0.1, 1))
    ]
    assert len({federation.fingerprints["partition"] for federation in made}) == 3
    assert len({federation.fingerprints["data"] for federation in made}) == 1


def test_iid_has_no_alpha():
    assert RunSpec(partition="iid").normalised().alpha is None
    assert RunSpec().normalised().alpha == 0.1


def test_different_settings_have_different_ids():
    others = {
        "algo": "fedper", "hyperparameters": {"align_lr": 0.5}, "dataset": "fashion-mnist", "split": "official",
        "partition": "iid", "alpha": 0.2, "balanced": True, "min_samples": 41, "clients": 21, "model": "mlp",
        "join_ratio": 0.2, "rounds": 41, "local_epochs": 6, "batch_size": 17, "lr": 0.006, "momentum": 0.1,
        "weight_decay": 0.1, "lr_decay": 0.9, "shuffle": False, "drop_last": True, "eval_every": 2, "seed": 1,
        "partition_seed": 1, "init_seed": 1, "sampling_seed": 1, "order_seed": 1, "precision": "bf16",
        "tested": "both",
    }  # fmt: skip
    missing = {f.name for f in dataclasses.fields(RunSpec)} - others.keys()
    assert missing == {"classes_per_client", "norm"}  # of other partitions and models
    ids = [_id()] + [_id(**{name: value}) for name, value in others.items()]
    ids += [_id(partition="pathological", classes_per_client=3), _id(partition="pathological")]
    ids += [_id(model="resnet18", norm="group"), _id(model="resnet18")]
    assert len(set(ids)) == len(ids)


def test_a_resolved_spec_has_every_hyperparameter_and_names_data_and_network():
    record = toy.run("fedas")
    assert record.spec.hyperparameters == {
        "alignment": "own-copy", "weighting": "fisher", "align_lr": 0.01, "align_epochs": 1, "align_batch_size": 16,
    }  # fmt: skip
    assert record.spec.dataset == "arrays@" + record.fingerprints["data"][:12]
    assert record.spec.model.startswith("Net@")
    assert RunSpec.from_dict(json.loads(json.dumps(record.spec.to_dict()))) == record.spec


def test_spelled_out_defaults_of_a_method_do_not_change_the_id():
    federation, net = toy.federation(), toy.net()
    a = pflbench.prepare(toy.spec("fedas"), federation, net)
    b = pflbench.prepare(toy.spec("fedas", {"align_lr": 0.01, "alignment": "own-copy"}), federation, net)
    assert a.id == b.id == pflbench.prepare(a.spec, federation, net).id


def test_other_samples_classes_parameters_or_layers_have_another_id():
    spec = toy.spec("fedavg")
    arrays = oracle.arrays()

    def given(federation=None, net=None):
        return pflbench.prepare(spec, federation or Federation.from_arrays(arrays), net or toy.net()).id

    ids = {
        "as it is": given(),
        "samples": given(Federation.from_arrays(oracle.arrays(seed=1))),
        "parameters": given(net=toy.net(seed=1)),
        "layers": given(net=toy.net(act=nn.ReLU)),
    }
    assert len(set(ids.values())) == len(ids), ids

    mlp = toy.spec("fedavg", model="mlp")
    three, five = (pflbench.prepare(mlp, Federation.from_arrays(arrays, classes=n)).id for n in (3, 5))
    assert three != five  # the head has another size


# Client sampling.


@pytest.mark.parametrize(
    ("ratio", "clients", "count"), [(0.1, 20, 2), (1.0, 7, 7), (0.5, 4, 2), (0.3, 10, 3), (0.01, 100, 1)]
)
def test_as_many_take_part_as_the_ratio_says(ratio, clients, count):
    spec = RunSpec(join_ratio=ratio, clients=clients)
    for r in range(1, 6):
        chosen = pflbench.participants(spec, r)
        assert len(chosen) == len(set(chosen)) == count == spec.joining
        assert chosen == sorted(chosen)
        assert set(chosen) <= set(range(clients))


def test_who_takes_part_depends_on_the_sampling_seed_and_the_round_alone():
    def rounds(**settings):
        return [pflbench.participants(RunSpec(**settings), r) for r in range(1, 9)]

    default = rounds()
    assert len({tuple(c) for c in default}) > 4
    assert rounds(sampling_seed=1) != default
    assert rounds(seed=1) == rounds(sampling_seed=1) == rounds(seed=9, sampling_seed=1)
    others = {"init_seed": 5, "order_seed": 5, "partition_seed": 5, "algo": "local", "lr": 1.0, "rounds": 9}
    assert [name for name, value in others.items() if rounds(**{name: value}) != default] == []


def test_everybody_has_his_turn():
    spec = RunSpec(clients=10, join_ratio=0.2)
    counts = np.bincount([c for r in range(1, 501) for c in pflbench.participants(spec, r)], minlength=10)
    assert counts.sum() == 1000
    assert counts.min() > 70  # 100 expected, standard deviation 9


# Numbers over clients.


def test_the_summary_of_twelve_clients_is_what_pencil_and_paper_give():
    right = [1, 3, 5, 5, 5, 5, 5, 5, 5, 5, 5, 40]
    scores = [Score(i, 10, k, 2.0 * i, k // 2, k - 1, MODELS) for i, k in enumerate(right[:-1])] + [
        Score(11, 50, 40, 7.0, 30, 39, MODELS)
    ]
    found = summary(scores)
    each = [0.1, 0.3] + [0.5] * 9 + [0.8]
    mean = 5.7 / 12
    assert found["accuracy"] == pytest.approx((49 + 40) / 160)
    assert found["accuracy_mean"] == pytest.approx(mean)
    assert found["accuracy_std"] == pytest.approx((sum((a - mean) ** 2 for a in each) / 12) ** 0.5)
    assert found["accuracy_worst10"] == pytest.approx(0.2)  # two of twelve
    assert found["global_accuracy"] == pytest.approx((0 + 1 + 9 * 2 + 30) / 160)
    assert found["test_loss"] == pytest.approx((2 * 55 + 7) / 160)
    own = [0.0, 0.2] + [0.4] * 9 + [0.78]
    assert found["own_accuracy"] == pytest.approx((49 - 11 + 39) / 160)
    assert found["own_accuracy_mean"] == pytest.approx(sum(own) / 12)
    assert found["own_accuracy_worst10"] == pytest.approx(0.1)
    assert found["own_accuracy_std"] == pytest.approx(float(np.std(own)))


@pytest.mark.parametrize(("clients", "worst"), [(1, 1), (9, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_the_worst_tenth_is_rounded_up(clients, worst):
    scores = [Score(i, 100, i, 0.0, None, None, MODELS) for i in reversed(range(clients))]
    assert summary(scores)["accuracy_worst10"] == pytest.approx(sum(range(worst)) / worst / 100)
    assert summary(scores)["global_accuracy"] is None


def test_the_headline_is_the_last_round_and_the_mean_of_the_last_five_and_best_on_test_is_called_so():
    accuracies = [0.2, 0.9, 0.3, 0.4, 0.5, 0.6, 0.5]
    names = ("accuracy", "accuracy_mean", "accuracy_std", "accuracy_worst10", "global_accuracy")
    even = {"bytes_up": 10, "bytes_down": 20, "seconds": 0.5, "busy_seconds": 0.9}
    odd = {"bytes_up": 1, "bytes_down": 2, "seconds": 0.25, "busy_seconds": 0.1}
    rounds = [{"round": i, **(odd if i % 2 else even)} for i in range(1, 15)]
    evaluations = [
        {"round": 2 * i, "seconds": 0.125, "busy_seconds": 0.2} | {n: a + k / 10 for k, n in enumerate(names)}
        for i, a in enumerate(accuracies, 1)
    ]
    found = Record("id", RunSpec(), rounds=rounds, evaluations=evaluations).summary
    assert found["last"] == {n: pytest.approx(0.5 + k / 10) for k, n in enumerate(names)}
    assert found["last5"] == {n: pytest.approx(2.3 / 5 + k / 10) for k, n in enumerate(names)}
    assert found["best_on_test"] == {"round": 4, "accuracy": 0.9}
    assert (found["rounds"], found["bytes_up"], found["bytes_down"]) == (14, 77, 154)
    assert found["seconds"] == pytest.approx(0.75 * 7)
    assert found["busy_seconds"] == pytest.approx(1.0 * 7)
    assert found["evaluation"] == {"seconds": pytest.approx(0.125 * 7), "busy_seconds": pytest.approx(0.2 * 7)}


def test_best_on_test_is_of_the_deployed_models_and_never_of_the_global_one():
    times = {"seconds": 0.0, "busy_seconds": 0.0}
    own = ("accuracy", "accuracy_mean", "accuracy_std", "accuracy_worst10")
    evaluations = [
        {"round": i, **times, **dict.fromkeys(own, personal), "global_accuracy": whole}
        for i, (personal, whole) in enumerate([(0.5, 0.1), (0.4, 0.9), (0.3, 0.2)], 1)
    ]
    found = Record("id", RunSpec(), evaluations=evaluations).summary
    assert found["best_on_test"] == {"round": 1, "accuracy": 0.5}


def test_the_last_five_are_of_evaluations_and_fewer_when_there_are_fewer():
    record = toy.run("fedavg", rounds=3)
    assert record.summary["last5"]["accuracy"] == pytest.approx(sum(r["accuracy"] for r in record.evaluations) / 3)


# Divergence.


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged_and_keeps_the_last_good_states():
    arrays = oracle.arrays()
    arrays[1] = (arrays[1][0] * float("nan"), *arrays[1][1:])
    settings, chosen = toy.TURNS[1]
    assert chosen == [[0], [1]]
    record = toy.run("fedavg", federation=Federation.from_arrays(arrays), **settings)
    assert record.status == "diverged"
    assert "round 2" in record.reason
    assert "client 1" in record.reason
    assert len(record.rounds) == 1
    x, y, _, _ = arrays[0]
    oracle.close(record.server["model"], oracle.train(toy.initial(), x, y, 2, lr=0.1))


def test_a_last_step_that_leaves_the_finite_numbers_ends_the_run_as_diverged():
    # One batch and one round: the loss was still finite, the parameters are not.
    settings = {"lr": 3e38, "weight_decay": 1e3, "batch_size": 7, "local_epochs": 1, "rounds": 1}
    record = toy.run("fedavg", net=toy.net().float(), **settings)
    assert record.status == "diverged"
    assert record.reason == "round 1: client 0: the parameters (train) are not finite; lower lr"
    assert oracle.same(record.server["model"], {name: t.float() for name, t in toy.initial().items()})


# Records on disk.


def _nested_same(a, b):
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_nested_same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("algo", ["local", "fedavg", "fedper", "fedas", "apfl", "fedfomo"])
def test_a_record_on_disk_equals_the_one_in_memory(tmp_path, algo):
    federation = toy.federation((7, 4, 5, 6))
    spec = toy.spec(algo, eval_every=2, clients=4, join_ratio=0.25, sampling_seed=1)
    record = pflbench.run(spec, federation, toy.net(), executor="serial", out=tmp_path)
    assert len({c for r in record.rounds for c in r["participants"]}) <= 2  # so two clients have the initial state
    assert record.path == tmp_path / record.id
    read = Record.load(record.path)
    for name in (
        "spec",
        "status",
        "reason",
        "rounds",
        "evaluations",
        "clients",
        "samples",
        "fingerprints",
        "versions",
        "machine",
        "path",
        "summary",
    ):
        assert getattr(read, name) == getattr(record, name), name
    read.load_states()
    assert _nested_same(read.server, record.server)
    assert read.client_states.keys() == record.client_states.keys()
    assert all(_nested_same(read.client_states[i], record.client_states[i]) for i in range(4))


def test_running_again_returns_the_record_without_computing_and_force_computes(tmp_path):
    computed = []

    class Count(pflbench.Observer):
        def round(self, row):
            computed.append(row)

    def run(**kw):
        spec = toy.spec("fedper", shuffle=True)
        return pflbench.run(
            spec, toy.federation(), toy.net(), executor="serial", out=tmp_path, observers=[Count()], **kw
        )

    first = run()
    assert len(computed) == 2
    again = run()
    assert len(computed) == 2
    assert again.rounds == first.rounds
    forced = run(force=True)
    assert len(computed) == 4
    assert forced.fingerprints == first.fingerprints
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == [first.id]


def test_the_executor_and_the_folder_are_not_in_the_id(tmp_path):
    ids = {
        pflbench.run(
            toy.spec("local"), toy.federation(), toy.net(), out=tmp_path / executor, executor=executor, workers=2
        ).id
        for executor in ("serial", "processes")
    }
    assert len(ids) == 1


def test_what_an_interrupted_run_left_is_replaced(tmp_path):
    def run(*observers):
        spec = toy.spec("fedavg")
        return pflbench.run(spec, toy.federation(), toy.net(), executor="serial", out=tmp_path, observers=observers)

    with pytest.raises(KeyboardInterrupt):
        run(toy.Stop(1))
    assert [p for p in tmp_path.iterdir() if p.suffix == "" and not p.name.startswith(".")] == []
    record = run()
    assert [r["round"] for r in Record.load(record.path).rounds] == [1, 2]
    assert list(tmp_path.glob("*.partial")) == []


def test_nothing_is_written_when_the_run_is_refused(tmp_path):
    with pytest.raises(UsageError):
        pflbench.run(toy.spec("fedas", {"align_lr": -1.0}), toy.federation(), toy.net(), out=tmp_path / "runs")
    assert list(tmp_path.iterdir()) == []


def test_two_processes_that_start_the_same_run_compute_it_once(tmp_path):
    script = tmp_path / "twice.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, time
            import torch
            import pflbench

            x, y = torch.arange(18.0).reshape(6, 3), torch.arange(6) % 2
            torch.manual_seed(0)
            net = pflbench.Net(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
            federation = pflbench.Federation.from_arrays([(x, y, x, y)] * 2)
            rows = []

            class Slow(pflbench.Observer):
                def round(self, row):
                    rows.append(row)
                    time.sleep(0.3)

            print("ready", flush=True)
            sys.stdin.readline()
            spec = pflbench.RunSpec(algo="fedper", join_ratio=1.0, rounds=5, lr=0.001)
            try:
                record = pflbench.run(spec, federation, net, executor="serial", out=sys.argv[1], observers=[Slow()])
                print("done", len(rows), record.id)
            except pflbench.RunError as error:
                print("refused", len(rows), error)
            """
        )
    )
    out = tmp_path / "runs"
    command = [sys.executable, str(script), str(out)]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert [p.stdout.readline() for p in both] == ["ready\n"] * 2
        for p in both:
            p.stdin.write("go\n")
            p.stdin.flush()
        lines = [p.communicate(timeout=60)[0] for p in both]
    finally:
        for p in both:
            p.kill()
            p.wait()
    assert all(p.returncode == 0 for p in both)
    words = sorted(line.split(maxsplit=2) for line in lines)
    assert sorted(w[1] for w in words) == ["0", "5"]  # rounds computed
    assert words[0][0] == "done"
    for word, _, text in words:
        assert word == "done" or "another process" in text
        assert text.count("\n") == 1
    (path,) = [p for p in out.iterdir() if not p.name.startswith(".")]
    record = Record.load(path)
    assert record.status == "finished"
    assert [r["round"] for r in record.rounds] == [1, 2, 3, 4, 5]
    assert len(record.clients) == 10


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"workers": -1}, {"executor": "threads"}])
def test_an_experiment_is_not_computed_in_a_way_that_does_not_exist(wrong):
    experiment = pflbench.prepare(toy.spec("fedavg"), toy.federation(), toy.net())
    with pytest.raises(UsageError):
        pflbench.run_experiment(experiment, execution=pflbench.Execution(**wrong))
    with pytest.raises(UsageError, match="checkpoint_every: 0 is out of bounds"):
        Folder(Path(), checkpoint_every=0)
