"""Run an experiment."""

from collections.abc import Sequence
from pathlib import Path

from pflbench import files
from pflbench.core.models import Net
from pflbench.engine.cores import cores
from pflbench.engine.executors import EXECUTORS
from pflbench.engine.executors.base import one_thread
from pflbench.engine.experiment import Experiment, prepare
from pflbench.engine.observers import Observer, Observers
from pflbench.engine.rounds import Rounds
from pflbench.engine.work import Work
from pflbench.errors import at_least_one, unknown
from pflbench.federation import Federation
from pflbench.spec import RunSpec
from pflbench.store.folder import Folder
from pflbench.store.memory import Memory, Notice, Store
from pflbench.store.provenance import machine, versions
from pflbench.store.record import Record
from pflbench.store.states import check_state


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
    notice: Notice = lambda _: None,
    observers: Sequence[Observer] = (),
) -> Record:
    """Run `spec` and return its record, with the final states of the server and of all clients.

    `federation` replaces the spec's dataset and partition. `model`, a network with `body` and `head`, replaces the
    spec's model, and its parameters are the initial ones; it is not changed. With `out` the record is written to
    `out/<id>`; `pflbench.store.folder.Folder` explains `force`, `resume` and `checkpoint_every`.

    Raises `UsageError`, before anything is written, when the run is not possible; `RunError` when a worker dies or
    another process computes the same run. If a number is not finite, the run ends with status "diverged".
    """
    check_execution(executor, workers, checkpoint_every)
    store: Store = Memory() if out is None else Folder(Path(out), force, resume, checkpoint_every)
    if out is not None:
        files.check_out(Path(out))
    experiment = prepare(spec or RunSpec(), federation, model, data_dir=data_dir, notice=notice)
    return run_experiment(
        experiment, executor=executor, workers=workers, store=store, notice=notice, observers=observers
    )


def run_experiment(
    experiment: Experiment,
    *,
    executor: str = "processes",
    workers: int | None = None,
    store: Store | None = None,
    notice: Notice = lambda _: None,
    observers: Sequence[Observer] = (),
) -> Record:
    """Compute the rounds of an experiment that `store` lacks, and return its record. `notice` gets remarks to show."""
    check_execution(executor, workers)
    store = store or Memory()
    algorithm, spec = experiment.algorithm, experiment.spec
    if found := store.find(experiment.id, algorithm, notice):
        return found
    experiment.check(notice)
    workers = 1 if executor == "serial" else min(workers or cores(), spec.clients)
    record = Record(experiment.id, spec, versions=versions(), machine=machine(executor, workers))
    record.fingerprints = dict(experiment.fingerprints)
    record.samples = experiment.federation.counts()
    record.server = algorithm.init_server(experiment.setup)
    initial = experiment.init_client()
    check_state(record.server, "the server's first state")
    with store.open(record, algorithm, initial, notice) as log:
        if isinstance(log, Record):
            return log
        work, watch = Work(experiment, log.states), Observers(observers)
        with one_thread(), EXECUTORS[executor](work, workers) as pool, watch.watching(experiment):
            Rounds(experiment, record, pool, log, watch).run()
            log.finish()
    return record


def check_execution(executor: str, workers: int | None, checkpoint_every: int = 1) -> None:
    """Raise `UsageError` for an unknown executor, or a number of workers or of rounds below 1."""
    if executor not in EXECUTORS:
        raise unknown("executor", executor, EXECUTORS)
    if workers is not None:
        at_least_one("workers", workers)
    at_least_one("checkpoint_every", checkpoint_every)
