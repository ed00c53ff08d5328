"""Bugs that a review found. Each test failed before its bug was corrected."""

import dataclasses
import json
from pathlib import Path

import oracle
import pytest
import torch
import toy

import pflbench
from pflbench import Federation, Folder, Message, MethodError, UsageError, register
from pflbench.algorithms.fedavg import FedAvg
from pflbench.store.record import Record


def images():
    random = torch.Generator().manual_seed(0)
    clients = []
    for n in (9, 7):
        x, y = torch.randn(n + 6, 3, 16, 16, generator=random), torch.arange(n + 6) % 3
        clients.append((x[:n], y[:n], x[n:], y[n:]))
    return Federation.from_arrays(clients, classes=3)


def test_a_message_with_gradients_of_a_convolution_gives_the_same_bits_in_memory_and_on_disk(methods, tmp_path):
    @register("gradnorm")
    class GradNorm(FedAvg):
        """Sends a gradient, whose numbers lie in another order in memory than in a file."""

        def local_update(self, client, received, state):
            model = client.sgd(received["model"])
            return Message({"model": model, "g": client.grad(model, next(client.batches(stream="g")))}), state

        def aggregate(self, round, server, uploads):
            norm = sum(t.square().sum() for upload in uploads for t in upload["g"].values())
            return {**super().aggregate(round, server, uploads), "norm": norm}

    spec = pflbench.RunSpec(algo="gradnorm", clients=2, rounds=2, join_ratio=1.0, batch_size=4, local_epochs=1)
    memory, disk = (pflbench.run(spec, images(), executor="serial", out=out) for out in (None, tmp_path))
    assert torch.equal(memory.server["norm"], disk.server["norm"])
    assert memory.fingerprints == disk.fingerprints


def test_a_forced_run_that_is_killed_while_it_deletes_a_complete_folder_leaves_no_complete_folder(
    tmp_path, monkeypatch
):
    spec = toy.spec("fedavg")
    record = pflbench.run(spec, toy.federation(), toy.net(), executor="serial", out=tmp_path)
    partial = tmp_path / f"{record.id}.partial"
    record.path.rename(partial)

    def killed(path):
        (Path(path) / "clients.parquet").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("pflbench.store.folder.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        pflbench.run(spec, toy.federation(), toy.net(), executor="serial", out=tmp_path, force=True)
    assert not (partial / "run.json").exists()


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"workers": -1}, {"executor": "threads"}])
def test_an_experiment_is_not_computed_in_a_way_that_does_not_exist(wrong):
    experiment = pflbench.prepare(toy.spec("fedavg"), toy.federation(), toy.net())
    with pytest.raises(UsageError):
        pflbench.run_experiment(experiment, **wrong)
    with pytest.raises(UsageError, match="checkpoint_every: 0 is out of bounds"):
        Folder(Path(), checkpoint_every=0)


def test_a_part_for_all_rounds_is_the_same_in_every_exchange():
    x, y, _, _ = oracle.arrays((20,))[0]
    first = toy.client(x, y)
    second = toy.client(x, y)
    second._key = (1, 0, 1)
    a, b = (client.part(0.3, stream="held", every_round=False)[0].y for client in (first, second))
    assert torch.equal(a, b)


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


def test_the_seconds_of_evaluations_of_an_old_record_are_unknown_and_not_0():
    (folder, *_) = sorted((Path(__file__).parent / "data" / "schema1").iterdir())
    assert Record.load(folder).summary["evaluation"] == {"seconds": None, "busy_seconds": None}


def test_the_states_of_a_record_whose_checkpoint_has_two_logs_are_read(tmp_path):
    """So has a record of schema 1."""
    import hashlib

    record = pflbench.run(toy.spec("fedavg"), toy.federation(), toy.net(), executor="serial", out=tmp_path)
    (path,) = (record.path / "checkpoint").glob("*.json")
    content = json.loads(json.loads(path.read_text())["content"])
    del content["logs"]["evaluations.jsonl"]
    text = json.dumps(content)
    path.write_text(json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}))
    loaded = Record.load(record.path)
    loaded.load_states()
    assert oracle.same(loaded.server["model"], record.server["model"])


def test_bfloat16_is_refused_with_every_executor(methods):
    @register("half")
    class Half(FedAvg):
        """Sends bfloat16."""

        def local_update(self, client, received, state):
            return Message({"model": {k: t.bfloat16() for k, t in received["model"].items()}}), state

    for executor in ("serial", "processes"):
        with pytest.raises(MethodError, match=r"the upload of client . has a bfloat16 tensor at 'model/body.0.weight'"):
            toy.run("half", executor=executor)


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
