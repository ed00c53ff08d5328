"""The round loop."""

import copy
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pflbench import evaluate, params, registry
from pflbench.algorithm import Algorithm, State
from pflbench.checkpoint import ClientStates
from pflbench.errors import Diverged, UsageError, unknown
from pflbench.executors import EXECUTORS, Executor, Task, Trained, Work, cores, one_thread
from pflbench.federation import Federation
from pflbench.models import Net, build_model
from pflbench.record import Record, Writer, check_out, machine, source_fingerprint, versions
from pflbench.rng import rng
from pflbench.spec import RunSpec

OnRound = Callable[[dict[str, Any]], None]


def run(
    spec: RunSpec | None = None,
    federation: Federation | None = None,
    model: Net | None = None,
    *,
    executor: str = "processes",
    workers: int | None = None,
    out: Path | str | None = None,
    force: bool = False,
    resume: bool = False,
    checkpoint_every: int = 1,
    data_dir: Path | str | None = None,
    notice: Callable[[str], None] = lambda _: None,
    on_start: Callable[[RunSpec], None] = lambda _: None,
    on_round: OnRound = lambda _: None,
) -> Record:
    """Run `spec` and return its record, with the final states of the server and of all clients.

    `federation` takes the place of the spec's dataset and partition. `model`, a network with `body` and `head`, takes
    the place of the spec's, and its parameters are the initial ones; it is not changed.
    With `out` the record is written to `out/<id>`, and a record that is already there is returned instead (`force`
    runs anew). A checkpoint is written every `checkpoint_every` rounds; `resume` goes on from the newest that an
    interrupted run left.
    `notice` gets remarks for the user, `on_start` the resolved spec, `on_round` each line of rounds.jsonl.

    Raises `UsageError` for what cannot be run, before anything is written; `RunError` when a worker dies or another
    process computes the same run. A run whose numbers are no longer finite ends with status "diverged".
    """
    check_execution(executor, workers, checkpoint_every)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_out(folder)
    spec = resolve(spec or RunSpec(), federation, model, data_dir=data_dir, notice=notice)
    if folder is not None and _shows_record(folder, spec, force=force, resume=resume):
        return Record.load(folder / spec.id)
    workers = 1 if executor == "serial" else min(workers or cores(), spec.clients)
    algorithm = registry.algorithm(spec.algo)(**spec.hyperparameters)
    federation = federation or load_federation(spec, data_dir)
    if model is None:
        init = spec.seed_of("init")
        net = build_model(spec.model, federation.shape, federation.classes, seed=init, norm=spec.norm)
    else:
        net = copy.deepcopy(model)
    record = Record(spec, versions=versions(), machine=machine(executor, workers))
    initial = params.read(net)
    record.fingerprints = {
        **federation.fingerprints,
        "initial": params.fingerprint(initial),
        "algorithm": source_fingerprint(algorithm),
    }
    first = algorithm.init_client(initial)
    record.server = algorithm.init_server(initial)
    if folder is None:
        record.client_states = ClientStates(spec.clients, first, {}, None)
        with one_thread(), EXECUTORS[executor](Work(spec, algorithm, federation, net), workers) as pool:
            on_start(spec)
            _train(record, algorithm, pool, lambda row, _: on_round(row))
        return record
    writer = Writer(folder, record, checkpoint_every)
    with writer.locked():
        # Another process may have finished it meanwhile, or one may have been killed when all was written.
        if not force and (writer.publish_complete() or _shows_record(folder, spec, force=force, resume=resume)):
            return Record.load(folder / spec.id)
        kept = writer.start(first, resume=resume and not force, notice=notice)
        record.client_states = ClientStates(spec.clients, first, kept, writer.states)
        work = Work(spec, algorithm, federation, net, writer.states)
        with one_thread(), EXECUTORS[executor](work, workers) as pool:
            on_start(spec)

            def each(row: dict[str, Any], tested: list[dict[str, Any]]) -> None:
                writer.add_round(row, tested)
                on_round(row)

            _train(record, algorithm, pool, each)
        writer.finish()
    return record


def _shows_record(folder: Path, spec: RunSpec, *, force: bool, resume: bool) -> bool:
    """Return whether the record that is there is the answer: not if a forced run was interrupted and is resumed."""
    interrupted = (folder / f"{spec.id}.partial").exists()
    return not force and (folder / spec.id).exists() and not (resume and interrupted)


def _train(
    record: Record,
    algorithm: Algorithm,
    pool: Executor,
    each: Callable[[dict[str, Any], list[dict[str, Any]]], None],
) -> None:
    """Run the rounds that are missing into `record`; `each` gets a round's line and those of the tested clients."""
    assert isinstance(record.client_states, ClientStates)  # noqa: S101
    number = len(record.rounds)
    last: dict[int, evaluate.Score] = {}
    try:
        while number < record.spec.rounds:
            number += 1
            before = record.server, dict(record.client_states.kept)
            row, tested = _round(record, algorithm, pool, number, last)
            record.rounds.append(row)
            record.clients.extend(tested)
            each(row, tested)
        record.status = "finished"
    except Diverged as error:
        record.status, record.reason = "diverged", f"round {number}: {error}"
        record.server, kept = before
        record.client_states.kept.clear()
        record.client_states.kept.update(kept)
    record.fingerprints |= {"metrics": record.metrics_fingerprint(), "states": record.states_fingerprint()}


def _round(
    record: Record, algorithm: Algorithm, pool: Executor, number: int, last: dict[int, evaluate.Score]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run one round; return its line for rounds.jsonl and, when it ends with an evaluation, those of clients.parquet.

    `last` has the clients' scores of the last evaluation, and gets those of this one.
    """
    began = time.perf_counter()
    spec, server, states = record.spec, record.server, record.client_states
    assert isinstance(states, ClientStates)  # noqa: S101
    chosen = participants(spec, number)

    def tasks(clients: Iterable[int], server: State, *, test: bool) -> list[Task]:
        return [Task(test, number, c, algorithm.broadcast(server, c), states.stored(c), last.get(c)) for c in clients]

    trained: list[Trained] = []
    sent = 0
    for group in [[c] for c in chosen] if algorithm.sequential else [chosen]:
        work = tasks(group, server, test=False)
        sent += sum(task.down.nbytes for task in work)
        trained += pool.map(work)
        if algorithm.sequential:
            server = algorithm.relay(server, trained[-1].up)
    record.server = algorithm.aggregate(server, [t.up for t in trained])
    states.kept.update({c: t.state for c, t in zip(chosen, trained, strict=True)})
    samples = sum(t.samples for t in trained)
    scores: list[evaluate.Score] = []
    row: dict[str, Any] = {
        "round": number,
        "participants": chosen,
        "train_loss": sum(t.loss_sum for t in trained) / samples if samples else None,
        "bytes_up": sum(t.up.nbytes for t in trained),
        "bytes_down": sent,
        "steps": sum(t.steps for t in trained),
    }
    if number % spec.eval_every == 0 or number == spec.rounds:
        scores = pool.map(tasks(range(spec.clients), record.server, test=True))
        for score in scores:
            if not math.isfinite(score.loss):
                raise Diverged(f"client {score.client}: the loss on the test data is {score.loss}; lower lr")
        row |= evaluate.summary(scores)
        last.update({score.client: score for score in scores})
    tested = [{"round": number, **evaluate.accuracies(score)} for score in scores]
    return {**row, "seconds": round(time.perf_counter() - began, 3)}, tested


def check_execution(executor: str, workers: int | None, checkpoint_every: int = 1) -> None:
    """Raise `UsageError` when there is no such executor, or no such number of workers or of rounds."""
    if executor not in EXECUTORS:
        raise unknown("executor", executor, EXECUTORS)
    if workers is not None and workers < 1:
        raise UsageError(f"workers: {workers} is out of bounds; it must be >= 1")
    if checkpoint_every < 1:
        raise UsageError(f"checkpoint_every: {checkpoint_every} is out of bounds; it must be >= 1")


def participants(spec: RunSpec, round: int) -> list[int]:  # noqa: A002
    """Return the clients that take part in `round` (1, 2, ...), in ascending order."""
    draw = rng(spec.seed_of("sampling"), "sampling", round).permutation(spec.clients)
    return sorted(draw[: spec.joining].tolist())


def resolve(
    spec: RunSpec,
    federation: Federation | None = None,
    model: Net | None = None,
    *,
    data_dir: Path | str | None = None,
    notice: Callable[[str], None] = lambda _: None,
    download: bool = True,
) -> RunSpec:
    """Return `spec` with every default resolved: the dataset that is really used, the hyperparameters, the partition's.

    A given federation or model is named with its fingerprint. Raises `UsageError` for what cannot be run.
    """
    from pflbench import datasets

    changes: dict[str, Any] = {}
    method = registry.algorithm(spec.algo)(**spec.hyperparameters)
    changes["hyperparameters"] = dataclasses.asdict(method.h)
    if federation is not None:
        digest = federation.fingerprints["data"]
        if "partition" in federation.fingerprints:
            digest = hashlib.sha256((digest + federation.fingerprints["partition"]).encode()).hexdigest()
        changes |= {"dataset": f"{federation.name}@{digest[:12]}", "clients": len(federation.clients)}
        changes |= {"partition": "given", "split": "given", "min_samples": 2}
        changes |= {"alpha": None, "classes_per_client": None, "balanced": None}
    elif "given" in (spec.partition, spec.split):
        raise UsageError("partition, split: 'given' is for runs with a federation of one's own, from Python")
    if model is not None:
        digest = hashlib.sha256(f"{model!r} {params.fingerprint(params.read(model))}".encode()).hexdigest()
        changes |= {"model": f"{type(model).__name__}@{digest[:12]}", "norm": None}
    spec = dataclasses.replace(spec, **changes)
    spec = spec.normalised(own_model=model is not None)
    if federation is None:
        name = datasets.resolve(spec.dataset, _data_dir(data_dir), notice=notice, download=download)
        spec = dataclasses.replace(spec, dataset=name)
    return spec


def load_federation(spec: RunSpec, data_dir: Path | str | None = None) -> Federation:
    """Return the clients that the resolved `spec` describes. Raises `UsageError` when the demand is impossible."""
    from pflbench import datasets
    from pflbench.datasets.partition import make

    data = datasets.load(spec.dataset, _data_dir(data_dir))
    parts = make(data.labels, data.n_train, len(data.classes), **spec.partition_settings())
    return Federation.from_dataset(data, parts)


def _data_dir(given: Path | str | None) -> Path:
    from pflbench import datasets

    return datasets.default_data_dir() if given is None else Path(given)
