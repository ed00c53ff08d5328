"""The round loop."""

import contextlib
import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from pflbench.core import params, registry
from pflbench.core.algorithm import Algorithm, Message, State
from pflbench.core.models import Net, build_model
from pflbench.engine import evaluation
from pflbench.engine.cores import cores
from pflbench.engine.executors import EXECUTORS, Executor, Task, Trained, Work, one_thread
from pflbench.errors import Diverged, UsageError, unknown
from pflbench.federation import Federation
from pflbench.rng import rng
from pflbench.spec import RunSpec
from pflbench.store.checkpoint import ClientStates
from pflbench.store.record import Record, Writer, check_out, machine, outdated, source_fingerprint, versions

Row = dict[str, Any]
OnRound = Callable[[Row], None]
T = TypeVar("T")


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
    algorithm = registry.algorithm(spec.algo)(**spec.hyperparameters)
    if folder is not None and _shows_record(folder, spec, force=force, resume=resume):
        return _record(folder / spec.id, algorithm, notice)
    workers = 1 if executor == "serial" else min(workers or cores(), spec.clients)
    federation = federation or load_federation(spec, data_dir)
    if model is None:
        init = spec.seed_of("init")
        net = build_model(spec.model, federation.shape, federation.classes, seed=init, norm=spec.norm)
    else:
        net = copy.deepcopy(model)
    initial = params.read(net)
    if spec.precision == "bf16":
        if others := {str(t.dtype) for t in initial.values()} - {"torch.float32"}:
            raise UsageError(f"precision: bf16 needs a float32 network; this one has {', '.join(sorted(others))}")
        onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        if not (onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            notice("this processor has no bf16 instructions: bf16 will take several times as long as fp32")
    record = Record(spec, versions=versions(), machine=machine(executor, workers))
    record.fingerprints = {
        **federation.fingerprints,
        "initial": params.fingerprint(initial),
        "algorithm": source_fingerprint(algorithm),
    }
    record.samples = federation.counts()
    first = algorithm.init_client(initial)
    record.server = algorithm.init_server(initial)
    if folder is None:
        record.client_states = ClientStates(spec.clients, first, {}, None)
        with one_thread(), EXECUTORS[executor](Work(spec, algorithm, federation, net), workers) as pool:
            on_start(spec)
            _Loop(record, algorithm, pool, on_round, None).run(None)
        return record
    writer = Writer(folder, record, checkpoint_every)
    with writer.locked():
        # Another process may have finished it meanwhile, or one may have been killed when all was written.
        if not force and (writer.publish_complete() or _shows_record(folder, spec, force=force, resume=resume)):
            return _record(folder / spec.id, algorithm, notice)
        kept, untested = writer.start(first, resume=resume and not force, notice=notice)
        record.client_states = ClientStates(spec.clients, first, kept, writer.states)
        work = Work(spec, algorithm, federation, net, writer.states)
        with one_thread(), EXECUTORS[executor](work, workers) as pool:
            on_start(spec)
            untested = _Loop(record, algorithm, pool, on_round, writer).run(untested)
        writer.finish(untested)
    return record


def _shows_record(folder: Path, spec: RunSpec, *, force: bool, resume: bool) -> bool:
    """Return whether the record that is there is the answer: not if a forced run was interrupted and is resumed."""
    interrupted = (folder / f"{spec.id}.partial").exists()
    return not force and (folder / spec.id).exists() and not (resume and interrupted)


def _record(path: Path, algorithm: Algorithm, notice: Callable[[str], None]) -> Record:
    """Read a record; say so if the code of today may give other numbers."""
    record = Record.load(path)
    if what := outdated(record.to_dict(), algorithm):
        notice(f"run {record.id} was made with {what}; --force runs it anew")
    return record


class _Loop:
    """The rounds of one run, in steps.

    In a step the clients of a round train, and all clients are tested with what the round before gave, if an evaluation
    is due: neither needs what comes out of the other, and the short work fills what the long work leaves idle.
    A round's line is therefore complete when the next round has been trained; until then it is `untested`.
    """

    def __init__(
        self, record: Record, algorithm: Algorithm, pool: Executor, on_round: OnRound, writer: Writer | None
    ) -> None:
        self._record = record
        self._algorithm = algorithm
        self._pool = pool
        self._on_round = on_round
        self._writer = writer
        self._last: dict[int, evaluation.Score] = {}

    def run(self, untested: Row | None) -> Row | None:
        """Run what is missing after the rounds in the record and the one that is `untested`.

        Returns the line of the last round if its evaluation diverged; it is no line of the record then, but the final
        states are those that were tested.
        """
        record = self._record
        number = len(record.rounds) + (untested is not None)
        try:
            while untested is not None or number < record.spec.rounds:
                untested = self._step(number, untested)
                number += 1
            record.status = "finished"
        except Diverged as error:
            record.status, record.reason = "diverged", str(error)
        record.fingerprints |= {"metrics": record.metrics_fingerprint(), "states": record.states_fingerprint()}
        return untested if untested is not None and len(record.rounds) < untested["round"] else None

    def _step(self, number: int, untested: Row | None) -> Row | None:
        """Test the clients after round `number` if it is `untested`, and train the next round if there is one.

        Returns the line of the next round if that is untested now.
        """
        began = time.perf_counter()
        record, spec = self._record, self._record.spec
        chosen = participants(spec, number + 1) if number < spec.rounds else []
        tests = [] if untested is None else self._tasks(number, range(spec.clients), record.server, test=True)
        with _round_named(number + 1):
            scores, trained, sent, server = self._compute(tests, number + 1, chosen)
        seconds = time.perf_counter() - began
        busy = sum(result.seconds for result in (*scores, *trained) if not isinstance(result, Exception))
        if untested is not None:
            if not chosen:  # the last evaluation is a step of its own
                untested["seconds"] += seconds
                untested["busy_seconds"] += busy
            self._finish(untested, scores)
        if not chosen:
            return None
        began = time.perf_counter()
        with _round_named(number + 1):
            done = _good(trained)
            record.server = self._algorithm.aggregate(server, [t.up for t in done])
        self._states.kept.update({c: t.state for c, t in zip(chosen, done, strict=True)})
        samples = sum(t.counts.samples for t in done)
        row: Row = {
            "round": number + 1,
            "participants": chosen,
            "train_loss": sum(t.counts.loss_sum for t in done) / samples if samples else None,
            "bytes_up": sum(t.up.nbytes for t in done),
            "bytes_down": sent,
            "steps": sum(t.counts.steps for t in done),
            "forward": sum(t.counts.forward for t in done),
            "backward": sum(t.counts.backward for t in done),
            "seconds": seconds + time.perf_counter() - began,
            "busy_seconds": busy,
        }
        due = row["round"] % spec.eval_every == 0 or row["round"] == spec.rounds
        if not due:
            self._finish(row, None)
            return None
        if self._writer is not None:
            self._writer.checkpoint(row["round"], row)
        return row

    def _compute(
        self, tests: list[Task], number: int, chosen: list[int]
    ) -> tuple[list[evaluation.Score | Exception], list[Trained | Exception], int, State]:
        """Compute `tests`, and train the `chosen` in round `number`.

        Returns what the former and the latter gave, the bytes sent to the latter, and the server's state: another one
        if it was relayed.
        """
        server = self._record.server
        sequential = self._algorithm.sequential
        scores: list[evaluation.Score | Exception] = []
        trained: list[Trained | Exception] = []
        sent = 0
        for group in [[c] for c in chosen] if sequential and chosen else [chosen]:
            tasks = self._tasks(number, group, server, test=False)
            sent += sum(task.down.nbytes for task in tasks)
            results = self._pool.map([*tests, *tasks])
            scores += results[: len(tests)]
            trained += results[len(tests) :]
            tests = []
            if sequential and trained:
                if isinstance(trained[-1], Exception):
                    break
                server = self._algorithm.relay(server, trained[-1].up)
        return scores, trained, sent, server

    def _tasks(self, number: int, clients: Iterable[int], server: State, *, test: bool) -> list[Task]:
        last = self._last if test else {}
        stored = self._states.stored

        def down(client: int) -> Message:
            alone = test and self._algorithm.tested_alone
            return Message({}) if alone else self._algorithm.broadcast(server, client)

        return [Task(test, number, c, down(c), stored(c), last.get(c)) for c in clients]

    def _finish(self, row: Row, scores: list[evaluation.Score | Exception] | None) -> None:
        """Record a round's line and its evaluation, if any."""
        tested: list[Row] = []
        if scores is not None:
            with _round_named(row["round"]):
                good = _good(scores)
                row |= evaluation.summary(good)
            tested = [{"round": row["round"], **evaluation.accuracies(score)} for score in good]
            self._last = {score.client: score for score in good}
        row |= {name: round(row[name], 3) for name in ("seconds", "busy_seconds")}
        self._record.rounds.append(row)
        self._record.clients.extend(tested)
        if self._writer is not None:
            self._writer.add_round(row, tested)
            if scores is None:
                self._writer.checkpoint(row["round"], None)
        self._on_round(row)

    @property
    def _states(self) -> ClientStates:
        assert isinstance(self._record.client_states, ClientStates)  # noqa: S101
        return self._record.client_states


def _good(results: list[T | Exception]) -> list[T]:
    """Return `results`; raise the first that is an exception, in the order of tasks and not of time."""
    good = []
    for result in results:
        if isinstance(result, Exception):
            raise result
        good.append(result)
    return good


@contextlib.contextmanager
def _round_named(number: int) -> Iterator[None]:
    """Name the round in a divergence."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"round {number}: {error}") from None


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
    from pflbench.datasets.partitioners import make

    data = datasets.load(spec.dataset, _data_dir(data_dir))
    parts = make(data.labels, data.n_train, len(data.classes), **spec.partition_settings())
    return Federation.from_dataset(data, parts)


def _data_dir(given: Path | str | None) -> Path:
    from pflbench import datasets

    return datasets.default_data_dir() if given is None else Path(given)
