import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import toy
from facts import BODY, HEAD, Facts

import pflbench
from pflbench import Message, UsageError
from pflbench.core import Round, registry
from pflbench.rng import rng

FACTS = Facts(
    # With more models it depends on who took part before: the tests below.
    bytes={"models=1": (BODY + HEAD, 0)},
    samples=9,
    sensitive=({"models": 2, "epsilon": 0.9, "epsilon_decay": 0.1}, (24, 40, 18, 12), 5),
    draws=True,
    alone=True,  # its broadcast is costly, and no test reads it
)

HYPER = {"models": 3, "epsilon": 0.6, "epsilon_decay": 0.2, "validation": 0.3}


# The oracle, from the paper's equations and the authors' code.


def split(i, n, share, seed=0):
    """The numbers of the samples for validation, and of those for training."""
    order = rng(seed, "parts", "validation", i).permutation(n)
    cut = math.ceil(share * n)
    return sorted(order[:cut].tolist()), sorted(order[cut:].tolist())


def weights(theta, models, x, y):
    """w_n = (L(theta) - L(theta_n)) / ||theta_n - theta||; 0 for theta itself."""
    found = {}
    for n, model in models.items():
        norm = torch.cat([(model[k] - theta[k]).flatten() for k in theta]).norm()
        found[n] = float((oracle.nll(theta, x, y) - oracle.nll(model, x, y)) / norm) if norm > 0 else 0.0
    return found


def step(theta, models, w):
    """Theta + sum_n w*_n (theta_n - theta)."""
    positive = {n: max(v, 0.0) for n, v in w.items()}
    if (total := sum(positive.values())) == 0:
        return theta
    return {k: theta[k] + sum(positive[n] / total * (models[n][k] - theta[k]) for n in models) for k in theta}


def coins(i, number, models, seed=0):
    """What the server draws for client i in a round."""
    return rng(seed, "server", number, "models", i).rand(models - 1, 2).tolist()


def choose(candidates, row, draws, epsilon):
    """Epsilon-greedy: the best that is left, equals by lot; or, with probability epsilon, any that is left."""
    chosen, left = [], list(candidates)
    for coin, lot in draws:
        if not left:
            break
        best = max(row.get(n, 0.0) for n in left)
        pool = left if coin < epsilon else [n for n in left if row.get(n, 0.0) == best]
        chosen.append(pool[int(lot * len(pool))])
        left.remove(chosen[-1])
    return chosen


def fedfomo(data, chosen, h, *, lr_decay=1.0, **sgd):
    theta, model = [toy.initial()] * len(data), [toy.initial()] * len(data)
    rows = [{} for _ in data]
    uploaded, tested, sent = {}, [], []
    for r, taking_part in enumerate(chosen):
        epsilon = h["epsilon"] - h["epsilon_decay"] * r
        before = dict(uploaded)
        sent.append({})
        for i in taking_part:
            x, y, _, _ = data[i]
            held, rest = split(i, len(y), h["validation"])
            candidates = [n for n in before if n != i] if i in before else []
            others = choose(candidates, rows[i], coins(i, r + 1, h["models"]), epsilon)
            models = {i: model[i]} | {n: before[n] for n in others}
            w = weights(theta[i], models, x[held], y[held])
            theta[i] = step(theta[i], models, w)
            model[i] = oracle.train(theta[i], x[rest], y[rest], 2, lr=0.1 * lr_decay**r, **sgd)
            rows[i] = rows[i] | {n: rows[i].get(n, 0.0) + w[n] for n in others}
            uploaded[i] = model[i]
            sent[-1][i] = others
        tested.append(list(model))
    return theta, model, rows, tested, sent


def check(record, expected):
    theta, model, rows, _, sent = expected
    for i, state in record.client_states.items():
        assert state.keys() == {"start", "model", "affinity"}
        oracle.close(state["start"], theta[i])
        oracle.close(state["model"], model[i])
        assert state["affinity"] == pytest.approx(rows[i], abs=1e-9)
    size = 8 * 24
    assert [row["bytes_down"] for row in record.rounds] == [size * sum(map(len, s.values())) for s in sent]
    clients = {i for s in sent for i in s}
    assert record.server.keys() == {"models", "affinity"}
    assert record.server["models"].keys() == record.server["affinity"].keys() == clients
    for i in clients:
        oracle.close(record.server["models"][i], model[i])
        assert record.server["affinity"][i] == record.client_states[i]["affinity"]
    assert all(row["global_accuracy"] is None for row in record.evaluations)


def test_two_rounds(turns):
    settings, chosen = turns
    record = toy.run("fedfomo", HYPER, **settings, **toy.FULL)
    expected = fedfomo(oracle.arrays(), chosen, HYPER, lr_decay=0.5, momentum=0.5, weight_decay=0.02)
    check(record, expected)
    toy.check_tested(record, expected[3])


@pytest.mark.parametrize("seed", range(3))
def test_six_rounds_of_five_clients_of_whom_three_or_more_take_part(seed):
    sizes = (9, 8, 7, 12, 10)
    settings = {"join_ratio": 0.8, "rounds": 6, "sampling_seed": seed}
    spec = toy.spec("fedfomo", clients=5, **settings)
    chosen = [pflbench.participants(spec, r) for r in range(1, 7)]
    record = toy.run("fedfomo", HYPER, federation=toy.federation(sizes), **settings)
    expected = fedfomo(oracle.arrays(sizes), chosen, HYPER)
    check(record, expected)
    assert {len(n) for s in expected[4] for n in s.values()} == {0, 2}
    assert any(w < 0 for row in expected[2] for w in row.values())  # P keeps what the mixture leaves out
    assert any(w > 0 for row in expected[2] for w in row.values())


# The client's mixture.


def moved(by):
    return {k: p + by for k, p in toy.initial().items()}


def update(state, models):
    """The upload and the new state of client 0 when it is sent `models` by client."""
    x, y, _, _ = oracle.arrays((30, 30))[0]
    return registry.algorithm("fedfomo")(**HYPER).local_update(toy.client(x, y), Message({"models": models}), state)


def better(steps):
    """A model that is better than the initial one on client 0's samples."""
    x, y, _, _ = oracle.arrays((30, 30))[0]
    return oracle.train(toy.initial(), x, y, steps, lr=0.3)


def test_a_model_that_is_worse_has_no_part_in_the_mixture_and_a_negative_affinity():
    own = {"start": toy.initial(), "model": better(2), "affinity": {}}
    bad = {k: -3 * p for k, p in better(9).items()}
    alone = update(own, {})[1]
    upload, state = update(own, {1: bad})
    assert oracle.same(state["start"], alone["start"])
    assert oracle.same(state["start"], own["model"])
    assert upload["affinity"][1] < 0


def test_a_model_that_is_better_is_mixed_in_by_its_weight():
    x, y, _, _ = oracle.arrays((30, 30))[0]
    held, _ = split(0, 30, 0.3)
    own = {"start": toy.initial(), "model": better(1), "affinity": {1: 0.5}}
    good = better(9)
    upload, state = update(own, {1: good})
    w = weights(toy.initial(), {0: own["model"], 1: good}, x[held], y[held])
    assert min(w.values()) > 0
    oracle.close(state["start"], step(toy.initial(), {0: own["model"], 1: good}, w))
    assert upload["affinity"][1] == pytest.approx(0.5 + w[1], abs=1e-9)


def test_running_statistics_are_no_part_of_the_distance():
    net = toy.net(norm=True)
    model = toy.initial(net)
    far = {k: t + 100 * k.endswith("running_mean") for k, t in model.items()}
    x, y, _, _ = oracle.arrays((30, 30))[0]
    state = {"start": far, "model": model, "affinity": {}}
    client = toy.client(x, y, net=net)
    upload, _ = registry.algorithm("fedfomo")(**HYPER).local_update(client, Message({"models": {1: model}}), state)
    assert upload["affinity"][1] == 0.0  # the same parameters


def test_if_no_model_is_better_than_the_start_training_begins_there_again():
    bad = {k: -3 * p for k, p in better(9).items()}
    _, state = update({"start": better(9), "model": bad, "affinity": {}}, {1: bad})
    assert oracle.same(state["start"], better(9))


def test_a_model_equal_to_the_start_has_weight_zero():
    state = {"start": toy.initial(), "model": toy.initial(), "affinity": {}}
    upload, state = update(state, {1: toy.initial()})
    assert upload["affinity"][1] == 0.0
    assert oracle.same(state["start"], toy.initial())


def test_models_are_weighed_by_samples_that_are_not_trained_on_in_any_round():
    x, y, _, _ = oracle.arrays((30, 30))[0]
    held, rest = split(0, 30, 0.3)
    assert (len(held), len(rest)) == (9, 21)
    changed = x.clone()
    changed[held] *= -5
    start, nothing = {"start": toy.initial(), "model": toy.initial(), "affinity": {}}, Message({"models": {}})
    for r in (1, 2):
        client, other = (toy.client(data, y, round=r) for data in (x, changed))
        (_, a), (_, b) = (
            registry.algorithm("fedfomo")(**HYPER).local_update(each, nothing, start) for each in (client, other)
        )
        assert oracle.same(a["model"], b["model"])
        assert client.counts.samples == 2 * 21
    trained = x.clone()
    trained[rest] *= -5
    _, b = registry.algorithm("fedfomo")(**HYPER).local_update(toy.client(trained, y), nothing, start)
    assert not oracle.same(a["model"], b["model"])


def test_a_client_with_one_sample_trains_on_it():
    record = toy.run("fedfomo", federation=toy.federation((7, 1)))
    assert record.status == "finished"
    assert not oracle.same(record.client_states[1]["model"], toy.initial())


# The server's choice.


def server_of(n, row=None):
    """The server's state with a model of each of n clients, and client 0's row of affinities."""
    return {"models": {i: {"w": torch.full((1,), float(i))} for i in range(n)}, "affinity": {0: row or {}}}


@dataclasses.dataclass(frozen=True)
class Drawn(Round):
    """A round in which the server draws what it is told."""

    draws: tuple = ()

    def rng(self, *key):
        assert key == ("models", 0)
        return SimpleNamespace(rand=lambda *shape: np.array(self.draws).reshape(shape))


def sent(server, draws=((0.5, 0.5),), *, number=1, **hyper):
    """The clients whose models are sent to client 0, in a round with these draws."""
    method = registry.algorithm("fedfomo")(models=len(draws) + 1, **hyper)
    message = method.broadcast(Drawn(number, (0,), toy.setup(), tuple(draws)), server, 0)
    assert message.content.keys() == {"models"}
    assert all(model is server["models"][n] for n, model in message["models"].items())
    return list(message["models"])


def test_the_models_of_highest_affinity_are_sent_and_never_the_clients_own():
    row = {1: -1.0, 2: 3.0, 4: 2.0}  # 3 was never sent: 0
    draws = [(0.5, 0.99)] * 6
    assert sent(server_of(5, row), draws, epsilon=0.0) == [2, 4, 3, 1]
    assert sent(server_of(5, row), draws[:2], epsilon=0.0) == [2, 4]


def test_of_equal_affinities_the_lot_decides_and_not_the_number():
    assert [sent(server_of(5), [(0.5, lot)], epsilon=0.0) for lot in (0.0, 0.3, 0.6, 0.99)] == [[1], [2], [3], [4]]


def test_with_probability_epsilon_any_model_that_is_left_is_sent():
    row = {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}
    assert sent(server_of(5, row), [(0.29, 0.99), (0.31, 0.99)], epsilon=0.3) == [4, 1]


@pytest.mark.parametrize(("number", "random"), [(1, True), (2, True), (3, False), (10, False)])
def test_epsilon_falls_with_every_round(number, random):
    server = server_of(3, {1: 9.0, 2: 8.0})
    found = sent(server, [(0.22, 0.99)], number=number, epsilon=0.3, epsilon_decay=0.05)
    assert found == ([2] if random else [1])


def test_a_client_that_has_not_taken_part_is_sent_nothing_and_trains_alone():
    method = registry.algorithm("fedfomo")()
    assert method.broadcast(toy.round(), server_of(3), 7).content == {"models": {}}


def test_client_1_is_sent_the_model_of_client_10():
    server = {"models": {n: {"w": torch.ones(1)} for n in (1, 10)}, "affinity": {}}
    assert list(registry.algorithm("fedfomo")().broadcast(toy.round(), server, 1)["models"]) == [10]


def chosen_for(client, *, number=3, cohort=(0, 1, 2), order_seed=0, clients=12):
    method = registry.algorithm("fedfomo")(models=4, epsilon=1.0, epsilon_decay=0.0)
    server = {"models": {n: {"w": torch.ones(1)} for n in range(12)}, "affinity": {}}
    at = toy.round(number, cohort, order_seed=order_seed, clients=clients)
    return list(method.broadcast(at, server, client)["models"])


def test_the_choice_depends_on_seed_round_and_client_alone():
    usual = chosen_for(0)
    assert len(usual) == 3
    assert chosen_for(0, cohort=(0, 5, 7, 9)) == chosen_for(0, clients=30) == usual
    chosen_for(4)
    assert chosen_for(0) == usual  # what is drawn for another client has no influence
    for changed in ({"order_seed": 1}, {"number": 4}):
        assert chosen_for(0, **changed) != usual
    choices = [tuple(chosen_for(i)) for i in range(12)]
    assert all(i not in choice for i, choice in enumerate(choices))
    assert len(set(choices)) == 12


def test_uploads_are_the_model_and_the_weight_of_each_model_that_was_sent_and_no_random_numbers():
    record = toy.run("fedfomo", {"models": 2}, federation=toy.federation((9, 8)))
    model, weight = 8 * 24, 8
    assert [row["bytes_up"] for row in record.rounds] == [2 * model, 2 * (model + weight)]

    x, y, _, _ = oracle.arrays()[0]
    method = registry.algorithm("fedfomo")()
    state = method.init_client(toy.setup())
    message, new = method.local_update(toy.client(x, y), Message({"models": {1: better(1)}}), state)
    assert message.content.keys() == {"model", "affinity"}
    assert message["affinity"].keys() == {1}
    assert oracle.same(message["model"], new["model"])


def test_not_all_samples_can_be_for_validation():
    with pytest.raises(UsageError, match="validation"):
        registry.algorithm("fedfomo")(validation=1.0)


@pytest.mark.parametrize("models", [1, 2, 5, 50])
def test_fewer_clients_than_models_work_and_bound_what_is_sent(models):
    record = toy.run("fedfomo", {"models": models}, federation=toy.federation((7, 4, 5)), rounds=3)
    assert record.status == "finished"
    assert [row["bytes_down"] for row in record.rounds] == [0] + [8 * 24 * 3 * min(models - 1, 2)] * 2


def test_choices_depend_on_the_seed_and_are_the_same_for_the_same_seed(tmp_path):
    federation = toy.federation((9, 8, 7, 12, 10))

    def run(seed, **how):
        spec = toy.spec("fedfomo", {"models": 2, "epsilon": 1.0}, clients=5, rounds=4, order_seed=seed)
        return pflbench.run(spec, federation, toy.net(), **how)

    plain = run(1, executor="serial")
    assert run(1, executor="processes", workers=2, out=tmp_path).fingerprints == plain.fingerprints
    names = [
        {i: set(s["affinity"]) for i, s in run(seed, executor="serial").client_states.items()} for seed in (1, 2, 3)
    ]
    assert names[0] != names[1] != names[2]


# Identities.


def test_with_no_model_but_its_own_it_is_local_on_the_samples_that_are_left():
    sizes = (60, 48)
    data = oracle.arrays(sizes)
    rests = [split(i, n, 0.2)[1] for i, n in enumerate(sizes)]
    rest = [(x[at], y[at], xt, yt) for (x, y, xt, yt), at in zip(data, rests, strict=True)]
    settings = {"rounds": 3, "shuffle": True, "lr": 0.03}
    a = toy.run("fedfomo", {"models": 1}, federation=toy.federation(sizes), **settings)
    b = toy.run("local", federation=pflbench.Federation.from_arrays(rest, classes=3), **settings)
    for i in range(2):  # each round's training was an improvement, or the client would have begun it again
        assert oracle.same(a.client_states[i]["model"], b.client_states[i]["model"])


def test_a_client_that_never_takes_part_is_evaluated_with_the_initial_model():
    settings, chosen = toy.TURNS[2]
    assert chosen == [[1], [1]]
    record = toy.run("fedfomo", **settings)
    assert oracle.same(record.client_states[0]["model"], toy.initial())


def test_a_client_is_not_influenced_by_models_it_was_not_sent():
    changed = oracle.arrays((9, 8))
    changed[0] = (changed[0][0] * -3, *changed[0][1:])
    changed = pflbench.Federation.from_arrays(changed, classes=3)
    for models, influence in ((1, False), (2, True)):
        runs = [toy.run("fedfomo", {"models": models}, federation=f) for f in (toy.federation((9, 8)), changed)]
        rows = [run.client_states[1]["affinity"] for run in runs]
        assert (rows[0] == rows[1]) != influence
        if not influence:
            assert oracle.same(*(run.client_states[1]["model"] for run in runs))


CHANGES = {"models": 3, "epsilon": 0.0, "epsilon_decay": 0.5, "validation": 0.1}


@pytest.mark.parametrize("name", CHANGES)
def test_every_hyperparameter_changes_the_result(name):
    settings = {"federation": toy.federation((9, 8, 7, 12, 10)), "rounds": 6}
    h = {"models": 2, "epsilon": 0.9, "epsilon_decay": 0.1, "validation": 0.3}
    a, b = (toy.run("fedfomo", g, **settings).evaluations[-1]["test_loss"] for g in (h, {**h, name: CHANGES[name]}))
    assert a != b


def test_the_defaults_are_the_authors():
    method = registry.algorithm("fedfomo")()
    assert (method.models, method.epsilon, method.epsilon_decay, method.validation) == (5, 0.3, 0.05, 0.2)


def test_a_run_that_is_interrupted_and_resumed_gives_the_same_bits(tmp_path):
    spec = toy.spec("fedfomo", HYPER, clients=5, rounds=5, join_ratio=0.67, shuffle=True)
    federation = toy.federation((9, 8, 7, 12, 10))
    plain, resumed = toy.interrupted(spec, federation, tmp_path)
    assert resumed.fingerprints == plain.fingerprints


def test_batch_norm_networks_run_and_mixed_variances_stay_positive():
    net = toy.batch_norm()
    settings = {"net": net, "federation": toy.federation((20, 10, 15)), "batch_size": 4, "rounds": 4}
    record = toy.run("fedfomo", HYPER, drop_last=True, **settings)
    assert record.status == "finished"
    for state in record.client_states.values():
        assert (state["start"]["body.1.running_var"] > 0).all()
        assert not torch.equal(state["start"]["body.1.running_mean"], torch.zeros(3).double())
