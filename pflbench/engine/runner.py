"""Run an experiment."""

from collections.abc import Sequence
from pathlib import Path

from pflbench import files
from pflbench.core.models import Net
from pflbench.engine import executors
from pflbench.engine.execution import DEFAULT, Execution
from pflbench.engine.executors.base import one_thread
from pflbench.engine.experiment import Experiment, prepare
from pflbench.engine.observers import Observer, Observers
from pflbench.engine.rounds import Rounds
from pflbench.engine.work import Work
from pflbench.errors import at_least_one
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
    device: str = "cpu",
    ray_address: str | None = None,
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
    `out/<id>`; `pflbench.store.folder.Folder` explains `force`, `resume` and `checkpoint_every`,
    `pflbench.engine.execution.Execution` explains `executor`, `workers`, `device` and `ray_address`.

    Raises `UsageError`, before anything is written, when the run is not possible; `RunError` when workers die of one
    job, or another process computes the same run. If a number is not finite, the run ends with status "diverged".
    """
    execution = Execution(executor, workers, device, ray_address)
    execution.check()
    at_least_one("checkpoint_every", checkpoint_every)
    store: Store = Memory() if out is None else Folder(Path(out), force, resume, checkpoint_every)
    if out is not None:
        files.check_out(Path(out))
    experiment = prepare(spec or RunSpec(), federation, model, data_dir=data_dir, notice=notice)
    return run_experiment(experiment, execution=execution, store=store, notice=notice, observers=observers)


def run_experiment(
    experiment: Experiment,
    *,
    execution: Execution = DEFAULT,
    store: Store | None = None,
    notice: Notice = lambda _: None,
    observers: Sequence[Observer] = (),
) -> Record:
    """Compute the rounds of an experiment that `store` lacks, and return its record. `notice` gets remarks to show."""
    execution.check()
    store = store or Memory()
    algorithm, spec = experiment.algorithm, experiment.spec
    if found := store.find(experiment.id, algorithm, notice):
        return found
    experiment.check(notice, device=execution.device)
    record = Record(experiment.id, spec, versions=versions())
    record.fingerprints = dict(experiment.fingerprints)
    record.samples = experiment.federation.counts()
    record.server = algorithm.init_server(experiment.setup)
    initial = experiment.init_client()
    check_state(record.server, "the server's first state")
    with executors.make(experiment, execution, notice) as pool:
        record.machine = machine(execution.executor, pool.describe())
        with store.open(record, algorithm, initial, notice) as log, one_thread():
            if isinstance(log, Record):
                return log
            pool.start(Work(experiment, log.states))
            watch = Observers(observers)
            with watch.watching(experiment):
                Rounds(experiment, record, pool, log, watch).run()
                log.finish()
    return record
